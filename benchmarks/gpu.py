"""Studies 1, 3 and 4 at real sizes on a GPU, side by side in one run: `python -m benchmarks.gpu`.

Weights are random. A Llama of the shape of Llama-3.1-8B is made on the device itself, in bfloat16, without a
file; study 4 reads a GPT-2 of the shape of GPT-2 small, in float32. Up to four ways take turns:

* ours: the batched sweep or reading of `lib`, without its cache;
* one condition at a time: with what `lib` has for it, a trace (study 1) or a call (study 3) a condition;
* straightforward and floor: as in `benchmarks.induction_sweep`, `refusal_sweep` and `latents_memory`.

The table goes to benchmarks/gpu.md. `--config tiny --device cpu` runs the same code in seconds and prints it.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import induction_sweep, latents_memory, refusal_sweep
from benchmarks.side_by_side import Round, measured, word_tokenizer

OURS, ONE, STRAIGHT, FLOOR = "ours", "one condition at a time", "straightforward", "floor"
REPORT = Path(__file__).with_suffix(".md")

# meta-llama/Llama-3.1-8B's config.json; its answers have no end here.
LLAMA_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "real": {
        "llama": LLAMA_8B,
        "dtype": "bfloat16",
        # 17 conditions: none, six sizes of two lists, four random sets of the largest size.
        "walks": {"n_walks": 16, "length": 1400, "k_values": [1, 2, 4, 8, 16, 32], "n_draws": 4},
        "answers": {
            "k_values": [1, 2, 3, 4, 5], "n_draws": 2, "strengths": [], "from": 0, "n_prompts": 32,
            "prompt_tokens": 64, "new_tokens": 128,
        },
        "codi": {"layers": 12, "heads": 12, "d_model": 768, "words": 50_260, "tokens": 256},
        "n_problems": 64,
    },
    "tiny": {
        "llama": {
            "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "initializer_range": 0.2,
        },
        "dtype": "float32",
        "walks": {"n_walks": 2, "length": 40, "k_values": [1, 2], "n_draws": 2},
        "answers": {
            "k_values": [1, 2], "n_draws": 1, "strengths": [], "from": 0, "n_prompts": 3,
            "prompt_tokens": 8, "new_tokens": 4,
        },
        "codi": {"layers": 2, "tokens": 40},
        "n_problems": 2,
    },
}  # fmt: skip


class Case(NamedTuple):
    """One piece of work and the ways of doing it.

    Attributes:
        title: what it is.
        ways: by name; "ours" comes first, and what it returns is handed to each, {} before it has run.
        agree: (what ours returned, what another way returned) -> how far they agree, a line.
    """

    title: str
    ways: dict[str, Callable[[Any], Any]]
    agree: Callable[[Any, Any], str] | None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=CONFIGS, default="real")
    parser.add_argument("--device", help="cuda by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=0, help="rows a forward in study 1; 0: by memory")
    parser.add_argument(
        "--out", type=Path, help="file of the report; by default benchmarks/gpu.md for `real`"
    )
    options = parser.parse_args(argv)

    import torch

    device = options.device or "cuda"
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            "no CUDA device: torch sees none here. Run it on a machine that has one, with a torch that is "
            "built for CUDA, or try the code alone by --config tiny --device cpu"
        )
    out = options.out or (REPORT if options.config == "real" else None)
    words = ["python -m benchmarks.gpu", *(argv if argv is not None else sys.argv[1:])]
    parts = [header(" ".join(words), device)]
    for case in cases(CONFIGS[options.config], device, options.batch_size):
        measure(case, device)  # loads libraries and kernels
        rounds = [measure(case, device) for _ in range(options.rounds)]
        parts.append(table(case, rounds))
        print(parts[-1], flush=True)
    if out:
        out.write_text("\n".join(parts), encoding="utf-8")


def cases(config: dict[str, Any], device: str, batch_size: int = 0) -> Iterator[Case]:
    """The pieces of work, one after the other: a model goes when the last that needs it is done."""
    model = random_model(config["llama"], device, config["dtype"])
    yield from _study_1(model, config["walks"], batch_size)
    yield _study_3(model, config["answers"])
    del model
    with tempfile.TemporaryDirectory() as folder:
        yield _study_4(Path(folder), config, device)


def random_model(settings: dict[str, Any], device: str, dtype: str):
    """A Llama of random weights that are drawn where they stay, as `lib.models.load` would return it."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lib import models

    torch.manual_seed(0)
    config = LlamaConfig(bos_token_id=1, eos_token_id=None, pad_token_id=0, **settings)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(
            config, dtype=models.float_dtype(dtype), attn_implementation="sdpa"
        )
    return models.adopt(
        module, word_tokenizer(config.vocab_size), model_id="random Llama", device=device, dtype=dtype,
        revision=None, weights_sha256="random, seed 0",
    )  # fmt: skip


