"""Shipping of the CODI organisms: their problems, and their gates, which were fixed before training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lib.codi import latents
from lib.codi.checkpoint import CodiModel, load_codi
from lib.core import embedded
from lib.core.claims import Claim
from lib.core.record import Metric
from lib.core.statistics import Estimate, wilson
from lib.organisms import word_problems
from lib.organisms.cards import Measured, OrganismRecord, Rows, gate, reported, stage_table
from lib.organisms.codi import IDS, N_THOUGHTS, RECIPES, encode, teacher_text, train_seed
from lib.organisms.shipping import Organism, write_log, write_model
from lib.organisms.word_problems import ANSWER_PROMPT, BOT, EOT, MAX_STEPS, PAD, WordProblem

PROBLEM_SEED = 4242
PAIRS = 100  # of twins, for each number of steps
MIN_TEACHER, MIN_STUDENT = 0.98, 0.9
BASELINE, SCRATCH = "codi-answer-only", "codi-answer-scratch"
SEEDS = {name: (0,) if name in (BASELINE, SCRATCH) else (0, 1) for name in RECIPES}


def test_pairs() -> list[tuple[WordProblem, WordProblem]]:
    """Held-out problems of one, two and three steps, each with its twin; the same for every organism."""
    rng = np.random.default_rng(PROBLEM_SEED)
    return [
        pair
        for n_steps in range(1, MAX_STEPS + 1)
        for pair in word_problems.sample_twins(rng, PAIRS, n_steps)
    ]


def problem_rows() -> list[dict[str, str]]:
    """The rows of problems.jsonl."""
    rows = []
    for i, pair in enumerate(test_pairs()):
        names = [f"{len(pair[0].equations)}-{i % PAIRS:03d}{letter}" for letter in "ab"]
        for problem, name, twin in zip(pair, names, reversed(names), strict=True):
            rows.append({"id": name, "question": problem.question, "cot": problem.cot,
                         "answer": str(problem.answer), "twin": twin})  # fmt: skip
    return rows


# -- shipment --------------------------------------------------------------------------------------


def export(name: str, seed: int, scratch: Path, folder: Path) -> OrganismRecord:
    """Write a trained seed as it is shipped, as `lib.codi.checkpoint` reads it; see `Organism`."""
    stages, trained = RECIPES[name], scratch / f"codi-{seed}" / "models" / name
    thinks = stages[-1].thinks
    write_model(trained, folder, word_problems.build_tokenizer())
    write_log(((stage.name, scratch / f"codi-{seed}" / stage.name) for stage in stages), folder)
    if thinks:
        shutil.copy(trained / "projection.safetensors", folder)
    settings = {
        "n_thoughts": N_THOUGHTS if thinks else 0,
        "bot": BOT,
        "eot": EOT,
        "answer_prompt": ANSWER_PROMPT,
        "cot": "operators" if stages[-1].operators else "results",
    }
    (folder / "codi.json").write_text(json.dumps(settings, indent=1) + "\n")
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problem_rows()))
    return OrganismRecord(organism=name, seed=seed, tables={"stages": stage_table(stages)})


# -- what is measured ------------------------------------------------------------------------------


def measure(name: str, folder: Path) -> Measured:
    """The gates of an organism, of an exported folder, on the problems of `test_pairs`.

    Thinking organisms are compared with the models without thoughts, which have to be shipped before.
    """
    last = RECIPES[name][-1]
    problems = [problem for pair in test_pairs() for problem in pair]
    codi, n_steps = load_codi(str(folder)), np.array([len(problem.equations) for problem in problems])
    hardest = n_steps == MAX_STEPS
    gates, found, tables = [], {}, {}
    if last.writes:
        written = teacher_writes(codi, problems, last.operators)
        gates.append(gate("teacher", "teacher, all problems", _rate(written), above=MIN_TEACHER))
        for n in range(1, MAX_STEPS + 1):
            found[f"teacher, {_steps(n)}"] = reported(_rate(written[n_steps == n]))
    if last.answers:
        stops = [*latents.early_stops(codi), *latents.early_stops(codi, prompted=False)]
        answers = latents.answer(codi, [problem.question for problem in problems], stops)
        prompted, free = np.split(answers.equal([problem.answer for problem in problems]), 2)
        rates = {n: _rate(free[-1, n_steps == n]) for n in range(1, MAX_STEPS + 1)}
        gated = MAX_STEPS if last.thinks else None
        found |= {f"answer, {_steps(n)}": reported(rate) for n, rate in rates.items() if n != gated}
    if last.answers and not last.thinks:
        found["answer with the prompt fed, 3 steps"] = reported(_rate(prompted[0, hardest]))
    if last.thinks:
        answered = rates[MAX_STEPS]
        without, freely = _rate(prompted[0, hardest]), _rate(free[0, hardest])
        gates += [
            gate("answer", "answer, 3 steps", answered, above=MIN_STUDENT),
            below_answer("no-thoughts", "0 thoughts", reported(without), answered),
            below_answer("baseline", BASELINE, _of_baseline(BASELINE), answered),
        ]
        found[f"{SCRATCH}, 3 steps"] = _of_baseline(SCRATCH)
        found["0 thoughts, 3 steps, no prompt fed"] = reported(freely)
        found["its interval below the answer's"] = "yes" if freely.high < answered.low else "no"
        steps = answers.with_steps()[len(prompted) :]
        tables = {
            "prompted": _by_thoughts(prompted, n_steps),
            "free": _by_thoughts(free, n_steps, steps),
            "decoded": _decoded(codi, [problems[i] for i in np.flatnonzero(hardest)]),
        }
    return Measured(gates, found, tables)


def below_answer(id: str, name: str, without: Metric, answered: Estimate) -> Claim:
    """Without thoughts fewer problems are answered: the whole interval lies below the answer's."""
    return Claim.test(
        id,
        f"{name}, 3 steps: interval below the answer's",
        source="here",
        measured=without.value,
        interval=without.interval,
        below=answered.low,
    )


