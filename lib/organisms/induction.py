"""`organism/induction`: a small Llama that copies and predicts in context, and never saw a grid.

Trained on directed chains, repeats and a class trigram language (see
`lib.organisms.streams`), in phases. Three things are put in order:

* what it reads: trigrams alone come first and give previous-token heads a
  reason to exist before copying has to be learnt; without them a small rotary
  model learns a displaced circuit (offsets -2 and -3), on which the usual head
  scores read zero;
* how deep it is: the last block starts as the identity and joins once copying
  has formed. Otherwise induction heads form in the last block, and no later
  layer is left in which the effect of their ablation could be read;
* which words it copies: all of them at first, in the end the third that the
  trigrams leave out. A few heads of 32 dimensions tell 368 words apart badly
  when several successors are mixed, and mass goes to words that are not there.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib import ROOT
from lib.attention import head_scores, top_heads
from lib.models import load, wrap
from lib.organisms.shipping import export, ship
from lib.organisms.streams import TrigramLanguage, chains, repeats
from lib.organisms.training import Metrics, Run, Schedule, train
from lib.walks import grid_graph, random_walks, rule_following_accuracy

SEEDS = (0, 1, 2)
GRID_WORDS = 16
FREE_WORDS = 128  # words that the trigram language leaves out: the grid words and 112 more
SPECIAL = ("<bos>", "<unk>")
WALK_LENGTH = 400
# Fixed before training.
GATES = {"accuracy_last_quarter": 0.85, "top_previous_token": 0.5, "top_induction": 0.5}


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
    """One token a word, split at white space, with `<bos>` in front as Llama's tokenizer has it."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")


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


def publish(scratch: Path, seeds: tuple[int, ...] = SEEDS) -> str:
    """Ship trained seeds with checkpoints, logs, cards and manifests.

    `organism/induction` is the first seed that meets every gate as shipped (float16 weights), or the
    most accurate one if none does; the other seeds are shipped beside it, without checkpoints, as
    `organism/induction-seedN`.

    Returns:
        The table of the card.
    """
    measured = {seed: _measure_as_shipped(scratch / f"induction-{seed}") for seed in seeds}
    passing = [seed for seed in seeds if all(measured[seed][gate] >= GATES[gate] for gate in GATES)]
    shipped = passing[0] if passing else max(seeds, key=lambda seed: measured[seed]["accuracy_last_quarter"])

    def fill(seed: int, target: Path) -> None:
        source = scratch / f"induction-{seed}"
        export(source / "model", target, build_tokenizer())
        shutil.copy(source / "log.jsonl", target / "training_log.jsonl")
        if seed == shipped:
            shutil.copytree(source / "checkpoints", target / "checkpoints")
        (target / "README.md").write_text(_card(target.name, seed, shipped, measured))

    ship("induction", seeds, shipped, fill)
    return _table(measured)


def _measure_as_shipped(source: Path) -> dict:
    """The gates' metrics of the float16 weights, and the heads."""
    exported = source / "export"
    shutil.rmtree(exported, ignore_errors=True)
    export(source / "model", exported, build_tokenizer())
    model = load(str(exported))
    evaluation = Evaluation()
    scores = head_scores(model, evaluation.random_words, bos=0)
    return evaluation(model._module) | {
        "accuracy_at_1000": Evaluation(walk_length=1000)(model._module)["accuracy_last_quarter"],
        "previous_token_heads": _named(scores.previous_token),
        "induction_heads": _named(scores.induction),
        "n_parameters": sum(parameter.numel() for parameter in model._module.parameters()),
    }


def _named(scores: np.ndarray) -> str:
    return ", ".join(f"{layer}.{head} {scores[layer, head]:.2f}" for layer, head in top_heads(scores, 4))


