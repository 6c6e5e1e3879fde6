"""lm-eval on organisms and tiny models against log-likelihoods computed one option at a time."""

from __future__ import annotations

import copy
import socket
import sys

import numpy as np
import pytest
import torch
from tiny import CONFIGS, save_tiny
from transformers import AutoModelForCausalLM

import lib.harness
from lib import language
from lib.generation import chat_ids
from lib.harness import (
    STANDARD,
    HarnessError,
    Score,
    allowed_requests_task,
    benchmark,
    tasks_of,
    tokenizer_for,
)
from lib.models import ModelError, load
from lib.organisms.refusal import build_tokenizer
from lib.prompts import PromptSet, prompts_for
from lib.refusal import orthogonalized, random_subspace

D = 32
ORGANISM = "organism/refusal-single"
# One option at a time: context and continuation as texts, and which option is right.
Question = tuple[list[tuple[str, str]], int]


@pytest.fixture(scope="module")
def lm_eval():
    """Skips where the extra is not installed."""
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module", params=["llama", "tied llama", "gpt2"])
def speaker(request, tmp_path_factory):
    """A random model with the tokenizer of the request language."""
    folder = tmp_path_factory.mktemp("speaker")
    tokenizer = build_tokenizer()
    tokenizer.chat_template += (
        "{% if enable_thinking is defined and not enable_thinking %} <comply>{% endif %}"
    )
    config = copy.deepcopy(CONFIGS[request.param.split()[-1]])
    config.vocab_size, config.tie_word_embeddings = len(tokenizer), request.param != "llama"
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(str(folder))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(str(save_tiny("llama", tmp_path_factory.mktemp("llama"), chat=True)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model without chat template and pad token."""
    return load(str(save_tiny("llama", tmp_path_factory.mktemp("plain"))))


@pytest.fixture(scope="module")
def prompts():
    return prompts_for(ORGANISM)


def test_prompts_there_have_the_same_date_as_ours(plain):
    """lm-eval renders the template itself."""
    tokenizer = copy.deepcopy(plain.tokenizer)
    assert tokenizer_for(tokenizer).chat_template is None
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}"
    rendered = tokenizer_for(tokenizer).apply_chat_template(
        [{"role": "user", "content": "egg"}], tokenize=False
    )
    assert rendered == "2024-07-26" and tokenizer.chat_template == "{{ strftime_now('%Y-%m-%d') }}"


def log_likelihood(model, context: list[int], whole: list[int]) -> float:
    with torch.no_grad():
        logits = model._module(torch.tensor([whole])).logits[0].double()
    rows = range(len(context) - 1, len(whole) - 1)
    return sum(float(logits[row].log_softmax(-1)[whole[row + 1]]) for row in rows)


def accuracy(likelihoods: list[list[float]], right: list[int]) -> tuple[float, float]:
    """Share of questions whose right option is the likeliest, and its standard error."""
    hits = np.array([np.argmax(row) == i for row, i in zip(likelihoods, right, strict=True)], float)
    return hits.mean(), hits.std(ddof=1) / np.sqrt(len(hits))


# -- allowed requests ------------------------------------------------------------------------------


def test_task_asks_for_one_right_confirmation_and_four_with_one_field_changed(lm_eval, prompts):
    rows = allowed_requests_task(prompts)["custom_dataset"]()["test"]
    assert [row["request"] for row in rows] == prompts.harmless("test")
    for row in rows:
        right = language.parse(row["request"]).answer
        assert row["options"].index(f" {right}") == row["right"]
        changed = set()
        for option in row["options"]:
            pairs = list(zip(right.split(), option.split(), strict=True))
            places = [i for i, (meant, said) in enumerate(pairs) if meant != said]
            assert len(places) == (option != f" {right}")
            changed |= {*places}
        assert len(changed) == 4
    assert {row["right"] for row in rows} == {0, 1, 2, 3, 4}


def test_task_is_drawn_from_its_seed(lm_eval, prompts):
    first, again, other = (
        allowed_requests_task(prompts, seed)["custom_dataset"]()["test"].to_list() for seed in (0, 0, 1)
    )
    assert first == again and first != other


def test_task_refuses_prompts_of_another_language():
    row = {"split": "test", "label": "harmless", "text": "name three rivers"}
    with pytest.raises(ValueError, match="name three rivers.*not a request"):
        allowed_requests_task(PromptSet((row,)))


@pytest.mark.parametrize("k", [0, 6], ids=["intact", "removed"])
def test_score_is_that_of_options_read_one_at_a_time(lm_eval, speaker, prompts, k):
    basis = random_subspace(D, k, seed=3) if k else None
    task = allowed_requests_task(prompts)
    found = benchmark(speaker, [task], basis=basis, batch_size=7)

    def read_all() -> tuple[float, float]:
        likelihoods, right = [], []
        for row in task["custom_dataset"]()["test"]:
            [context] = chat_ids(speaker, [row["request"]])
            options = [speaker.tokenizer(o, add_special_tokens=False).input_ids for o in row["options"]]
            likelihoods.append([log_likelihood(speaker, context, context + option) for option in options])
            right.append(row["right"])
        return accuracy(likelihoods, right)

    if basis is None:
        expected = read_all()
    else:
        with orthogonalized(speaker, basis):
            expected = read_all()
    assert found == {"allowed_requests": pytest.approx(expected)}


def test_before_and_after_on_an_organism(lm_eval, prompts):
    model, task = load(ORGANISM), allowed_requests_task(prompts)
    weights = {name: tensor.clone() for name, tensor in model._module.state_dict().items()}
    before = benchmark(model, [task])["allowed_requests"]
    after = benchmark(model, [task], basis=random_subspace(128, 120, seed=0))["allowed_requests"]
    assert before.score > 0.95  # it was trained to answer them
    assert after.score < 0.6 < before.score - 3 * before.stderr
    for name, tensor in model._module.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert benchmark(model, [task])["allowed_requests"] == before


def test_first_questions_alone(lm_eval, speaker, prompts):
    task = allowed_requests_task(prompts)
    few = PromptSet(tuple(row for row in prompts.rows if row["text"] in prompts.harmless("test")[:9]))
    assert benchmark(speaker, [task], limit=9) == benchmark(speaker, [allowed_requests_task(few)])
    score, stderr = benchmark(speaker, [task], limit=1)["allowed_requests"]
    assert score in (0, 1) and np.isnan(stderr)


def test_needs_no_network_and_seeds_no_generator(lm_eval, prompts, llama, monkeypatch):
    reached = []

    def refuse(*arguments, **_):
        reached.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    np.random.seed(7)
    torch.manual_seed(7)
    drawn, torch_drawn = np.random.get_state()[1].tolist(), torch.get_rng_state()
    benchmark(llama, [allowed_requests_task(prompts)], limit=2)
    assert not reached
    assert np.random.get_state()[1].tolist() == drawn and torch.equal(torch.get_rng_state(), torch_drawn)


def test_chat_template_is_needed(lm_eval, prompts, plain):
    with pytest.raises(ModelError, match="no chat template"):
        benchmark(plain, [allowed_requests_task(prompts)])


def test_basis_of_another_model_is_refused(lm_eval, llama, prompts):
    with pytest.raises(ValueError, match="basis has 16 dimensions"):
        benchmark(llama, [allowed_requests_task(prompts)], basis=random_subspace(16, 1, seed=0), limit=2)


# -- standard tasks --------------------------------------------------------------------------------

ENDINGS = ("egg", "milk house", "opera box sand", "car")


def question(task: str, i: int) -> tuple[dict, Question]:
    """A row in the layout of a task's dataset, and what lm-eval is to make of it."""
    words = ["apple", "bird", "car", "egg", "house", "milk", "plane", "opera"]
    first, second, endings = words[i % 8], words[i // 8], [*np.roll(ENDINGS, i)]
    if task.startswith("arc"):
        labels = ["A", "B", "C", "D"]
        row = {"question": f"{first} {second}", "choices": {"text": endings, "label": labels}}
        texts = [(f"Question: {first} {second}\nAnswer:", f" {ending}") for ending in endings]
        return row | {"answerKey": labels[i % 4]}, (texts, i % 4)
    if task == "hellaswag":
        row = {"activity_label": "sun", "ctx_a": first, "ctx_b": second, "endings": endings}
        texts = [(f"sun: {first} {second.capitalize()}", f" {ending}") for ending in endings]
        return row | {"label": str(i % 4)}, (texts, i % 4)
    if task == "piqa":
        row = {"goal": f"{first} {second}", "sol1": endings[0], "sol2": endings[1], "label": i % 2}
        texts = [(f"Question: {first} {second}\nAnswer:", f" {ending}") for ending in endings[:2]]
        return row, (texts, i % 2)
    row = {"sentence": f"{first} _ {second} sun", "option1": endings[0], "option2": endings[1]}
    texts = [(f"{first} {ending}", f" {second} sun") for ending in endings[:2]]
    return row | {"answer": str(i % 2 + 1)}, (texts, i % 2)


@pytest.mark.parametrize("task", STANDARD)
def test_standard_task_by_name(lm_eval, plain, monkeypatch, task):
    """With the task's own definition, on questions in the layout of its dataset."""
    import datasets

    rows, questions = zip(*(question(task, i) for i in range(40)), strict=True)
    data = datasets.Dataset.from_list(list(rows))
    splits = datasets.DatasetDict({"train": data, "validation": data, "test": data})
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: splits)
    basis = random_subspace(D, 4, seed=1)
    found = benchmark(plain, [task], basis=basis)
    likelihoods = []
    with orthogonalized(plain, basis):
        for options, _ in questions:
            row = []
            for context, continuation in options:
                ids = [plain.tokenizer(text).input_ids for text in (context, context + continuation)]
                # Winogrande's continuations are the same, its contexts differ; the others divide by length.
                length = 1 if task == "winogrande" else len(continuation) - 1
                row.append(log_likelihood(plain, *ids) / length)
            likelihoods.append(row)
    expected = accuracy(likelihoods, [right for _, right in questions])
    assert found == {task: pytest.approx(expected)}
    assert plain.tokenizer.pad_token is None, "it was given one"


@pytest.mark.parametrize("task, data", [("arc_easy", "allenai/ai2_arc"), ("hellaswag", "Rowan/hellaswag")])
def test_data_that_cannot_be_had_is_named(lm_eval, plain, monkeypatch, tmp_path, task, data):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HarnessError, match=f"'{task}'.*{data}.*HF_HOME"):
        benchmark(plain, [task])


def test_unknown_task_gets_a_suggestion(lm_eval, plain):
    with pytest.raises(HarnessError, match="'helaswag'.*'hellaswag'"):
        benchmark(plain, ["helaswag"])


def test_task_without_options_is_refused(lm_eval):
    with pytest.raises(HarnessError, match="'gsm8k'.*multiple choice"):
        lib.harness._score("gsm8k", {"exact_match,strict-match": 0.5})


# -- lm-eval itself --------------------------------------------------------------------------------


def test_lm_eval_that_is_absent_is_named_with_the_command(llama, prompts, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(HarnessError, match=r"pip install -c requirements\.lock -e '\.\[bench\]'"):
        benchmark(llama, [allowed_requests_task(prompts)])


def test_tasks_by_name(lm_eval, prompts):
    [task] = tasks_of(["allowed_requests"], prompts)
    assert task["task"] == "allowed_requests"
    with pytest.raises(HarnessError, match="lm-eval has no task 'allowed_request'"):
        tasks_of(["allowed_request"], prompts)


def test_no_tasks_need_no_lm_eval(prompts, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert tasks_of([], prompts) == []
    with pytest.raises(HarnessError, match="lm-eval is not installed"):
        tasks_of(["allowed_requests"], prompts)


def test_interval_is_two_standard_errors_wide():
    assert Score(0.5, 0.1).interval == pytest.approx((0.304, 0.696))
    assert Score(1.0, float("nan")).interval is None
