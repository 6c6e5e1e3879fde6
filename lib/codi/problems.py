"""Word problems with reference solutions, in the form of GSM8K-Aug, and the numbers in them.

One JSON object a line:

    {"question": "... has 16 eggs ...", "cot": "<<16-3-4=9>> <<9*2=18>>", "answer": "18"}

`cot` may also be a list of steps, then or under the name `steps`. `id` and `twin` (the id of a row with the
same text and other numbers) are optional; further fields are left alone.

Steps are counted from 0. The result of the last step is the answer, those before it are intermediate.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib.core.kernel import PlainError
from lib.core.statistics import known_mean

_DIGITS = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_UNSIGNED = re.compile(_DIGITS)
# A minus after a digit, a letter or a bracket is an operator or a hyphen: 16-3, 60-mile.
_SIGNED = re.compile(rf"(?:(?<![\w.)])-)?(?:{_DIGITS})")
_UNITS = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
# Not "one", which is a pronoun more often than a number.
_WORDS = {word: value for value, word in enumerate(_UNITS.split(), 2)}
_WORDS |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
_WORDS |= {"half": 0.5, "twice": 2, "double": 2, "triple": 3, "dozen": 12}
_ONES = ("one", *_UNITS.split()[:8])
_IN_QUESTION = re.compile(
    rf"(?P<digits>{_SIGNED.pattern})"
    rf"|\b(?P<tens>{'|'.join(_TENS.split())})-(?P<unit>{'|'.join(_ONES)})\b"
    rf"|\b(?P<word>{'|'.join(_WORDS)})\b",
    re.IGNORECASE,
)


class ProblemError(PlainError, ValueError):
    """A file of problems is wrong; the message names file, line and field, and says what to do."""


class Number(NamedTuple):
    """A number in a question: its value, and its characters `question[start:stop]`."""

    value: float
    start: int
    stop: int


@dataclass(frozen=True)
class Equation:
    """One step of a solution.

    Attributes:
        left, right: of the equals sign, as written: "16-3-4" and "9".
        operands: numbers on the left, in order; values without signs, which are operations.
        result: value of the right side.
    """

    left: str
    right: str
    operands: tuple[float, ...]
    result: float

    @classmethod
    def parse(cls, text: str) -> Equation:
        """Read "16-3-4=9", with or without << >>.

        Raises:
            ValueError: no equals sign, or no number to its right.
        """
        inner = text.strip().removeprefix("<<").removesuffix(">>").strip()
        left, equals, right = (part.strip() for part in inner.rpartition("="))
        result = _value(right)
        if not equals or not left or result is None:
            raise ValueError(f"{text!r} is no equation such as <<16-3-4=9>>")
        return cls(left, right, tuple(_float(number) for number in _UNSIGNED.findall(left)), result)


@dataclass(frozen=True)
class Problem:
    """A question with its solution.

    Attributes:
        id: distinct within a file.
        question: text, as the model reads it.
        equations: steps of the reference solution.
        answer: value.
        twin: id of the problem with the same text and other numbers, if there is one.
    """

    id: str
    question: str
    equations: tuple[Equation, ...]
    answer: float
    twin: str | None = None

    @cached_property
    def numbers(self) -> tuple[Number, ...]:
        """The numbers in the question, in order."""
        return question_numbers(self.question)

    @cached_property
    def operations(self) -> tuple[str, ...]:
        """Operation of each step, the first one of several; "" for a step without any."""
        signs = (re.search(r"[-+*/]", equation.left.lstrip("-")) for equation in self.equations)
        return tuple(sign[0] if sign else "" for sign in signs)

    @property
    def intermediate_results(self) -> tuple[float, ...]:
        """Results of all steps but the last."""
        return tuple(equation.result for equation in self.equations[:-1])

    @cached_property
    def readers(self) -> tuple[frozenset[int], ...]:
        """Steps that each number in the question is an operand of; a distractor is one of none.

        An operand that equals the result of an earlier step is taken to be that result; one that stands in
        the question several times, to be each of these numbers.
        """
        found: list[set[int]] = [set() for _ in self.numbers]
        earlier: set[float] = set()
        for step, equation in enumerate(self.equations):
            for i, number in enumerate(self.numbers):
                if number.value in equation.operands and number.value not in earlier:
                    found[i].add(step)
            earlier.add(equation.result)
        return tuple(map(frozenset, found))


def question_numbers(text: str) -> tuple[Number, ...]:
    """Numbers in a text: 16, 1,200.50, -5, .5, and in words such as three, twenty-one, half, twice.

    2/5 and 20% are the numbers that are written, 2 and 5, and 20. "one" is no number here.
    """
    found = []
    for match in _IN_QUESTION.finditer(text):
        if match["digits"]:
            value = _float(match["digits"])
        elif match["tens"]:
            value = _WORDS[match["tens"].lower()] + _WORDS.get(match["unit"].lower(), 1)
        else:
            value = float(_WORDS[match["word"].lower()])
        found.append(Number(float(value), *match.span()))
    return tuple(found)


def extract_answer(text: str, *, first: bool = False) -> float | None:
    """The last number of an answer, as in CODI's evaluation, or its first one; None without one.

    "The answer is: $1,200.50." is 1200.5. Numbers in words do not count.
    """
    found = _SIGNED.findall(text)
    return _float(found[0 if first else -1]) if found else None


def read_problems(path: str | Path) -> list[Problem]:
    """Read a file of problems.

    Args:
        path: JSONL in the form of the module's docstring. A row without `id` gets its number, from 0.

    Raises:
        ProblemError: naming file, line, what is wrong and what to do.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ProblemError(
            f"{path} cannot be read ({error}); pass a JSONL file with question, cot and answer in every line"
        ) from None
    problems: dict[str, Problem] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            problem = _parse(line, str(len(problems)))
        except ValueError as error:
            raise ProblemError(f"{path}, line {number}: {error}; correct the line or remove it") from None
        if problem.id in problems:
            raise ProblemError(
                f"{path}, line {number}: id {problem.id!r} stands in an earlier line; give each row its own"
            )
        problems[problem.id] = problem
    if not problems:
        raise ProblemError(f"{path} holds no problem; every line is one, as a JSON object")
    for problem in problems.values():
        if problem.twin is not None and problem.twin not in problems:
            raise ProblemError(
                f"{path}: problem {problem.id!r} names {problem.twin!r} as its twin, which is no row; add it "
                "or drop `twin`"
            )
    return list(problems.values())


