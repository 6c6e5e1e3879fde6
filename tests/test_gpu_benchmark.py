"""The benchmark for GPUs runs whole at a size of seconds on a CPU; its real sizes are those of the models."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import gpu, induction_sweep
from lib import ROOT

WAYS = ["ours", "one condition at a time", "straightforward", "floor"]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("gpu") / "gpu.md"
    gpu.main(["--config", "tiny", "--device", "cpu", "--rounds", "1", "--out", str(out)])
    return out.read_text()


def test_every_study_is_measured_in_every_way(report):
    assert f"torch {torch.__version__}" in report and "`python -m benchmarks.gpu --config tiny" in report
    sections = dict(re.findall(r"## (Study \d, [\w -]+).*?\n(.*?)(?=\n## |\Z)", report, re.DOTALL))
    ways = {
        title: re.findall(r"^\| ([a-z ]+) \| \d+\.\d\d \| (?:\d+\.\d\d|-) \| \d+ \|$", text, re.MULTILINE)
        for title, text in sections.items()
    }
    assert ways == {
        "Study 1, head scores": WAYS[:1],
        "Study 1, ablation sweep": WAYS,
        "Study 3, k-sweep": WAYS,
        "Study 4, reading": [WAYS[0], *WAYS[2:]],
    }
    for title in ("Study 1, ablation sweep", "Study 3, k-sweep"):
        assert re.search(
            r"Conditions in one batch: \d+\.\d\d times as fast as one at a time", sections[title]
        )


def test_the_ways_do_the_same_work(report):
    differences = re.findall(r"differs? by ([\d.e+-]+\d)(?: and ([\d.e+-]+\d))?", report)
    assert len(differences) == 3
    assert all(float(value) < 1e-5 for pair in differences for value in pair if value)
    assert re.findall(r"(\d+) of (\d+) answers are the same", report) == [("27", "27")] * 2


def test_without_a_gpu_it_stops_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no CUDA device: torch sees none here" in capsys.readouterr().err


def test_real_sizes_are_those_of_llama_and_its_protocol():
    settings = gpu.CONFIGS["real"]
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(LlamaConfig(**settings["llama"]), dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in module.parameters()) == 8_030_261_248
    narrow = settings["llama"] | {"hidden_size": 64, "intermediate_size": 8, "vocab_size": 200}
    model = gpu.random_model(narrow, "cpu", "float32")
    heads = [(layer, head) for layer in range(32) for head in range(32)]
    ranked = {"induction": heads[:32], "previous token": heads[32:64]}
    ids, *_, conditions = induction_sweep.protocol(model, list(range(100, 116)), ranked, **settings["walks"])
    assert ids.shape == (16, 1401) and len(conditions) == 17


def test_numbers_are_of_a_run_or_said_to_be_missing():
    text = (ROOT / "benchmarks" / "gpu.md").read_text()
    assert "No GPU has been measured yet" in text or re.search(r"^Device: .*CUDA", text, re.MULTILINE)
