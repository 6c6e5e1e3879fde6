"""The stored notebooks against a fresh run of them on their own models, by values: `make test-real`.

`make test` leaves that out, because the models have to be fetched. What `make real` left stands for the fresh
run where it is whole, and of this code and of the notebook and parameters that are stored.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib import ROOT, compare
from lib.record import STORED_FIGURES, Record, RecordError, code_version, validate_record, versions

FRESH_FIGURES = ROOT / "runs" / "real" / "figures"
STUDIES = sorted(path.stem for path in (ROOT / "notebooks").rglob("[0-9][0-9a-z]_*.ipynb"))


@pytest.mark.real
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("study", STUDIES)
def test_fresh_run_agrees_with_what_is_stored(study, capsys):
    stored, fresh = (folder / study / "record.json" for folder in (STORED_FIGURES, FRESH_FIGURES))
    if not is_fresh(fresh, validate_record(stored)):
        with capsys.disabled():
            run(study)
    assert compare.main([str(stored), str(fresh), "--by-values"]) == 0


def is_fresh(path: Path, stored: Record) -> bool:
    """Whether a record stands for a fresh run of what is stored."""
    try:
        record = validate_record(path)
    except RecordError:
        return False
    of_today = (stored.parameters, stored.notebook, code_version(), versions())
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
    today = {"code": code_version(), "versions": versions()}
    path.write_text(json.dumps(json.loads(path.read_text()) | today | change))
    assert is_fresh(path, stored) is expected
