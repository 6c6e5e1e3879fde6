"""The ablation sweep of study 1 three ways, side by side in one run: `python -m benchmarks.induction_sweep`.

* ours: `lib.interventions.ablation_sweep`, without its cache;
* straightforward: one condition and one walk at a time, plain hooks, softmax over the
  whole vocabulary, a Python loop over positions;
* floor: as many bare forwards of the unablated model, in batches, with nothing measured.

Every measurement is a process of its own; the three take turns, and the ratio of a round compares runs
that are next to each other in time. Memory is the highest resident set during the work minus the one
before it (weights loaded, one warm-up forward done).
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

METHODS = ("ours", "straightforward", "floor")
CASES = {
    "organism/induction": {"n_walks": 16, "length": 400, "k_values": [1, 2, 4, 8], "n_draws": 4},
    "random 12-layer Llama, 32k vocabulary": {
        "n_walks": 2,
        "length": 1000,
        "k_values": [1, 2, 4, 8],
        "n_draws": 4,
    },
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
        for case in CASES:
            rounds = []
            for _ in range(arguments.rounds):
                rounds.append({method: _child(case, method, folder, arguments.threads) for method in METHODS})
            report(case, rounds)


def report(case: str, rounds: list[dict[str, dict]]) -> None:
    settings = CASES[case]
    first = rounds[0]["ours"]
    print(
        f"\n{case}: {first['conditions']} conditions x "
        f"{settings['n_walks']} walks x {settings['length']} tokens"
    )
    print(f"{'':16s}{'seconds':>9s}{'/ floor':>9s}{'MB above weights':>18s}{'/ straightforward':>19s}")
    for method in METHODS:
        seconds = statistics.median(r[method]["seconds"] for r in rounds)
        ratio = statistics.median(r[method]["seconds"] / r["floor"]["seconds"] for r in rounds)
        memory = statistics.median(r[method]["megabytes"] for r in rounds)
        share = statistics.median(r[method]["megabytes"] / r["straightforward"]["megabytes"] for r in rounds)
        print(f"{method:16s}{seconds:9.2f}{ratio:9.2f}{memory:18.0f}{share:19.2f}")
    differences = [abs(r["ours"]["accuracy"] - r["straightforward"]["accuracy"]) for r in rounds]
    print(f"largest difference in mean accuracy, ours against straightforward: {max(differences):.1e}")


def measure(case: str, method: str, folder: Path, threads: int) -> dict:
    """Run one method once in this process: seconds, megabytes above the weights, mean accuracy."""
    import torch

    torch.set_num_threads(threads)
    model, ids, walks, graph, word_ids, conditions = _task(case, folder)
    run = {"ours": _ours, "straightforward": _straightforward, "floor": _floor}[method]
    # Warm up on a single short row: kernels, allocator, nnsight's own caches.
    run(model, ids[:1, :64], walks[:1, :63], graph, word_ids, conditions[:2])
    before = _reset_peak()
    start = time.perf_counter()
    accuracy = run(model, ids, walks, graph, word_ids, conditions)
    return {
        "seconds": time.perf_counter() - start,
        "megabytes": _peak() - before,
        "accuracy": accuracy,
        "conditions": len(conditions),
    }


def _task(case: str, folder: Path):
    import numpy as np
    import torch

    from lib import attention, interventions, models
    from lib.parameters import GRID_WORDS
    from lib.walks import grid_graph, random_walks

    settings = CASES[case]
    graph = grid_graph(4, 4, GRID_WORDS)
    walks = random_walks(graph, settings["n_walks"], settings["length"], seed=0)
    if case.startswith("organism/"):
        model = models.load(case)
        word_ids = models.word_ids(model, graph.words)
    else:
        model = models.load(str(_random_llama(folder / "llama")))
        word_ids = list(range(100, 116))
    sizes = models.shape(model)
    if case.startswith("organism/"):
        scores = attention.head_scores(model, models.plain_token_ids(model), bos=0, n_sequences=8)
        ranked = {
            "induction": attention.top_heads(scores.induction),
            "previous": attention.top_heads(scores.previous_token),
        }
    else:  # a random model has no head types: heads anywhere, as the published lists are
        order = np.random.default_rng(0).permutation(sizes.n_layers * sizes.n_heads)
        heads = [(int(i) // sizes.n_heads, int(i) % sizes.n_heads) for i in order]
        ranked = {"induction": heads[:16], "previous": heads[16:32]}
    conditions = interventions.ablation_conditions(
        ranked, settings["k_values"], settings["n_draws"], n_layers=sizes.n_layers, n_heads=sizes.n_heads
    )
    conditions = [
        c for c in conditions if not c.name.startswith("random") or (c.name == "random" and len(c.heads) == 8)
    ]
    ids = torch.from_numpy(np.pad(np.array(word_ids)[walks], ((0, 0), (1, 0))))
    return model, ids, walks, graph, word_ids, conditions


def _ours(model, ids, walks, graph, word_ids, conditions) -> float:
    from lib import interventions, models
    from lib.walks import rule_following_accuracy

    layer = round(0.81 * models.shape(model).n_layers)
    sweep = interventions.ablation_sweep(
        model, ids, conditions, word_ids=word_ids, labels=walks, n_classes=graph.n_nodes, layer=layer
    )
    return float(rule_following_accuracy(sweep.word_probabilities, walks, graph).mean())


def _straightforward(model, ids, walks, graph, word_ids, conditions) -> float:
    import numpy as np

    return float(np.mean([_one_condition(model, ids, walks, graph, word_ids, c) for c in conditions]))


def _one_condition(model, ids, walks, graph, word_ids, condition) -> float:
    import numpy as np
    import torch

    module = model._module
    n_heads = module.config.num_attention_heads
    layer = round(0.81 * module.config.num_hidden_layers)
    streams, accuracies = [], []

    def ablate(args, index):
        z = args[0].clone()
        d_head = z.shape[-1] // n_heads
        for at, head in condition.heads:
            if at == index:
                z[..., head * d_head : (head + 1) * d_head] = 0
        return (z,)

    blocks = module.model.layers
    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args, i=i: ablate(args, i))
        for i, block in enumerate(blocks)
    ]
    handles.append(blocks[layer].register_forward_pre_hook(lambda _, args: streams.append(args[0])))
    for walk, row in zip(walks, ids, strict=True):
        with torch.no_grad():
            probabilities = module(input_ids=row[None], use_cache=False).logits[0].float().softmax(-1)
        for t, node in enumerate(walk):
            neighbours = [word_ids[n] for n in np.flatnonzero(graph.adjacency[node])]
            accuracies.append(probabilities[t + 1, neighbours].sum().item())
    for handle in handles:
        handle.remove()
    means = torch.cat(streams)[:, 1:].flatten(0, 1)
    nodes = torch.from_numpy(walks).flatten()
    [means[nodes == node].mean(0) for node in range(graph.n_nodes)]
    return float(np.mean(accuracies))


def _floor(model, ids, walks, graph, word_ids, conditions) -> float:
    import torch

    from lib.batches import auto_batch_size

    size = auto_batch_size(model, ids.shape[1])
    rows = ids.repeat(len(conditions), 1)
    with torch.no_grad():
        for batch in rows.split(size):
            model._module(input_ids=batch, use_cache=False)
    return 0.0


def _random_llama(folder: Path) -> Path:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=12,
            num_attention_heads=8,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        vocabulary = {str(i): i for i in range(32_000)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0", bos_token="1").save_pretrained(
            folder
        )
    return folder


def _child(case: str, method: str, folder: str, threads: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.induction_sweep", "--one", case, method, "--folder", folder]
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}, {method}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _reset_peak() -> float:
    """Forget the highest resident set so far; returns the current one in megabytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status: memory can be measured on Linux only")


if __name__ == "__main__":
    main()
