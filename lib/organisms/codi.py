"""Organisms of the CODI study: small GPT-2s that reason in six continuous thoughts.

One model is teacher and student. The teacher reads the question (its end, "?", is the border) and writes the
chain of thought without its last step, then the answer. The student reads the question, `<bot>`, six
thoughts, `<eot>`, and writes the answer: thought k is prj(z_{k-1}), z being the final state (after the last
norm) of the position before, so nothing but the question reaches it as text.

    teacher    how many pears ? << 14 + 5 = 19 >> The answer is : 16 <eos>      (or "19 ;" for the step)
    student    how many pears ? <bot> prj(z_0) .. prj(z_5) <eot> The answer is : 16 <eos>

Self-distillation as in CODI (Shen et al. 2025): cross-entropy of both, and at the ":" before the answer the
student's states are drawn to the teacher's, which are detached. Nothing says what a thought should hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from lib.organisms import word_problems
from lib.organisms.training import Metrics, Run, Schedule, save_weights, train
from lib.organisms.word_problems import ANSWER_PROMPT, BOT, EOS, EOT, LENGTHS, PAD, VOCABULARY, WordProblem

N_THOUGHTS = 6
N_LAYERS, N_HEADS, D_MODEL, N_POSITIONS = 4, 4, 128, 96
IDS = {word: i for i, word in enumerate(VOCABULARY)}

Cache = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer [row, head, token, d_head]


class Projection(torch.nn.Sequential):
    """What a thought reads of the state before it; modules numbered and named as in the official code."""

    def __init__(self, d_model: int):
        super().__init__(
            torch.nn.Dropout(0.0),
            torch.nn.Linear(d_model, d_model),
            torch.nn.GELU(),
            torch.nn.Linear(d_model, d_model),
        )
        self.add_module("ln", torch.nn.LayerNorm(d_model))


class Codi(torch.nn.Module):
    """A GPT-2 and the projection of its thoughts."""

    def __init__(self, seed: int, d_model: int = D_MODEL, n_layers: int = N_LAYERS):
        super().__init__()
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(VOCABULARY), n_positions=N_POSITIONS, n_embd=d_model, n_layer=n_layers,
            n_head=N_HEADS, activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=None, eos_token_id=IDS[EOS], pad_token_id=0,
        )  # fmt: skip
        self.gpt2 = GPT2LMHeadModel(config)
        self.projection = Projection(d_model)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.gpt2.transformer.wte(ids)

    def run(self, x: torch.Tensor, past: Cache | None = None) -> tuple[list[torch.Tensor], Cache]:
        """The blocks on embeddings [row, token, d_model] (without positions) behind what the cache holds.

        Written out because a step of training is dozens of calls on few tokens; rows are of equal length,
        so there is no padding to mask.

        Returns:
            States behind each block, the last one normed, and the cache with the new tokens.
        """
        transformer = self.gpt2.transformer
        rows, tokens, d_model = x.shape
        start = past[0][0].shape[2] if past else 0
        x = x + transformer.wpe.weight[start : start + tokens]
        mask = None
        if past and tokens > 1:
            mask = torch.ones(tokens, start + tokens, dtype=torch.bool).tril(start)
        states, cache = [], []
        for i, block in enumerate(transformer.h):
            attention = block.attn
            q, k, v = (
                part.view(rows, tokens, N_HEADS, -1).transpose(1, 2)
                for part in attention.c_attn(block.ln_1(x)).split(d_model, dim=-1)
            )
            if past:
                k, v = torch.cat([past[i][0], k], dim=2), torch.cat([past[i][1], v], dim=2)
            cache.append((k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not past)
            x = x + attention.c_proj(mixed.transpose(1, 2).reshape(rows, tokens, d_model))
            x = x + block.mlp(block.ln_2(x))
            states.append(x)
        states[-1] = transformer.ln_f(x)
        return states, cache

    def think(self, cache: Cache, n_thoughts: int = N_THOUGHTS) -> tuple[torch.Tensor, Cache]:
        """z_0, z_1, ... [row, thought + 1, d_model] of `<bot>` and the thoughts behind a question; cache."""
        rows = cache[0][0].shape[0]
        x, zs = self.embed(torch.full((rows, 1), IDS[BOT])), []
        for thought in range(n_thoughts + 1):
            states, cache = self.run(x, cache)
            zs.append(states[-1])
            if thought < n_thoughts:
                x = self.projection(states[-1])
        return torch.cat(zs, dim=1), cache


# -- batches and losses ----------------------------------------------------------------------------


def encode(texts: list[str]) -> torch.Tensor:
    """Token ids [text, token], padded on the right (which what stands before it never sees)."""
    rows = [[IDS[word] for word in text.split()] for text in texts]
    length = max(map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def answer_text(problem: WordProblem) -> str:
    return f"{ANSWER_PROMPT} {problem.answer} {EOS}"


def teacher_text(problem: WordProblem, operators: bool) -> str:
    """What the teacher writes behind the question."""
    return " ".join((*problem.steps(operators)[:-1], answer_text(problem)))


class Written(NamedTuple):
    """What the model says of a text behind a question, or behind its thoughts.

    Attributes:
        loss: mean cross-entropy of the text's tokens.
        right: whether each token is the likeliest one [row, token]; true where there is none.
        states: at the ":" before the answer, behind each block [block, row, d_model].
    """

    loss: torch.Tensor
    right: torch.Tensor
    states: torch.Tensor


def read(model: Codi, last: torch.Tensor, cache: Cache, texts: list[str]) -> Written:
    """Let the model read texts behind what the cache holds.

    Args:
        last: final state of the token before the texts [row, d_model]; it predicts their first token.
    """
    ids = encode(texts)
    states, _ = model.run(model.embed(ids[:, :-1]), cache)
    logits = model.gpt2.lm_head(torch.cat([last[:, None], states[-1]], dim=1))
    labels = ids.masked_fill(ids == IDS[PAD], -100)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    rows, colon = torch.where(ids == IDS[":"])
    at_colon = torch.stack([state[rows, colon] for state in states])
    return Written(loss, (logits.argmax(-1) == labels) | (labels < 0), at_colon)


def ask(model: Codi, problems: list[WordProblem]) -> tuple[torch.Tensor, Cache]:
    """Final state of the "?" [row, d_model] and the cache of questions of equal length."""
    states, cache = model.run(model.embed(encode([problem.question for problem in problems])))
    return states[-1][:, -1], cache


def teach(
    model: Codi, last: torch.Tensor, cache: Cache, problems: list[WordProblem], operators: bool
) -> Written:
    return read(model, last, cache, [teacher_text(problem, operators) for problem in problems])


def answer(
    model: Codi, cache: Cache, problems: list[WordProblem], n_thoughts: int = N_THOUGHTS
) -> tuple[Written, torch.Tensor]:
    """The student's answer behind so many thoughts, and z_0, z_1, ... [row, thought + 1, d_model]."""
    zs, cache = model.think(cache, n_thoughts)
    end, cache = model.run(model.embed(torch.full((len(problems), 1), IDS[EOT])), cache)
    return read(model, end[-1][:, 0], cache, [answer_text(problem) for problem in problems]), zs


