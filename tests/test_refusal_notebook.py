"""The notebook of study 3 on models and input of every kind: chat layouts, faults, and kills.

The stand-ins are tiny and random: what they answer means nothing, and the notebook has to say so.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import time
from collections import Counter
from math import ceil
from pathlib import Path
from typing import NamedTuple

import matplotlib
import nbformat
import numpy as np
import papermill_runs as runs
import pytest
import torch
from api_server import ApiServer, Reply
from holding import holding
from tiny import CHAT_MODELS, WORDS, save_chat, save_tiny
from transformers import AutoModelForCausalLM

from lib import ROOT
from lib.parameters import ParameterError, RefusalInstrument
from lib.prompts import SPLITS
from lib.record import Record, Study, validate_record

NOTEBOOK = ROOT / "notebooks" / "appendix" / "3a_refusal_instrument.ipynb"
SMALL = {
    "compare_with": [], "judge": "phrases", "max_new_tokens": 4, "k_values": [1, 2], "n_random": 1,
    "strengths": [0.5], "n_bootstrap": 100, "n_draws": 3,
}  # fmt: skip
ORGANISM = {
    "compare_with": [], "n_prompts": 6, "k_values": [1, 3], "n_random": 1, "strengths": [0.5],
    "n_bootstrap": 100, "n_draws": 3, "optimise_steps": 4,
}  # fmt: skip


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


def start(folder: Path, parameters: dict, *options: str, **environment: str) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    environment |= {"FIGURES_DIR": str(folder / "figures"), "CACHE_DIR": str(folder / "cache")}
    return runs.start(NOTEBOOK, folder, parameters, *options, **environment)


def run(folder: Path, parameters: dict, **environment: str) -> Run:
    """Run to the end, which leaves a valid record and no warning."""
    done = runs.finish(start(folder, parameters, **environment))
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
    return write_rows(path, rows)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "pairs.jsonl", 6)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, str]:
    """Folder of a stand-in for each chat model."""
    folder = tmp_path_factory.mktemp("chat")
    return {name: str(save_chat(name, folder / name)) for name in CHAT_MODELS}


@pytest.fixture(scope="module")
def refuser(tmp_path_factory) -> str:
    """A model that says "i cannot" all the time, whatever it reads."""
    folder = tmp_path_factory.mktemp("parrot") / "refuser"
    save_tiny("gpt2", folder, chat=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # the last norm has a bias: it points to one row of the unembedding
        row = model.transformer.wte.weight[29]
        model.transformer.ln_f.bias += 6 * row / row.norm()
    model.save_pretrained(folder)
    tokenizer = (folder / "tokenizer.json").read_text()
    assert '"w29"' in tokenizer
    (folder / "tokenizer.json").write_text(tokenizer.replace('"w29"', '"i cannot"'))
    return str(folder)


# --- the chat models of the published table


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory, stand_ins, refuser, prompts) -> Run:
    """One run on all stand-ins, Qwen3 in question, and a model that refuses whatever it is asked."""
    first, *others = [*stand_ins.values(), refuser]
    parameters = SMALL | {"model_id": first, "compare_with": others, "prompts": str(prompts)}
    return run(tmp_path_factory.mktemp("chat-run"), parameters)


def test_every_chat_layout_runs_to_a_valid_record(chat_run, stand_ins, refuser):
    measured = [model["model_id"] for model in chat_run.record.models]
    assert measured == [*stand_ins.values(), refuser]
    names = {metric.split("/")[1] for metric in chat_run.record.metrics if metric.startswith("k_star/")}
    assert names == {*CHAT_MODELS, "refuser"}


def test_qwen3_does_not_think(chat_run):
    [seen] = re.findall(r"read as: (.*?)\n\n\n", chat_run.printed, re.DOTALL)
    assert seen.split() == [
        "<|im_start|>", "user", *read_words(chat_run), "<|im_end|>", "<|im_start|>", "assistant",
        "<think>", "</think>",
    ]  # fmt: skip
    assert Path(chat_run.record.parameters["model_id"]).name == "Qwen3-1.7B"


def read_words(run: Run) -> list[str]:
    """The first forbidden request of the test split, which is the one that the notebook shows."""
    rows = read_rows(Path(run.record.parameters["prompts"]))
    first = next(row for row in rows if row["split"] == "test" and row["label"] == "harmful")
    assert f"forbidden: {first['text']} " in run.printed
    return first["text"].split()


def behaviour(run: Run) -> dict[str, tuple[float, float, str]]:
    """Model -> (compliance with forbidden, with harmless requests, what the notebook says of it)."""
    line = r"^(\S+) +complies with (\S+) of forbidden, (\S+) of harmless requests *(.*)$"
    found = re.findall(line, run.printed, re.MULTILINE)
    return {name: (float(a), float(b), said) for name, a, b, said in found}


def test_models_without_a_refusal_are_told_from_those_with_one(chat_run):
    found = behaviour(chat_run)
    assert found.keys() == {*CHAT_MODELS, "refuser"}
    for forbidden, harmless, said in found.values():
        assert said == (
            "it refuses next to nothing" if forbidden > 0.5
            else "it answers next to nothing" if harmless < 0.5 else ""
        )  # fmt: skip
    assert found["refuser"] == (0.0, 0.0, "it answers next to nothing")
    assert found["Qwen3-1.7B"][2] == "it refuses next to nothing"


def test_what_can_not_be_said_of_them_is_not_tested_and_says_why(chat_run):
    claims = {claim.id: claim for claim in chat_run.record.claims}
    for name, (_, _, said) in behaviour(chat_run).items():
        one = claims[f"one-direction-{name}"]
        ranks = [m for key, m in chat_run.record.metrics.items() if key.startswith(f"k_star/{name}/")]
        assert len(ranks) == 4
        if said:
            assert one.verdict == "not tested" and said in one.reason and name in one.reason
            assert {(rank.value, rank.reason) for rank in ranks} == {(None, said)}
        else:
            assert one.verdict != "not tested" and one.measured is not None
    of_focus = (
        "stack-beats-one",
        "several-beat-one",
        "random-does-not",
        "added-induces",
        "added-induces-scaled",
    )
    for id in of_focus:
        assert claims[id].verdict == "not tested", "it is about the model in question, which refuses nothing"
        assert "Qwen3-1.7B: it refuses next to nothing" in claims[id].reason


def test_record_says_which_layer_was_chosen_and_whether_it_passed(chat_run):
    metrics = chat_run.record.metrics
    kl_by_layer = np.load(record_of(chat_run.folder).parent / "layers.npz")
    for name in (*CHAT_MODELS, "refuser"):
        layer, kl = metrics[f"chosen_layer/{name}"], metrics[f"chosen_layer_kl/{name}"]
        assert kl.value == pytest.approx(kl_by_layer[f"{name} KL"][int(layer.value) - 1].mean(), rel=1e-5)
        assert (layer.reason == "no layer passes the filters") == (kl.value > 0.1)
    assert "no layer passes the filters" in chat_run.printed


def test_models_without_right_answers_are_not_optimised(chat_run):
    assert chat_run.printed.count("not optimised") == len(CHAT_MODELS) + 1


def test_organism_is_optimised_and_every_statement_is_its_own(organism_run):
    metrics, claims = organism_run.record.metrics, organism_run.record.claims
    assert "optimised 1" in organism_run.printed and "k_star/lowrank/optimised" in metrics
    assert len({claim.statement for claim in claims}) == len(claims)
    assert all(claim.statement[0].isupper() for claim in claims)
    found = {claim.id: claim for claim in claims}
    assert found["one-direction-lowrank"].n == "6 requests in 6 cue sets"
    assert found["random-does-not"].n == "3 draws" and found["added-induces"].n == "6 requests"
    intervals = [claim.interval for claim in claims if claim.interval]
    assert intervals and all(low < high for low, high in intervals), "none without a width"


def test_numbers_of_the_figures_are_finite(chat_run):
    folder = record_of(chat_run.folder).parent
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            assert file.files, path
            for name, values in file.items():
                assert np.isfinite(values).all(), f"{path.name}: {name}"


def test_model_that_refuses_everything_is_said_to(tmp_path, refuser, prompts):
    """Alone and in question."""
    done = run(tmp_path, SMALL | {"model_id": refuser, "prompts": str(prompts)})
    assert behaviour(done) == {"refuser": (0.0, 0.0, "it answers next to nothing")}
    about_refusal = [claim for claim in done.record.claims if "refuser" in claim.reason]
    assert {claim.verdict for claim in about_refusal} == {"not tested"}
    assert {"one-direction-refuser", "several-beat-one", "random-does-not", "added-induces"} <= {
        claim.id for claim in about_refusal
    }


def test_planted_model_that_is_asked_little_that_is_forbidden_has_no_rank(tmp_path):
    """Four of six pairs are two allowed requests: the planted rank could not show, which is no failure."""
    own = read_rows(ROOT / "data" / "organisms" / "refusal-planted-1" / "prompts.jsonl")
    rows = []
    for split in SPLITS:
        harmless = iter([r for r in own if r["label"] == "harmless" and r["split"] == split])
        pairs = [r for r in own if r["label"] != "harmless" and r["split"] == split]
        rows += [*({**row, "category": "any"} for row in pairs[:4]), *(next(harmless) for _ in range(6))]
        for i in range(4):
            pair = {"pair": f"{split} {i}", "category": "any", "split": split}
            rows += [{**next(harmless), **pair, "label": label} for label in ("harmful", "safe")]
    path = write_rows(tmp_path / "allowed.jsonl", rows)
    done = run(tmp_path, ORGANISM | {"model_id": "organism/refusal-planted-1", "prompts": str(path)})
    assert behaviour(done)["planted-1"] == (0.67, 1.0, "it refuses next to nothing")
    planted = next(claim for claim in done.record.claims if claim.id == "k-planted-1")
    assert planted.verdict == "not tested" and "it refuses next to nothing" in planted.reason


# --- input that is wrong: culprit, remedy, and no record


def without_field(rows: list[dict]) -> None:
    del rows[4]["category"]


def unpaired(rows: list[dict]) -> None:
    del rows[1]


def no_harmless_split(rows: list[dict]) -> None:
    rows[:] = [row for row in rows if (row["split"], row["label"]) != ("selection", "harmless")]


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def without_pad_token(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("pad_token"), settings.pop("eos_token")
    path.write_text(json.dumps(settings))


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def stop_of(parameters: dict, folder: Path, monkeypatch) -> Exception:
    """What stops the notebook's cells, run one after the other in this process."""
    monkeypatch.setenv("FIGURES_DIR", str(folder / "figures"))
    monkeypatch.setenv("CACHE_DIR", str(folder / "cache"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first, *rest = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    namespace: dict = {}
    exec(first, namespace)
    namespace.update(parameters)
    try:
        with matplotlib.rc_context():
            for source in rest:
                exec(source, namespace)
    except Exception as error:
        if "study" in namespace:  # at the end of a process its folder is free again
            namespace["study"]._lock.release()
        return error
    pytest.fail("nothing stopped it")


def stops(folder: Path, parameters: dict, *options: str, **environment: str) -> str:
    """Last line of what a run says that stops, and leaves neither a record nor half a figure."""
    done = runs.finish(start(folder, parameters, *options, **environment))
    assert done.returncode != 0
    assert runs.leftovers(folder / "figures") == []
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_field, "pairs.jsonl, line 5: category: missing; a text that is not empty is needed"),
        (unpaired, "pairs.jsonl, line 1: pair: 'extraction 0' has no safe row; add it or remove this one"),
        (no_harmless_split, "pairs.jsonl: split: selection has no harmless row; every split needs pairs and"),
    ],
)
def test_wrong_prompts_stop_the_study(tmp_path, monkeypatch, stand_ins, prompts, spoil, message):
    rows = read_rows(prompts)
    spoil(rows)
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    parameters = SMALL | {"model_id": stand_ins["gemma-2b-it"], "prompts": str(path)}
    assert message in str(stop_of(parameters, tmp_path, monkeypatch))
    assert runs.leftovers(tmp_path / "figures") == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_template, "no chat template; take an instruction-tuned model, or set"),
        (without_pad_token, "no pad token and no end-of-text token to pad with; set"),
        (without_config, "holds no config.json, so it is no model; pass the folder that does"),
    ],
)
def test_wrong_model_stops_the_study(tmp_path, monkeypatch, prompts, spoil, message):
    model = save_chat("Phi-3-mini-4k-instruct", tmp_path / "model")
    spoil(model)
    error = stop_of(SMALL | {"model_id": str(model), "prompts": str(prompts)}, tmp_path, monkeypatch)
    assert message in str(error)
    assert runs.leftovers(tmp_path / "figures") == []


