"""Shipping of the CODI organisms: problems, gates measured as shipped, cards that say what fell short."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from safetensors.torch import load_file

from lib import latents, models
from lib.codi_checkpoint import CodiModel, load_codi
from lib.organisms import shipping, word_problems
from lib.organisms.codi import (
    D_MODEL,
    N_HEADS,
    N_LAYERS,
    N_THOUGHTS,
    RECIPES,
    Codi,
    Recipe,
    ask,
    teach,
    teacher_text,
    train_seed,
    trained,
)
from lib.organisms.shipping import Check, Organism, export, ship
from lib.organisms.training import save_weights
from lib.organisms.word_problems import ANSWER_PROMPT, BOT, EOT, LENGTHS, MAX_STEPS, WordProblem
from lib.statistics import Estimate, wilson

PROBLEM_SEED = 4242
PAIRS = 100  # of twins, for each number of steps
# Fixed before training.
MIN_TEACHER, MIN_STUDENT = 0.98, 0.9
BASELINE, SCRATCH = "codi-answer-only", "codi-answer-scratch"


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


def publish(name: str, scratch: Path, seeds: tuple[int, ...]) -> str:
    """Ship trained seeds with problems, logs, cards and manifests.

    `organism/NAME` is the seed that misses the fewest gates as shipped (float16 weights), among those the
    one that answers the most problems of three steps (of models that only write: the first); the others are
    shipped beside it as `organism/NAME-seedN`. Thinking organisms are compared with the answer-only model.

    Returns:
        The table of the card.
    """
    recipe = RECIPES[name]
    baselines = {}
    if recipe.thinks:
        for other in (BASELINE, SCRATCH):
            baselines[other] = measure_as_shipped(RECIPES[other], SEEDS[other][0], scratch)
    measured = {seed: measure_as_shipped(recipe, seed, scratch, baselines) for seed in seeds}
    shipped = min(seeds, key=lambda seed: (len(shipping.missed(measured[seed].checks)), -measured[seed].rank))

    def fill(seed: int, target: Path) -> None:
        shutil.copytree(scratch / f"codi-{seed}" / "export" / name, target)
        stages = ((stage.name, scratch / f"codi-{seed}" / stage.name) for stage in recipe.stages)
        (target / "training_log.jsonl").write_text(shipping.joined_logs(stages))
        (target / "README.md").write_text(_card(recipe, target.name, seed, shipped, measured))

    ship(name, seeds, shipped, fill)
    return shipping.table({seed: of.checks for seed, of in measured.items()})


def write_cards(name: str, seeds: tuple[int, ...]) -> str:
    """Measure the shipped seeds of an organism again and write their cards, without training.

    Returns:
        The table of the card.
    """
    recipe = RECIPES[name]
    [shipped] = [seed for seed in seeds if not (models.ORGANISMS / f"{name}-seed{seed}").is_dir()]
    folders = {seed: models.ORGANISMS / (name if seed == shipped else f"{name}-seed{seed}") for seed in seeds}
    baselines = {}
    if recipe.thinks:
        for other in (BASELINE, SCRATCH):
            baselines[other] = measure(RECIPES[other], models.ORGANISMS / other, test_pairs())
    measured = {seed: measure(recipe, folder, test_pairs(), baselines) for seed, folder in folders.items()}
    for seed, folder in folders.items():
        (folder / "README.md").write_text(_card(recipe, folder.name, seed, shipped, measured))
        models.write_manifest(folder)
    return shipping.table({seed: of.checks for seed, of in measured.items()})


SEEDS = {"codi": (0, 1), "codi-results": (0, 1), "codi-teacher": (0, 1), "codi-results-teacher": (0, 1),
         BASELINE: (0,), SCRATCH: (0,)}  # fmt: skip
ORGANISMS = {
    name: Organism(
        seeds,
        partial(train_seed, name),
        partial(publish, name, seeds=seeds),
        partial(write_cards, name, seeds),
    )
    for name, seeds in SEEDS.items()
}


def export_codi(recipe: Recipe, model: Codi, target: Path) -> None:
    """Write a model in the layout that `lib.codi_checkpoint` reads, with its problems."""
    ordinary = target.with_name(f"{target.name}-float32")
    model.gpt2.save_pretrained(ordinary)
    export(ordinary, target, word_problems.build_tokenizer())
    shutil.rmtree(ordinary)
    if recipe.thinks:
        save_weights(model.projection, target / "projection.safetensors")
    settings = {
        "n_thoughts": N_THOUGHTS if recipe.thinks else 0,
        "bot": BOT,
        "eot": EOT,
        "answer_prompt": ANSWER_PROMPT,
        "cot": "operators" if recipe.operators else "results",
    }
    (target / "codi.json").write_text(json.dumps(settings, indent=1) + "\n")
    (target / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problem_rows()))


def load_exported(folder: Path) -> Codi:
    """A shipped model as it is trained here, float32; without a projection file, that part is random."""
    model = Codi(0)
    model.gpt2.load_state_dict(load_file(folder / "model.safetensors"))
    projection = folder / "projection.safetensors"
    if projection.is_file():
        model.projection.load_state_dict(load_file(projection))
    return model.eval()


# -- what is measured ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What is known of a seed as shipped.

    Attributes:
        checks: rows of the card.
        right: whether the answer behind 0, 1, .. thoughts and the answer prompt is right, bool
            [thoughts, problem].
        free: the same where the model writes the prompt itself, or its steps first.
        steps: whether it then writes steps, bool [thoughts, problem].
        n_steps: of each problem [problem].
        decoded: in problems of three steps, share of z_0, z_1, .. whose likeliest token is a number, and
            those whose likeliest token is an intermediate result of the problem [2, z].
        rank: by which seeds are compared that miss equally many gates.
    """

    checks: list[Check]
    right: np.ndarray
    free: np.ndarray
    steps: np.ndarray
    n_steps: np.ndarray
    decoded: np.ndarray
    rank: float

    def of(self, values: np.ndarray, n_steps: int) -> np.ndarray:
        """Share of the problems of so many steps for which values [thoughts, problem] are true [thoughts]."""
        return values[:, self.n_steps == n_steps].mean(1)