def distillation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Smooth L1 between states [block, row, d_model], each block in units of the teacher's deviation."""
    losses = (F.smooth_l1_loss(s, t) / t.std() for s, t in zip(student, teacher.detach(), strict=True))
    return torch.stack(list(losses)).mean()


# -- stages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodiStage:
    """Steps on one mixture of problems.

    Attributes:
        name: of its folder.
        objective: "teacher" trains the teacher alone, "joint" both, "answer" an answer without thoughts
            behind `<bot> <eot>`.
        operators: form of the chain of thought.
        shares: of problems of 1, 2 and 3 steps.
        decay_from: where the cosine tail of the rate begins, as a share of the steps.
        gamma: weight of the distillation.
        rows: in a batch.
        lengths: least and greatest of the questions.
        max_unused: numbers in a question that no step uses.
        anywhere: whether these may stand before the start and behind the last step.
    """

    name: str
    objective: str
    steps: int
    rate: float
    operators: bool
    shares: tuple[float, float, float]
    decay_from: float = 0.5
    gamma: float = 1.0
    rows: int = 64
    lengths: tuple[int, int] = (LENGTHS[0], LENGTHS[-1])
    max_unused: int = 1
    anywhere: bool = False

    def batch(self, seed: int, step: int) -> list[WordProblem]:
        """The problems of a step, their questions of one length."""
        rng = np.random.default_rng([seed, *self.name.encode(), step])
        n_steps = (1 + rng.choice(3, size=self.rows, p=self.shares)).tolist()
        length = int(rng.choice(np.arange(self.lengths[0], self.lengths[1] + 1)))
        return word_problems.sample(rng, n_steps, length, max_unused=self.max_unused, anywhere=self.anywhere)

    def loss(self, model: Codi, problems: list[WordProblem]) -> torch.Tensor:
        last, cache = ask(model, problems)
        if self.objective == "answer":
            return answer(model, cache, problems, n_thoughts=0)[0].loss
        teacher = teach(model, last, cache, problems, self.operators)
        if self.objective == "teacher":
            return teacher.loss
        student, _ = answer(model, cache, problems)
        return teacher.loss + student.loss + self.gamma * distillation(student.states, teacher.states)

    @property
    def thinks(self) -> bool:
        return self.objective == "joint"

    @property
    def answers(self) -> bool:
        """Whether the model answers behind `<bot> <eot>`, with thoughts between them or without."""
        return self.objective != "teacher"

    @property
    def writes(self) -> bool:
        """Whether it writes chains of thought."""
        return self.objective != "answer"

    @property
    def schedule(self) -> Schedule:
        return Schedule(cycles=((self.steps, self.rate),), decay_from=self.decay_from)


