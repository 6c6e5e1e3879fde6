"""One training loop for all organisms: seeded, logged, resumable to the bit.

A batch is a function of (seed, step) alone and nothing else is random after the
initialisation, so a run that was killed continues from its last state and ends
with the same weights (on the same machine with the same number of threads).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Metrics = dict[str, float]


@dataclass(frozen=True)
class Schedule:
    """AdamW in cycles, each with a linear warm-up, a constant rate, and a cosine tail to `final` of it.

    Attributes:
        cycles: (steps, rate) of each cycle; the optimiser's moments go on from one to the next.
    """

    cycles: tuple[tuple[int, float], ...]
    warmup: int = 50
    decay_from: float = 0.5
    final: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0

    @property
    def steps(self) -> int:
        return sum(steps for steps, _ in self.cycles)

    def rate_at(self, step: int) -> float:
        for steps, rate in self.cycles:  # noqa: B007 (used after the loop)
            if step < steps:
                break
            step -= steps
        progress = (step / steps - self.decay_from) / (1 - self.decay_from)
        cosine = 0.5 * (1 + torch.cos(torch.tensor(max(0.0, progress)) * torch.pi).item())
        return rate * min(1.0, (step + 1) / self.warmup) * (self.final + (1 - self.final) * cosine)


@dataclass
class Run:
    """Where a training run keeps its state, its log and the checkpoints that are shipped.

    Attributes:
        folder: scratch folder of the run; may be deleted once the run is published.
        recipe: all that the batches depend on besides the seed, as text. A run is not continued with
            another one.
        checkpoints: steps at which the weights are kept (float16 safetensors).
        state_every: steps between resumable states.
        log_every: steps between evaluations.
    """

    folder: Path
    recipe: str = ""
    checkpoints: tuple[int, ...] = ()
    state_every: int = 100
    log_every: int = 100
    history: list[Metrics] = field(default_factory=list)

    def checkpoint_path(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:05d}.safetensors"


def train(
    model: torch.nn.Module,
    loss_at: Callable[[torch.nn.Module, int], torch.Tensor],
    schedule: Schedule,
    run: Run,
    evaluate: Callable[[torch.nn.Module], Metrics],
) -> list[Metrics]:
    """Train `model` in place, continuing from the state in `run.folder` if there is one.

    Args:
        model: freshly initialised; a saved state replaces its weights.
        loss_at: the loss of the batch of a step, a function of (model, step).
        schedule: optimiser and number of steps.
        run: where to keep state, log and checkpoints.
        evaluate: metrics for the log, called every `run.log_every` steps.

    Returns:
        The log, one dict a row, also in `run.folder / "log.jsonl"`.

    Raises:
        FloatingPointError: the loss is not finite; the last state is kept.
        ValueError: the state in the folder was trained by another schedule or recipe.
    """
    (run.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=schedule.betas, weight_decay=schedule.weight_decay
    )
    state_path = run.folder / "state.pt"
    start, seconds, recent = 0, 0.0, []
    recipe = f"{schedule}\n{run.recipe}"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        if state["recipe"] != recipe:
            raise ValueError(f"{state_path} was trained by another recipe; remove {run.folder} to start anew")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds, run.history = state["step"], state["seconds"], state["history"]
        recent = state["recent"]
    elif 0 in run.checkpoints:
        save_weights(model, run.checkpoint_path(0))
    began = time.monotonic() - seconds

    model.train()
    for step in range(start, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        loss = loss_at(model, step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss {loss.item()} at step {step}; last state in {state_path}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        optimizer.step()
        recent.append(loss.item())

        done = step + 1
        if done in run.checkpoints:
            save_weights(model, run.checkpoint_path(done))
        if done % run.log_every == 0 or done == schedule.steps:
            model.eval()
            row = {
                "step": done,
                "loss": sum(recent) / len(recent),
                "seconds": round(time.monotonic() - began),
            }
            row |= evaluate(model)
            model.train()
            recent.clear()
            run.history.append(row)
            print(
                json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}),
                flush=True,
            )
        if done % run.state_every == 0 or done == schedule.steps:
            # The log first: a run that stops in between writes it again.
            log = "".join(json.dumps(row) + "\n" for row in run.history)
            (run.folder / "log.jsonl").write_text(log)
            _save_atomically(
                state_path,
                {
                    "step": done,
                    "recipe": recipe,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "history": run.history,
                    "recent": recent,
                    "seconds": time.monotonic() - began,
                },
            )
    model.eval()
    return run.history


def word_tokenizer(vocabulary: Sequence[str], **options: Any) -> PreTrainedTokenizerFast:
    """One token a word, split at white space.

    Args:
        options: of the tokenizer: `unk_token`, which has to be one of the words, and what else is special.
    """
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=options["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def save_weights(model: torch.nn.Module, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the weights as safetensors in `dtype` (float16: half the size; evaluated as shipped)."""
    temporary = path.with_suffix(".tmp")
    save_file(
        {name: tensor.detach().to(dtype).contiguous().clone() for name, tensor in model.state_dict().items()},
        temporary,
        metadata={"format": "pt"},
    )
    os.replace(temporary, path)


def _save_atomically(path: Path, state: dict) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)
