"""Memory as planned by `lib.memory`, and as measured: `python -m benchmarks.memory_plan`.

Every case is a process of its own: it loads a random Llama, runs the stages of study 1 in their order with
the functions that the notebook calls, keeps what the notebook keeps, and measures the peak above the weights:
on a CPU the highest resident set, on a GPU (`--device cuda`) torch's `max_memory_allocated`.

The C library keeps what tensors of up to 32 MB leave free, and half as much again may stay resident. The
children therefore run with MALLOC_MMAP_THRESHOLD_ set to 1 MB, with which it gives back all that is freed;
`--keep` runs them without.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.side_by_side import megabytes_of, random_llama
from lib import ROOT

# Layers, width, MLP, heads, key-value heads, vocabulary; walks, tokens, rows a batch.
CASES = {
    "mid-size": dict(shape=(3, 128, 384, 4, 2, 4000), walks=16, tokens=500, rows=64),
    "deep": dict(shape=(12, 128, 256, 4, 4, 4000), walks=16, tokens=400, rows=32),
    "wide": dict(shape=(2, 512, 1408, 8, 2, 4000), walks=16, tokens=300, rows=32),
    "large vocabulary": dict(shape=(2, 128, 384, 4, 4, 64000), walks=4, tokens=1000, rows=16),
}
N_WORDS, WINDOW, N_LAYOUTS = 16, 100, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--keep", action="store_true", help="let the C library keep what is freed")
    arguments = parser.parse_args()
    for case, settings in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            for dtype in arguments.dtypes:
                for _ in range(arguments.rounds):
                    report(
                        f"{case}, {dtype}",
                        in_child(settings, folder, arguments.device, dtype, arguments.keep),
                    )


def report(title: str, stages: dict[str, tuple[float, float]]) -> None:
    """Print what a case needed, (estimate, measured) in MB by stage, the largest of them last."""
    print(f"\n{title:48s}{'estimate':>10s}{'measured':>10s}{'ratio':>8s}")
    largest = (max(pair[0] for pair in stages.values()), max(pair[1] for pair in stages.values()))
    for name, (estimate, found) in (stages | {"peak": largest}).items():
        print(f"{name:48s}{estimate:10.0f}{found:10.0f}{estimate / found:8.2f}")


def in_child(
    settings: dict, folder: str, device: str, dtype: str, keep: bool = False
) -> dict[str, tuple[float, float]]:
    """(estimate, measured) in MB by stage, from a process of its own."""
    code = (
        "import json, sys; from benchmarks.memory_plan import measure; "
        "print(json.dumps(measure(*json.loads(sys.argv[1]))))"
    )
    arguments = json.dumps([settings, folder, device, dtype])
    environment = dict(os.environ) if keep else os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        [sys.executable, "-c", code, arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure(settings: dict, folder: str, device: str, dtype: str) -> dict[str, tuple[float, float]]:
    """(estimate, measured) in MB by stage, in this process."""
    import torch

    from lib import memory, models

    layers, width, mlp, heads, groups, vocabulary = settings["shape"]
    path = random_llama(
        Path(folder), num_hidden_layers=layers, hidden_size=width, intermediate_size=mlp,
        num_attention_heads=heads, num_key_value_heads=groups, vocab_size=vocabulary,
    )  # fmt: skip
    model = models.load(str(path), device=device, dtype=dtype)
    conditions, layer = _conditions(layers, heads), layers - 1
    of_walks = dict(n_walks=settings["walks"], seq_len=settings["tokens"], batch_size=settings["rows"])
    for _ in _stages(model, conditions[:2], layer, n_walks=2, seq_len=WINDOW, batch_size=2):
        pass  # what a first trace loads
    ctypes.CDLL(None).malloc_trim(0)  # what it left unused would serve the work below
    on_gpu = torch.device(device).type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else megabytes_of("VmRSS")
    found = {}
    _forget(on_gpu)
    for name in _stages(model, conditions, layer, **of_walks):
        if on_gpu:
            found[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
        else:
            found[name] = (megabytes_of("VmHWM") - before) * 2**20 / 1e6
        _forget(on_gpu)
    plan = memory.plan(
        model, conditions, n_words=N_WORDS, window=WINDOW, layer=layer, n_layouts=N_LAYOUTS, **of_walks
    )
    where = "device" if on_gpu else "host"
    return {stage.name: (getattr(stage, where) / 1e6, found[stage.name]) for stage in plan.stages}


def _forget(on_gpu: bool) -> None:
    """Forget the peak so far."""
    if on_gpu:
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _conditions(layers: int, heads: int) -> list:
    import numpy as np

    from lib.interventions import ablation_conditions

    order = [(int(i) // heads, int(i) % heads) for i in np.random.default_rng(0).permutation(layers * heads)]
    ranked = {"induction": order[:2], "previous token": order[2:4]}
    conditions = ablation_conditions(ranked, [1, 2], 2, n_layers=layers, n_heads=heads)
    return [c for c in conditions if not c.name.startswith("random like")]  # 9


def _stages(model, conditions, layer: int, *, n_walks: int, seq_len: int, batch_size: int) -> Iterator[str]:
    """Runs the stages of notebook 01 and keeps what it keeps; yields the name of each when it is over."""
    import numpy as np
    import torch

    from lib import attention, batches, interventions, models, walks

    graph = walks.grid_graph(4, 4, [f"w{i}" for i in range(10, 26)])
    nodes = walks.random_walks(graph, n_walks, seq_len, 0)
    tokens = np.arange(10, 26)
    ids = models.with_bos(model, tokens[nodes])
    attention.head_scores(model, tokens.tolist(), bos=1, batch_size=batch_size)
    yield "head scores"
    with torch.no_grad(), model.trace(ids[:1].to(model.device), use_cache=False):
        heads = model.layers[layer].self_attn.o_proj.input
        heads[..., :8] = 0
        model.lm_head.output[0, 1:].float().softmax(-1)[:, tokens].cpu().save()
    yield "one walk, all logits"
    fill = interventions.mean_head_outputs(model, ids, batch_size=batch_size)
    yield "mean head outputs"
    sweeps = [
        interventions.ablation_sweep(
            model, ids, conditions, word_ids=tokens, labels=nodes, n_classes=N_WORDS, layer=layer, fill=f,
            batch_size=batch_size,
        )
        for f in (None, fill)
    ]  # fmt: skip
    yield "ablation sweeps"
    accuracies = [walks.rule_following_accuracy(s.word_probabilities, nodes, graph) for s in sweeps]

    def window_stream(rows):
        with torch.no_grad(), model.trace(rows.to(model.device), use_cache=False) as tracer:
            part = model.layers[layer].input[:, -WINDOW:].float().cpu().save()
            tracer.stop()
        return part

    stream = torch.cat(list(batches.Batches(batch_size).map(window_stream, ids)))
    yield "streams of the last window"
    stretch = np.arange(seq_len) * 8 // seq_len * N_WORDS
    groups = np.stack([nodes, nodes + N_WORDS, nodes + 2 * N_WORDS + stretch])
    drawn = list({condition.name: condition for condition in conditions}.values())[:4]
    kept = []
    for dealt in walks.layouts(N_WORDS, N_LAYOUTS, 0):
        sums, _ = interventions.layer_class_sums(
            model, models.with_bos(model, tokens[dealt][nodes]), groups, 10 * N_WORDS, conditions=drawn,
            batch_size=batch_size,
        )  # fmt: skip
        kept.append(sums[0, :, : 2 * N_WORDS].copy())
    yield "class sums of all layers"
    del sweeps, accuracies, stream, kept  # until here they live


if __name__ == "__main__":
    main()