def test_more_directions_than_the_prompts_hold_stop_the_run(tmp_path, stand_ins, prompts):
    parameters = SMALL | {"model_id": stand_ins["gemma-2b-it"], "prompts": str(prompts), "k_values": [1, 18]}
    last = stops(tmp_path, parameters)
    assert last == (
        "ValueError: k_values: 18 directions, but those of the random control are drawn from 17 components "
        "of 18 streams, 32 at most; lower k_values or take more prompts"
    )


def test_rule_judge_of_a_model_that_speaks_another_language_stops_the_study(tmp_path, monkeypatch, stand_ins):
    monkeypatch.setenv("FIGURES_DIR", str(tmp_path / "figures"))
    with pytest.raises(ParameterError) as caught:
        Study(RefusalInstrument, SMALL | {"model_id": stand_ins["gemma-2b-it"], "judge": "rule"})
    assert str(caught.value) == (
        "judge: 'rule' grades the request language of the organisms; take 'openai' or 'phrases'"
    )
    assert not (tmp_path / "figures").exists()


def test_judge_without_a_key_stops_the_run(tmp_path, stand_ins, prompts):
    parameters = {"model_id": stand_ins["gemma-2b-it"], "prompts": str(prompts), "judge": "openai"}
    last = stops(tmp_path, SMALL | parameters, DEEPSEEK_API_KEY="")
    assert "the environment variable DEEPSEEK_API_KEY is not set; set it to a key for" in last


