"""Synthetic word problems of one to three steps, and the word-level tokenizer that reads them.

A problem tells of one person whose things are counted: a start ("Ann has 14 pears ."), one clause a step
("she buys 5 more ."), and in between clauses with a number that no step uses ("a box holds 9 nuts .") and
clauses without a number ("it rains ."). Each step takes the result before it, and a number of the text:

    << 14 + 5 = 19 >> << 19 - 3 = 16 >>

What makes a problem fit to see which numbers are read and which are computed:

* the numbers of a question are distinct, no result is among them, and no two results are equal;
* answers are drawn evenly from 1 to 40, for each number of steps;
* operands stand at varying places, and unused numbers between them, as small or as great;
* a fifth of all tuples of operands is never trained on (`held_out`). Each single fact, such as 14 + 5, is.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from lib.organisms.training import word_tokenizer

MAX_STEPS = 3
TOP_NUMBER = 60  # the tokenizer has a token for each number from 0 to this one
TOP_RESULT = 40  # no number in a problem is greater
TOP_SECOND = 12  # what is added or taken away is 2 to this
FACTORS = (2, 3)
OPERATIONS = "+-*"
SHARES = (0.4, 0.4, 0.2)  # of the operations
LENGTHS = range(24, 29)  # of questions, in tokens; shorter ones do not hold two multiplications

NAMES = {"Ann": "she", "Eve": "she", "Mia": "she", "Bob": "he", "Dan": "he", "Tom": "he"}
THINGS = tuple("pears nuts coins cards pens eggs shells stamps".split())
START = "{name} has {a} {things} ."
# One clause a step; {n} is its number.
STEPS = {
    "+": ("{they} buys {n} .", "{they} finds {n} more .", "{they} gets {n} {things} more ."),
    "-": ("{they} loses {n} .", "{they} gives {n} away .", "{they} sells {n} of the {things} ."),
    "*": ("that grows {n} fold .", "soon {they} has {n} times that ."),
}
QUESTIONS = ("how many {things} ?", "how many {things} has {name} ?")
UNUSED = ("{other} is {n} .", "a box holds {n} {goods} .", "the bus takes {n} minutes .")
FILLERS = ("it rains .", "{other} is tall .", "the sky is blue .", "birds sing .", "{other} likes tea .")
MAX_UNUSED = 2  # numbers in a question that no step uses

PAD, UNKNOWN, EOS, BOT, EOT = SPECIAL = ("<pad>", "<unk>", "<eos>", "<bot>", "<eot>")
ANSWER_PROMPT = "The answer is :"
_SYMBOLS = ("<<", ">>", "+", "-", "*", "=", ";")


def _words() -> tuple[str, ...]:
    clauses = " ".join((START, *(c for cs in STEPS.values() for c in cs), *QUESTIONS, *UNUSED, *FILLERS))
    plain = [word for word in clauses.split() if "{" not in word]
    numbers = map(str, range(TOP_NUMBER + 1))
    words = (*numbers, *_SYMBOLS, *ANSWER_PROMPT.split(), *plain, *NAMES, *NAMES.values(), *THINGS)
    return tuple(dict.fromkeys(words))


VOCABULARY = (*SPECIAL, *_words())


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, number or sign; nothing is put in front of a text."""
    return word_tokenizer(VOCABULARY, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN)


@dataclass(frozen=True)
class WordProblem:
    """A problem and its solution.

    Attributes:
        question: text, one space between tokens.
        equations: (left, operation, right, result) of each step, in order.
    """

    question: str
    equations: tuple[tuple[int, str, int, int], ...]

    @property
    def answer(self) -> int:
        return self.equations[-1][-1]

    @property
    def operands(self) -> tuple[int, ...]:
        """The start and the number of each step."""
        return (self.equations[0][0], *(right for _, _, right, _ in self.equations))

    @property
    def cot(self) -> str:
        """Chain of thought in the form of GSM8K-Aug."""
        return " ".join(f"<<{left}{op}{right}={result}>>" for left, op, right, result in self.equations)

    def steps(self, operators: bool) -> list[str]:
        """Each step as tokens: "<< 3 + 5 = 8 >>", or "8 ;" without operators."""
        if operators:
            return [f"<< {left} {op} {right} = {result} >>" for left, op, right, result in self.equations]
        return [f"{result} ;" for *_, result in self.equations]


