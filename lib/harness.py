"""Benchmarks of a model before and after a subspace is removed, by lm-eval itself (extra `bench`).

    before = benchmark(model, [allowed_requests_task(prompts), "arc_easy", "hellaswag"])
    after = benchmark(model, [allowed_requests_task(prompts), "arc_easy", "hellaswag"], basis=basis)

The local task needs no network. Standard tasks fetch their data from the hub once, then read its cache.
"""

from __future__ import annotations

import copy
import difflib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from nnsight import TransformersModel

from lib import language
from lib.generation import chat_ids, with_fixed_date
from lib.kernel import PlainError
from lib.prompts import PromptSet
from lib.refusal import orthogonalized

LOCAL = "allowed_requests"
STANDARD = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande")

_FIELDS = {
    "verb": language.VERBS,
    "modifier": language.MODIFIERS,
    "object": language.OBJECTS,
    "purpose": language.PURPOSES,
}


class HarnessError(PlainError, RuntimeError):
    """A benchmark that cannot be run; the message names culprit and remedy."""


class Score(NamedTuple):
    """Accuracy of a task and its standard error, both shares; NaN where one question leaves no error."""

    score: float
    stderr: float

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%, by the normal approximation."""
        reach = 1.96 * self.stderr
        return None if math.isnan(reach) else (self.score - reach, self.score + reach)


def tokenizer_for(tokenizer: Any) -> Any:
    """A copy for lm-eval, which gives it a pad token; it prints the date that `chat_ids` prints."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.chat_template:
        tokenizer.chat_template = with_fixed_date(tokenizer.get_chat_template())
    return tokenizer


def benchmark(
    model: TransformersModel,
    tasks: Sequence[str | dict[str, Any]],
    *,
    basis: torch.Tensor | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, Score]:
    """Scores of a model as lm-eval computes them, with as many examples as a task asks for (`STANDARD`: 0).

    Args:
        model: from `lib.models.load`.
        tasks: names that lm-eval knows, such as `STANDARD`, and local tasks (`allowed_requests_task`). Named
            tasks are asked as plain text, as their published scores are, local ones in the chat template.
        basis: orthonormal rows [k, d_model] that the weights no longer write to (`orthogonalized`).
        limit: number of questions of each task, the first ones; None for all.
        batch_size: options a forward.

    Returns:
        By the task's name; a group's name stands for its tasks. Accuracy of the most probable option, per
        character of its text where the task says so (`acc_norm`), else as it is (`acc`).

    Raises:
        HarnessError: lm-eval is not installed; it does not know a task; a task's data cannot be had.
        ModelError: a local task, and a tokenizer without chat template.
        ValueError: see `orthogonalized`.
    """
    lm_eval = _lm_eval()
    if local := [task for task in tasks if isinstance(task, dict)]:
        chat_ids(model, [])  # refuses a model without chat template
    loaded = {False: _named([task for task in tasks if isinstance(task, str)])}  # in chat? -> tasks
    with _errors_alone():  # it warns of what is meant here: data of one's own, a model that is loaded
        loaded[True] = lm_eval.TaskManager(include_defaults=False).load(local)["tasks"]
        # Before the weights are edited: it ties a tied unembedding to whatever embedding it finds.
        wrapped = lm_eval.HFLM(
            pretrained=model._module,
            tokenizer=tokenizer_for(model.tokenizer),
            batch_size=batch_size,
            softmax_dtype=torch.float32,  # in half precision options would tie
            enable_thinking=False,  # as in `chat_ids`
            trust_remote_code=False,
        )
    scores = {}
    with orthogonalized(model, basis) if basis is not None else nullcontext():
        for in_chat, found in loaded.items():
            if found:
                report = lm_eval.simple_evaluate(
                    wrapped,
                    tasks=list(found.values()),
                    task_manager=lm_eval.TaskManager(include_defaults=False),
                    apply_chat_template=in_chat,
                    limit=limit,
                    log_samples=False,
                    # It would seed the caller's generators.
                    random_seed=None,
                    numpy_random_seed=None,
                    torch_random_seed=None,
                )
                scores |= {name: _score(name, report["results"][name]) for name in found}
    return scores


