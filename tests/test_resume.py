"""A sweep that is killed goes on from what it had done, and ends with the same bits."""

from __future__ import annotations

import multiprocessing
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from holding import hold
from tiny import save_tiny

from lib.interventions import Condition, ablation_sweep
from lib.models import load
from lib.record import Cache

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


def sweep(
    model_folder: Path, cache_folder: Path, result: Path, hold_at: int | None = None, pause: float = 0.0
) -> None:
    """What the killed process does: a sweep with a cache, whose arrays are saved at the end.

    It holds once the cache has `hold_at` entries, and pauses before every forward (s).
    """
    torch.set_num_threads(1)
    model = load(str(model_folder))
    forwards = hold(model, cache_folder, hold_at, pause)
    rng = np.random.default_rng(1)
    labels = rng.integers(0, N_CLASSES, size=(N_SEQUENCES, LENGTH))
    ids = torch.from_numpy(np.pad(labels + 2, ((0, 0), (1, 0))))
    found = ablation_sweep(
        model, ids, CONDITIONS, word_ids=range(2, 7), labels=labels, n_classes=N_CLASSES,
        batch_size=ROWS, cache=Cache(cache_folder),
    )  # fmt: skip
    np.savez(result, n_forwards=len(forwards), **{name: getattr(found, name) for name in ARRAYS})


@pytest.fixture(scope="module")
def start():
    """Start `sweep` in a process of its own, which has the libraries at hand."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lib.interventions", "transformers.models.llama.modeling_llama"])

    def run(*arguments, **options):
        process = context.Process(target=sweep, args=arguments, kwargs=options)
        process.start()
        return process

    return run


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def uninterrupted(start, model_folder, tmp_path_factory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(start(model_folder, folder / "cache", folder / "result.npz"))
    assert len(entries(folder / "cache")) == BATCHES
    return arrays(folder / "result.npz")


def finish(process) -> None:
    process.join(600)
    assert process.exitcode == 0


def entries(folder: Path) -> dict[str, tuple[int, int]]:
    """Whole entries of the cache: name -> (inode, time of writing)."""
    stats = {path.name: path.stat() for path in folder.glob("[!.]*.npz")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def assert_same_bits(result: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name in ARRAYS:
        assert result[name].dtype == expected[name].dtype and result[name].shape == expected[name].shape
        assert result[name].tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("done", [1, 4, 7, 10, 14])
def test_sweep_that_was_killed_goes_on_and_ends_with_the_same_bits(
    start, model_folder, uninterrupted, tmp_path, done
):
    cache, result = tmp_path / "cache", tmp_path / "result.npz"
    process = start(model_folder, cache, result, hold_at=done)
    while len(entries(cache)) < done and process.is_alive():
        time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not result.exists()
    before = entries(cache)
    assert len(before) == done

    finish(start(model_folder, cache, result))
    after, found = entries(cache), arrays(result)
    assert_same_bits(found, uninterrupted)
    assert len(after) == BATCHES and before.items() <= after.items(), "what was done is not done again"
    # One batch more: the rows that are missing start from the stream of a baseline that is done.
    missing = BATCHES - len(before)
    assert missing <= found["n_forwards"] <= missing + 1


def test_finished_sweep_is_read_and_nothing_is_run(start, model_folder, uninterrupted, tmp_path):
    for result in ("first.npz", "second.npz"):
        finish(start(model_folder, tmp_path / "cache", tmp_path / result))
    assert uninterrupted["n_forwards"] == arrays(tmp_path / "first.npz")["n_forwards"] == BATCHES
    assert arrays(tmp_path / "second.npz")["n_forwards"] == 0
    assert_same_bits(arrays(tmp_path / "second.npz"), uninterrupted)


@pytest.fixture
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_as_they_were")
@pytest.mark.parametrize("damaged", [0, BATCHES - 1])
def test_flipped_bit_is_named_and_its_batch_computed_again(
    model_folder, uninterrupted, tmp_path, capfd, damaged
):
    cache = tmp_path / "cache"
    sweep(model_folder, cache, tmp_path / "first.npz")
    path = sorted(cache.glob("*.npz"), key=lambda path: path.stat().st_mtime_ns)[damaged]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = entries(cache)
    capfd.readouterr()

    sweep(model_folder, cache, tmp_path / "second.npz")
    said = capfd.readouterr().err.splitlines()
    after, found = entries(cache), arrays(tmp_path / "second.npz")
    assert [line for line in said if "cache" in line] == [
        f"cache: {path} is damaged (its bytes are not those that were written); computing it again"
    ]
    assert_same_bits(found, uninterrupted)
    assert {name for name in before if before[name] != after[name]} == {path.name}
    assert found["n_forwards"] <= 2  # the batch, and the baseline that its rows may start from
