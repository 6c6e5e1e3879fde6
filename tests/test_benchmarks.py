"""The benchmark runs, on a case cut down to seconds, and its three ways measure the same thing."""

from __future__ import annotations

import pytest
import torch

from benchmarks import induction_sweep

CASE = "random 12-layer Llama, 32k vocabulary"


def test_every_method_runs_and_agrees(monkeypatch, tmp_path, capsys):
    small = {"n_walks": 2, "length": 70, "k_values": [1, 8], "n_draws": 2}
    monkeypatch.setitem(induction_sweep.CASES, CASE, small)
    threads = torch.get_num_threads()  # which `measure` sets
    found = {m: induction_sweep.measure(CASE, m, tmp_path, threads) for m in induction_sweep.METHODS}
    # Baseline, two sizes of two lists, two random sets.
    assert {result["conditions"] for result in found.values()} == {7}
    assert found["ours"]["accuracy"] == pytest.approx(found["straightforward"]["accuracy"], rel=1e-4)
    assert all(result["seconds"] > 0 and result["megabytes"] >= 0 for result in found.values())
    induction_sweep.report(CASE, [found])
    assert "ours" in capsys.readouterr().out
