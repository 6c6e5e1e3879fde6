"""The benchmark of study 3 runs, on cases cut down to seconds, and its ways give the same answers."""

from __future__ import annotations

import pytest

from benchmarks import refusal_sweep
from benchmarks.side_by_side import METHODS
from lib.refusal.generation import chat_ids
from lib.refusal.prompts import prompts_for

SMALL = {"n_prompts": 5, "new_tokens": 4, "k_values": [1, 3], "n_draws": 1}
ORGANISM = "organism/refusal-lowrank"
FROM_BLOCK_4 = "random 6-layer Llama, from block 4"


@pytest.mark.parametrize(("case", "n_conditions"), [(ORGANISM, 11), (FROM_BLOCK_4, 14)])
def test_every_method_runs_and_agrees(case, n_conditions, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(refusal_sweep.CASES, case, refusal_sweep.CASES[case] | SMALL)
    found = {m: refusal_sweep.measure(case, m, tmp_path) for m in METHODS}
    assert {result["conditions"] for result in found.values()} == {n_conditions}
    assert len({result["answers"] for result in found.values()}) == 1
    assert all(result["seconds"] > 0 and result["megabytes"] >= 0 for result in found.values())
    refusal_sweep.report(case, [found])
    printed = capsys.readouterr().out
    assert f"{n_conditions} conditions x 5 prompts" in printed
    assert "straightforward are the same: yes" in printed
    found["straightforward"]["answers"] = "others"
    refusal_sweep.report(case, [found])
    assert "straightforward are the same: NO" in capsys.readouterr().out


def test_organism_gets_the_requests_and_subspaces_of_the_study(tmp_path):
    model, prompts, conditions = refusal_sweep._task(ORGANISM, tmp_path)
    requests = prompts_for(ORGANISM)
    assert prompts == chat_ids(model, requests.harmful("test") + requests.harmless("test"))
    methods = {condition.name.rstrip("0123456789# ") for condition in conditions}
    assert methods == {"intact", "layers", "categories", "pairs", "random", "random in the stream"}
