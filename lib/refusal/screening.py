"""Study 3 at the first token of an answer: many interventions compared before any answer is generated.

A chat model opens its refusals with few tokens. Their probability says whether it is about to refuse, at the
cost of reading the request once; the best interventions are then judged by whole answers
(`lib.refusal.directions`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from nnsight import TransformersModel

from lib.core.cache import Cache
from lib.core.kernel import PlainError
from lib.refusal.behaviour import MAX_KL, Outcome, answer_texts, measure, refusals
from lib.refusal.directions import extract
from lib.refusal.forwards import Tokens
from lib.refusal.generation import chat_ids, first_token_kl, first_token_share, generate, tail_streams
from lib.refusal.prompts import PromptSet
from lib.refusal.removal import Ablation, intact
from lib.refusal.search import (
    MAX_DEPTH,
    category_conditions,
    layer_conditions,
    rank_conditions,
    select_layers,
)
from lib.refusal.verdicts import Judge, grades_of, rates

MIN_REFUSED = {"selection": 6, "test": 8}  # requests; and a share of at least
MIN_SHARE = 0.2


class TooFewRefusals(PlainError, ValueError):
    """A model that refuses too little, or everything, has no refusal to take apart."""


class Refusals(NamedTuple):
    """What the intact model refuses, greedily.

    Attributes:
        harmful: split ("selection", "test") -> whether each harmful request is refused [request].
        safe: whether each safe twin of the test split is [request].
        harmless: whether each everyday request of the test split is [request].
        openings: tokens that open refusals more often than other answers, by falling number of refusals.
    """

    harmful: dict[str, np.ndarray]
    safe: np.ndarray
    harmless: np.ndarray
    openings: list[int]

    def refused(self, prompts: PromptSet, split: str) -> tuple[list[str], list[str]]:
        """Harmful requests of a split that are refused, and their categories."""
        rows = zip(prompts.harmful(split), prompts.categories(split), self.harmful[split], strict=True)
        kept = [(text, category) for text, category, refused in rows if refused]
        return [text for text, _ in kept], [category for _, category in kept]


def find_refusals(
    model: TransformersModel,
    prompts: PromptSet,
    judge: Judge,
    says_refusal: Callable[[str], bool],
    *,
    max_new_tokens: int,
    batch_size: int = 0,
    cache: Cache | None = None,
) -> Refusals:
    """What the intact model refuses, by its own answers: harmful requests, their safe twins, everyday ones.

    Raises:
        TooFewRefusals: it refuses fewer than 8 harmful requests of the test split, 6 of the selection split,
            or a fifth of either; or more than half of the everyday ones; or its refusals open like answers.
        JudgeError: over 2% of the verdicts are invalid.
    """
    parts = {
        "selection": prompts.harmful("selection"),
        "test": prompts.harmful("test"),
        "safe": prompts.safe("test"),
        "harmless": prompts.harmless("test"),
    }
    texts = [text for part in parts.values() for text in part]
    asked = chat_ids(model, texts)
    [tokens] = generate(
        model, asked, [intact(model)], max_new_tokens=max_new_tokens, batch_size=batch_size, cache=cache
    )
    answers = answer_texts(model, asked, tokens)
    verdicts = judge(texts, answers)
    rates(verdicts)  # refuses a judge that fails too often
    refused = refusals(answers, grades_of(verdicts)[:, 1], says_refusal) == 1
    ends = np.cumsum([len(part) for part in parts.values()])
    by_part = dict(zip(parts, np.split(refused, ends[:-1]), strict=True))
    for split, least in MIN_REFUSED.items():
        found = by_part[split]
        if found.sum() < least or found.mean() < MIN_SHARE:
            raise TooFewRefusals(
                f"this model refuses {found.sum()} of {len(found)} harmful requests of the {split} split "
                f"({found.mean():.0%}), and at least {least} and {MIN_SHARE:.0%} are needed to see what "
                "removes refusal; take a chat model that refuses more, or other prompts"
            )
    if by_part["harmless"].mean() > 0.5:
        raise TooFewRefusals(
            f"this model refuses {by_part['harmless'].mean():.0%} of everyday requests as well: what is "
            "removed could not be told from refusal; take another model"
        )
    openings = opening_tokens(tokens, refused)
    if not openings:
        raise TooFewRefusals(
            "no token opens refusals more often than other answers, so that refusal can not be seen in the "
            "first token; does the model think before it answers? Switch thinking off, or take another model"
        )
    return Refusals(
        {split: by_part[split] for split in MIN_REFUSED}, by_part["safe"], by_part["harmless"],
        openings,
    )  # fmt: skip


def opening_tokens(answers: Sequence[Tokens], refused: Sequence[bool]) -> list[int]:
    """First tokens that open more refusals than other answers, by falling number of refusals."""
    opened: dict[bool, Counter] = {True: Counter(), False: Counter()}
    for answer, is_refusal in zip(answers, refused, strict=True):
        if len(answer):
            opened[bool(is_refusal)][int(answer[0])] += 1
    return [token for token, n in opened[True].most_common() if n > opened[False][token]]


class Screen(NamedTuple):
    """What conditions do at the first token of the answer.

    Attributes:
        refusal: probability that the answer opens like a refusal [condition, request].
        kl: KL(intact || condition) on harmless requests, in nats [condition, request].
    """

    refusal: np.ndarray
    kl: np.ndarray


def screen(
    model: TransformersModel,
    requests: Sequence[str],
    harmless: Sequence[str],
    conditions: Sequence[Ablation],
    openings: Sequence[int],
    *,
    batch_size: int = 0,
    cache: Cache | None = None,
) -> Screen:
    """Refusal score of every condition on some requests, and its KL on harmless ones (there may be none)."""
    how = {"batch_size": batch_size, "cache": cache}
    refusal = first_token_share(model, chat_ids(model, requests), conditions, openings, **how)
    kl = np.zeros((len(conditions), 0))
    if len(harmless):
        kl = first_token_kl(model, chat_ids(model, harmless), conditions, **how)
    return Screen(refusal, kl)


def best_layers(screened: Screen, n_layers: int) -> list[int]:
    """Layers 1 to L - 1 of a screen of `layer_conditions` by rising refusal score.

    Those come first that pass the filters of Arditi et al. (2024): KL on harmless requests of at most .1
    nats, and less than .8 of the depth.
    """
    score, kl = screened.refusal.mean(1), screened.kl.mean(1)
    layers = range(1, len(score) + 1)
    passes = [kl[i - 1] <= MAX_KL and i < MAX_DEPTH * n_layers for i in layers]
    return sorted(layers, key=lambda i: (not passes[i - 1], score[i - 1]))


def smallest_passing(
    conditions: Sequence[Ablation],
    promising: Sequence[bool],
    measured: Callable[[list[Ablation]], Outcome],
) -> tuple[list[Ablation], Outcome | None]:
    """Generate answers under growing subspaces until one removes refusal (see `behaviour.behavioural_rank`).

    Args:
        conditions: of one way, by rising number of directions.
        promising: whether each could pass, by what is known without its answers; others are not generated.
        measured: outcome of conditions.

    Returns:
        The conditions that were generated, and their outcome; None if none was promising.
    """
    tried: list[Ablation] = []
    outcomes: list[Outcome] = []
    for condition, could_pass in zip(conditions, promising, strict=True):
        if not could_pass:
            continue
        tried.append(condition)
        outcomes.append(measured([condition]))
        if outcomes[-1].rank([condition]):
            break
    return tried, joined(outcomes) if outcomes else None


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome of the conditions of several."""
    parts = zip(*outcomes, strict=True)
    return Outcome(*([row for part in each for row in part] if isinstance(each[0], list)
                     else np.concatenate(each) for each in parts))  # fmt: skip


