"""The benchmark of study 3 runs, on cases cut down to seconds, and its ways give the same answers."""

from __future__ import annotations

import pytest

from benchmarks import refusal_sweep
from benchmarks.side_by_side import METHODS
from lib.generation import chat_ids
from lib.models import shape
from lib.prompts import prompts_for

SMALL = {"n_prompts": 5, "new_tokens": 4, "k_values": [1, 3], "n_draws": 1}


@pytest.mark.parametrize("case", refusal_sweep.CASES)
def test_every_method_runs_and_agrees(case, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(refusal_sweep.CASES, case, refusal_sweep.CASES[case] | SMALL)
    found = {m: refusal_sweep.measure(case, m, tmp_path) for m in METHODS}
    # Intact, what is removed, what is added.
    removed = 10 if case.startswith("organism/") else 8
    added = 5 if case.endswith("from block 4") else 0
    assert {result["conditions"] for result in found.values()} == {1 + removed + added}
    assert len({result["answers"] for result in found.values()}) == 1
    if case.startswith("random"):
        assert {result["tokens"] for result in found.values()} == {(1 + removed + added) * 5 * 4}
    assert all(result["seconds"] > 0 and result["megabytes"] >= 0 for result in found.values())
    refusal_sweep.report(case, [found])
    printed = capsys.readouterr().out
    assert f"{1 + removed + added} conditions x 5 prompts" in printed
    assert "straightforward are the same: yes" in printed
    found["straightforward"]["answers"] = "others"
    refusal_sweep.report(case, [found])
    assert "straightforward are the same: NO" in capsys.readouterr().out


def test_organism_gets_the_requests_and_subspaces_of_the_study(tmp_path):
    name = "organism/refusal-lowrank"
    model, prompts, conditions = refusal_sweep._task(name, tmp_path)
    requests = prompts_for(name)
    assert prompts == chat_ids(model, requests.harmful("test") + requests.harmless("test"))
    methods = {condition.name.rstrip("0123456789# ") for condition in conditions}
    assert methods == {"intact", "layers", "categories", "pairs", "random", "random in the stream"}
    assert {len(c.basis) for c in conditions if c.name.startswith("pairs")} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("case", [case for case in refusal_sweep.CASES if case.endswith("from block 4")])
def test_nothing_is_done_below_the_first_block_of_a_case(case, tmp_path):
    model, _, conditions = refusal_sweep._task(case, tmp_path)
    assert {c.layers for c in conditions if c.removes} == {range(4, shape(model).n_layers)}
    assert {c.shift[0] for c in conditions if c.shift} == {4}
    assert sum(c.shift is not None for c in conditions) == 5
