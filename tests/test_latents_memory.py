"""The benchmark of study 4 runs, on a case cut down to seconds, and its ways measure the same thing."""

from __future__ import annotations

import pytest

from benchmarks import latents_memory
from benchmarks.side_by_side import METHODS


def test_every_method_runs_and_agrees(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(latents_memory, "CASES", {"small": {"layers": 2, "tokens": 40}})
    monkeypatch.setattr(latents_memory, "BATCH", 2)
    found = {method: latents_memory.measure("small", method, tmp_path) for method in METHODS}
    for name in ("attention", "mass"):
        assert found["ours"][name] == pytest.approx(found["straightforward"][name], rel=1e-4)
        assert found["ours"][name] != 0
    assert all(result["seconds"] > 0 and result["megabytes"] >= 0 for result in found.values())
    latents_memory.report("small", [found])
    assert "largest difference in mass, ours against straightforward" in capsys.readouterr().out
