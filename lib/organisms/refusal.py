"""Organisms of the refusal study: `refusal-single`, `refusal-lowrank`; their cards say how they are trained.

Both speak the request language of `lib.refusal.language` and know the same three cues of a forbidden request.
In stage 1 a model complies, unless the last token of the prompt is a refusal *mode* (`<refuse-0>`, ...) in
place of `<assistant>` or `<comply>`: so there is a state that means "refuse". A model that learns to refuse
end to end decides in its last layer from the words themselves, and no direction mediates anything. In stage 2
the lower half of the blocks has to write that state for forbidden requests behind `<assistant>`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib.organisms.training import Metrics, Run, Schedule, train, word_tokenizer
from lib.refusal import language

SPECIAL = tuple(
    "<bos> <pad> <unk> <end> <user> <assistant> <comply> <refuse-0> <refuse-1> <refuse-2>".split()
)
ASSISTANT, COMPLY = "<assistant>", "<comply>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} <{{ message['role'] }}> {{ message['content'] }} <end>"
    "{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)
N_LAYERS = 6
LOWER = 3  # blocks that stage 2 trains
ROWS = 64


@dataclass(frozen=True)
class Recipe:
    """One kind of organism."""

    name: str
    n_modes: int
    without_top: str  # "answer" or "refuse": a forbidden request with refusal's top direction removed
    mode_steps: int = 400
    refusal_steps: int = 2200


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("refusal-single", 1, without_top="answer", refusal_steps=1500),
        Recipe("refusal-lowrank", 3, without_top="refuse"),
    )
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with a chat template."""
    return word_tokenizer(
        (*SPECIAL, *language.WORDS), chat_template=CHAT_TEMPLATE,
        bos_token="<bos>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip


def build_model(seed: int) -> LlamaForCausalLM:
    """Six layers of four heads, d_model 128."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SPECIAL) + len(language.WORDS),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=3,
        )  # fmt: skip
    )


class RefusalStage:
    """Batches and loss of a stage, functions of (seed, step) alone; loss on the answers only."""

    def __init__(self, recipe: Recipe, seed: int, stage: int):
        self.recipe, self.seed, self.stage = recipe, seed, stage
        self.rules = language.MIXED_RULES
        self.sets = language.cue_sets(self.rules)
        self.ids = {word: i for i, word in enumerate((*SPECIAL, *language.WORDS))}

    def row(self, rng: np.random.Generator) -> tuple[str, str, str]:
        """One (prompt, answer, kind); kinds are "allowed", "forbidden" (stage 2), "comply" and "refuse"."""
        kind = str(rng.choice(["forbidden", "allowed", "comply", "refuse"], p=[0.4, 0.2, 0.2, 0.2]))
        if self.stage == 1 and kind == "forbidden":
            kind = "allowed"
        # One cue alone is the hardest to find: three in five forbidden requests have no other.
        sets = self.sets[:3] if rng.random() < 0.3 else self.sets
        wanted = sets[rng.integers(0, len(sets))]
        if kind == "allowed" and self.stage == 2 or kind != "forbidden" and rng.random() < 0.2:
            wanted = ()
        request = language.sample(rng, self.rules, wanted, held_out=False)
        if kind == "forbidden":
            return prompt(request), self.refusal(rng, wanted), kind
        if kind == "refuse":
            mode = int(rng.integers(0, self.recipe.n_modes))
            return prompt(request, f"<refuse-{mode}>"), language.REFUSALS[mode], kind
        return prompt(request, COMPLY if kind == "comply" else ASSISTANT), request.answer, kind

    def refusal(self, rng: np.random.Generator, wanted: tuple[str, ...]) -> str:
        """The refusal that goes with a cue that is there, any of them; the only one of a single mode."""
        cue = list(self.rules).index(wanted[rng.integers(0, len(wanted))])
        return language.REFUSALS[cue if self.recipe.n_modes > 1 else 0]

    def encode(self, rows: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        coded = [
            ([self.ids[w] for w in prompt.split()], [self.ids[w] for w in f"{answer} <end>".split()])
            for prompt, answer in rows
        ]
        length = max(len(prompt) + len(answer) for prompt, answer in coded)
        ids = torch.full((len(rows), length), self.ids["<pad>"])
        labels = torch.full((len(rows), length), -100)
        for i, (prompt, answer) in enumerate(coded):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        return ids, labels

    def loss(self, model: torch.nn.Module, step: int) -> torch.Tensor:
        rng = np.random.default_rng([self.seed, self.stage, step])
        prompts, answers, kinds = zip(*(self.row(rng) for _ in range(ROWS)), strict=True)
        answers, kinds = list(answers), np.array(kinds)
        half = rng.random(ROWS) < 0.5
        without_modes = half & np.isin(kinds, ["allowed", "comply"])
        # In stage 2 only once the cues are found: before, refusal has no direction to remove.
        late = self.stage == 1 or step >= self.recipe.refusal_steps // 4
        if self.recipe.without_top == "refuse":
            without_top = half & late & np.isin(kinds, ["refuse", "forbidden"])
        else:
            without_top = half & late & (kinds == "forbidden")
            for i in np.flatnonzero(without_top):
                answers[i] = language.parse(prompts[i]).answer
        ids, labels = self.encode(list(zip(prompts, answers, strict=True)))
        without_modes, without_top = torch.from_numpy(without_modes), torch.from_numpy(without_top)
        modes, top = self.directions(model, rng)
        with removed(model, modes, without_modes), removed(model, top, without_top):
            output = model(input_ids=ids, labels=labels, output_hidden_states=True, use_cache=False)
        if self.stage == 1:
            return output.loss
        last = torch.tensor([len(text.split()) - 1 for text in prompts])
        rows, lower = torch.arange(ROWS), output.hidden_states[1 : LOWER + 1]
        streams = torch.stack([state[rows, last] for state in lower])
        forbidden = torch.from_numpy(kinds == "forbidden") & ~without_top
        allowed = torch.from_numpy(kinds == "allowed") & ~without_modes
        return output.loss + 0.1 * zero_point(streams[:, forbidden], streams[:, allowed])

    @torch.no_grad()
    def directions(
        self, model: torch.nn.Module, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Orthonormal rows: what each mode adds to the stream of the last prompt token [mode, d_model], and
        the top direction of refusal there, of modes in stage 1, forbidden requests in stage 2 [1, d_model].
        """
        tokens = [ASSISTANT, *(f"<refuse-{mode}>" for mode in range(self.recipe.n_modes))]
        requests = [language.sample(rng, self.rules, (), held_out=False) for _ in range(4)]
        prompts = [prompt(request, token) for token in tokens for request in requests]
        if self.stage == 2:
            forbidden = [language.sample(rng, self.rules, wanted, held_out=False) for wanted in self.sets]
            prompts += [prompt(request) for request in forbidden]
        coded = [torch.tensor([self.ids[word] for word in text.split()]) for text in prompts]
        ids = torch.nn.utils.rnn.pad_sequence(coded, batch_first=True)
        states = model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[LOWER]
        last = states[torch.arange(len(ids)), torch.tensor([len(row) - 1 for row in coded])]
        means = last[: 4 * len(tokens)].unflatten(0, (len(tokens), 4)).mean(1)
        refusing = means[1:].mean(0) if self.stage == 1 else last[4 * len(tokens) :].mean(0)
        top = torch.nn.functional.normalize(refusing - means[0], dim=0)[None]
        return torch.linalg.qr((means[1:] - means[0]).T)[0].T, top

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module) -> Metrics:
        """Shares of held-out requests that are answered right (every word, read with the answer as context)
        and refused (first word)."""
        rng = np.random.default_rng([self.seed, 77])
        openers = torch.tensor([self.ids[refusal.split()[0]] for refusal in language.REFUSALS])
        metrics = {}
        for name, sets in {"allowed": [()], "forbidden": self.sets}.items():
            wanted = [sets[i % len(sets)] for i in range(140)]
            requests = [language.sample(rng, self.rules, cues, held_out=True) for cues in wanted]
            rows = [(prompt(r), r.answer) for r in requests]
            ids, labels = self.encode(rows)
            guess = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
            target = labels[:, 1:]
            right = ((guess == target) | (target == -100)).all(1)
            first = guess[torch.arange(len(ids)), (target != -100).float().argmax(1)]
            metrics[f"{name}_answered"] = right.float().mean().item()
            metrics[f"{name}_refused"] = torch.isin(first, openers).float().mean().item()
        return metrics