def measure_as_shipped(
    recipe: Recipe, seed: int, scratch: Path, baselines: Mapping[str, Measured] = MappingProxyType({})
) -> Measured:
    """Export a trained seed into its scratch folder, load it from there, and measure its gates."""
    exported = scratch / f"codi-{seed}" / "export" / recipe.name
    shutil.rmtree(exported, ignore_errors=True)
    exported.parent.mkdir(exist_ok=True)
    export_codi(recipe, trained(recipe.name, seed, scratch), exported)
    return measure(recipe, exported, test_pairs(), baselines)


def measure(
    recipe: Recipe,
    folder: Path,
    pairs: Sequence[tuple[WordProblem, WordProblem]],
    baselines: Mapping[str, Measured] = MappingProxyType({}),
) -> Measured:
    """Gates of an organism's folder.

    Args:
        pairs: problems to measure on.
        baselines: for thinking organisms, the models without thoughts by name, on the same problems.
    """
    problems = [problem for pair in pairs for problem in pair]
    questions = [problem.question for problem in problems]
    n_steps = np.array([len(problem.equations) for problem in problems])
    codi = load_codi(str(folder))
    stops = [*latents.early_stops(codi), *latents.early_stops(codi, prompted=False)]
    answers = latents.answer(codi, questions, stops)
    right, free = np.split(answers.equal([problem.answer for problem in problems]), 2)
    steps = answers.with_steps()[len(right) :]
    decoded = _decoded(codi, [problem for problem in problems if len(problem.equations) == MAX_STEPS])
    checks = []
    if recipe.writes:
        written = teacher_writes(load_exported(folder), problems, recipe.operators)
        rate = _rate(written)
        checks.append(
            Check("teacher, all problems", f"{rate}", f">= {MIN_TEACHER}", rate.value >= MIN_TEACHER)
        )
        for n in range(1, MAX_STEPS + 1):
            checks.append(Check(f"teacher, {_steps(n)}", f"{_rate(written[n_steps == n])}"))
    if recipe.answers:
        for n in range(1, MAX_STEPS + 1):
            rate = _rate(free[-1, n_steps == n])
            gated = recipe.thinks and n == MAX_STEPS
            checks.append(
                Check(f"answer, {_steps(n)}", f"{rate}", f">= {MIN_STUDENT}", rate.value >= MIN_STUDENT)
                if gated
                else Check(f"answer, {_steps(n)}", f"{rate}")
            )
    if recipe.thinks:
        student = _rate(free[-1, n_steps == MAX_STEPS])
        without = {"0 thoughts": right} | {name: of.right for name, of in baselines.items()}
        for label, other in without.items():
            rate = _rate(other[0, n_steps == MAX_STEPS])
            met = student.low > rate.high
            # The gate is against the stronger baseline, fixed before the other was trained.
            gate = "" if label == SCRATCH else "interval below the answer's"
            checks.append(Check(f"{label}, {_steps(MAX_STEPS)}", f"{rate}", gate, met or not gate))
        rate = _rate(free[0, n_steps == MAX_STEPS])
        checks.append(Check(f"0 thoughts, {_steps(MAX_STEPS)}, no prompt fed", f"{rate}"))
    rank = float(free[-1, n_steps == MAX_STEPS].mean()) if recipe.answers else 0.0
    return Measured(checks, right, free, steps, n_steps, decoded, rank)