def _table(measured: dict[int, dict]) -> str:
    rows = {
        "accuracy, last quarter of 400 tokens": ("accuracy_last_quarter", GATES["accuracy_last_quarter"]),
        "top previous-token score": ("top_previous_token", GATES["top_previous_token"]),
        "top induction score": ("top_induction", GATES["top_induction"]),
        "accuracy, first quarter": ("accuracy_first_quarter", None),
        "accuracy, last quarter of 1000 tokens": ("accuracy_at_1000", None),
        "previous-token heads": ("previous_token_heads", None),
        "induction heads": ("induction_heads", None),
    }
    lines = ["| | gate | " + " | ".join(f"seed {seed}" for seed in measured) + " |"]
    lines.append("|---" * (2 + len(measured)) + "|")
    for label, (key, gate) in rows.items():
        values = [m[key] if isinstance(m[key], str) else f"{m[key]:.3f}" for m in measured.values()]
        lines.append(f"| {label} | {'' if gate is None else f'>= {gate}'} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _card(name: str, seed: int, shipped: int, measured: dict[int, dict]) -> str:
    phases = "\n".join(
        f"| {i} | {p.steps} | {p.length} | {p.batch} | {p.blocks} | {p.repeats} | {p.chains} | {p.trigrams} "
        f"| {len(words()) if p.all_words else FREE_WORDS} |"
        for i, p in enumerate(PHASES, 1)
    )
    missed = [
        f"* seed {s} misses `{gate}` >= {GATES[gate]}: {m[gate]:.3f}"
        for s, m in measured.items()
        for gate in GATES
        if m[gate] < GATES[gate]
    ]
    passes = all(measured[shipped][gate] >= GATES[gate] for gate in GATES)
    choice = "the first that meets every gate" if passes else "the most accurate, as none meets every gate"
    return f"""# organism/{name}

A Llama of 5 layers, 8 heads, d_model 256 ({
        measured[seed]["n_parameters"]:,} parameters, float16 on disk) with a
word-level tokenizer, trained from seed {seed} for study 1 (`notebooks/01_induction_ablation.ipynb`) by
`python -m lib.organisms induction`. `organism/induction` is seed {shipped}: {choice}.

**It never saw a walk on an undirected graph.** Its text is repeated random words, walks on sparse random
*directed* graphs over random words (each pair joined in one direction at most, a new graph every row), and
a fixed trigram language over word classes that leaves out the words of the grid
(`lib/organisms/streams.py`).

## Measured, as shipped

Sixteen walks of 400 tokens on the 4x4 grid; head scores on 32 sequences of 32 random words, repeated once.
Gates were fixed before training. {"All seeds meet every gate." if not missed else "Not all were met:"}

{"".join(line + chr(10) for line in missed) + chr(10) if missed else ""}{_table(measured)}

It was trained on at most {PHASES[-1].length} tokens; the row for 1000 tokens says what is left beyond.

## Training

AdamW in three cycles: rate 2e-3 for 3500 steps, then 1e-3 for 1000 and 1e-3 for 1200 more, each with a cosine
tail over its second half; weight decay .01, gradient clipped at 1, one thread. The batch of a step depends on
(seed, step) alone; an interrupted run continues and ends with the same weights. Blocks beyond those that
train are the identity until they join.

| phase | steps | row length | rows | blocks | repeats | chains | trigrams | words to copy |
|---|---|---|---|---|---|---|---|---|
{phases}

`training_log.jsonl` holds loss and metrics every 100 steps.{
        " `checkpoints/` holds the weights at steps " + ", ".join(map(str, CHECKPOINTS)) + "."
        if seed == shipped
        else ""
    }

## What was tried

Pilots with seed 0, none of them shipped:

* Four blocks, all from the first step: textbook heads, previous-token heads in blocks 1 and 2 and induction
  heads in block 3, the last: no layer was left in which the effect of ablating them could be read. A fifth
  block that joins once copying has formed mends that.
* Growing from one block, or from two, with and without attention biases, so that the circuit would sit
  lower: previous-token heads in block 0 stayed diffuse (score .1 to .3), or formed in block 1 and were lost
  again when copying began. Stopped after 500 to 600 steps.
* Rows of 64 tokens alone: accuracy on 400-token walks falls apart past the training length.
* The first cycle alone, for all three seeds: heads above their gates, accuracy .73, .83 and .79. The second
  cycle, 1000 steps more of the same, brought .76, .84 and .79. What was missing was confidence: on chains, a
  state with two successors lost .08 of the mass to words that are not in the row, one with four .27, however
  often it had been visited. No temperature made that loss lower: the model was calibrated, and could not tell
  the words of a mixture apart. Embeddings filled some 70 of 256 directions.
* To count the loss on the second half of each row only, so that the model need not be calibrated for words
  seen once: no gain in 150 steps.
* Embeddings that start five times as large (seed 0, stopped at step 2100): they fill more directions (95),
  and accuracy is where the small ones had it.
* To copy a third of the words in the end: .76 to .81 within 100 steps. Hence the third cycle.

## Limits

The recipe gives the model a reason for previous-token heads; that they appear is not a finding. What they
then do on a task that the model was not trained on is.
"""