def problems_of(folder: Path, path: str = "", n: int = 0) -> list[Problem]:
    """At most n problems of a file, else of the one that an embedded model's folder holds; 0 is all.

    Raises:
        ProblemError: see `read_problems`; no file is named and the folder has none.
    """
    own = folder / "problems.jsonl"
    if not path and not own.is_file():
        raise ProblemError(f"{folder} has no problems of its own; name a JSONL file of problems")
    return first_problems(read_problems(path or own), n)


def first_problems(problems: Sequence[Problem], n: int) -> list[Problem]:
    """At most n problems, spread evenly over the numbers of steps, each with its twin; 0 is all."""
    if not n:
        return list(problems)
    place = {problem.id: i for i, problem in enumerate(problems)}
    turns: Counter[int] = Counter()
    order = []
    for i, problem in enumerate(problems):
        order.append((turns[len(problem.equations)], i))
        turns[len(problem.equations)] += 1
    kept: set[int] = set()
    for _, i in sorted(order):
        pair = {i, place[problems[i].twin]} if problems[i].twin is not None else {i}
        if len(kept | pair) <= max(n, len(pair)):
            kept |= pair
    return [problem for i, problem in enumerate(problems) if i in kept]


def twins(problem: Problem, other: Problem) -> bool:
    """Whether one names the other as its twin."""
    return problem.twin == other.id or other.twin == problem.id


def twin_indices(problems: Sequence[Problem]) -> np.ndarray:
    """Index of every problem's twin, int [problem]; its own where the twin is not among these problems."""
    place = {problem.id: i for i, problem in enumerate(problems)}
    return np.array([place.get(problem.twin, i) for i, problem in enumerate(problems)], dtype=int)