def teacher_writes(model: Codi, problems: Sequence[WordProblem], operators: bool) -> np.ndarray:
    """Whether greedy decoding behind each question writes its steps and its answer exactly, bool [problem].

    It does where each token is the likeliest behind the right ones.
    """
    right = np.zeros(len(problems), dtype=bool)
    lengths = np.array([len(problem.question.split()) for problem in problems])
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        chosen = [problems[i] for i in rows]
        with torch.no_grad():
            last, cache = ask(model, chosen)
            right[rows] = teach(model, last, cache, chosen, operators).right.all(1).numpy()
    return right


def _decoded(codi: CodiModel, problems: Sequence[WordProblem]) -> np.ndarray:
    thoughts = latents.think(codi, [problem.question for problem in problems])
    head = codi.model._module.lm_head
    with torch.no_grad():
        likeliest = head(torch.from_numpy(thoughts.z)).argmax(-1).numpy()
    values = codi.token_values[likeliest]  # [problem, z]
    results = [[equation[-1] for equation in problem.equations[:-1]] for problem in problems]
    found = (values[:, :, None] == np.array(results)[:, None]).any(-1)
    return np.stack([~np.isnan(values), found]).mean(1)


def _rate(right: np.ndarray) -> Estimate:
    return wilson(int(right.sum()), right.size)


def _steps(n: int) -> str:
    return "1 step" if n == 1 else f"{n} steps"


def _thoughts(n: int) -> str:
    return "1 thought" if n == 1 else f"{n} thoughts"


# -- the card --------------------------------------------------------------------------------------


