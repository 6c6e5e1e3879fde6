"""Appendices 1b and 2a: they run, keep their shape, and a number of each is found by a naive route."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from test_notebooks import code_cells, disagreements, misshapen, read, unexecuted
from transformers import AutoModelForCausalLM

from lib import ROOT
from lib.induction import appendix
from lib.parameters import GRID_WORDS, schemas
from lib.record import validate_record
from lib.statistics import Estimate

SMALL = {
    "1b_emergence": {
        "seq_len": 160,
        "window": 60,
        "n_walks": 4,
        "n_layouts": 4,
        "k_values": [1, 2],
        "n_bootstrap": 100,
    },
    "2a_mixing_theory": {"dim": 256, "n_seeds": 3, "ranks": [1, 4], "dims": [16, 64]},
}
each_notebook = pytest.mark.parametrize("study", SMALL)


@pytest.fixture(scope="module", params=SMALL)
def run(request, tmp_path_factory):
    """The figures folder of a run with small parameters, and its record."""
    folder = tmp_path_factory.mktemp(request.param)
    path = ROOT / "notebooks" / "appendix" / f"{request.param}.ipynb"
    parameters = SMALL[request.param] | {"out_dir": str(folder / "figures")}
    command = [sys.executable, "-m", "papermill", path, "out.ipynb", "-y", yaml.safe_dump(parameters)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "figures", validate_record(folder / "figures" / "record.json")


def test_runs_with_small_parameters_from_any_folder(run):
    _, record = run
    small = SMALL[record.study]
    assert {name: record.parameters[name] for name in small} == small
    verdicts = {claim.id: claim.verdict for claim in record.claims}
    if record.study == "2a_mixing_theory":  # published of other parameters
        assert verdicts["toy-before"] == verdicts["toy-after"] == "not tested"
    else:
        assert verdicts["geometry"] == "fails" and verdicts["previous-token-head"] == "holds"


def test_a_number_is_that_of_a_naive_route(run):
    folder, record = run
    if record.study == "2a_mixing_theory":
        assert record.metrics["energy_limit"].value == pytest.approx(energy_of_mixed_grid(), abs=1e-9)
    else:
        with np.load(folder / "ablation.npz") as file:
            found = file["without_layer"][3]
        assert found == pytest.approx(accuracy_without_layer(3, **SMALL[record.study]), abs=1e-4)


def test_no_claim_has_an_interval_of_width_0(run):
    _, record = run
    for claim in record.claims:
        assert claim.interval is None or claim.interval[0] < claim.interval[1], claim.id


@each_notebook
def test_keeps_its_shape(study):
    path = ROOT / "notebooks" / "appendix" / f"{study}.ipynb"
    notebook = read(path)
    assert misshapen(notebook) == []
    assert disagreements(path, schemas()[study]) == []
    cells = code_cells(notebook)
    prose = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert len(re.sub(r"!\[[^]]*\]", "", prose).split()) <= 2500 and len(cells) <= 30
    assert [line for cell in cells[1:] for line in cell.source.splitlines() if len(line) > 100] == []


@each_notebook
def test_is_stored_with_the_figures_of_one_run(study):
    assert unexecuted(read(ROOT / "notebooks" / "appendix" / f"{study}.ipynb")) == []
    folder = ROOT / "figures" / study
    record = validate_record(folder / "record.json")
    files = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    assert files == {*record.artifacts, "record.json"}, "files of another run"


def test_stored_claims_say_how_many_heads_are_real():
    record = validate_record(ROOT / "figures" / "1b_emergence" / "record.json")
    statements = {claim.id: claim.statement for claim in record.claims}
    assert "(7 real)" in statements["induction matters"]
    assert "real)" in statements["previous token matters"]


def test_table_aligns_text_numbers_and_estimates():
    rows = [["a", 1, float("nan")], ["longer", -0.001, Estimate(0.5, 0.25, 0.75)]]
    assert appendix.table(["", "n", "value"], rows).splitlines() == [
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


def accuracy_without_layer(layer: int, seq_len: int, window: int, n_walks: int, **_) -> float:
    """Mean mass on the neighbours over the last window, with all heads of a layer zero, by plain hooks."""
    folder = ROOT / "data" / "organisms" / "induction"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocabulary = yaml.safe_load((folder / "tokenizer.json").read_text())["model"]["vocab"]
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