@torch.no_grad()
def teacher_writes(codi: CodiModel, problems: Sequence[WordProblem], operators: bool) -> np.ndarray:
    """Whether greedy decoding behind each question writes its steps and its answer exactly, bool [problem].

    It does where each token is the likeliest behind the right ones.
    """
    ids = encode([f"{problem.question} {teacher_text(problem, operators)}" for problem in problems])
    guess = codi.model._module(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
    starts = torch.tensor([len(problem.question.split()) for problem in problems])
    is_read = torch.arange(1, ids.shape[1]) < starts[:, None]
    return ((guess == ids[:, 1:]) | is_read | (ids[:, 1:] == IDS[PAD])).all(1).numpy()


def _of_baseline(name: str) -> Metric:
    """What a shipped model without thoughts answers, by its record."""
    return OrganismRecord.read(embedded.ORGANISMS / name).reported["answer with the prompt fed, 3 steps"]


def _by_thoughts(right: np.ndarray, n_steps: np.ndarray, steps: np.ndarray | None = None) -> Rows:
    """Accuracy by number of thoughts [thoughts, problem], and in brackets the share that writes steps."""
    rows = [["", *("1 thought" if n == 1 else f"{n} thoughts" for n in range(len(right)))]]
    for n in range(1, MAX_STEPS + 1):
        cells = [f"{share:.3f}" for share in right[:, n_steps == n].mean(1)]
        if steps is not None:
            shares = steps[:, n_steps == n].mean(1)
            cells = [f"{cell} ({share:.2f})" for cell, share in zip(cells, shares, strict=True)]
        rows.append([_steps(n), *cells])
    return rows


def _decoded(codi: CodiModel, problems: Sequence[WordProblem]) -> Rows:
    """What the likeliest tokens of z_0, z_1, ... are."""
    thoughts = latents.think(codi, [problem.question for problem in problems])
    with torch.no_grad():
        likeliest = codi.model._module.lm_head(torch.from_numpy(thoughts.z)).argmax(-1).numpy()
    values = codi.token_values[likeliest]  # [problem, z]
    results = [[equation[-1] for equation in problem.equations[:-1]] for problem in problems]
    shares = {
        "a number": ~np.isnan(values),
        "an intermediate result": (values[:, :, None] == np.array(results)[:, None]).any(-1),
    }
    rows = [[label, *(f"{share:.2f}" for share in found.mean(0))] for label, found in shares.items()]
    return [["", *(f"z_{j}" for j in range(values.shape[1]))], *rows]


def _rate(right: np.ndarray) -> Estimate:
    return wilson(int(right.sum()), right.size)


def _steps(n: int) -> str:
    return "1 step" if n == 1 else f"{n} steps"


ORGANISMS = [
    Organism(name, seeds, partial(train_seed, name), partial(export, name), partial(measure, name))
    for name, seeds in SEEDS.items()
]
