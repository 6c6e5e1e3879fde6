"""What readings say: which tokens are attended to, which numbers are decoded, when a thought settles."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import comb
from typing import NamedTuple

import numpy as np

from lib.codi.checkpoint import CodiModel
from lib.codi.problems import Problem
from lib.codi.readings import SHARED, SINK, Reading
from lib.core.statistics import known_mean


# -- what a reading says ---------------------------------------------------------------------------
class Attended(NamedTuple):
    """The tokens that a row attends to most, by mean attention over all layers and heads (neverix 2026)."""

    positions: np.ndarray  # int [problem, row, k], in order of mass
    mass: np.ndarray  # [problem, row, k]
    kinds: np.ndarray  # category of these tokens, int [problem, row, k]
    sink: np.ndarray  # mass on the first token, whether or not it is among them [problem, row]


def attended(reading: Reading, k: int, *, question_only: bool = False, sink: bool = True) -> Attended:
    """Top k tokens of every row.

    Args:
        reading: of `read_thoughts` or `read_solution`.
        k: number of tokens.
        question_only: leave out what stands behind the question, among it the row itself.
        sink: whether the first token competes. Its mass is returned in either case.

    Raises:
        ValueError: k is larger than what a row can attend to.
    """
    shape_ = (len(reading.attention), len(reading.rows), k)
    found = Attended(
        np.full(shape_, -1), np.full(shape_, np.nan), np.full(shape_, -1), np.full(shape_[:2], np.nan)
    )
    for i, (attention, kinds) in enumerate(zip(reading.attention, reading.kinds, strict=True)):
        open_ = (kinds >= 0) & (sink | (kinds != SINK))
        if question_only:
            open_ &= kinds < len(SHARED)
        for row, allowed in enumerate(open_):
            if not (kinds[row] >= 0).any():
                continue  # a row that this problem does not have
            if not 1 <= k <= allowed.sum():
                raise ValueError(
                    f"k {k}: {reading.rows[row]} of problem {i} has {allowed.sum()} tokens to attend to; "
                    "lower k"
                )
            order = np.argsort(-np.where(allowed, attention[row], -1), kind="stable")[:k]
            found.positions[i, row], found.mass[i, row] = order, attention[row, order]
            found.kinds[i, row], found.sink[i, row] = kinds[row, order], attention[row, 0]
    return found


def chance_in_top(reading: Reading, k: int, kinds: Collection[int]) -> np.ndarray:
    """Chance that k question tokens drawn at random hold one of some categories [problem, row]: what the same
    share of `attended(..., question_only=True)` is to be compared with. NaN for a row that is not there."""
    found = np.full((len(reading.kinds), len(reading.rows)), np.nan)
    for i, rows in enumerate(reading.kinds):
        for row, of in enumerate(rows):
            question = of[(of >= 0) & (of < len(SHARED))]
            if len(question):
                others = len(question) - int(np.isin(question, list(kinds)).sum())
                found[i, row] = 1 - comb(others, k) / comb(len(question), k)
    return found


ROLES = ("operand", "other operand", "distractor", "text", "sink", "just before", "earlier latents", "self")


class Roles(NamedTuple):
    """Attention of z_0 .. z_n by what a token is to the thought, mean over layers and heads.

    Attributes:
        mass, null: [problem, thought, role], see `Reading`; roles as in `ROLES`. "just before" is the
            position in front of the thought, text for z_0 and <bot> for z_1; "earlier latents" are <bot> and
            the thoughts before that one.
        base: share of the tokens up to the thought [problem, thought, role].
    """

    mass: np.ndarray
    null: np.ndarray
    base: np.ndarray


def by_role(reading: Reading) -> Roles:
    """The attention of thoughts by role: categories, with the thoughts told apart by distance."""
    latent = [name for name in reading.categories if name == "<bot>" or name.startswith("thought ")]
    column = {name: i for i, name in enumerate(reading.categories)}

    def grouped(masses: np.ndarray) -> np.ndarray:
        found = np.zeros((len(masses), len(reading.thought_rows), len(ROLES)))
        for j, row in enumerate(reading.thought_rows):
            before = latent[j - 1] if j else None
            for name in (*SHARED, *latent[:j], "self"):
                role = name
                if name in latent:
                    role = "just before" if name == before else "earlier latents"
                found[:, j, ROLES.index(role)] += masses[:, row, column[name]]
        return found

    return Roles(
        grouped(reading.mass.mean((1, 2))), grouped(reading.null.mean((1, 2))), grouped(reading.base)
    )


class Decoding(NamedTuple):
    """What the lens reads at every row; the axis layer is that of `Reading.layers`, z itself the last one.

    A token counts as the number that it spells, with or without a leading space.
    """

    number: np.ndarray  # top token is a number, bool [problem, layer, row]
    intermediate: np.ndarray  # it is an intermediate result, bool [problem, layer, row]
    answer: np.ndarray  # it is the answer, bool [problem, layer, row]
    step: np.ndarray  # first step whose result it is, -1 for none, int [problem, layer, row]
    intermediate_in_top: np.ndarray  # one of the top k tokens is, bool [problem, layer, row]
    all_in_top: np.ndarray  # all intermediate results are in the top k of some z, bool [problem, layer]


def decoding(codi: CodiModel, reading: Reading, problems: Sequence[Problem]) -> Decoding:
    """Compare what the lens reads with the problems' solutions.

    With the problems in another order it is the chance level. Read `all_in_top` for problems with
    intermediate results; without any it is true. In a reading of a text it goes over all rows.
    """
    rows = reading.thought_rows or list(range(len(reading.rows)))
    values = _values(codi, reading)  # [problem, layer, row, k]
    top = values[..., 0]
    step = np.full(top.shape, -1)
    in_top = np.zeros(top.shape, dtype=bool)
    all_in_top = np.ones(top.shape[:2], dtype=bool)
    for i, problem in enumerate(problems):
        for s, equation in reversed(list(enumerate(problem.equations))):
            step[i][np.isclose(top[i], equation.result)] = s
        for result in problem.intermediate_results:
            seen = np.isclose(values[i], result).any(-1)  # [layer, row]
            in_top[i] |= seen
            all_in_top[i] &= seen[:, rows].any(-1)
    last = np.array([len(problem.equations) - 1 for problem in problems])[:, None, None]
    answers = np.array([problem.answer for problem in problems])[:, None, None]
    intermediate = (step >= 0) & (step < last)
    return Decoding(~np.isnan(top), intermediate, np.isclose(top, answers), step, in_top, all_in_top)


def operators_decoded(codi: CodiModel, reading: Reading, problems: Sequence[Problem]) -> np.ndarray:
    """Whether z_k decodes to the operation of each step, 1 or 0 [problem, thought, step].

    NaN for a step that a problem does not have. The lens behind the last block; of a step with several
    operations the first one counts.
    """
    top = reading.tokens[:, -1, reading.thought_rows, 0]
    found = np.full((*top.shape, max(len(problem.equations) for problem in problems)), np.nan)
    for i, problem in enumerate(problems):
        words = np.array([codi.token_texts[token].strip() for token in top[i]])
        for step, sign in enumerate(problem.operations):
            if sign:
                found[i, :, step] = words == sign
    return found


def settling(codi: CodiModel, reading: Reading) -> np.ndarray:
    """Whether z_k and z_{k+2} decode to the same number, 1 or 0 [problem, layer, n - 1].

    NaN where not both decode to a number: a separator that stays a separator settles nothing.
    """
    values = _values(codi, reading)[:, :, reading.thought_rows, 0]
    first, second = values[..., :-2], values[..., 2:]
    return np.where(np.isnan(first + second), np.nan, first == second)


def settles(settled: np.ndarray) -> np.ndarray:
    """How much more the last two thoughts of a parity agree than its first two [...], of `settling` [..., k].

    Mean of both parities, of those where all four decode to a number; NaN where neither does.
    """
    n = settled.shape[-1]
    late = [max(range(k, n, 2)) for k in range(min(2, n))]
    leads = [settled[..., last] - settled[..., k] for k, last in enumerate(late) if last > k]
    if not leads:
        return np.full(settled.shape[:-1], np.nan)
    return known_mean(np.stack(leads), 0)


def _values(codi: CodiModel, reading: Reading) -> np.ndarray:
    """Values of the lens' tokens, NaN for what is no number [problem, layer, row, k]."""
    return np.where(reading.tokens >= 0, codi.token_values[reading.tokens], np.nan)


