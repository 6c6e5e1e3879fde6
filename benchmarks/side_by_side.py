"""Several ways of doing the same work, side by side in one run: what the benchmarks share.

Every measurement is a process of its own; the ways take turns, and the ratio of a round compares runs
that are next to each other in time. Memory is the highest resident set during the work minus the one
before it (weights loaded, a short warm-up done).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

METHODS = ("ours", "straightforward", "floor")

Result = TypeVar("Result")
Round = dict[str, dict]  # method -> what `measure` returned


def main(
    module: str,
    description: str,
    cases: Iterable[str],
    measure: Callable[[str, str, Path], dict],
    report: Callable[[str, list[Round]], None],
    methods: Sequence[str] = METHODS,
) -> None:
    """The command line of a benchmark.

    Args:
        module: what `python -m` runs, in the children too.
        description: of the command.
        cases: names of the cases to run.
        measure: (case, method, folder) -> what was measured, JSON. One folder serves all runs of a case,
            which begin with "ours". A method that can not be had is {"missing": why}.
        report: prints the rounds of a case.
        methods: the ways, in their order.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "METHOD"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        import torch  # the parent, which only waits, needs none

        torch.set_num_threads(arguments.threads)
        print(json.dumps(measure(*arguments.one, arguments.folder)))
        return
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--folder", folder, "--threads", str(arguments.threads)]
            rounds = [
                {method: _child(module, case, method, options) for method in methods}
                for _ in range(arguments.rounds)
            ]
        report(case, rounds)


def measured(work: Callable[[], Result], device: str = "cpu") -> tuple[Result, dict[str, float]]:
    """What a piece of work returns, and what it took: seconds, and megabytes above those before it.

    Args:
        work: what to do.
        device: whose memory is meant; on a CUDA device what torch has allocated there, not what it reserves.
    """
    if device.startswith("cuda"):
        return _measured_on_cuda(work, device)
    gc.collect()  # what went away during the work would hide as much of its memory
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident set so far
    before, start = megabytes_of("VmRSS"), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    # The kernel's two counters differ by a few pages.
    return result, {"seconds": seconds, "megabytes": max(megabytes_of("VmHWM") - before, 0.0)}


def _measured_on_cuda(work: Callable[[], Result], device: str) -> tuple[Result, dict[str, float]]:
    import torch

    gc.collect()  # a trace leaves cycles that hold its tensors
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    before, start = torch.cuda.memory_allocated(device), time.perf_counter()
    result = work()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return result, {
        "seconds": seconds,
        "megabytes": (torch.cuda.max_memory_allocated(device) - before) / 2**20,
    }


def print_table(rounds: list[Round]) -> None:
    """Medians over rounds of seconds and memory, and of their ratios within a round."""
    print(
        f"{'':16s}{'seconds':>9s}{'/ floor':>9s}{'/ straightforward':>19s}"
        f"{'MB above weights':>18s}{'/ straightforward':>19s}"
    )
    for method, found in rounds[0].items():
        if "missing" in found:
            print(f"{method:16s}{found['missing']}")
            continue

        def median(of: str, against: str = "", method=method) -> float:
            others = [r[against][of] if against else 1 for r in rounds]
            return statistics.median(
                r[method][of] / n if n else math.nan for r, n in zip(rounds, others, strict=True)
            )

        print(
            f"{method:16s}{median('seconds'):9.2f}{median('seconds', 'floor'):9.2f}"
            f"{median('seconds', 'straightforward'):19.2f}{median('megabytes'):18.0f}"
            f"{median('megabytes', 'straightforward'):19.2f}"
        )


def random_llama(folder: Path, **config) -> Path:
    """Save a Llama of random weights and a tokenizer of as many words; its answers have no end.

    Args:
        folder: where; what is there stays.
        config: of the model, above all vocab_size.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        settings = LlamaConfig(bos_token_id=1, eos_token_id=None, pad_token_id=0, **config)
        LlamaForCausalLM(settings).save_pretrained(folder)
        word_tokenizer(settings.vocab_size).save_pretrained(folder)
    return folder


def word_tokenizer(n_words: int):
    """A tokenizer of the words w0 (padding), w1 (BOS), w2, ...; its texts have no end."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n_words)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", bos_token="w1")


def _child(module: str, case: str, method: str, options: list[str]) -> dict:
    command = [sys.executable, "-m", module, "--one", case, method, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}, {method}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def megabytes_of(field: str) -> float:
    """Megabytes (2^20 bytes) of a field of this process, "VmRSS" or "VmHWM" (the highest of it)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status: memory can be measured on Linux only")
