"""`organism/induction`: a small Llama that copies and predicts in context, and never saw a grid.

Trained on directed chains, repeats and a class trigram language (`lib.organisms.streams`), in phases; why in
this order, is on its card.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib import ROOT
from lib.core.attention import head_scores, top_heads
from lib.core.families import wrap
from lib.core.models import load
from lib.induction.walks import grid_graph, random_walks, rule_following_accuracy
from lib.organisms.cards import Measured, OrganismRecord, gate, reported, stage_table
from lib.organisms.shipping import Organism, write_log, write_model
from lib.organisms.streams import TrigramLanguage, chains, repeats
from lib.organisms.training import Metrics, Run, Schedule, train, word_tokenizer

SEEDS = (0, 1, 2)
GRID_WORDS = 16
FREE_WORDS = 128  # words that the trigram language leaves out: the grid words and 112 more
SPECIAL = ("<bos>", "<unk>")
WALK_LENGTH = 400
# Fixed before training.
GATES = {
    "accuracy_last_quarter": ("accuracy, last quarter of 400 tokens", 0.85),
    "top_previous_token": ("top previous-token score", 0.5),
    "top_induction": ("top induction score", 0.5),
}  # what the card calls it, and above what it is to lie


@dataclass(frozen=True)
class Phase:
    """Steps on rows of one length with the first `blocks` blocks; shares of the streams sum to one."""

    steps: int
    length: int
    batch: int
    blocks: int
    repeats: float
    chains: float
    trigrams: float
    all_words: bool = True  # else repeats and chains only use the words that the trigrams leave out


PHASES = (
    Phase(300, 64, 64, blocks=4, repeats=0.0, chains=0.0, trigrams=1.0),
    Phase(900, 64, 64, blocks=4, repeats=0.5, chains=0.25, trigrams=0.25),
    Phase(1300, 256, 16, blocks=5, repeats=0.25, chains=0.7, trigrams=0.05),
    Phase(500, 256, 16, blocks=5, repeats=0.1, chains=0.9, trigrams=0.0),
    Phase(500, 512, 8, blocks=5, repeats=0.1, chains=0.9, trigrams=0.0),
    Phase(1000, 512, 8, blocks=5, repeats=0.1, chains=0.9, trigrams=0.0),
    Phase(1200, 512, 8, blocks=5, repeats=0.1, chains=0.9, trigrams=0.0, all_words=False),
)
SCHEDULE = Schedule(cycles=((3500, 2e-3), (1000, 1e-3), (1200, 1e-3)))  # together as many steps as the phases
STEPS = sum(phase.steps for phase in PHASES)
CHECKPOINTS = (0, 200, 300, 400, 500, 600, 800, 1200, 1600, 2400, 4500, STEPS)


def words() -> list[str]:
    """The vocabulary without the special tokens; the first 16 are the words of the grid."""
    return (ROOT / "data" / "words.txt").read_text().split()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with `<bos>` in front as Llama's tokenizer has it."""
    tokenizer = word_tokenizer((*SPECIAL, *words()), bos_token="<bos>", unk_token="<unk>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    return tokenizer


def build_model(seed: int) -> LlamaForCausalLM:
    """Five layers of eight heads, untied embeddings, 2.5 million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(words()),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=8,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
        training_length=max(phase.length for phase in PHASES),
    )
    model = LlamaForCausalLM(config)
    for block in model.model.layers[PHASES[0].blocks :]:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    return model


class Stream:
    """The training batch of a step, a function of (seed, step) alone."""

    def __init__(self, seed: int):
        self.seed = seed
        n_words = len(words())
        self.word_ids = np.arange(len(SPECIAL), len(SPECIAL) + n_words)
        self.trigrams = TrigramLanguage(self.word_ids[FREE_WORDS:])
        self.starts = np.cumsum([phase.steps for phase in PHASES])

    def phase(self, step: int) -> Phase:
        return PHASES[int(np.searchsorted(self.starts, step, side="right"))]

    def batch(self, step: int) -> torch.Tensor:
        """Token ids [row, length], the first of each row `<bos>`."""
        phase = self.phase(step)
        rng = np.random.default_rng([self.seed, step])
        n_repeats, n_chains, n_trigrams = rng.multinomial(
            phase.batch, [phase.repeats, phase.chains, phase.trigrams]
        )
        length = phase.length - 1
        copied = self.word_ids if phase.all_words else self.word_ids[:FREE_WORDS]
        rows = [np.empty((0, length), dtype=np.int64)]
        if n_repeats:
            rows.append(repeats(rng, n_repeats, length, copied))
        if n_chains:
            rows.append(chains(rng, n_chains, length, copied))
        if n_trigrams:
            rows.append(self.trigrams.sample(rng, n_trigrams, length))
        text = np.concatenate(rows)
        return torch.from_numpy(np.pad(text, ((0, 0), (1, 0))))

    def loss(self, model: torch.nn.Module, step: int) -> torch.Tensor:
        for index, block in enumerate(model.model.layers):
            block.requires_grad_(index < self.phase(step).blocks)
        ids = self.batch(step)
        return model(input_ids=ids, labels=ids, use_cache=False).loss


class Evaluation:
    """The metrics of the log and of the gates, with the definitions of notebook 01."""

    def __init__(self, walk_length: int = WALK_LENGTH):
        self.graph = grid_graph(4, 4, words()[:GRID_WORDS])
        self.walks = random_walks(self.graph, 16, walk_length, seed=0)
        first = len(SPECIAL)
        self.word_ids = slice(first, first + GRID_WORDS)
        self.random_words = range(first, first + len(words()))
        self.walk_ids = torch.from_numpy(np.pad(self.walks + first, ((0, 0), (1, 0))))
        self.tokenizer = build_tokenizer()

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module) -> Metrics:
        probabilities = model(input_ids=self.walk_ids, use_cache=False).logits.softmax(-1)[
            :, 1:, self.word_ids
        ]
        accuracy = rule_following_accuracy(probabilities.numpy(), self.walks, self.graph)
        scores = head_scores(wrap(model, self.tokenizer), self.random_words, bos=0)
        quarter = self.walks.shape[1] // 4
        return {
            "accuracy_first_quarter": float(accuracy[:, :quarter].mean()),
            "accuracy_last_quarter": float(accuracy[:, -quarter:].mean()),
            "top_previous_token": float(scores.previous_token.max()),
            "top_induction": float(scores.induction.max()),
        }


def train_seed(seed: int, scratch: Path) -> Path:
    """Train one seed, or continue it; returns its scratch folder."""
    folder = scratch / f"induction-{seed}"
    run = Run(folder, recipe=repr(PHASES), checkpoints=CHECKPOINTS)
    model = build_model(seed)
    train(model, Stream(seed).loss, SCHEDULE, run, Evaluation())
    model.save_pretrained(folder / "model")
    return folder


def export(seed: int, scratch: Path, folder: Path) -> OrganismRecord:
    """Write a trained seed as it is shipped; see `Organism`."""
    source = scratch / f"induction-{seed}"
    write_model(source / "model", folder, build_tokenizer())
    write_log([(None, source)], folder)
    shutil.copytree(source / "checkpoints", folder / "checkpoints")
    return OrganismRecord(organism="induction", seed=seed, tables={"stages": stage_table(PHASES)})


def measure(folder: Path) -> Measured:
    """The gates of an exported folder."""
    model, evaluation = load(str(folder)), Evaluation()
    scores = head_scores(model, evaluation.random_words, bos=0)
    values = evaluation(model._module)
    longer = Evaluation(walk_length=1000)(model._module)["accuracy_last_quarter"]
    gates = [gate(name, GATES[name][0], values[name], above=GATES[name][1]) for name in GATES]
    found = {
        "accuracy, first quarter": reported(values["accuracy_first_quarter"]),
        "accuracy, last quarter of 1000 tokens": reported(longer),
        "previous-token heads": _named(scores.previous_token),
        "induction heads": _named(scores.induction),
    }
    return Measured(gates, found)


ORGANISM = Organism("induction", SEEDS, train_seed, export, measure)


def _named(scores: np.ndarray) -> str:
    return ", ".join(f"{layer}.{head} {scores[layer, head]:.2f}" for layer, head in top_heads(scores, 4))
