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
    "rows": 3, "cols": 4, "words": list(WORDS), "seq_len": 80, "window": 8, "n_walks": 4, "k_values": [1],
    "n_random_sets": 1, "n_bootstrap": 100,
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


def test_word_that_never_occurs_in_the_window_is_named_and_left_out(papermill, figures, tiny_model, tmp_path):
    """Also: a list given by -p, which papermill passes on as a string, and one given by -y."""
    settings = SMALL | {"seed": 2}
    walks = random_walks(grid_graph(3, 4), settings["n_walks"], settings["seq_len"], settings["seed"])
    absent = np.setdiff1d(np.arange(12), walks[:, -settings["window"] :])
    assert len(absent) == 2

    run = papermill(settings | {"model_id": tiny_model}, "-p", "k_values", "[1,2]")
    assert run.returncode == 0, run.stderr[-3000:]
    folder = figures / NOTEBOOK.stem
    record = validate_record(folder / "record.json")
    assert record.parameters["k_values"] == [1, 2] and record.parameters["words"] == list(WORDS)
    with np.load(folder / "ablation.npz") as file:
        assert file["k"].tolist() == [0, 1, 2]

    missing = ", ".join(WORDS[i] for i in absent)
    assert f"words without a mean in the window: {missing}\n" in runs.printed(tmp_path)
    assert runs.complaints(tmp_path) == []
    with np.load(folder / "planes.npz") as file:
        assert len(file.files) == 4
        for name, plane in file.items():
            assert np.flatnonzero(np.isnan(plane).any(axis=1)).tolist() == absent.tolist(), name
            assert np.delete(plane, absent, axis=0).any(axis=1).all(), "no word is a vector of zeros"
