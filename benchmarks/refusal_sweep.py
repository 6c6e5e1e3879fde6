"""The k-sweep of study 3 three ways, side by side in one run: `python -m benchmarks.refusal_sweep`.

* ours: `lib.generation.generate`, all prompts and conditions in its batches, without its cache;
* straightforward: one condition at a time, plain hooks, transformers' `generate` on all its prompts at once;
* floor: bare forwards of the unablated model that read the same prompts and the same answers, a token at a
  time, with a key-value cache, in batches of our size; nothing is intervened on, chosen or checked.

Every measurement is a process of its own; the three take turns, and the ratio of a round compares runs
that are next to each other in time. Memory is the highest resident set during the work minus the one
before it (weights loaded, a few short answers given).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.induction_sweep import _peak, _reset_peak

METHODS = ("ours", "straightforward", "floor")
# A random model rarely ends an answer: all rows run to the last token. An organism's answers end.
CASES = {
    "random 6-layer Llama, d 128": {
        "n_prompts": 64,
        "new_tokens": 24,
        "k_values": [1, 2, 3, 5],
        "n_draws": 4,
    },
    "organism/refusal-lowrank": {"n_prompts": 64, "new_tokens": 24, "k_values": [1, 2, 3, 5], "n_draws": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "METHOD"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one, Path(arguments.folder), arguments.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for case in _present():
            rounds = []
            for _ in range(arguments.rounds):
                rounds.append({method: _child(case, method, folder, arguments.threads) for method in METHODS})
            report(case, rounds)


def report(case: str, rounds: list[dict[str, dict]]) -> None:
    settings, first = CASES[case], rounds[0]["ours"]
    print(
        f"\n{case}: {first['conditions']} conditions x {settings['n_prompts']} prompts, "
        f"{first['tokens']} tokens of answers"
    )
    print(f"{'':16s}{'seconds':>9s}{'/ floor':>9s}{'/ straightforward':>19s}{'MB above weights':>18s}")
    for method in METHODS:
        seconds, memory = (
            statistics.median(r[method][of] for r in rounds) for of in ("seconds", "megabytes")
        )
        floor, straight = (
            statistics.median(r[method]["seconds"] / r[other]["seconds"] for r in rounds)
            for other in ("floor", "straightforward")
        )
        print(f"{method:16s}{seconds:9.2f}{floor:9.2f}{straight:19.2f}{memory:18.0f}")
    same = [r["ours"]["answers"] == r["straightforward"]["answers"] for r in rounds]
    print(f"answers of ours and straightforward are the same: {'yes' if all(same) else 'NO'}")


def measure(case: str, method: str, folder: Path, threads: int) -> dict:
    """Run one method once in this process: seconds, megabytes above the weights, hash of the answers."""
    import hashlib

    import torch

    torch.set_num_threads(threads)
    model, prompts, conditions = _task(case, folder)
    n = CASES[case]["new_tokens"]
    run, known = {"ours": _ours, "straightforward": _straightforward, "floor": _floor}[method], None
    if method == "floor":  # it reads what the sweep has answered
        known = _ours(model, prompts, conditions, n)
    # Warm up on a few short answers: kernels, allocator, nnsight's own caches.
    run(model, prompts[:2], conditions[:2], 3, *([[answers[:2] for answers in known[:2]]] if known else []))
    before = _reset_peak()
    start = time.perf_counter()
    answers = run(model, prompts, conditions, n, *([known] if known else []))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "megabytes": _peak() - before,
        "answers": hashlib.sha256(json.dumps(answers).encode()).hexdigest(),
        "tokens": sum(len(answer) for found in answers for answer in found),
        "conditions": len(conditions),
    }


def _task(case: str, folder: Path):
    import numpy as np
    import torch

    from lib import models
    from lib.generation import Ablation
    from lib.refusal import random_subspace

    settings = CASES[case]
    model = models.load(case if case.startswith("organism/") else str(_random_llama(folder / "llama")))
    sizes, rng = models.shape(model), np.random.default_rng(0)
    plain = models.plain_token_ids(model)
    lengths = np.sort(rng.integers(12, 20, settings["n_prompts"]))
    prompts = [[models.bos_id(model), *rng.choice(plain, length).tolist()] for length in lengths]
    conditions = [Ablation("intact", torch.zeros(0, sizes.d_model))]
    for seed in range(1 + settings["n_draws"]):  # the subspace, and as many random ones
        conditions += [
            Ablation("subspace", random_subspace(sizes.d_model, k, seed)) for k in settings["k_values"]
        ]
    return model, prompts, conditions


def _ours(model, prompts, conditions, new_tokens) -> list[list[list[int]]]:
    from lib.generation import generate

    return generate(model, prompts, conditions, max_new_tokens=new_tokens)


def _straightforward(model, prompts, conditions, new_tokens) -> list[list[list[int]]]:
    import torch

    from lib.generation import end_tokens

    module, ends = model._module, sorted(end_tokens(model))
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * n + prompt for n, prompt in zip(pads, prompts, strict=True)])
    mask = torch.tensor([[0] * n + [1] * len(prompt) for n, prompt in zip(pads, prompts, strict=True)])
    found = []
    for condition in conditions:
        projection = condition.basis.T @ condition.basis

        def without(x, projection=projection):
            return x - x @ projection

        handles = []
        for block in module.model.layers if len(condition.basis) else []:
            handles.append(
                block.register_forward_pre_hook(lambda _, args, f=without: (f(args[0]), *args[1:]))
            )
            for part in (block.self_attn.o_proj, block.mlp):
                handles.append(part.register_forward_hook(lambda _, __, output, f=without: f(output)))
        with torch.no_grad():
            whole = module.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
                eos_token_id=ends or None, pad_token_id=0,
            )  # fmt: skip
        for handle in handles:
            handle.remove()
        answers = whole[:, longest:].tolist()
        found.append([a[: next((i for i, t in enumerate(a) if t in ends), len(a))] for a in answers])
    return found


def _floor(model, prompts, conditions, new_tokens, known) -> list[list[list[int]]]:
    import torch
    from transformers import DynamicCache

    from lib.generation import auto_rows

    size = auto_rows(model, max(map(len, prompts)) + new_tokens)
    rows = [(prompt, answer) for answers in known for prompt, answer in zip(prompts, answers, strict=True)]
    # Together what is equally long, so that next to nothing is padded; padding is read as any token.
    rows.sort(key=lambda row: (len(row[0]), len(row[1])))
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        longest = [max(len(row[i]) for row in batch) for i in (0, 1)]
        ids = torch.tensor(
            [[0] * (longest[0] - len(p)) + p + a + [0] * (longest[1] - len(a)) for p, a in batch]
        )
        cache = DynamicCache(config=model._module.config)
        with torch.no_grad():
            model._module(ids[:, : longest[0]], past_key_values=cache, logits_to_keep=1)
            # What ends an answer is not read, but was chosen: an answer cut at the last token has one less.
            for step in range(longest[0], ids.shape[1] - (longest[1] == new_tokens)):
                model._module(ids[:, step : step + 1], past_key_values=cache, logits_to_keep=1)
    return known


def _present() -> list[str]:
    from lib.models import organisms

    return [case for case in CASES if not case.startswith("organism/") or case in organisms()]


def _random_llama(folder: Path) -> Path:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512, hidden_size=128, intermediate_size=344, num_hidden_layers=6,
            num_attention_heads=4, max_position_embeddings=128, bos_token_id=1, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # answers that depend on the prompt and the condition
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        vocabulary = {f"w{i}": i for i in range(512)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
        made = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="w0", pad_token="w0", bos_token="w1"
        )
        made.chat_template = "{{ bos_token }} {{ messages[0].content }} w2"
        made.save_pretrained(folder)
    return folder


def _child(case: str, method: str, folder: str, threads: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.refusal_sweep", "--one", case, method, "--folder", folder]
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}, {method}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
