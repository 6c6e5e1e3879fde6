"""Notebook 04 on the official layout with problems of the form of GSM8K, and on what it cannot read."""

from __future__ import annotations

import json

import papermill_runs as runs
import pytest
from tiny_codi import N_HEADS, N_LAYERS, byte_tokenizer, official_tensors, save_official

from lib import ROOT
from lib.parameters import CodiAttention, ParameterError
from lib.record import Study, validate_record

NOTEBOOK = ROOT / "notebooks" / "04_codi_attention.ipynb"
# Short enough for 64 positions of a tokenizer that has a token for each letter; no twins, as in GSM8K.
PROBLEMS = (
    ("Al has 3. He buys 4.", "<<3+4=7>>", "7"),
    ("Al has 5. He buys 2.", "<<5+2=7>>", "7"),
    ("Al has 3. He buys 4, eats 2.", "<<3+4=7>> <<7-2=5>>", "5"),
    ("Al has 9. He buys 1, eats 6.", "<<9+1=10>> <<10-6=4>>", "4"),
    ("Bo has 8. He eats 1, buys $2.", "<<8-1=7>> <<7+2=9>>", "9"),
)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder as on the hub, with GPT-2's configuration and tokenizer in it."""
    folder = save_official(tmp_path_factory.mktemp("official"), official_tensors(len(byte_tokenizer())))
    for path in (folder / "base").iterdir():
        path.rename(folder / path.name)
    (folder / "base").rmdir()
    return folder


@pytest.fixture
def gsm8k(tmp_path):
    rows = [{"question": q, "cot": cot, "answer": answer} for q, cot, answer in PROBLEMS]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder, figures, parameters):
    process = runs.start(NOTEBOOK, folder, parameters, FIGURES_DIR=str(figures))
    return runs.finish(process)


def test_the_official_layout_runs_end_to_end(official, gsm8k, figures, tmp_path):
    parameters = {
        "model_id": str(official), "compare_with": [], "problems": str(gsm8k), "n_bootstrap": 100,
    }  # fmt: skip
    done = run(tmp_path, figures, parameters)
    assert done.returncode == 0, done.stderr[-3000:]
    assert runs.complaints(tmp_path) == []
    record = validate_record(figures / NOTEBOOK.stem / "record.json")
    assert {"dashboard.html", "answer.png"} <= set(record.artifacts)
    verdicts = {claim.id: claim for claim in record.claims}
    assert verdicts["all-carry"].verdict == "not tested"  # no twins
    assert not [claim for claim in record.claims if claim.id.startswith("rhythm")]  # nothing to compare with
    assert verdicts["even-decode"].verdict in ("holds", "fails", "unclear")
    printed = runs.printed(tmp_path)
    assert f"{N_LAYERS} layers, 6 thoughts, teacher writes compact" in printed
    assert N_HEADS == 4 and "z_0 (neverix: odd token 1; Goyal: before step 1)" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problems": ""}, "has no problems of its own; name a JSONL file of problems"),
        ({"top_k": 99}, r"k 99: z_0 of problem 0 has"),
    ],
)
def test_what_it_cannot_read_stops_it_with_the_remedy(official, gsm8k, figures, tmp_path, change, message):
    parameters = {
        "model_id": str(official), "compare_with": [], "problems": str(gsm8k), "n_bootstrap": 100, **change,
    }  # fmt: skip
    done = run(tmp_path, figures, parameters)
    assert done.returncode != 0 and message in done.stderr
    assert not (figures / NOTEBOOK.stem / "record.json").exists()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_thoughts": 0}, "n_thoughts: 0 has no even and odd ones to compare; take 2 or more, or -1"),
        (
            {"compare_with": ["a/codi"]},
            "compare_with: several models are called 'codi' in tables and figures",
        ),
        ({"remote": True}, "remote: this study does not run on NDIF: "),
    ],
)
def test_parameters_that_make_no_sense_are_named(parameters, message, figures):
    with pytest.raises(ParameterError, match=message):
        Study(CodiAttention, parameters)
    assert not figures.exists()