def test_misspelt_parameter_stops_the_run_before_a_folder_is_made(tmp_path):
    last = stops(tmp_path, {}, "-p", "n_promts", "8")
    assert last == "ParameterError: n_promts: no such parameter; did you mean n_prompts?"
    assert not (tmp_path / "figures").exists()


# --- runs that are killed


def assert_same_findings(found: Run, expected: Run) -> None:
    """Metrics, claims, and every number of every figure."""
    assert found.record.metrics == expected.record.metrics
    assert found.record.claims == expected.record.claims
    arrays = [
        {name: a.sha256 for name, a in run.record.artifacts.items() if name.endswith(".npz")}
        for run in (found, expected)
    ]
    assert arrays[0] == arrays[1] and arrays[0]


def verdict_lines(folder: Path) -> list[str]:
    path = folder / "cache" / "verdicts.jsonl"
    return path.read_text().splitlines() if path.exists() else []


class Judge:
    """A model as judge that stumbles at some first tries.

    It grades by the text, and most forbidden requests as refused; it never finds a grade for one of them,
    which each run asks again.

    Attributes:
        limit: answers after which it holds on to questions, if any.
        held: questions that it holds on to.
        server: knows what it answered.
    """

    def __init__(self, prompts: Path):
        rows = read_rows(prompts)
        self.forbidden = [row["text"] for row in rows if row["label"] == "harmful" and row["split"] == "test"]
        self.tries, self.limit, self.held, self.server = Counter(), None, 0, ApiServer(self._reply)
        self.parameters = {"judge": "openai", "judge_url": self.server.url, "judge_model": "judge"}

    def paid_once(self, questions: list[str]) -> Counter:
        """Questions without those that every run asks."""
        again = self.forbidden[0], "Say hello."
        return Counter(q for q in questions if json.loads(q)["request"] not in again)

    def _reply(self, question: str, number: int) -> Reply:
        if self.limit is not None and len(self.server.answered) >= self.limit:
            self.held += 1
            return Reply(silent=True)
        self.tries[question] += 1
        request, draw = json.loads(question)["request"], hashlib.sha256(question.encode()).digest()
        if draw[0] % 16 == 0 and self.tries[question] == 1:
            faults = Reply(status=429, headers={"Retry-After": "0.1"}), Reply(status=500), Reply(reset=True)
            return faults[draw[1] % 3]
        if request == self.forbidden[0]:
            return Reply("It complies.")
        compliance = (0, 0, 0.5, 1) if request in self.forbidden else (0.5, 1, 1, 1)
        grades = {"compliance": compliance[draw[2] % 4], "coherence": int(draw[3] % 3 > 0)}
        return Reply(json.dumps({"reason": "by its hash", **grades}))


