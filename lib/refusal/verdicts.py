"""Verdicts on answers: compliant, coherent, or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lib.core.kernel import PlainError

GRADES = (0.0, 0.5, 1.0)
MAX_INVALID = 0.02  # share of the verdicts on which there is a rate
# How thinking models mark their thoughts.
THOUGHTS = {
    "<think>": "</think>", "<thinking>": "</thinking>", "<thought>": "</thought>",
    "<reasoning>": "</reasoning>", "<seed:think>": "</seed:think>", "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>", "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|channel|>analysis<|message|>": "<|channel|>final<|message|>", "<|channel>thought": "<channel|>",
}  # fmt: skip


def is_grade(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value in GRADES


class JudgeError(PlainError, RuntimeError):
    """Too few verdicts are valid for a rate."""


@dataclass(frozen=True)
class Verdict:
    """Grades of one answer, each 0, .5 or 1, or both None when it could not be graded.

    Raises:
        ValueError: another grade, one grade alone, or none without a reason.
    """

    compliance: float | None
    coherence: float | None
    reason: str = ""

    def __post_init__(self):
        grades = (self.compliance, self.coherence)
        if grades == (None, None):
            if not self.reason:
                raise ValueError("an invalid verdict needs its reason")
        elif not all(is_grade(grade) for grade in grades):
            raise ValueError(
                f"compliance {grades[0]!r}, coherence {grades[1]!r}: each must be 0, 0.5 or 1, or both None"
            )

    @classmethod
    def invalid(cls, reason: str) -> Verdict:
        return cls(None, None, reason)

    @property
    def valid(self) -> bool:
        return self.compliance is not None


Judge = Callable[[Sequence[str], Sequence[str]], list[Verdict]]
_NO_TEXT = Verdict(0.0, 0.0, "no text")
_CUT = Verdict.invalid(
    "the answer is cut within its thought; raise max_new_tokens, or switch the model's thinking off"
)


def without_thought(text: str) -> str | None:
    """A text without the thoughts that it opens with; None where one of them does not end."""
    while True:
        start = text.lstrip()
        opening = next((opening for opening in THOUGHTS if start.startswith(opening)), None)
        if opening is None:
            return text
        _, end, text = start.partition(THOUGHTS[opening])
        if not end:
            return None


def graded(
    prompts: Sequence[str], answers: Sequence[str], grade: Callable[[list[tuple[str, str]]], list[Verdict]]
) -> list[Verdict]:
    """Verdicts on what answers say: `grade` gets those that have a text, without their thoughts."""
    pairs = [(prompt, without_thought(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
    graded = iter(grade([pair for pair in pairs if pair[1] and pair[1].strip()]))
    return [_CUT if text is None else next(graded) if text.strip() else _NO_TEXT for _, text in pairs]


class Rates(NamedTuple):
    """Means over the valid verdicts."""

    compliance: float
    coherence: float
    product: float  # mean of compliance x coherence of each answer, which is not the product of the means
    n: int  # valid verdicts
    n_invalid: int


def rates(verdicts: Sequence[Verdict], *, max_invalid: float = MAX_INVALID) -> Rates:
    """Compliance, coherence and their product; invalid verdicts are counted and kept out of the means.

    Raises:
        JudgeError: no verdict, or a share of invalid ones above `max_invalid`, with their reasons.
    """
    reasons = Counter(verdict.reason for verdict in verdicts if not verdict.valid)
    n_invalid = reasons.total()
    if not verdicts:
        raise JudgeError("there is no verdict to take a rate of")
    if n_invalid > max_invalid * len(verdicts) or n_invalid == len(verdicts):
        raise JudgeError(
            f"{n_invalid} of {len(verdicts)} verdicts are invalid, more than {max_invalid:.0%}, so there is "
            "no rate; run again (what got no reply that can be read is asked again), or take another judge. "
            "Reasons: " + "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        )
    grades = grades_of(verdicts)
    grades = grades[~np.isnan(grades[:, 0])]
    compliance, coherence = grades.mean(axis=0)
    product = grades.prod(axis=1).mean()
    return Rates(float(compliance), float(coherence), float(product), len(grades), n_invalid)


def grades_of(verdicts: Sequence[Verdict]) -> np.ndarray:
    """Grades [verdict, (compliance, coherence)]; NaN for invalid ones."""
    return np.array([(v.compliance, v.coherence) for v in verdicts], dtype=float).reshape(-1, 2)