def parity(values: np.ndarray) -> np.ndarray:
    """Mean over even thoughts minus mean over odd ones [...] of values [..., thought].

    Of the thoughts that are fed back and have a partner: z_0, z_2, z_4 against z_1, z_3, z_5 of seven.
    """
    pairs = (values.shape[-1] - 1) // 2
    if pairs < 1:
        raise ValueError(f"{values.shape[-1]} thoughts have no even and odd ones to compare; think 2 or more")
    fed = values[..., : 2 * pairs]
    return fed[..., ::2].mean(-1) - fed[..., 1::2].mean(-1)


def alternation(values: np.ndarray) -> np.ndarray:
    """How far values [..., thought] rise and fall from one thought to the next [...].

    Mean over z_k between two others of (-1)^k (x_k - (x_{k-1} + x_{k+1}) / 2); positive where even ones rise.

    1 for 1, 0, 1, 0, ... and 0 for a straight line. One thought that stands out, which `parity` takes for a
    rhythm, counts for little: z_0 alone of seven is .1.
    """
    if values.shape[-1] < 3:
        raise ValueError(f"{values.shape[-1]} thoughts have none between two others; think 2 or more")
    bends = values[..., 1:-1] - (values[..., :-2] + values[..., 2:]) / 2
    signs = np.where(np.arange(1, values.shape[-1] - 1) % 2, -1, 1)
    return (signs * bends).mean(-1)