def held_out(operands: np.ndarray) -> np.ndarray:
    """Whether tuples of operands [..., operand], zero where there are fewer, are kept from training."""
    mixed = np.zeros(operands.shape[:-1], dtype=np.uint64)
    for i in range(operands.shape[-1]):
        mixed = (mixed ^ operands[..., i].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed % np.uint64(5) == 0


def sample(
    rng: np.random.Generator,
    n_steps: Sequence[int],
    length: int,
    *,
    max_unused: int = 1,
    anywhere: bool = False,
    test: bool = False,
) -> list[WordProblem]:
    """Problems whose questions all have `length` tokens.

    Args:
        n_steps: of each problem, 1 to 3.
        length: that of `LENGTHS`, or more.
        max_unused: numbers that no step uses, at most `MAX_UNUSED`.
        anywhere: whether they may stand before the start and behind the last step.
        test: draw held-out tuples of operands instead of the others.

    Raises:
        ValueError: a length that some problems do not fit into.
    """
    if length < LENGTHS[0]:
        raise ValueError(f"length {length}: some problems take {LENGTHS[0]} tokens; ask for that or more")
    draw, problems = random.Random(int(rng.integers(1 << 62))), [None] * len(n_steps)
    for count in sorted(set(n_steps)):
        rows = [i for i, n in enumerate(n_steps) if n == count]
        operations, values = _sample_numbers(rng, len(rows), count, test)
        for i, signs, numbers in zip(rows, operations.tolist(), values.tolist(), strict=True):
            template = _template(draw, [OPERATIONS[sign] for sign in signs], length, max_unused, anywhere)
            problems[i] = _fill(template, signs, numbers)
    return problems


def sample_twins(rng: np.random.Generator, n: int, n_steps: int) -> list[tuple[WordProblem, WordProblem]]:
    """Pairs of held-out problems with the same text and other numbers; no result of one is in the other."""
    draw, pairs = random.Random(int(rng.integers(1 << 62))), []
    operations, values = _sample_numbers(rng, 40 * n, n_steps, True)
    waiting: dict[tuple[int, ...], list[list[int]]] = {}
    for signs, numbers in zip(map(tuple, operations.tolist()), values.tolist(), strict=True):
        partners = waiting.setdefault(signs, [])
        for other in partners:
            if set(numbers[1 : n_steps + 1]).isdisjoint(other) and set(other[1 : n_steps + 1]).isdisjoint(
                numbers
            ):
                partners.remove(other)
                template = _template(
                    draw, [OPERATIONS[sign] for sign in signs], draw.choice(LENGTHS), 1, False
                )
                pairs.append((_fill(template, signs, other), _fill(template, signs, numbers)))
                break
        else:
            partners.append(numbers)
        if len(pairs) == n:
            return pairs
    raise RuntimeError(f"only {len(pairs)} of {n} pairs of {n_steps} steps were found")


# -- numbers ---------------------------------------------------------------------------------------


def _sample_numbers(
    rng: np.random.Generator, n: int, n_steps: int, test: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Operations [problem, step] and values [problem, start, results, numbers of steps, unused numbers].

    Answers are drawn evenly first; each takes the next candidate that has it.
    """
    operations = np.zeros((n, n_steps), dtype=np.int64)
    values = np.zeros((n, 1 + 2 * n_steps + MAX_UNUSED), dtype=np.int64)
    open_rows = np.arange(n)
    while len(open_rows):
        signs, drawn = _candidates(rng, max(3000, 40 * len(open_rows)), n_steps, test)
        # Drawn anew in every round: held-out problems of one step do not reach every answer.
        wanted = np.sort(rng.integers(1, TOP_RESULT + 1, size=len(open_rows)))
        order = np.argsort(drawn[:, n_steps], kind="stable")
        answers = drawn[order, n_steps]
        # The k-th row that wants an answer takes the k-th candidate that has it.
        place = np.searchsorted(answers, wanted) + np.arange(len(wanted)) - np.searchsorted(wanted, wanted)
        fits = place < len(answers)
        fits[fits] = answers[place[fits]] == wanted[fits]
        rng.shuffle(open_rows)
        rows, chosen = open_rows[fits], order[place[fits]]
        operations[rows], values[rows] = signs[chosen], drawn[chosen]
        open_rows = open_rows[~fits]
    return operations, values


def _candidates(rng: np.random.Generator, n: int, n_steps: int, test: bool) -> tuple[np.ndarray, np.ndarray]:
    """At most `n` problems that keep the rules of the module, as `_sample_numbers` returns them."""
    signs = rng.choice(3, size=(n, n_steps), p=SHARES)
    seconds = rng.integers(2, TOP_SECOND + 1, size=(n, n_steps))
    seconds = np.where(signs == 2, rng.choice(FACTORS, size=(n, n_steps)), seconds)
    chain = np.empty((n, n_steps + 1), dtype=np.int64)
    chain[:, 0] = rng.integers(2, TOP_RESULT + 1, size=n)
    for step in range(n_steps):
        left, right = chain[:, step], seconds[:, step]
        chain[:, step + 1] = np.choose(signs[:, step], [left + right, left - right, left * right])
    # Half of the unused numbers are as small as what is added or taken away.
    tops = rng.choice([TOP_SECOND, TOP_RESULT], size=(n, MAX_UNUSED))
    unused = rng.integers(2, tops + 1)
    values = np.concatenate([chain, seconds, unused], axis=1)
    ordered = np.sort(values, axis=1)
    keep = ((chain >= 1) & (chain <= TOP_RESULT)).all(1) & (ordered[:, 1:] != ordered[:, :-1]).all(1)
    operands = np.zeros((n, MAX_STEPS + 1), dtype=np.int64)
    operands[:, 0], operands[:, 1 : n_steps + 1] = chain[:, 0], seconds
    keep &= held_out(operands) == test
    return signs[keep], values[keep]


# -- text ------------------------------------------------------------------------------------------


def _template(
    draw: random.Random, operations: Sequence[str], length: int, max_unused: int, anywhere: bool
) -> str:
    """A question of `length` tokens with {0}, {1}, ... for the operands and {u0}, ... for unused numbers."""
    gap = -1
    while gap < 0 or gap in (1, 2):  # no clause is as short as that
        name, other = draw.sample(sorted(NAMES), 2)
        things, goods = draw.sample(THINGS, 2)
        story = [START.replace("{a}", "{0}")]
        story += [draw.choice(STEPS[op]).replace("{n}", f"{{{i}}}") for i, op in enumerate(operations, 1)]
        question = draw.choice(QUESTIONS)
        gap = length - sum(len(clause.split()) for clause in (*story, question))
    unused = 0
    while gap:
        extra = draw.choice(UNUSED if unused < max_unused and draw.random() < 0.6 else FILLERS)
        left = gap - len(extra.split())
        if left < 0 or left in (1, 2):
            continue
        gap = left
        first, last = 0, len(story)
        if extra in UNUSED:
            extra, unused = extra.replace("{n}", f"{{u{unused}}}"), unused + 1
            if not anywhere:
                used = [i for i, clause in enumerate(story) if re.search(r"\{\d", clause)]
                first, last = used[0] + 1, used[-1]
        story.insert(draw.randint(first, last), extra)
    text = " ".join((*story, question))
    for slot, word in {"name": name, "they": NAMES[name], "things": things, "other": other,
                       "goods": goods}.items():  # fmt: skip
        text = text.replace(f"{{{slot}}}", word)
    return text


def _fill(template: str, signs: Sequence[int], values: Sequence[int]) -> WordProblem:
    """A template with the values of a problem, ordered as in `_sample_numbers`."""
    n = len(signs)
    chain, seconds, unused = values[: n + 1], values[n + 1 : 2 * n + 1], values[2 * n + 1 :]
    slots = {str(i): value for i, value in enumerate((chain[0], *seconds))}
    slots |= {f"u{i}": value for i, value in enumerate(unused)}
    question = re.sub(r"\{(u?\d)\}", lambda match: str(slots[match[1]]), template)
    equations = tuple((chain[i], OPERATIONS[sign], seconds[i], chain[i + 1]) for i, sign in enumerate(signs))
    return WordProblem(question, equations)
