"""Notebook 04 on the official layout with problems of the form of GSM8K."""

from __future__ import annotations

import json

import papermill_runs as runs
import pytest
from tiny_codi import N_LAYERS, byte_tokenizer, official_tensors, save_official

from lib import ROOT
from lib.codi.parameters import CodiAttention
from lib.core.parameters import ParameterError, check
from lib.core.record import validate_record

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


def test_the_official_layout_runs_end_to_end(official, gsm8k, figures, tmp_path):
    parameters = {
        "model_id": str(official), "compare_with": [], "problems": str(gsm8k), "n_bootstrap": 100,
    }  # fmt: skip
    done = runs.finish(runs.start(NOTEBOOK, tmp_path, parameters, FIGURES_DIR=str(figures)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert runs.complaints(tmp_path) == []
    record = validate_record(figures / NOTEBOOK.stem / "record.json")
    assert {"dashboard.html", "answer.png"} <= set(record.artifacts)
    verdicts = {claim.id: claim for claim in record.claims}
    assert verdicts["all-carry"].verdict == "not tested"  # no twins
    assert not [claim for claim in record.claims if claim.id.startswith("rhythm")]  # nothing to compare with
    assert verdicts["even-decode"].verdict in ("holds", "fails", "unclear")
    assert f"{N_LAYERS} layers, 6 thoughts, teacher writes compact" in runs.printed(tmp_path)


@pytest.mark.parametrize("parameters", [{"n_thoughts": 0}, {"remote": True}], ids=str)
def test_parameters_that_make_no_sense_are_named(parameters):
    [culprit] = parameters
    with pytest.raises(ParameterError, match=culprit):
        check(CodiAttention, parameters)