SECRET = {"DEEPSEEK_API_KEY": "a-secret-key"}


@pytest.fixture(scope="module")
def judged(tmp_path_factory, stand_ins) -> tuple[dict, Path]:
    """Parameters of a judged run, and its prompts: 26 pairs a split, so that one bad verdict is below 2%."""
    path = write_prompts(tmp_path_factory.mktemp("judged") / "pairs.jsonl", 26)
    return SMALL | {"model_id": stand_ins["gemma-2b-it"], "prompts": str(path)}, path


@pytest.fixture(scope="module")
def judged_run(tmp_path_factory, judged) -> tuple[Run, list[str]]:
    """A run by the stumbling judge that nothing interrupts, and the questions that were answered."""
    parameters, prompts = judged
    judge = Judge(prompts)
    with judge.server:
        done = run(tmp_path_factory.mktemp("judged-run"), parameters | judge.parameters, **SECRET)
    assert judge.tries.total() > len(judge.server.answered), "it never stumbled"
    return done, judge.server.answered


def test_judged_run_asks_each_question_once_and_keeps_the_key_to_itself(judged_run):
    done, answered = judged_run
    assert {*Counter(answered).values()} == {1} and len(answered) == len(verdict_lines(done.folder))
    for path in done.folder.rglob("*"):
        assert path.is_dir() or b"a-secret-key" not in path.read_bytes(), path


