"""What thoughts are for: answers with thoughts replaced, and rhythms over thoughts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lib.codi.checkpoint import CodiModel
from lib.codi.latents import Thoughts, answer, mean_ablations, replacing, twin_patches
from lib.codi.problems import Problem, carried_answer, twin_indices, twins
from lib.core.cache import Cache


class CausalRole(NamedTuple):
    """What follows when thoughts are replaced, [set, problem]: 1 or 0, NaN for a problem that cannot tell.

    Attributes:
        twin: with the twin's thoughts the answer is the twin's.
        carried: with the twin's thoughts it is the problem's own last step on the twin's intermediate result
            (`lib.codi.problems.carried_answer`), or, where there is one step alone, that step on the twin's
            start: thoughts carry that number, and no more.
        kept: with the twin's thoughts it is the problem's own all the same.
        lost: with the mean thoughts of problems of as many steps it is right no more.
        lost_any: with the mean thoughts of all problems.
    """

    twin: np.ndarray
    carried: np.ndarray
    kept: np.ndarray
    lost: np.ndarray
    lost_any: np.ndarray


def causal_role(
    codi: CodiModel,
    problems: Sequence[Problem],
    thoughts: Thoughts,
    sets: Sequence[Sequence[int]],
    *,
    batch_size: int = 0,
    cache: Cache | None = None,
) -> CausalRole:
    """Twin patching and mean ablation of sets of thoughts, side by side.

    Only problems that are answered right tell anything, and of twins those that both are. Problems whose twin
    is not among these, as those of GSM8K, have mean ablation alone.

    Args:
        thoughts: of the problems, from `think`.
        sets: of k, z_k being replaced together.
    """
    wanted = np.array([problem.answer for problem in problems])
    right = thoughts.answers.equal(wanted)[0]
    twin = twin_indices(problems)
    paired = twin != np.arange(len(problems))
    n_steps = [len(problem.equations) for problem in problems]
    variants = [*mean_ablations(thoughts, sets, n_steps), *mean_ablations(thoughts, sets)]
    if paired.any():
        variants += twin_patches(problems, thoughts, sets)
    questions = [problem.question for problem in problems]
    found = answer(codi, questions, variants, batch_size=batch_size, cache=cache)
    n, shape_ = len(sets), (len(sets), len(problems))
    role = CausalRole(*(np.full(shape_, np.nan) for _ in CausalRole._fields))
    lost = ~found.equal(wanted)
    role.lost[:, right], role.lost_any[:, right] = lost[:n, right], lost[n : 2 * n, right]
    if paired.any():
        carried = np.array(
            [carried_answer(problem, problems[i]) for problem, i in zip(problems, twin, strict=True)]
        )
        both = paired & right & right[twin]
        for effect, expected in zip(role, (wanted[twin], carried, wanted), strict=False):
            told = both & np.isfinite(expected)
            effect[:, told] = found.equal(expected)[2 * n :, told]
    return role


class PlanRole(NamedTuple):
    """Whether an answer stays the problem's own with thoughts of a problem that is no twin of it and has as
    many steps [set, problem]: 1 or 0, NaN for a problem that cannot tell.

    Twins share their text, so patches between them say nothing of what thoughts know of it.

    Attributes:
        same: the other problem's steps have the same operations.
        other: they have not.
    """

    same: np.ndarray
    other: np.ndarray


def plan_role(
    codi: CodiModel,
    problems: Sequence[Problem],
    thoughts: Thoughts,
    sets: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    batch_size: int = 0,
    cache: Cache | None = None,
) -> PlanRole:
    """Patching of sets of thoughts from strangers, of problems that are answered right by problems that are.

    Args:
        thoughts, sets: as for `causal_role`.
        seed: of the strangers.
    """
    wanted = np.array([problem.answer for problem in problems])
    right = thoughts.answers.equal(wanted)[0]
    rng, variants, told = np.random.default_rng(seed), [], []
    for alike in (True, False):
        donors = np.full(len(problems), -1)
        for i, problem in enumerate(problems):
            strangers = [
                j
                for j, other in enumerate(problems)
                if right[j] and i != j and not twins(problem, other)
                and len(other.equations) == len(problem.equations)
                and (other.operations == problem.operations) == alike
            ]  # fmt: skip
            if strangers:
                donors[i] = rng.choice(strangers)
        variants += [replacing("stranger's", chosen, thoughts, thoughts.z[donors]) for chosen in sets]
        told.append(right & (donors >= 0))
    questions = [problem.question for problem in problems]
    found = answer(codi, questions, variants, batch_size=batch_size, cache=cache).equal(wanted)
    halves = np.split(found, 2)
    return PlanRole(*(np.where(known, half, np.nan) for half, known in zip(halves, told, strict=True)))
