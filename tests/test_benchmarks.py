"""The benchmarks run, on cases cut down to seconds, and their ways measure the same thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from tiny import save_tiny

from benchmarks import induction_sweep, latents_memory, side_by_side
from benchmarks.induction_sweep import LENS
from lib import ROOT
from lib.core import models, tokens

CASE = "Qwen2.5-Coder-0.5B-Instruct"
ROUND = {method: {"seconds": s, "megabytes": m} for method, s, m in
         (("ours", 3.0, 10.0), ("straightforward", 6.0, 40.0), ("floor", 2.0, 0.0))}  # fmt: skip


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The case on a tiny Qwen2 and short walks; gives the folder of its runs."""
    settings = induction_sweep.CASES[CASE] | {"length": 60, "window": 20, "k_values": [1, 2]}
    monkeypatch.setitem(induction_sweep.CASES, CASE, settings)
    tiny, load = str(save_tiny("qwen2", tmp_path / "tiny")), models.load
    monkeypatch.setattr(models, "load", lambda name, dtype: load(tiny, dtype="float32"))
    words = list(range(2, 18))
    monkeypatch.setattr(tokens, "word_ids", lambda *_: words)
    return tmp_path


def test_ways_of_study_1_agree(small, capsys):
    found = {m: induction_sweep.measure(CASE, m, small) for m in ("ours", "straightforward", "floor")}
    assert {result["conditions"] for result in found.values()} == {7}
    assert found["ours"]["accuracy"] == pytest.approx(found["straightforward"]["accuracy"], rel=1e-4)
    assert found["floor"]["dtype"] == "float32" and (small / "heads.json").exists()
    induction_sweep.report(CASE, [found])
    printed = capsys.readouterr().out
    assert "ours against straightforward" in printed and LENS not in printed


def test_ways_agree_on_a_random_model_of_many_parameters(monkeypatch, tmp_path):
    case = "random 12-layer Llama, 32k vocabulary"
    small = {"n_walks": 2, "length": 70, "window": 30, "k_values": [1], "n_draws": 1}
    monkeypatch.setitem(induction_sweep.CASES, case, small)
    ours, straightforward = (induction_sweep.measure(case, m, tmp_path) for m in ("ours", "straightforward"))
    assert ours["accuracy"] == pytest.approx(straightforward["accuracy"], rel=1e-4)


def test_floor_computes_no_logits(small):
    task, called = induction_sweep._task(CASE, small), []
    task[0]._module.lm_head.register_forward_hook(lambda *_: called.append("logits"))
    task[0]._module.model.layers[2].register_forward_hook(lambda *_: called.append("block"))
    induction_sweep.floor(*task, 20)
    assert called == ["block"] * len(called) and called


@pytest.mark.skipif(not find_spec("transformer_lens"), reason="an extra, see pyproject.toml")
def test_transformer_lens_agrees(small):
    found = {m: induction_sweep.measure(CASE, m, small) for m in ("straightforward", LENS)}
    assert "transformer_lens" in sys.modules
    assert found[LENS]["accuracy"] == pytest.approx(found["straightforward"]["accuracy"], rel=1e-4)


def test_ways_of_study_4_agree(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(latents_memory, "CASES", {"small": {"layers": 2, "tokens": 40}})
    monkeypatch.setattr(latents_memory, "BATCH", 2)
    found = {method: latents_memory.measure("small", method, tmp_path) for method in side_by_side.METHODS}
    for name in ("attention", "mass"):
        assert found["ours"][name] == pytest.approx(found["straightforward"][name], rel=1e-4)
        assert found["ours"][name] != 0
    assert all(result["seconds"] > 0 and result["megabytes"] >= 0 for result in found.values())
    latents_memory.report("small", [found])
    assert "largest difference in mass, ours against straightforward" in capsys.readouterr().out


def test_ratios_are_of_one_round_and_the_median_of_all(capsys):
    slow = {method: cost | {"seconds": 10 * cost["seconds"]} for method, cost in ROUND.items()}
    twice = ROUND | {"ours": ROUND["straightforward"]}
    side_by_side.print_table([ROUND, slow, twice])
    ours, straightforward, _ = (line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:])
    assert ours == ["6.00", "1.50", "0.50", "10", "0.25"]
    assert straightforward == ["6.00", "3.00", "1.00", "40", "1.00"]


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


def test_every_measurement_is_a_process_of_its_own_and_one_that_fails_is_named(monkeypatch, tmp_path):
    (tmp_path / "small.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(sys, "argv", ["small", "--rounds", "1", "--threads", "1"])
    reports = []
    with pytest.raises(RuntimeError, match="broken, ours: ValueError"):
        side_by_side.main("small", "", ["first", "broken"], None, lambda *report: reports.append(report))
    [(case, [found])] = reports
    assert case == "first" and len({result["pid"] for result in found.values()}) == len(side_by_side.METHODS)
    assert found["floor"]["calls"] == [f"first {method} 1" for method in side_by_side.METHODS]