def _by_thoughts(measured: dict[int, Measured], prompted: bool) -> str:
    """Table of accuracy by number of thoughts, all seeds; without a prompt also how many write steps."""
    counts = range(N_THOUGHTS + 1)
    lines = ["| | " + " | ".join(map(_thoughts, counts)) + " |", "|---" * (len(counts) + 1) + "|"]
    for seed, of in measured.items():
        for n in range(1, MAX_STEPS + 1):
            cells = [f"{share:.3f}" for share in of.of(of.right if prompted else of.free, n)]
            if not prompted:
                cells = [
                    f"{cell} ({share:.2f})" for cell, share in zip(cells, of.of(of.steps, n), strict=True)
                ]
            lines.append(f"| seed {seed}, {_steps(n)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _gate_change(measured: dict[int, Measured]) -> str:
    """What the change of measure did to the gate, all seeds."""
    found = []
    for seed, of in measured.items():
        student = _rate(of.free[-1, of.n_steps == MAX_STEPS])
        met = [student.low > _rate(right[0, of.n_steps == MAX_STEPS]).high for right in (of.right, of.free)]
        words = ["met" if each else "missed" for each in met]
        found.append(f"{words[0]} by seed {seed} with the prompt, {words[1]} without it")
    return "; ".join(found) + "."


def _decoding(measured: dict[int, Measured]) -> str:
    """Table of what the likeliest tokens of the thoughts are, all seeds."""
    counts = range(N_THOUGHTS + 1)
    lines = ["| | " + " | ".join(f"z_{j}" for j in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for seed, of in measured.items():
        for label, row in zip(("a number", "an intermediate result"), of.decoded, strict=True):
            lines.append(f"| seed {seed}, {label} | " + " | ".join(f"{x:.2f}" for x in row) + " |")
    return "\n".join(lines)


def _stages(recipe: Recipe) -> str:
    titles = ("stage", "objective", "chain of thought", "steps", "rate", "tail from", "1 / 2 / 3 steps",
              "gamma", "tokens", "unused numbers")  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for stage in recipe.stages:
        form = "operators" if stage.operators else "results"
        tail = "none" if stage.decay_from > 0.99 else f"{stage.decay_from:.0%}"
        gamma = f"{stage.gamma:g}" if stage.objective == "joint" else ""
        shares = " / ".join(f"{share:g}" for share in stage.shares)
        tokens = f"{stage.lengths[0]} to {stage.lengths[1]}"
        unused = f"up to {stage.max_unused}, {'anywhere' if stage.anywhere else 'between'}"
        rate = f"{stage.rate:g}"
        cells = (stage.name, stage.objective, form, stage.steps, rate, tail, shares, gamma, tokens, unused)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _card(recipe: Recipe, folder_name: str, seed: int, shipped: int, measured: dict[int, Measured]) -> str:
    checks = {seed: of.checks for seed, of in measured.items()}
    model = Codi(seed)
    size = sum(parameter.numel() for parameter in model.gpt2.parameters())
    alone = ""
    if len(measured) > 1:
        which = "the one that answers the most problems of three steps" if recipe.answers else "the first"
        alone = (
            f"\n`organism/{recipe.name}` is seed {shipped}: of the seeds that miss the fewest gates, {which}."
        )
    form = "`<< 14 + 5 = 19 >>`" if recipe.operators else "`19 ;`"
    example = test_pairs()[-1][0]
    writes = f"{example.question} {teacher_text(example, recipe.operators)}"
    thoughts = ""
    if recipe.thinks:
        thoughts = f"""
Accuracy on the same problems behind fewer thoughts, `<eot>` and the answer prompt following at once:

{_by_thoughts(measured, prompted=True)}

The same where no prompt is fed and the model may write its steps first, with the share of problems for which
it does (more than one number) in brackets:

{_by_thoughts(measured, prompted=False)}

The rows of 0 thoughts, and their gate, were first measured without the prompt. That measure was changed after
its results had been seen: the last number of what a model writes freely can be that of a written chain of
thought, which is no answer without thoughts. Both numbers stand above. The gate is
{_gate_change(measured)}

What the likeliest token of z_0 .. z_6 is, in problems of three steps (reported; no recipe was chosen by it):

{_decoding(measured)}
"""
    return f"""# organism/{folder_name}

{shipping.shortfalls(checks)}

A GPT-2 of {N_LAYERS} layers, {N_HEADS} heads, d_model {D_MODEL} ({size:,} parameters, float16 on disk) with a
word-level tokenizer, trained from seed {seed} for study 4 (`notebooks/04_codi_attention.ipynb`) by
`python -m lib.organisms {recipe.name}`.{alone}

{_ABOUT[recipe.name].format(form=form)}

## Measured, as shipped

Float16 weights, loaded again; {2 * PAIRS} problems for each number of steps (`problems.jsonl`), no tuple of
operands of which was in training; rates with Wilson's 95% intervals. Gates were fixed before training.
"Teacher" is the share of problems whose steps and answer greedy decoding writes exactly.

{shipping.table(checks)}
{thoughts}
## Problems

`lib/organisms/word_problems.py`. The last of the test problems as its teacher writes it:

    {writes}

The numbers of a question are distinct, no result is among them, results are distinct, answers are spread
evenly over 1 to {word_problems.TOP_RESULT}. Clauses without a number stand anywhere, one whose number no step
uses stands between start and last step; questions have {LENGTHS[0]} to {LENGTHS[-1]} tokens whatever the
number of steps. A fifth of all tuples of operands is held out; single facts (14 + 5) are not. Each test
problem has a twin with the same text and other numbers. In `problems.jsonl` chains of thought have operators,
whatever the condition.

## Training

AdamW, weight decay .01, gradient clipped at 1, batches of {recipe.stages[0].rows}, one thread; each stage
warms up over 50 steps and goes on from the one before. The batch of a step depends on seed, stage and step
alone; an interrupted run continues and ends with the same weights. `training_log.jsonl` holds loss, held-out
accuracy and what thoughts decode to, every 100 steps.

{_stages(recipe)}

"joint" is cross-entropy of student and teacher plus gamma times the distillation: smooth L1 between the
states of student and teacher behind every block at the ":" before the answer, each in units of the teacher's
standard deviation, the teacher's detached. Nothing supervises a thought.
{_TRIED if recipe.thinks else ""}"""


_ABOUT = {
    "codi": """It answers after six continuous thoughts (self-distillation as in CODI). As its own teacher it
writes each step with its operator, {form}.""",
    "codi-results": """It answers after six continuous thoughts (self-distillation as in CODI). As its
own teacher it writes results only, {form}: is the period of the thoughts that of the teacher's text?""",
    "codi-teacher": """The teacher of `organism/codi` before joint training, and the start of all the
others. It writes each step with its operator, {form}, and thinks no thoughts.""",
    "codi-results-teacher": """The teacher of `organism/codi-results` before joint training. It writes
results only, {form}, and thinks no thoughts. It learnt the arithmetic in the form with operators.""",
    "codi-answer-only": """The baseline of the thinking organisms: same size, same start (the teacher),
as many steps on as many problems of each kind, but its answer follows `<bot> <eot>` at once.""",
    "codi-answer-scratch": """A second baseline: same size, from random weights, answers only, right
behind `<bot> <eot>`; it never saw a chain of thought. As many steps as joint training.""",
}

_TRIED = """
## What was tried

Recipes were chosen by held-out accuracy, never by what thoughts decode to. Pilots, none of them shipped:

* Joint training with gamma 5, rate 5e-4 and a quarter or more of problems of one step (seed 0, with
  operators): the student answered .19 and .12 of the problems of two steps after 300 steps. With gamma 1,
  rate 7e-4 and a tenth of one step it answered .37 and .55 (two runs). Hence these.
* Up to two unused numbers, anywhere in the text: what is read off the question alone stayed at .57 of the
  problems of one step for 1000 steps, while chains of three steps reached .98. With one unused number the
  model in training (seed 0) was right in .95 of the problems of one step if it stood between start and step,
  in .63 if before and in .50 if behind: it took the first and the last number. Now it stands between.
* Number embeddings that start as sines and cosines of the value: no faster (.30 of three steps after 900
  steps; .31 after 1000 without).
* Gamma 5 and more problems of one step in the second stage of seed 1 with operators, which answered half of
  the problems whatever their number of steps, nearly all other answers being one too small: no gain in 300
  steps. The tail of the rate brought it.

## Limits

**The problems do not need the thoughts.** `codi-answer-only`, which also starts from the teacher, answers
nearly all of them in one pass, and `codi-answer-scratch`, which never saw a chain of thought, most of them: a
question names its steps in order, so that its own tokens can carry the running total. What the thoughts of
this model do can be read from what happens without them; that a model of this size would fail without any can
not be claimed.

The start is always the first number of a question and the operand of the last step its last one; places in
the text vary, ranks among the numbers do so only in between.
"""
