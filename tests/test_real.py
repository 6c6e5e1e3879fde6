"""The stored notebooks against a fresh run of them on their own models, by values: `make test-real`.

`make test` leaves that out, because the models have to be fetched. What `make real` left stands for the fresh
run where it is whole, and of this code and of the notebook and parameters that are stored. Appendix 3b is
left out: gradient descent in bfloat16 may end elsewhere on another processor.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lib import ROOT
from lib.core import attention, models, statistics, tokens
from lib.core.cache import code_version, versions
from lib.core.interventions import Condition
from lib.core.parameters import schemas
from lib.core.record import STORED_FIGURES, Record, RecordError, validate_record
from lib.core.sweeps import ablation_sweep
from lib.induction import geometry, walks
from lib.induction.parameters import GRID_WORDS
from lib.tools import compare

FRESH_FIGURES = ROOT / "runs" / "real" / "figures"
STUDIES = sorted(path.stem for path in (ROOT / "notebooks").rglob("[0-9][0-9a-z]_*.ipynb"))
STUDIES.remove("3b_refusal_by_gradient")


@pytest.mark.real
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("study", STUDIES)
def test_fresh_run_agrees_with_what_is_stored(study, capsys):
    stored, fresh = (folder / study / "record.json" for folder in (STORED_FIGURES, FRESH_FIGURES))
    if not is_fresh(fresh, validate_record(stored)):
        with capsys.disabled():
            run(study)
    assert compare.main([str(stored), str(fresh), "--by-values"]) == 0


def code_of(study: str) -> str:
    return code_version(schemas()[study].wing())


def is_fresh(path: Path, stored: Record) -> bool:
    """Whether a record stands for a fresh run of what is stored."""
    try:
        record = validate_record(path)
    except RecordError:
        return False
    of_today = (stored.parameters, stored.notebook, code_of(stored.study), versions())
    return (record.parameters, record.notebook, record.code, record.versions) == of_today


def run(study: str) -> None:
    outside = {name: value for name, value in os.environ.items() if name != "FIGURES_DIR"}
    words = ["-m", "lib", "run", "--real", "--study", study]
    status = subprocess.run([sys.executable, *words], cwd=ROOT, env=outside).returncode
    assert status == 0, f"python {' '.join(words)} failed; it said why above"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"started": "2020-01-01T00:00:00Z"}, True),
        ({"code": "0" * 16}, False),
        ({"notebook": "0" * 16}, False),
        ({"parameters": {"seed": 1}}, False),
        ({"versions": {}}, False),
        ({"metrics": "none"}, False),
    ],
)
def test_run_of_other_code_or_parameters_is_not_fresh(tmp_path, change, expected):
    shutil.copytree(STORED_FIGURES / "00_start_here", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "record.json"
    stored = validate_record(path)
    today = {"code": code_of(stored.study), "versions": versions()}
    path.write_text(json.dumps(json.loads(path.read_text()) | today | change))
    assert is_fresh(path, stored) is expected


@pytest.mark.real
@pytest.mark.timeout(3600)
def test_first_look_by_plain_torch_is_found_again():
    """Qwen on the words' given order, without an opening token: accuracies and energies of a first look.

    That look was made with plain torch, before this library could read the model: four walks for energies,
    two for accuracies, over the last fifth. Eight walks here, as one walk has an SD of .03 to .05.
    """
    model = models.load("Qwen2.5-Coder-0.5B-Instruct")
    grid = walks.grid_graph(4, 4, GRID_WORDS)
    scores = attention.head_scores(model, tokens.plain_token_ids(model))
    heads = [attention.top_heads(kind) for kind in (scores.induction, scores.previous_token)]
    conditions = [Condition("baseline"), *(Condition("top", of[:k]) for of in heads for k in (8, 32))]
    nodes = walks.random_walks(grid, 8, 400, seed=0)
    words = tokens.word_ids(model, GRID_WORDS)
    sweep = ablation_sweep(
        model, tokens.with_bos(model, np.array(words)[nodes], "none"), conditions, word_ids=words,
        positions=np.arange(320, 400), labels=np.where(np.arange(400) >= 200, nodes, -1), n_classes=16,
        layers=[16, 20, 22, 24], n_prefix=0,
    )  # fmt: skip
    followed = walks.rule_following_accuracy(sweep.word_probabilities, nodes[:, 320:], grid).mean((1, 2))
    assert followed == pytest.approx([0.728, 0.581, 0.163, 0.278, 0.187], abs=0.05)
    of_four = statistics.means_of(sweep.class_sums[0, :4].sum(0), sweep.class_counts[:4].sum(0))
    assert geometry.plane_energies(of_four, grid) == pytest.approx([2.01, 2.16, 0.94, 0.74], abs=0.2)
