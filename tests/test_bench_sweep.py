"""The benchmark of study 1's sweep: a case of a pretrained model, every way beside the others."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import save_tiny

from benchmarks import induction_sweep, side_by_side
from benchmarks.induction_sweep import LENS
from lib import models

CASE = "Qwen2.5-Coder-0.5B-Instruct"


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The case on a tiny Qwen2 and short walks; gives the folder of its runs."""
    settings = induction_sweep.CASES[CASE] | {"length": 60, "window": 20, "k_values": [1, 2]}
    monkeypatch.setitem(induction_sweep.CASES, CASE, settings)
    tiny, load = str(save_tiny("qwen2", tmp_path / "tiny")), models.load
    monkeypatch.setattr(models, "load", lambda name, dtype: load(tiny, dtype="float32"))
    words = list(range(2, 18))
    monkeypatch.setattr(models, "word_ids", lambda *_: words)
    return tmp_path


def test_ways_agree_on_a_pretrained_model(small, capsys):
    found = {m: induction_sweep.measure(CASE, m, small) for m in ("ours", "straightforward", "floor")}
    assert {result["conditions"] for result in found.values()} == {7}
    assert found["ours"]["accuracy"] == pytest.approx(found["straightforward"]["accuracy"], rel=1e-4)
    assert found["floor"]["dtype"] == "float32" and (small / "heads.json").exists()
    induction_sweep.report(CASE, [found])
    printed = capsys.readouterr().out
    assert "float32: 7 conditions x 1 walks x 60 tokens, of which the last 20 are read" in printed
    assert "ours against straightforward" in printed and LENS not in printed


def test_floor_computes_no_logits(small):
    task, called = induction_sweep._task(CASE, small), []
    task[0]._module.lm_head.register_forward_hook(lambda *_: called.append("logits"))
    task[0]._module.model.layers[2].register_forward_hook(lambda *_: called.append("block"))
    induction_sweep.floor(*task, 20)
    assert called == ["block"] * len(called) and called


def test_transformer_lens_that_is_not_installed_is_left_out(small, monkeypatch, capsys):
    monkeypatch.setattr(induction_sweep, "find_spec", lambda name: None)
    found = {m: induction_sweep.measure(CASE, m, small) for m in ("ours", LENS)}
    assert found[LENS] == {"missing": "not installed: pip install -e '.[bench-lens]'"}
    side_by_side.print_table([found | {m: found["ours"] for m in ("straightforward", "floor")}])
    assert f"{LENS:16s}not installed: pip install" in capsys.readouterr().out


def test_heads_are_ablated_by_hook_z(monkeypatch):
    """Without TransformerLens: what its model would be asked."""
    calls = []

    def run_with_hooks(ids, fwd_hooks):
        calls.append([name for name, _ in fwd_hooks])
        for name, hook in fwd_hooks:
            x = torch.ones(1, 5, 3, 2) if name.endswith("hook_z") else torch.ones(1, 5, 4)
            zeroed = hook(x, hook=None)
            if name.endswith("hook_z"):
                assert (zeroed[:, :, 2] == 0).all() and (zeroed[:, :, :2] == 1).all()
        return torch.zeros(1, 5, 8)

    bridge = SimpleNamespace(run_with_hooks=run_with_hooks)
    monkeypatch.setattr(induction_sweep, "_bridge", lambda model: bridge)
    model = SimpleNamespace(_module=SimpleNamespace(config=SimpleNamespace(num_hidden_layers=2)))
    graph = SimpleNamespace(n_nodes=2, adjacency=np.array([[0, 1], [1, 0]], dtype=bool))
    conditions = [SimpleNamespace(heads={(1, 2)})]
    ids, walks = torch.zeros(1, 5, dtype=torch.long), np.array([[0, 1, 0, 1]])
    accuracy = induction_sweep.lens(model, ids, walks, graph, [3, 4], conditions, 2)
    assert accuracy == pytest.approx(1 / 8), "logits that are all the same"
    assert calls == [
        [
            "blocks.0.hook_resid_pre",
            "blocks.1.attn.hook_z",
            "blocks.1.hook_resid_pre",
            "blocks.1.hook_resid_post",
        ]
    ]


@pytest.mark.skipif(not find_spec("transformer_lens"), reason="an extra, see pyproject.toml")
def test_transformer_lens_agrees(small):
    found = {m: induction_sweep.measure(CASE, m, small) for m in ("straightforward", LENS)}
    assert "transformer_lens" in sys.modules
    assert found[LENS]["accuracy"] == pytest.approx(found["straightforward"]["accuracy"], rel=1e-4)
