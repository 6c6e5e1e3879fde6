"""Appendices 1b and 2a: a number of each by a naive route, and what their claims must say.

That they run and keep to their shape is in test_notebooks.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lib import ROOT
from lib.core.parameters import schemas
from lib.core.record import validate_record
from lib.core.statistics import Estimate
from lib.induction import appendix_figures
from lib.induction.parameters import GRID_WORDS


def stored(study: str):
    """The stored record, unless its run had parameters of its own."""
    record = validate_record(ROOT / "figures" / study / "record.json")
    if record.parameters != schemas()[study]().model_dump():
        pytest.skip("the stored run has parameters of its own")
    return record


def test_closed_form_of_the_mixed_grid_is_that_of_plain_numpy():
    assert stored("2a_mixing_theory").metrics["energy_limit"].value == pytest.approx(energy_of_mixed_grid())


def test_accuracy_without_a_layer_is_that_of_plain_hooks():
    settings = stored("1b_emergence").parameters
    with np.load(ROOT / "figures" / "1b_emergence" / "ablation.npz") as file:
        found = file["without_layer"][3]
    sizes = {name: settings[name] for name in ("seq_len", "window", "n_walks")}
    assert found == pytest.approx(accuracy_without_layer(3, **sizes), abs=1e-4)


@pytest.mark.parametrize("study", ["1b_emergence", "2a_mixing_theory"])
def test_no_claim_has_an_interval_of_width_0(study):
    for claim in stored(study).claims:
        assert claim.interval is None or claim.interval[0] < claim.interval[1], claim.id


def test_table_aligns_text_numbers_and_estimates():
    rows = [["a", 1, float("nan")], ["longer", -0.001, Estimate(0.5, 0.25, 0.75)]]
    assert appendix_figures.table(["", "n", "value"], rows).splitlines() == [
        "        n     value",
        "a       1     -",
        "longer  0.00  0.50 [0.25, 0.75]",
    ]


# -- second routes ---------------------------------------------------------------------------------


def grid_neighbours() -> list[list[int]]:
    """Neighbours of each cell of the 4x4 grid, row by row."""
    steps = (-1, 0), (1, 0), (0, -1), (0, 1)
    cells = [(i // 4, i % 4) for i in range(16)]
    return [[cells.index((r + y, c + x)) for y, x in steps if (r + y, c + x) in cells] for r, c in cells]


def energy_of_mixed_grid() -> float:
    """Energy of the plane of the 4x4 grid after one mixing step, in the limit of many dimensions."""
    neighbours = grid_neighbours()
    mixing = np.eye(16)
    for i, beside in enumerate(neighbours):
        for j in beside:
            mixing[i, j] = 1 / len(beside)
    rows = mixing - mixing.mean(axis=0)  # each word as what it holds of the 16 vectors
    _, _, axes = np.linalg.svd(rows)
    plane = rows @ axes[:2].T
    edges = [(i, j) for i, beside in enumerate(neighbours) for j in beside if i < j]
    return sum(((plane[i] - plane[j]) ** 2).sum() for i, j in edges) / (plane**2).sum()


def accuracy_without_layer(layer: int, seq_len: int, window: int, n_walks: int) -> float:
    """Mean mass on the neighbours over the last window, with all heads of a layer zero, by plain hooks."""
    folder = ROOT / "data" / "organisms" / "induction"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    words, neighbours = [vocabulary[word] for word in GRID_WORDS], grid_neighbours()
    projection = model.model.layers[layer].self_attn.o_proj
    projection.register_forward_pre_hook(lambda _, inputs: (torch.zeros_like(inputs[0]),))
    masses = []
    for i in range(n_walks):
        draws, nodes = np.random.default_rng([0, i]).random(seq_len), [i]
        for draw in draws[1:]:
            beside = sorted(neighbours[nodes[-1]])
            nodes.append(beside[int(draw * len(beside))])
        ids = torch.tensor([[vocabulary["<bos>"], *(words[node] for node in nodes)]])
        with torch.no_grad():
            probabilities = model(ids).logits[0, 1:].softmax(-1)
        for t in range(seq_len - window, seq_len):
            masses.append(sum(probabilities[t, words[j]].item() for j in neighbours[nodes[t]]))
    return float(np.mean(masses))
