"""The notebook of study 3: what stops it, what it finds on a known model, and kills at five points."""

from __future__ import annotations

import signal
import subprocess
import time
from math import ceil
from pathlib import Path

import papermill_runs as runs
import pytest
from holding import holding
from test_refusal_notebook import write_prompts
from tiny import save_chat

from lib import ROOT
from lib.record import Record, validate_record

NOTEBOOK = ROOT / "notebooks" / "03_refusal_low_rank.ipynb"
SMALL = {
    "model_id": "organism/refusal-lowrank", "n_prompts": 28, "k_values": [1, 2, 3], "strengths": [0.5, 1.0],
    "n_random": 1, "n_bootstrap": 100,
}  # fmt: skip


def start(folder: Path, parameters: dict, **environment: str) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    environment |= {"FIGURES_DIR": str(folder / "figures"), "CACHE_DIR": str(folder / "cache")}
    return runs.start(NOTEBOOK, folder, parameters, **environment)


def run(folder: Path, parameters: dict) -> Record:
    done = runs.finish(start(folder, parameters))
    assert done.returncode == 0, done.stderr[-3000:]
    assert runs.complaints(folder) == []
    return validate_record(record_of(folder))


def record_of(folder: Path) -> Path:
    return folder / "figures" / NOTEBOOK.stem / "record.json"


def findings(record: Record) -> tuple:
    return record.claims, record.metrics, record.artifacts


def cached(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").glob("[!.]*.npz"))


@pytest.fixture(scope="module")
def lowrank(tmp_path_factory) -> tuple[Path, Record]:
    folder = tmp_path_factory.mktemp("lowrank")
    return folder, run(folder, SMALL)


def test_known_models_are_read_right(lowrank):
    folder, record = lowrank
    verdicts = {claim.id: claim.verdict for claim in record.claims}
    assert verdicts["one-direction"] == "fails", "it was trained so"
    planted = {f"k-refusal-{name}": "holds" for name in ("planted-1", "planted-2", "planted-3", "decoy")}
    assert verdicts.items() >= (planted | {"hooks-are-the-edit": "holds"}).items()
    assert record.metrics["k_star/categories"].value == 3
    assert record.metrics["k_star/stacks, QR"].value is None
    assert record.metrics["refused, harmful requests"].value == 1
    assert "it refuses 28 of 28 harmful requests" in runs.printed(folder)


def test_model_that_refuses_nothing_stops_before_any_sweep(tmp_path):
    model = save_chat("gemma-2b-it", tmp_path / "model")
    prompts = write_prompts(tmp_path / "pairs.jsonl", 8)
    given = {"model_id": str(model), "prompts": str(prompts), "max_new_tokens": 4}
    failed = runs.finish(start(tmp_path / "run", given))
    assert failed.returncode != 0
    assert "TooFewRefusals: this model refuses 0 of 8 harmful requests of the sel" in failed.stderr
    assert not record_of(tmp_path / "run").exists()
    assert not [name for name in cached(tmp_path / "run") if name.startswith("first_token")]


def test_kills_at_five_points_change_nothing(tmp_path, lowrank):
    folder, whole = lowrank
    n = len(cached(folder))
    for share in (0.05, 0.3, 0.5, 0.7, 0.95):
        process = start(tmp_path, SMALL, **holding(tmp_path / "site", "*.npz", ceil(share * n)))
        while process.poll() is None and len(cached(tmp_path)) < share * n:
            time.sleep(0.05)
        runs.kill(process)
        assert process.returncode == -signal.SIGKILL and not record_of(tmp_path).exists()
    again = run(tmp_path, SMALL)
    assert cached(tmp_path) == cached(folder), "nothing was done twice, nothing else was done"
    assert findings(again) == findings(whole)