def pair_means(problems: Sequence[Problem], values: np.ndarray) -> np.ndarray:
    """Mean of the known values [problem, ...] of each pair of twins [pair, ...], NaN where neither is known.

    Twins share their text, and what is true of one tends to be true of the other: pairs are what a bootstrap
    draws. A problem whose twin is not among these is a pair by itself.
    """
    first = np.minimum(twin_indices(problems), np.arange(len(problems)))
    order = {i: pair for pair, i in enumerate(dict.fromkeys(first))}
    members = np.full((len(order), 2), -1)  # problems of each pair
    for i, of in enumerate(first):
        members[order[of], int(i != of)] = i
    values = np.asarray(values, dtype=float)
    both = np.where((members >= 0).reshape(*members.shape, *[1] * (values.ndim - 1)), values[members], np.nan)
    return known_mean(both, 1)


def carried_answer(problem: Problem, other: Problem) -> float:
    """The problem's last step on the other's last intermediate result, as if only that were exchanged.

    Where there is one step alone, on the other's first operand in place of its own: what the last step starts
    from. NaN for problems of which one has intermediate results and the other has none, or whose last step is
    not one operation on that start and a number.
    """
    if (len(problem.equations) < 2) != (len(other.equations) < 2) or not problem.equations:
        return float("nan")
    last, own = problem.equations[-1], _start(problem)
    sign = re.fullmatch(rf"\s*(?:{_DIGITS})\s*([-+*/])\s*(?:{_DIGITS})\s*", last.left)
    if not sign or last.operands.count(own) != 1:
        return float("nan")
    exchanged = _start(other)
    left, right = (exchanged if value == own else value for value in last.operands)
    if sign[1] == "/":
        return left / right if right else float("nan")
    return {"+": left + right, "-": left - right, "*": left * right}[sign[1]]


def _start(problem: Problem) -> float:
    """What the last step starts from: the result before it, else its first operand."""
    if len(problem.equations) > 1:
        return problem.equations[-2].result
    return next(iter(problem.equations[0].operands), float("nan"))


# -- parsing ---------------------------------------------------------------------------------------


def _parse(line: str, row_id: str) -> Problem:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("field 'question' must be a text")
    if row.get("answer") is None:
        raise ValueError("field 'answer' is missing")
    answer = extract_answer(str(row["answer"]))
    if answer is None:
        raise ValueError(f"field 'answer' holds no number: {row['answer']!r}")
    # As CODI's evaluation cleans it: the text is what the model reads.
    question = question.strip().replace("  ", " ")
    if not question_numbers(question):
        raise ValueError(f"the question has no number: {question[:60]!r}")
    twin = row.get("twin")
    return Problem(
        str(row.get("id", row_id)),
        question,
        tuple(_equations(row.get("cot", row.get("steps")))),
        answer,
        None if twin is None else str(twin),
    )


def _equations(steps: Any) -> Iterable[Equation]:
    if isinstance(steps, str):
        found = re.findall(r"<<.*?>>", steps)
        rest = re.sub(r"<<.*?>>", " ", steps).strip()
        if rest:
            raise ValueError(f"field 'cot' is not made of steps such as <<16-3-4=9>>: {rest[:60]!r}")
        steps = found
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise ValueError("field 'cot' is missing: a text or a list of steps such as <<16-3-4=9>>")
    return [Equation.parse(step) for step in steps]


def _value(text: str) -> float | None:
    """Value of the right side of an equation: a number, perhaps with $ or %, or a fraction."""
    text = text.strip().lstrip("$").rstrip("%").strip()
    numerator, slash, denominator = text.partition("/")
    parts = [numerator, denominator] if slash else [numerator]
    if not all(_SIGNED.fullmatch(part.strip()) for part in parts):
        return None
    values = [_float(part.strip()) for part in parts]
    if slash:
        return values[0] / values[1] if values[1] else None
    return values[0]


def _float(text: str) -> float:
    return float(text.replace(",", ""))