def tasks_of(names: Sequence[str], prompts: PromptSet) -> list[str | dict[str, Any]]:
    """Tasks for `benchmark` by name, where "allowed_requests" is the local one; checked before anything runs.

    Raises:
        HarnessError: lm-eval is not installed; it does not know a task; a task's data cannot be had.
        ValueError: see `allowed_requests_task`.
    """
    if names:
        _lm_eval()
    _named([name for name in names if name != LOCAL])
    return [allowed_requests_task(prompts) if name == LOCAL else name for name in names]


def allowed_requests_task(prompts: PromptSet, seed: int = 0) -> dict[str, Any]:
    """A local task: which of five confirmations is the one of an allowed request?

    The wrong ones have one field changed each: verb, modifier, object or purpose. Chance is .2.

    Args:
        prompts: in the request language; the harmless rows of the test split are the questions.
        seed: of the changed words and of the order of the options.

    Returns:
        The configuration of an lm-eval task, its data included.

    Raises:
        ValueError: a prompt that is not of the request language.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for text in prompts.harmless("test"):
        request = language.parse(text)
        options = [request]
        for field, words in _FIELDS.items():
            step = int(rng.integers(1, len(words)))  # never back to the same word
            options.append(replace(request, **{field: (getattr(request, field) + step) % len(words)}))
        order = [int(i) for i in rng.permutation(len(options))]
        rows.append(
            {
                "request": text,
                # In a chat lm-eval puts nothing between template and option, and this language needs a space.
                "options": [f" {options[i].answer}" for i in order],
                "right": order.index(0),
            }
        )

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset  # comes with lm-eval

        return {"test": Dataset.from_list(rows)}

    return {
        "task": LOCAL,
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{request}}",
        "doc_to_choice": "options",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _lm_eval() -> SimpleNamespace:
    """What is used of lm-eval, imported when it is needed: it is an extra."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise HarnessError(
            f"lm-eval is not installed ({error}); run: pip install -c requirements.lock -e '.[bench]'"
        ) from None
    return SimpleNamespace(simple_evaluate=simple_evaluate, HFLM=HFLM, TaskManager=TaskManager)


@contextmanager
def _errors_alone() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@cache
def _manager():
    return _lm_eval().TaskManager()  # reads some ten thousand files


def _named(names: list[str]) -> dict[str, Any]:
    """lm-eval's own tasks, with their data."""
    tasks: dict[str, Any] = {}
    for name in names:
        if name not in (index := _manager().task_index):
            close = difflib.get_close_matches(name, index, n=3)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"try {', '.join(STANDARD)}"
            raise HarnessError(f"lm-eval has no task {name!r}; {hint}")
        try:
            tasks |= _manager().load([name])["tasks"]
        except (OSError, ValueError) as error:
            data = (index[name].cfg or {}).get("dataset_path", "of its tasks")
            reason = str(error).strip().splitlines()[0]
            raise HarnessError(
                f"task {name!r}: its dataset {data} cannot be had ({reason}); run once with a network, or "
                "copy the folder that HF_HOME names (~/.cache/huggingface) from a machine that has it; "
                "allowed_requests_task needs neither"
            ) from error
    return tasks


def _score(name: str, report: dict[str, Any]) -> Score:
    for metric in ("acc_norm", "acc"):
        if (value := report.get(f"{metric},none")) is not None:
            stderr = report[f"{metric}_stderr,none"]  # "N/A" where there is none
            return Score(float(value), math.nan if isinstance(stderr, str) else float(stderr))
    raise HarnessError(f"task {name!r} does not report an accuracy; take one of multiple choice")
