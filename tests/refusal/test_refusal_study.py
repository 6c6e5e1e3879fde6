"""The notebook of study 3: what it finds on a known model, and a kill half-way."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import papermill_runs as runs
import pytest
from holding import holding

from lib import ROOT
from lib.core.record import Record, validate_record

NOTEBOOK = ROOT / "notebooks" / "03_refusal_low_rank.ipynb"
SMALL = {
    "model_id": "organism/refusal-lowrank", "n_prompts": 28, "k_values": [1, 2, 3], "strengths": [0.5, 1.0],
    "n_random": 1, "n_bootstrap": 100,
}  # fmt: skip


def start(folder: Path, **environment: str) -> subprocess.Popen:
    environment |= {"FIGURES_DIR": str(folder / "figures"), "CACHE_DIR": str(folder / "cache")}
    return runs.start(NOTEBOOK, folder, SMALL, **environment)


def run(folder: Path) -> Record:
    done = runs.finish(start(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    assert runs.complaints(folder) == []
    return validate_record(record_of(folder))


def record_of(folder: Path) -> Path:
    return folder / "figures" / NOTEBOOK.stem / "record.json"


def cached(folder: Path) -> dict[str, int]:
    """Entries of the cache, with the times of their writing."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cache").glob("[!.]*.npz")}


@pytest.fixture(scope="module")
def lowrank(tmp_path_factory) -> tuple[Path, Record]:
    folder = tmp_path_factory.mktemp("lowrank")
    return folder, run(folder)


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


def test_killed_run_ends_with_the_same_findings(tmp_path, lowrank):
    folder, whole = lowrank
    half = len(cached(folder)) // 2
    process = start(tmp_path, **holding(tmp_path / "site", "*.npz", half))
    while process.poll() is None and len(cached(tmp_path)) < half:
        time.sleep(0.05)
    runs.kill(process)
    assert process.returncode == -signal.SIGKILL and not record_of(tmp_path).exists()
    before = cached(tmp_path)
    again = run(tmp_path)
    after = cached(tmp_path)
    assert before.items() < after.items() and after.keys() == cached(folder).keys(), "nothing is done twice"
    for name in ("claims", "metrics", "artifacts"):
        assert getattr(again, name) == getattr(whole, name)
