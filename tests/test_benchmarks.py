"""The benchmark runs, on a case cut down to seconds, and its three ways measure the same thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks import induction_sweep, side_by_side
from lib import ROOT

CASE = "random 12-layer Llama, 32k vocabulary"
ROUND = {method: {"seconds": s, "megabytes": m} for method, s, m in
         (("ours", 3.0, 10.0), ("straightforward", 6.0, 40.0), ("floor", 2.0, 0.0))}  # fmt: skip


def test_every_method_runs_and_agrees(monkeypatch, tmp_path, capsys):
    small = {"n_walks": 2, "length": 70, "window": 30, "k_values": [1, 8], "n_draws": 2}
    monkeypatch.setitem(induction_sweep.CASES, CASE, small)
    found = {m: induction_sweep.measure(CASE, m, tmp_path) for m in side_by_side.METHODS}
    # Baseline, two sizes of two lists, two random sets.
    assert {result["conditions"] for result in found.values()} == {7}
    assert found["ours"]["accuracy"] == pytest.approx(found["straightforward"]["accuracy"], rel=1e-4)
    assert all(result["seconds"] > 0 and result["megabytes"] >= 0 for result in found.values())
    induction_sweep.report(CASE, [found])
    assert "7 conditions x 2 walks x 70 tokens" in capsys.readouterr().out


def test_ratios_are_of_one_round_and_the_median_of_all(capsys):
    slow = {method: cost | {"seconds": 10 * cost["seconds"]} for method, cost in ROUND.items()}
    twice = ROUND | {"ours": ROUND["straightforward"]}
    side_by_side.print_table([ROUND, slow, twice])
    ours, straightforward, floor = (line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:])
    assert ours == ["6.00", "1.50", "0.50", "10", "0.25"]
    assert straightforward == ["6.00", "3.00", "1.00", "40", "1.00"]
    assert floor == ["2.00", "1.00", "0.33", "0", "0.00"]
    side_by_side.print_table([{method: ROUND["floor"] for method in side_by_side.METHODS}])
    assert capsys.readouterr().out.count("nan") == 3, "no memory to compare with"


WORK = """
import json
from benchmarks.side_by_side import measured

def work():
    for megabytes in (64, 16):
        last = b"x" * (megabytes << 20)
    return len(last)

print(json.dumps([measured(work), measured(lambda: None)]))
"""


def test_memory_is_the_highest_during_the_work():
    """In a process of its own: what ran before in this one has left memory that the work would use again."""
    run = subprocess.run([sys.executable, "-c", WORK], cwd=ROOT, capture_output=True, text=True, check=True)
    (result, cost), (_, nothing) = json.loads(run.stdout)
    assert result == 2**24 and cost["seconds"] > 0
    assert 56 < cost["megabytes"] < 120
    assert nothing["megabytes"] < 16, "what came before is forgotten"


MODULE = """
import os, torch
from pathlib import Path
from benchmarks.side_by_side import main

def measure(case, method, folder):
    if case == "broken":
        raise ValueError("the third wheel is off")
    with open(folder / "calls", "a") as file:
        file.write(f"{case} {method} {torch.get_num_threads()}\\n")
    return {"pid": os.getpid(), "calls": (folder / "calls").read_text().splitlines()}

if __name__ == "__main__":
    main("small", "A small one.", [], measure, None)
"""


def run_small(cases: list[str], monkeypatch, tmp_path) -> list[tuple[str, list]]:
    """The command line of a benchmark of these cases, two rounds on one thread: what it reports."""
    (tmp_path / "small.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(sys, "argv", ["small", "--rounds", "2", "--threads", "1"])
    reports = []
    side_by_side.main(
        "small", "", cases, measure=None, report=lambda case, rounds: reports.append((case, rounds))
    )
    return reports


def test_every_measurement_is_a_process_of_its_own_and_the_ways_take_turns(monkeypatch, tmp_path):
    reports = run_small(["first", "second"], monkeypatch, tmp_path)
    assert [case for case, _ in reports] == ["first", "second"]
    for case, rounds in reports:
        assert [list(found) for found in rounds] == [list(side_by_side.METHODS)] * 2
        assert len({result["pid"] for found in rounds for result in found.values()}) == 6
        assert rounds[-1]["floor"]["calls"] == [f"{case} {method} 1" for method in side_by_side.METHODS] * 2


def test_child_that_fails_is_named(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="broken, ours: ValueError: the third wheel is off"):
        run_small(["broken"], monkeypatch, tmp_path)