def _study_1(model, settings: dict[str, Any], batch_size: int) -> Iterator[Case]:
    from lib import attention, models

    sizes, tokens = models.shape(model), models.plain_token_ids(model)

    def scores() -> attention.HeadScores:
        return attention.head_scores(model, tokens, bos=models.bos_id(model))

    title = f"Study 1, head scores: {sizes.n_layers} x {sizes.n_heads} heads, 32 sequences of 65 tokens"
    yield Case(title, {OURS: lambda _: scores()}, None)

    found = scores()
    ranked = {
        "induction": attention.top_heads(found.induction),
        "previous token": attention.top_heads(found.previous_token),
    }
    # Random weights have no head types: the heads that both lists hold are taken from the second.
    first = set(ranked["induction"][: max(settings["k_values"])])
    ranked["previous token"] = [head for head in ranked["previous token"] if head not in first]
    *task, conditions = induction_sweep.protocol(model, list(range(100, 116)), ranked, **settings)

    yield Case(
        f"Study 1, ablation sweep: {len(conditions)} conditions x {settings['n_walks']} walks x "
        f"{settings['length']} tokens",
        {
            OURS: lambda _: induction_sweep.ours(model, *task, conditions, batch_size),
            ONE: lambda _: _one_condition_at_a_time(model, *task, conditions, batch_size),
            STRAIGHT: lambda _: induction_sweep.straightforward(model, *task, conditions),
            FLOOR: lambda _: induction_sweep.floor(model, *task, conditions, batch_size),
        },
        lambda ours, other: f"mean accuracy differs by {abs(ours - other):.1e}",
    )


def _one_condition_at_a_time(model, ids, walks, graph, word_ids, conditions, batch_size: int) -> float:
    """The sweep of study 1 as a loop over conditions, all walks of each in batches of our size."""
    import numpy as np
    import torch

    from lib import interventions, models
    from lib.batches import Batches, auto_batch_size
    from lib.parameters import InductionAblation
    from lib.walks import rule_following_accuracy

    sizes = models.shape(model)
    layer, words = InductionAblation().read_layer(sizes.n_layers), torch.tensor(word_ids, device=model.device)
    labels, n_classes, accuracies = torch.from_numpy(walks), graph.n_nodes, []
    for condition in conditions:
        mask = torch.zeros(sizes.n_layers, sizes.n_heads, dtype=torch.bool)
        for at in condition.heads:
            mask[at] = True

        def run(rows, mask=mask) -> np.ndarray:
            batch, of = ids[rows].to(model.device), labels[rows]
            with torch.no_grad(), model.trace(batch, use_cache=False) as tracer:
                for index, block in enumerate(model.layers):
                    if index == layer:
                        sums = interventions.class_sums(block.input[:, 1:], of, n_classes).cpu().save()
                    if mask[index].any():
                        interventions.ablate_heads(block, mask[index])
                found = interventions.word_probabilities(model, model.norm.output[:, 1:], words).cpu().save()
                tracer.stop()
            assert sums.isfinite().all()
            return found.numpy()

        batches = Batches(batch_size or auto_batch_size(model, ids.shape[1]))
        probabilities = np.concatenate(list(batches.map(run, torch.arange(len(ids)))))
        accuracies.append(rule_following_accuracy(probabilities, walks, graph).mean())
    return float(np.mean(accuracies))


