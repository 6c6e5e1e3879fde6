"""A run of study 1 in which some words never occur: they have no mean, and none of zeros."""

from __future__ import annotations

import numpy as np
import papermill_runs as runs

from lib import ROOT
from lib.core.record import validate_record
from lib.induction.walks import grid_graph, random_walks

NOTEBOOK = ROOT / "notebooks" / "01_induction_ablation.ipynb"


def test_word_that_never_occurs_in_the_window_is_left_out(figures, tmp_path):
    """Also: a list given by -p, which papermill passes on as a string, and one given by -y."""
    settings = {
        "model_id": "organism/induction", "seq_len": 200, "window": 60, "n_layouts": 4, "n_selecting": 1,
        "n_random_sets": 2, "n_bootstrap": 100, "seed": 1,
    }  # fmt: skip

    def words_read(n_walks: int, seed: int) -> list[set[int]]:
        """Nodes in the window of each walk."""
        walks = random_walks(grid_graph(4, 4), n_walks, settings["seq_len"], seed)
        return [set(walk) for walk in walks[:, -settings["window"] :]]

    read = words_read(4, settings["seed"])
    others = words_read(8, settings["seed"] + 2)  # of which the map is taken, two walks a layout
    assert max(map(len, read)) < 16
    assert all(len(a | b) == 16 for a, b in zip(others[::2], others[1::2], strict=True))

    run = runs.finish(runs.start(NOTEBOOK, tmp_path, settings, "-p", "k_values", "[1,2]"))
    assert run.returncode == 0, run.stderr[-3000:]
    folder = figures / NOTEBOOK.stem
    record = validate_record(folder / "record.json")
    assert record.parameters["k_values"] == [1, 2] and record.parameters["seed"] == 1
    assert {"accuracy, 2 induction", "accuracy, 2 previous token"} <= record.metrics.keys()
    assert runs.complaints(tmp_path) == []
    with np.load(folder / "answer.npz") as file:
        planes = {name: file[name] for name in file.files if name != "accuracy"}
    assert len(planes) == 3
    for name, plane in planes.items():
        absent = np.isnan(plane).any(axis=1)
        assert set(np.flatnonzero(~absent)) in read, name
        assert plane[~absent].any(axis=1).all(), "no word is a vector of zeros"