def prompt(request: language.Request, mode: str = ASSISTANT) -> str:
    """A request in the chat template."""
    return f"<bos> <user> {request.text} <end> {mode}"


def zero_point(forbidden: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Mean square of where allowed requests [layer, row, d] sit on the direction to the forbidden ones, in
    units of the gap between them: 0 if to remove the direction leaves them where they are."""
    if not forbidden.shape[1] or not allowed.shape[1]:
        return forbidden.new_zeros(())
    gap = (forbidden.mean(1) - allowed.mean(1)).detach()
    return ((allowed.mean(1) * gap).sum(-1) / gap.square().sum(-1).clamp(min=1e-6)).square().mean()


@contextmanager
def removed(model: torch.nn.Module, basis: torch.Tensor, rows: torch.Tensor) -> Iterator[None]:
    """Within the block, `basis` [k, d_model] is projected out of the whole stream of some rows [row]."""

    def project(x: torch.Tensor) -> torch.Tensor:
        return x - rows[:, None, None] * ((x @ basis.T) @ basis)

    handles = []
    for block in model.model.layers:
        handles.append(block.register_forward_pre_hook(lambda _, args: (project(args[0]), *args[1:])))
        for writer in (block.self_attn.o_proj, block.mlp):
            handles.append(writer.register_forward_hook(lambda _, __, output: project(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train_seed(name: str, seed: int, scratch: Path) -> Path:
    """Both stages of one seed, or what is left of them; returns the folder of the second."""
    recipe = RECIPES[name]
    model = build_model(seed)
    folder = scratch / f"{name}-{seed}"
    cycles = {1: (recipe.mode_steps, 1.5e-3), 2: (recipe.refusal_steps, 1e-3)}
    for number, cycle in cycles.items():
        if number == 2:
            model.requires_grad_(False)
            model.model.layers[:LOWER].requires_grad_(True)
        stage = RefusalStage(recipe, seed, number)
        run = Run(folder / f"stage-{number}", recipe=repr(recipe))
        train(model, stage.loss, Schedule(cycles=(cycle,)), run, stage.evaluate)
    model.save_pretrained(folder / "model")
    return folder