def _study_3(model, settings: dict[str, Any]) -> Case:
    n = settings["new_tokens"]
    random = refusal_sweep.at_random(model, settings)
    prompts, conditions = refusal_sweep.protocol(model, settings, *random)

    def agree(ours, other) -> str:
        pairs = [pair for found in zip(ours, other, strict=True) for pair in zip(*found, strict=True)]
        return f"{sum(a == b for a, b in pairs)} of {len(pairs)} answers are the same"

    return Case(
        f"Study 3, k-sweep: {len(conditions)} conditions x {len(prompts)} prompts of about "
        f"{settings['prompt_tokens']} tokens, {n} tokens an answer",
        {
            OURS: lambda _: refusal_sweep.ours(model, prompts, conditions, n),
            ONE: lambda _: [refusal_sweep.ours(model, prompts, [c], n)[0] for c in conditions],
            STRAIGHT: lambda _: refusal_sweep.straightforward(model, prompts, conditions, n),
            FLOOR: lambda answers: refusal_sweep.floor(model, prompts, conditions, n, answers),
        },
        agree,
    )


def _study_4(folder: Path, config: dict[str, Any], device: str) -> Case:
    from lib.codi_checkpoint import load_codi

    settings = config["codi"]
    codi = load_codi(str(latents_memory.random_codi(folder, **settings)), device=device)
    task = latents_memory.task(codi, config["n_problems"], settings["tokens"])
    return Case(
        f"Study 4, reading: {config['n_problems']} problems of {settings['tokens']} tokens, "
        f"{settings['layers']} layers",
        {
            OURS: lambda _: latents_memory.ours(codi, *task),
            STRAIGHT: lambda _: latents_memory.straightforward(codi, *task),
            FLOOR: lambda _: latents_memory.floor(codi, *task),
        },
        lambda ours, other: (
            "attention and mass differ by "
            + " and ".join(f"{abs(a - b):.1e}" for a, b in zip(ours, other, strict=True))
        ),
    )


def measure(case: Case, device: str) -> Round:
    """Each way once: seconds, megabytes above the weights, and how far it agrees with ours."""
    found, result = {}, {}
    for name, way in case.ways.items():
        result[name], found[name] = measured(lambda way=way: way(result.get(OURS)), device)
        if case.agree and name in (ONE, STRAIGHT):
            found[name]["agreement"] = case.agree(result[OURS], result[name])
    return found


def header(command: str, device: str) -> str:
    """What the numbers were measured on and how."""
    import nnsight
    import torch
    import transformers

    name, memory = platform.processor() or platform.machine(), "highest resident set of the process"
    if device.startswith("cuda"):
        gpu = torch.cuda.get_device_properties(device)
        name = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        memory = "peak that torch allocates"
    return (
        "# On a GPU\n\n"
        f"Device: {name}. Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, nnsight {nnsight.__version__}. Command: `{command}`.\n\n"
        "Random weights. Medians over rounds, in which the ways take turns, after one that is not counted. "
        f"Memory is the {memory}, above that before the work. The floor is as many bare forwards of the "
        "unablated model in batches, with nothing measured.\n"
    )


def table(case: Case, rounds: list[Round]) -> str:
    """A section in Markdown."""
    lines = [f"## {case.title}\n", "| | seconds | / floor | MB above weights |", "|---|---|---|---|"]

    def median(of: Callable[[Round], float]) -> float:
        return statistics.median(map(of, rounds))

    for name in case.ways:
        seconds = median(lambda r, name=name: r[name]["seconds"])
        memory = median(lambda r, name=name: r[name]["megabytes"])
        ratio = "-"
        if FLOOR in case.ways:
            ratio = f"{median(lambda r, name=name: r[name]['seconds'] / r[FLOOR]['seconds']):.2f}"
        lines.append(f"| {name} | {seconds:.2f} | {ratio} | {memory:.0f} |")
    lines.append("")
    if ONE in case.ways:
        gain = median(lambda r: r[ONE]["seconds"] / r[OURS]["seconds"])
        lines.append(f"Conditions in one batch: {gain:.2f} times as fast as one at a time.")
    for name in (ONE, STRAIGHT):
        if name in case.ways:
            lines.append(f"{name[0].upper()}{name[1:]} against ours: {rounds[-1][name]['agreement']}.")
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    main()