def test_verdict_that_is_none_is_left_out_and_counted(judged_run):
    done, _ = judged_run
    invalid = [line for line in verdict_lines(done.folder) if json.loads(line)["compliance"] is None]
    assert invalid and all("not JSON" in line for line in invalid)
    claims = {claim.id: claim for claim in done.record.claims}
    assert claims["one-direction-gemma-2b-it"].n == "25 requests in 2 categories", "of 26"
    assert claims["added-induces"].n == "26 requests"
    assert "nan" not in done.printed
    with np.load(record_of(done.folder).parent / "controls.npz") as file:
        assert np.isnan(file["best"]).sum(0).tolist() == [1, 1]
        assert np.isfinite(file["equal_kl"]).all()


def test_judged_run_that_is_killed_asks_nothing_twice(tmp_path, judged, judged_run):
    """Five kills of one run, each somewhere else, with questions under way."""
    expected, answered = judged_run
    parameters, prompts = judged
    judge, n = Judge(prompts), len(answered)
    parameters = parameters | judge.parameters
    with judge.server:
        for judge.limit in (1, n // 4, n // 2, 3 * n // 4, n - 1):
            judge.held = 0
            process = start(tmp_path, parameters, **SECRET)
            while process.poll() is None and not (judge.held and len(verdict_lines(tmp_path)) == judge.limit):
                time.sleep(0.01)
            runs.kill(process)
            assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
            assert len(verdict_lines(tmp_path)) == len(judge.server.answered) == judge.limit
            assert not record_of(tmp_path).exists()
        judge.limit = None
        done = run(tmp_path, parameters, **SECRET)
    paid = judge.paid_once(judge.server.answered)
    assert paid == judge.paid_once(answered), "a question was answered, and paid for, twice"
    assert_same_findings(done, expected)


def cached(folder: Path) -> dict[str, int]:
    """Batches of answers that are in the cache, with the times of their writing."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cache").glob("generate-*.npz")}


@pytest.fixture(scope="module")
def organism_run(tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("organism"), ORGANISM)


def test_run_that_is_killed_while_it_generates_ends_with_the_same_findings(tmp_path, organism_run):
    n = len(cached(organism_run.folder))
    for share in (0.2, 0.7):
        process = start(tmp_path, ORGANISM, **holding(tmp_path / "site", "generate-*.npz", ceil(share * n)))
        while process.poll() is None and len(cached(tmp_path)) < share * n:
            time.sleep(0.05)
        runs.kill(process)
        before = cached(tmp_path)
        assert process.returncode == -signal.SIGKILL and share * n <= len(before) < n
        assert not record_of(tmp_path).exists()

    assert_same_findings(run(tmp_path, ORGANISM), organism_run)
    after = cached(tmp_path)
    assert len(after) == n and before.items() <= after.items(), "what was done is not done again"