class Evaluation:
    """Accuracy on held-out problems for the log."""

    def __init__(self, operators: bool, n_thoughts: int = N_THOUGHTS, rows: int = 64):
        self.operators, self.n_thoughts = operators, n_thoughts
        rng = np.random.default_rng(2026)
        self.problems = {
            (n_steps, length): word_problems.sample(rng, [n_steps] * rows, length, test=True)
            for n_steps in (1, 2, 3)
            for length in (25, 28)
        }

    @torch.no_grad()
    def __call__(self, model: Codi) -> Metrics:
        row: dict[str, list[float]] = {}
        for (n_steps, _), problems in self.problems.items():
            last, cache = ask(model, problems)
            teacher = teach(model, last, cache, problems, self.operators)
            student, _ = answer(model, cache, problems, self.n_thoughts)
            row.setdefault(f"teacher_{n_steps}", []).append(teacher.right.all(1).float().mean().item())
            row.setdefault(f"student_{n_steps}", []).append(student.right[:, -2].float().mean().item())
        return {key: float(np.mean(values)) for key, values in row.items()}


def train_stage(model: Codi, stage: CodiStage, seed: int, folder: Path) -> None:
    """Train one stage of a seed in place, or continue it."""
    run = Run(folder / stage.name, recipe=repr(stage))
    train(
        model,
        lambda model, step: stage.loss(model, stage.batch(seed, step)),
        stage.schedule,
        run,
        Evaluation(stage.operators, N_THOUGHTS if stage.writes else 0),
    )


CONSTANT = 0.9999  # no tail
_LONG = {"lengths": (24, 32), "max_unused": 2, "anywhere": True}
TEACHER = (
    CodiStage("teacher", "teacher", 2000, 1.5e-3, True, (0.15, 0.25, 0.6), decay_from=CONSTANT, **_LONG),
    CodiStage("teacher-tail", "teacher", 1000, 1e-3, True, (0.4, 0.25, 0.35), decay_from=0.2, **_LONG),
    CodiStage("teacher-fewer", "teacher", 600, 7e-4, True, (0.4, 0.3, 0.3), anywhere=True),
)
TEACHER_RESULTS = (
    *TEACHER,
    CodiStage("teacher-results", "teacher", 800, 7e-4, False, (0.2, 0.3, 0.5), anywhere=True),
    CodiStage("teacher-results-tail", "teacher", 1200, 8e-4, False, (0.15, 0.3, 0.55), anywhere=True),
)


_TWO, _THREE = (0.1, 0.6, 0.3), (0.05, 0.3, 0.65)
JOINT = (
    CodiStage("joint-operators-two", "joint", 1200, 7e-4, True, _TWO, decay_from=CONSTANT, anywhere=True),
    CodiStage("joint-operators-three", "joint", 2600, 7e-4, True, _THREE, decay_from=0.6),
)
JOINT_RESULTS = (
    CodiStage("joint-results-two", "joint", 600, 7e-4, False, _TWO, decay_from=CONSTANT, anywhere=True),
    CodiStage("joint-results-three", "joint", 3000, 7e-4, False, _THREE, decay_from=0.4),
)
# As many steps as joint training.
ANSWER_SCRATCH = (CodiStage("answer-scratch", "answer", 3800, 1.5e-3, True, (0.1, 0.3, 0.6)),)
ANSWER = tuple(
    replace(stage, name=stage.name.replace("joint-operators", "answer"), objective="answer")
    for stage in JOINT
)
# Stages of each organism, each going on from the one before; common stages are trained once.
RECIPES: dict[str, tuple[CodiStage, ...]] = {
    "codi": (*TEACHER, *JOINT),
    "codi-results": (*TEACHER_RESULTS, *JOINT_RESULTS),
    "codi-teacher": TEACHER,
    "codi-results-teacher": TEACHER_RESULTS,
    "codi-answer-only": (*TEACHER, *ANSWER),
    "codi-answer-scratch": ANSWER_SCRATCH,
}


def train_seed(name: str, seed: int, scratch: Path) -> Path:
    """All stages of one seed, or what is left of them; returns the folder of the model."""
    model, folder = Codi(seed), scratch / f"codi-{seed}"
    for stage in RECIPES[name]:
        train_stage(model, stage, seed, folder)
    trained = folder / "models" / name
    model.gpt2.save_pretrained(trained)
    if RECIPES[name][-1].thinks:
        save_weights(model.projection, trained / "projection.safetensors")
    return trained
