"""Every batched measurement goes on with smaller batches when memory runs out, and measures the same."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import CONFIGS, save_tiny

from lib.core.attention import attention_spectra, head_scores, second_copy_loss
from lib.core.batches import Batches, auto_batch_size, auto_rows
from lib.core.interventions import Condition, mean_head_outputs
from lib.core.models import load
from lib.core.sweeps import ablation_sweep

N_CLASSES, LENGTH = 5, 12
LABELS = np.random.default_rng(1).integers(0, N_CLASSES, size=(7, LENGTH))
IDS = torch.from_numpy(np.pad(LABELS + 2, ((0, 0), (1, 0))))
CONDITIONS = [
    Condition("baseline"),
    Condition("one late", [(2, 1)]),
    Condition("two layers", [(1, 0), (2, 3)]),
    Condition("first layer", [(0, 2), (2, 0)]),
]
STIMULUS = dict(n_sequences=7, period=6, bos=0)


def sweep(model, batch_size, fill=None):
    found = ablation_sweep(
        model, IDS, CONDITIONS, word_ids=[2, 3], labels=LABELS, n_classes=N_CLASSES, fill=fill,
        batch_size=batch_size,
    )  # fmt: skip
    return np.concatenate([found.word_probabilities.ravel(), found.class_sums.ravel()])


MEASUREMENTS = {
    "ablation_sweep": sweep,
    "ablation_sweep, mean": lambda model, n: sweep(model, n, fill=torch.ones(3, 4, 8)),
    "mean_head_outputs": lambda model, n: mean_head_outputs(model, IDS, batch_size=n).numpy(),
    "attention_spectra": lambda model, n: attention_spectra(model, IDS, n_prefix=1, batch_size=n),
    "head_scores": lambda model, n: head_scores(model, range(2, 30), **STIMULUS, batch_size=n).induction,
    "second_copy_loss": lambda model, n: second_copy_loss(model, range(2, 30), **STIMULUS, batch_size=n),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(str(save_tiny("llama", tmp_path_factory.mktemp("llama"))))


@contextmanager
def memory_for_two(model):
    """The last block of the model has room for two rows; gives the numbers of rows that came there."""
    sizes = []

    def refuse(_, args):
        sizes.append(len(args[0]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    handle = model._module.model.layers[2].register_forward_pre_hook(refuse)
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.mark.parametrize("measure", MEASUREMENTS.values(), ids=MEASUREMENTS)
def test_batch_halves_when_memory_runs_out(model, measure):
    one_by_one, whole = measure(model, 1), measure(model, 7)
    with memory_for_two(model) as sizes:
        found = measure(model, 7)
    for expected in (one_by_one, whole):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert sizes[:2] == [7, 3] and max(sizes[2:]) <= 2, "no batch is tried at a size that did not fit before"


def test_results_come_in_order_and_the_size_stays_halved():
    tried = []

    def run(rows):
        tried.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError
        return list(rows)

    batches = Batches(8)
    assert list(batches.map(run, range(10))) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert tried == [8, 4, 2, 2, 2, 2, 2] and batches.size == 2
    assert list(batches.map(run, [])) == []


@pytest.mark.parametrize(
    ("error", "sizes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), [7, 3, 1]),
        (RuntimeError("can't allocate memory: you tried"), [7, 3, 1]),
        (ValueError("shapes"), [7]),
    ],
)
def test_error_that_no_smaller_batch_mends_is_raised(error, sizes):
    tried = []

    def run(rows):
        tried.append(len(rows))
        raise error

    with pytest.raises(type(error), match=str(error)):
        list(Batches(7).map(run, range(7)))
    assert tried == sizes


def test_batches_on_a_cpu_are_of_8_mb_and_64_rows_at_most(model):
    assert [auto_batch_size(model, length) for length in (1, 1000, 10**6)] == [64, 4, 1]


@pytest.mark.parametrize(("free", "rows"), [(0, 1), (10**6, 4), (10**9, 64)])
def test_batches_on_a_gpu_take_a_quarter_of_its_free_memory(monkeypatch, free, rows):
    weight = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    module = SimpleNamespace(config=CONFIGS["llama"], parameters=lambda: iter([weight]))
    monkeypatch.setattr("lib.core.batches.free_memory", lambda device: free)
    assert auto_batch_size(SimpleNamespace(_module=module), 60) == rows


def test_rows_of_answers_are_powers_of_two_and_256_at_most(model):
    assert [auto_rows(model, length) for length in (1, 1000, 1_000_000)] == [256, 64, 1]
