"""Appendix 3a on chat models of every layout, and with a model as judge.

The stand-ins are tiny and random: what they answer means nothing, and the notebook has to say so.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import papermill_runs as runs
import pytest
from api_server import ApiServer, Reply
from tiny import CHAT_MODELS, WORDS, save_chat

from lib import ROOT
from lib.core.record import Record, validate_record
from lib.refusal.prompts import SPLITS

NOTEBOOK = ROOT / "notebooks" / "appendix" / "3a_refusal_instrument.ipynb"
SMALL = {
    "compare_with": [], "judge": "phrases", "max_new_tokens": 4, "k_values": [1, 2], "n_random": 1,
    "strengths": [0.5], "n_bootstrap": 100, "n_draws": 3,
}  # fmt: skip

LAYOUTS = [name for name in CHAT_MODELS if "Llama-3.2" not in name]  # theirs is that of Llama-3.1


class Run(NamedTuple):
    """A run that ended.

    Attributes:
        folder: holds out.ipynb, figures/ and cache/.
    """

    folder: Path
    record: Record

    @property
    def printed(self) -> str:
        return runs.printed(self.folder)


def run(folder: Path, parameters: dict, **environment: str) -> Run:
    """Run to the end, which leaves a valid record and no warning."""
    environment |= {"FIGURES_DIR": str(folder / "figures"), "CACHE_DIR": str(folder / "cache")}
    done = runs.finish(runs.start(NOTEBOOK, folder, parameters, **environment))
    assert done.returncode == 0, done.stderr[-3000:]
    assert runs.complaints(folder) == []
    return Run(folder, validate_record(record_of(folder)))


def record_of(folder: Path) -> Path:
    return folder / "figures" / NOTEBOOK.stem / "record.json"


def write_prompts(path: Path, n: int) -> Path:
    """A file of n pairs in two categories and n harmless requests a split, of the stand-ins' words.

    To extract from there are six.
    """
    rng, texts, rows = np.random.default_rng(0), set(), []

    def new_text() -> str:
        while True:
            text = " ".join(rng.choice(WORDS, size=rng.integers(2, 6)))
            if text not in texts:
                texts.add(text)
                return text

    for split in SPLITS:
        for i in range(6 if split == "extraction" else n):
            shared = {"pair": f"{split} {i}", "category": ("fruit", "road")[i % 2], "split": split}
            rows += [{**shared, "label": label, "text": new_text()} for label in ("harmful", "safe")]
            rows.append({"split": split, "label": "harmless", "text": new_text()})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, str]:
    """Folder of a stand-in for a chat model of each layout."""
    folder = tmp_path_factory.mktemp("chat")
    return {name: str(save_chat(name, folder / name)) for name in LAYOUTS}


# --- the chat models of the published table


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory, stand_ins) -> Run:
    """One run on all stand-ins, Qwen3 in question."""
    folder, (first, *others) = tmp_path_factory.mktemp("chat-run"), stand_ins.values()
    prompts = write_prompts(folder / "pairs.jsonl", 6)
    return run(folder, SMALL | {"model_id": first, "compare_with": others, "prompts": str(prompts)})


def test_every_chat_layout_runs_to_a_valid_record(chat_run, stand_ins):
    measured = [model["model_id"] for model in chat_run.record.models]
    assert measured == [*stand_ins.values()]
    names = {metric.split("/")[1] for metric in chat_run.record.metrics if metric.startswith("k_star/")}
    assert names == {*LAYOUTS}
    assert chat_run.printed.count("not optimised") == len(names), "there are no right answers to descend to"


def test_what_can_not_be_said_of_them_is_not_tested_and_says_why(chat_run):
    claims = {claim.id: claim for claim in chat_run.record.claims}
    line = r"^(\S+) +complies with \S+ of forbidden, \S+ of harmless requests *(.*)$"
    without_refusal = dict(re.findall(line, chat_run.printed, re.MULTILINE))
    assert without_refusal.keys() == {*LAYOUTS}
    assert without_refusal["Qwen3-1.7B"] == "it refuses next to nothing"
    for name, said in without_refusal.items():
        one = claims[f"one-direction-{name}"]
        ranks = [m for key, m in chat_run.record.metrics.items() if key.startswith(f"k_star/{name}/")]
        assert len(ranks) == 4
        if said:
            assert one.verdict == "not tested" and said in one.reason and name in one.reason
            assert {(rank.value, rank.reason) for rank in ranks} == {(None, said)}
        else:
            assert one.verdict != "not tested" and one.measured is not None
    for id in ("stack-beats-one", "several-beat-one", "random-does-not", "added-induces"):
        assert claims[id].verdict == "not tested", "it is about the model in question, which refuses nothing"
        assert "Qwen3-1.7B: it refuses next to nothing" in claims[id].reason


def test_record_says_which_layer_was_chosen_and_whether_it_passed(chat_run):
    metrics = chat_run.record.metrics
    kl_by_layer = np.load(record_of(chat_run.folder).parent / "layers.npz")
    for name in LAYOUTS:
        layer, kl = metrics[f"chosen_layer/{name}"], metrics[f"chosen_layer_kl/{name}"]
        assert kl.value == pytest.approx(kl_by_layer[f"{name} KL"][int(layer.value) - 1].mean(), rel=1e-5)
        assert (layer.reason == "no layer passes the filters") == (kl.value > 0.1)
    assert "no layer passes the filters" in chat_run.printed


def test_numbers_of_the_figures_are_finite(chat_run):
    folder = record_of(chat_run.folder).parent
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            assert file.files, path
            for name, values in file.items():
                assert np.isfinite(values).all(), f"{path.name}: {name}"


def test_statements_of_the_stored_run_are_its_own():
    record = validate_record(ROOT / "figures" / NOTEBOOK.stem / "record.json")
    assert len({claim.statement for claim in record.claims}) == len(record.claims)
    intervals = [claim.interval for claim in record.claims if claim.interval]
    assert intervals and all(low < high for low, high in intervals), "none without a width"


# --- a model as judge


@pytest.fixture(scope="module")
def judged_run(tmp_path_factory, stand_ins) -> tuple[Run, list[dict]]:
    """A run judged by a model, and the verdicts that it wrote down.

    It grades by the text, and never finds a grade for one request. There are 26 pairs a split, so that one
    bad verdict is below 2%.
    """
    folder = tmp_path_factory.mktemp("judged-run")
    prompts = write_prompts(folder / "pairs.jsonl", 26)
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    forbidden = [row["text"] for row in rows if row["label"] == "harmful" and row["split"] == "test"]

    def reply(question: str, number: int) -> Reply:
        request, draw = json.loads(question)["request"], hashlib.sha256(question.encode()).digest()
        if request == forbidden[0]:
            return Reply("It complies.")
        compliance = (0, 0, 0.5, 1) if request in forbidden else (0.5, 1, 1, 1)
        grades = {"compliance": compliance[draw[2] % 4], "coherence": int(draw[3] % 3 > 0)}
        return Reply(json.dumps({"reason": "by its hash", **grades}))

    with ApiServer(reply) as server:
        judge = {"judge": "openai", "judge_url": server.url, "judge_model": "judge"}
        parameters = SMALL | judge | {"model_id": stand_ins["gemma-2b-it"], "prompts": str(prompts)}
        done = run(folder, parameters, DEEPSEEK_API_KEY="a-secret-key")
    verdicts = [json.loads(line) for line in (folder / "cache" / "verdicts.jsonl").read_text().splitlines()]
    assert len(verdicts) == len(server.answered)
    return done, verdicts


def test_judged_run_asks_each_question_once_and_keeps_the_key_to_itself(judged_run):
    done, verdicts = judged_run
    assert len({verdict["key"] for verdict in verdicts}) == len(verdicts) > 100
    for path in done.folder.rglob("*"):
        assert path.is_dir() or b"a-secret-key" not in path.read_bytes(), path


def test_verdict_that_is_none_is_left_out_and_counted(judged_run):
    done, verdicts = judged_run
    invalid = [verdict["reason"] for verdict in verdicts if verdict["compliance"] is None]
    assert invalid and all("not JSON" in reason for reason in invalid)
    claims = {claim.id: claim for claim in done.record.claims}
    assert claims["one-direction-gemma-2b-it"].n == "25 requests in 2 categories", "of 26"
    assert claims["added-induces"].n == "26 requests"
    assert "nan" not in done.printed
    with np.load(record_of(done.folder).parent / "controls.npz") as file:
        assert np.isnan(file["best"]).sum(0).tolist() == [1, 1]
        assert np.isfinite(file["equal_kl"]).all()
