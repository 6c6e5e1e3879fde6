"""Bad input to the notebook of study 1: it stops, names culprit and remedy, and leaves no record.

What a run needs a kernel for goes through raw papermill; what stops at the parameters is asked of `Study`.
"""

from __future__ import annotations

import subprocess

import numpy as np
import papermill_runs as runs
import pytest
from tiny import CONFIGS, WORDS, save_tiny

from lib import ROOT
from lib.parameters import InductionAblation, ParameterError
from lib.record import Study, validate_record
from lib.walks import grid_graph, random_walks

NOTEBOOK = ROOT / "notebooks" / "01_induction_ablation.ipynb"
# The tiny model's words on a grid of their own; three layers of four heads, 96 positions.
SMALL = {
    "rows": 3, "cols": 4, "words": list(WORDS), "seq_len": 90, "window": 40, "n_layouts": 4,
    "n_selecting": 1, "k_values": [1], "n_random_sets": 2, "n_bootstrap": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture
def papermill(figures, tmp_path):
    """Run the notebook as a person does, from another folder, with parameters by -y and more options."""

    def run(parameters: dict, *options: str, **environment: str) -> subprocess.CompletedProcess:
        return runs.finish(runs.start(NOTEBOOK, tmp_path, parameters, *options, **environment))

    return run


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("-p", "seqlen", "200"), "seqlen: no such parameter; did you mean seq_len?"),
        (("-p", "seq_len", "abc"), "seq_len: got 'abc'; a whole number is needed"),
    ],
)
def test_wrong_parameter_stops_before_anything_is_written(papermill, figures, option, message):
    run = papermill({}, *option)
    assert run.returncode != 0
    assert f"ParameterError: {message}" in run.stderr and "torch" not in run.stderr
    assert not figures.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": 5}, "graph: 5x4 grid has 20 nodes and 16 words were given; give one word a node"),
        ({"words": "['apple', 'bird']"}, "graph: 4x4 grid has 16 nodes and 2 words were given"),
        (
            {"graph": "edges", "edges": ["apple-bird", "car-egg", "egg-house"]},
            "edges: edge list of 5 words is disconnected, so no walk sees all of it; "
            "join its 2 components by an edge: apple bird | car egg house",
        ),
        (
            {"graph": "edges", "edges": '["apple-bird", "bird-huose"]'},
            "edges: edge 'bird-huose' names the unknown word 'huose'; did you mean 'house'?",
        ),
        (
            {"graph": "edges", "edges": ["apple-bird", "bird-zzz"]},
            "edges: edge 'bird-zzz' names the unknown word 'zzz'; known words: apple bird car",
        ),
    ],
)
def test_graph_that_can_not_be_built_stops_the_study(figures, values, message):
    with pytest.raises(ParameterError) as caught:
        Study(InductionAblation, values)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not figures.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"words": [*WORDS[:10], "zebra", "ice cream"]},
            "not one token of this tokenizer: 'zebra' (unknown), 'ice cream' (2 tokens); choose other words",
        ),
        (
            {"seq_len": CONFIGS["llama"].max_position_embeddings},
            "97 tokens (BOS included) are more than the 96 positions of this model; lower seq_len",
        ),
        (
            {"k_values": [1, 13]},
            "k_values: 13 heads to ablate, and the model has 12; lower k_values",
        ),
    ],
    ids=["word", "seq_len", "k_values"],
)
def test_what_the_model_can_not_do_stops_the_run_without_a_record(
    papermill, figures, tiny_model, changes, message
):
    folder = figures / NOTEBOOK.stem
    folder.mkdir(parents=True)
    (folder / "record.json").write_text("of an earlier run")
    run = papermill(SMALL | {"model_id": tiny_model} | changes)
    assert run.returncode != 0
    assert message in run.stderr.strip().splitlines()[-1]
    assert runs.leftovers(folder) == []


def test_unknown_model_without_a_network_is_named_with_what_to_do(papermill, figures, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    run = papermill({"model_id": "nobody/no-such-model"}, **offline)
    assert run.returncode != 0
    message = run.stderr[run.stderr.rindex("ModelError: ") :]
    assert "model_id 'nobody/no-such-model' is no embedded model" in message and "no local folder" in message
    assert "pass a folder with config.json, tokenizer and weights: -p model_id /path/to/folder" in message
    assert runs.leftovers(figures) == []


# On the embedded model: the tiny one's walks are too short for stretches in which words occur.
EMBEDDED = {
    "model_id": "organism/induction", "seq_len": 200, "n_layouts": 4, "n_selecting": 1, "k_values": [1],
    "n_random_sets": 2, "n_bootstrap": 100,
}  # fmt: skip


def words_read(settings: dict, n_walks: int, seed: int) -> list[set[int]]:
    """Nodes in the window of each walk."""
    walks = random_walks(grid_graph(4, 4), n_walks, settings["seq_len"], seed)
    return [set(walk) for walk in walks[:, -settings["window"] :]]


def test_word_that_never_occurs_in_the_window_is_left_out(papermill, figures, tmp_path):
    """Also: a list given by -p, which papermill passes on as a string, and one given by -y."""
    settings = EMBEDDED | {"window": 60, "seed": 1}
    read = words_read(settings, 4, settings["seed"])
    others = words_read(settings, 8, settings["seed"] + 2)  # of which the map is taken, two walks a layout
    assert max(map(len, read)) < 16
    assert all(len(a | b) == 16 for a, b in zip(others[::2], others[1::2], strict=True))

    run = papermill(settings, "-p", "k_values", "[1,2]")
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
