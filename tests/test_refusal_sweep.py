"""The benchmark of study 3 runs, on a case cut down to seconds, and its ways give the same answers."""

from __future__ import annotations

import torch

from benchmarks import refusal_sweep

CASE = "random 6-layer Llama, d 128"


def test_every_method_runs_and_agrees(monkeypatch, tmp_path, capsys):
    small = {"n_prompts": 5, "new_tokens": 4, "k_values": [1, 3], "n_draws": 1}
    monkeypatch.setitem(refusal_sweep.CASES, CASE, small)
    threads = torch.get_num_threads()  # which `measure` sets
    found = {m: refusal_sweep.measure(CASE, m, tmp_path, threads) for m in refusal_sweep.METHODS}
    assert {result["conditions"] for result in found.values()} == {5}
    assert {result["tokens"] for result in found.values()} == {5 * 5 * 4}
    assert len({result["answers"] for result in found.values()}) == 1
    assert all(result["seconds"] > 0 and result["megabytes"] >= 0 for result in found.values())
    refusal_sweep.report(CASE, [found])
    printed = capsys.readouterr().out
    assert "ours" in printed and "straightforward are the same: yes" in printed
    found["straightforward"]["answers"] = "others"
    refusal_sweep.report(CASE, [found])
    assert "straightforward are the same: NO" in capsys.readouterr().out