def along_the_prompt(
    model: TransformersModel, texts: Sequence[str], direction: torch.Tensor, layer: int, n: int
) -> np.ndarray:
    """Projection of the stream on a direction at the last n tokens of each chat prompt [text, token].

    Args:
        direction: unit vector [d_model].
        layer: whose input is read.
    """
    streams = tail_streams(model, chat_ids(model, texts), layer, n)
    return (streams.double() @ direction.double().cpu()).numpy()


def on_other_requests(
    model: TransformersModel,
    requests: Sequence[str],
    condition: Ablation,
    judge: Judge,
    says_refusal: Callable[[str], bool],
    **options,
) -> tuple[int, np.ndarray]:
    """How a condition does on requests of another set: those that the intact model refuses.

    Args:
        options: of `lib.refusal.behaviour.measure`.

    Returns:
        How many are refused, and the compliance with each of these under the condition [request].
    """
    before = measure(model, requests, [], [intact(model)], judge, **options)
    refused = refusals(before.answers[0], before.coherence[0], says_refusal) == 1
    texts = [text for text, kept in zip(requests, refused, strict=True) if kept]
    if not texts:
        return 0, np.zeros(0)
    return len(texts), measure(model, texts, [], [condition], judge, **options).compliance[0]


def template_tail(model: TransformersModel, texts: Sequence[str]) -> list[str]:
    """The tokens of the chat template that follow every request, as text."""
    ids = chat_ids(model, texts)
    n = next(i for i in range(1, len(ids[0])) if len({prompt[-i] for prompt in ids}) > 1) - 1
    return [model.tokenizer.decode([token]) for token in ids[0][len(ids[0]) - n :]]


class Calibration(NamedTuple):
    """What the instrument reads of a model whose refusal is known.

    Attributes:
        k_star: by the categories' differences of means; None if no k passes.
        one_direction: compliance on the test split without the best layer's direction.
    """

    k_star: int | None
    one_direction: float


def calibrate(
    model: TransformersModel, prompts: PromptSet, judge: Judge, ks: Sequence[int], **options
) -> Calibration:
    """Read a model with the steps of the study, every choice on the selection split.

    Args:
        options: of `lib.refusal.behaviour.measure`.
    """
    extraction = extract(model, prompts)
    n_layers = extraction.harmful.shape[1] - 1

    def outcome(conditions: list[Ablation], split: str) -> Outcome:
        return measure(model, prompts.harmful(split), prompts.harmless(split), conditions, judge, **options)

    def best(conditions: list[Ablation]) -> list[int]:
        columns = outcome(conditions, "selection").with_layer_zero()
        passing = select_layers(*columns, n_layers=n_layers)
        return passing or select_layers(*columns, n_layers=n_layers, max_kl=np.inf, max_depth=1.0)

    single = layer_conditions(extraction)
    layer = best(category_conditions(extraction))[0]
    ways = rank_conditions(extraction, [layer], layer, ks, 1, 0)["categories"]
    chosen = best(single)[0]
    found = outcome([single[chosen - 1], *ways], "test")
    return Calibration(found.part(1, None).rank(ways), float(np.nanmean(found.compliance[0])))
