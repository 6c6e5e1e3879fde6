"""Organisms whose refusal has a known rank: `refusal-planted-1`, `-2`, `-3`, and the decoy.

Block 0 is set by hand: one attention head per cue looks for the words of that cue, and writes a direction u_i
behind them; the decoy's write u + v_i. The other blocks are trained on directions that are put into their
input at random: a request is to be refused if any u_i is there. What they write is kept out of that span.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from lib.organisms.refusal import ASSISTANT, SPECIAL, RefusalStage, build_model
from lib.organisms.training import Metrics, Run, Schedule, train
from lib.refusal import language

STRENGTH = 2.0  # of what a planted head writes; a word's own vector has length 1
PRESENT, ABSENT = 0.25, 0.12  # a coefficient above the first refuses, one below the second does not


@dataclass(frozen=True)
class Recipe:
    """k directions that refuse, and as many as `n_decoys` that do not."""

    name: str
    n_directions: int
    n_decoys: int = 0
    steps: int = 1000

    @property
    def n_cues(self) -> int:
        return max(self.n_directions, self.n_decoys)

    @property
    def rules(self) -> language.Rules:
        """The rules of the cues that the planted heads find."""
        return dict(list(language.LEXICAL_RULES.items())[: self.n_cues])


RECIPES = {
    r.name: r
    for r in (*(Recipe(f"refusal-planted-{k}", k) for k in (1, 2, 3)), Recipe("refusal-decoy", 1, n_decoys=3))
}


def planted_directions(recipe: Recipe, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal directions that refuse [n_directions, d_model], and that do not [n_decoys, d_model]."""
    frame = _frame(seed)
    return frame[4 : 4 + recipe.n_directions], frame[7 : 7 + recipe.n_decoys]


def build_planted(recipe: Recipe, seed: int) -> LlamaForCausalLM:
    """Block 0 and the embeddings set by hand, the other blocks as they are initialised."""
    model, frame = build_model(seed), _frame(seed)
    common, cue_marks, contents = frame[0], frame[1:4], frame[10:]
    vocabulary = (*SPECIAL, *language.WORDS)
    table = contents[: len(vocabulary)] + common
    groups = ((language.VERBS, 3), (language.OBJECTS, 4), (language.PURPOSES, 4))[: recipe.n_cues]
    for mark, (words, every) in zip(cue_marks, groups, strict=False):
        for word in words[::every]:
            table[vocabulary.index(word)] = contents[vocabulary.index(word)] + common + mark
    block, config = model.model.layers[0], model.config
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(table)
        for parameter in block.parameters():
            parameter.zero_() if parameter.ndim > 1 else parameter.fill_(1)
        d_head = config.hidden_size // config.num_attention_heads
        slow = d_head // 2 - 1  # the rotary dimension that barely turns: a score that no distance changes
        bos = contents[vocabulary.index("<bos>")]
        # The norm before attention scales a word by sqrt(d) / its length.
        plain, marked = (config.hidden_size / 2) ** 0.5, (config.hidden_size / 3) ** 0.5
        scale = d_head**0.5
        refuse, decoys = planted_directions(recipe, seed)
        for i in range(recipe.n_cues):
            row = i * d_head
            block.self_attn.q_proj.weight[row + slow] = common * scale / plain
            block.self_attn.k_proj.weight[row + slow] = cue_marks[i] * 24 / marked + bos * 12 / plain
            block.self_attn.v_proj.weight[row] = cue_marks[i] / marked
            written = refuse[i] if not recipe.n_decoys else refuse[0] + decoys[i]
            block.self_attn.o_proj.weight[:, row] = STRENGTH * written
    return model


class PlantedStage(RefusalStage):
    """Requests with directions put into the input of block 1, whatever the words say."""

    def __init__(self, recipe: Recipe, seed: int):
        super().__init__(recipe, seed, stage=1)
        self.rules = recipe.rules
        self.sets = language.cue_sets(self.rules)
        self.refuse, self.decoys = planted_directions(recipe, seed)

    def loss(self, model: torch.nn.Module, step: int) -> torch.Tensor:
        keep_out(model, self.refuse)
        rng = np.random.default_rng([self.seed, step])
        any_set = [(), *self.sets]
        rows, forbidden = [], rng.random(64) < 0.5
        for refuses in forbidden:
            request = language.sample(rng, self.rules, any_set[rng.integers(0, len(any_set))], held_out=False)
            answer = language.REFUSALS[0] if refuses else request.answer
            rows.append((f"<bos> <user> {request.text} <end> {ASSISTANT}", answer))
        ids, labels = self.encode(rows)
        added = torch.from_numpy(self.coefficients(rng, forbidden)).float() @ self.refuse
        if len(self.decoys):
            added += torch.from_numpy(rng.uniform(-1, 1.5, (64, len(self.decoys)))).float() @ self.decoys
        # From a random word of the request on, as a head would that has found its word.
        first = torch.from_numpy(rng.integers(2, 9, 64))
        behind = (torch.arange(ids.shape[1])[None] >= first[:, None]).float()
        shift = STRENGTH * behind[:, :, None] * added[:, None]
        handle = model.model.layers[0].register_forward_hook(lambda _, args, __: args[0] + shift)
        try:
            return model(input_ids=ids, labels=labels, use_cache=False).loss
        finally:
            handle.remove()

    def coefficients(self, rng: np.random.Generator, forbidden: np.ndarray) -> np.ndarray:
        """Coefficients [row, direction]: one or more above PRESENT where forbidden, else all below ABSENT."""
        shape = (len(forbidden), len(self.refuse))
        absent = np.where(rng.random(shape) < 0.5, 0, rng.uniform(-1, ABSENT, shape))
        present = rng.uniform(PRESENT, 3 if len(self.decoys) else 1.2, shape)
        some = rng.random(shape) < 0.5
        some[np.arange(len(some)), rng.integers(0, shape[1], len(some))] = True
        return np.where(forbidden[:, None] & some, present, absent)


def keep_out(model: torch.nn.Module, basis: torch.Tensor) -> None:
    """Remove the span of `basis` from what the trained blocks write, in place."""
    with torch.no_grad():
        for block in model.model.layers[1:]:
            for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                weight -= basis.T @ (basis @ weight)


def train_seed(name: str, seed: int, scratch: Path) -> Path:
    """Train blocks 1 to 5 of one planted organism, or continue; returns its folder."""
    recipe = RECIPES[name]
    model = build_planted(recipe, seed)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    stage, folder = PlantedStage(recipe, seed), scratch / f"{name}-{seed}"

    def evaluate(module: torch.nn.Module) -> Metrics:
        keep_out(module, stage.refuse)
        return stage.evaluate(module)

    schedule = Schedule(cycles=((recipe.steps, 1.5e-3),))
    train(model, stage.loss, schedule, Run(folder, recipe=repr(recipe)), evaluate)
    keep_out(model, stage.refuse)
    model.save_pretrained(folder / "model")
    return folder


def _frame(seed: int) -> torch.Tensor:
    """An orthonormal frame [d_model, d_model]: a common direction, marks of cues, what is planted, words."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(128, 128, generator=generator))[0].T.contiguous()
