"""A sweep that is killed goes on from what it had done, and ends with the same bits."""

from __future__ import annotations

import multiprocessing
import signal
import time
from pathlib import Path

import numpy as np
import torch
from holding import hold
from tiny import save_tiny

from lib.core.cache import Cache
from lib.core.interventions import Condition
from lib.core.models import load
from lib.core.sweeps import ablation_sweep

# Four sets of heads in batches of two rows, that is four batches for each pair of sequences.
CONDITIONS = (
    Condition("baseline"),
    Condition("one late", [(2, 1)]),
    Condition("two layers", [(1, 0), (2, 3)]),
    Condition("one late, again", [(2, 1)]),
    Condition("first layer", [(0, 2), (2, 0)]),
)
N_SEQUENCES, LENGTH, N_CLASSES, ROWS = 8, 24, 5, 2
BATCHES = 16
ARRAYS = ("word_probabilities", "class_sums", "class_counts")


def sweep(model_folder: Path, cache_folder: Path, result: Path, hold_at: int | None = None) -> None:
    """What the killed process does: a sweep with a cache, whose arrays are saved at the end.

    It holds once the cache has `hold_at` entries.
    """
    torch.set_num_threads(1)
    model = load(str(model_folder))
    forwards = hold(model, cache_folder, hold_at)
    rng = np.random.default_rng(1)
    labels = rng.integers(0, N_CLASSES, size=(N_SEQUENCES, LENGTH))
    ids = torch.from_numpy(np.pad(labels + 2, ((0, 0), (1, 0))))
    found = ablation_sweep(
        model, ids, CONDITIONS, word_ids=range(2, 7), labels=labels, n_classes=N_CLASSES,
        batch_size=ROWS, cache=Cache(cache_folder),
    )  # fmt: skip
    np.savez(result, n_forwards=len(forwards), **{name: getattr(found, name) for name in ARRAYS})


def entries(folder: Path) -> dict[str, tuple[int, int]]:
    """Whole entries of the cache: name -> (inode, time of writing)."""
    stats = {path.name: path.stat() for path in folder.glob("[!.]*.npz")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def test_sweep_that_was_killed_goes_on_and_ends_with_the_same_bits(tmp_path):
    model, cache, done = save_tiny("llama", tmp_path / "llama"), tmp_path / "cache", 7
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lib.core.interventions", "transformers.models.llama.modeling_llama"])

    def run(cache: Path, name: str) -> dict[str, np.ndarray]:
        process = context.Process(target=sweep, args=(model, cache, tmp_path / name))
        process.start()
        process.join(600)
        assert process.exitcode == 0
        with np.load(tmp_path / name) as file:
            return dict(file)

    killed = context.Process(target=sweep, args=(model, cache, tmp_path / "none.npz", done))
    killed.start()
    while len(entries(cache)) < done and killed.is_alive():
        time.sleep(0.05)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and not (tmp_path / "none.npz").exists()
    before = entries(cache)
    assert len(before) == done

    found, after, whole = run(cache, "found.npz"), entries(cache), run(tmp_path / "other", "whole.npz")
    for name in ARRAYS:
        assert found[name].dtype == whole[name].dtype and found[name].shape == whole[name].shape
        assert found[name].tobytes() == whole[name].tobytes(), name
    assert len(after) == BATCHES and before.items() <= after.items(), "what was done is not done again"
    # One batch more: the rows that are missing start from the stream of a baseline that is done.
    assert BATCHES - done <= found["n_forwards"] <= BATCHES - done + 1
