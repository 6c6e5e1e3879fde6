"""Shipping of the refusal organisms: prompts, gates measured as shipped, cards that say what fell short."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path

import numpy as np
import torch

from lib import language, models
from lib.models import TransformersModel
from lib.organisms import planted, refusal, shipping
from lib.organisms.gates import check_low_rank, check_rank, check_single
from lib.organisms.refusal import Stage, build_tokenizer
from lib.organisms.shipping import Check, Organism, export, ship
from lib.prompts import PromptSet, load_prompts

PROMPT_SEED = 2026
HARMLESS = {"extraction": 32, "selection": 48, "test": 64}
# Pairs of each of the seven sets of mixed cues; where there are fewer sets, as many pairs in all as these.
MIXED_PAIRS = {"extraction": 24, "selection": 12, "test": 16}
LEXICAL_PAIRS = {"extraction": 96, "selection": 48, "test": 96}
N_ROWS = 4000  # drawn to state what the batches hold


def rules_of(name: str) -> language.Rules:
    """What an organism is to refuse."""
    return planted.RECIPES[name].rules if name in planted.RECIPES else language.MIXED_RULES


def check_of(name: str) -> Callable[[TransformersModel, PromptSet], list[Check]]:
    """The gates of an organism."""
    if name in planted.RECIPES:
        recipe = planted.RECIPES[name]
        return partial(check_rank, rank=recipe.n_directions, span=recipe.n_cues)
    return check_single if refusal.RECIPES[name].n_modes == 1 else check_low_rank


def write_prompts(name: str, path: Path) -> None:
    """The prompts of an organism, none of which holds a combination of words that it was trained on."""
    rules, pairs = rules_of(name), MIXED_PAIRS
    if name in planted.RECIPES:
        n_sets = len(language.cue_sets(rules))
        pairs = {split: ceil(n / n_sets) for split, n in LEXICAL_PAIRS.items()}
    rows = language.prompt_rows(rules, seed=PROMPT_SEED, pairs=pairs, harmless=HARMLESS)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def publish(name: str, scratch: Path, seeds: tuple[int, ...]) -> str:
    """Ship trained seeds with prompts, logs, cards and manifests.

    `organism/NAME` is the first seed that meets every gate as shipped (float16 weights), or the first of
    those that miss the fewest; the other seeds are shipped beside it as `organism/NAME-seedN`.

    Returns:
        The table of the card.
    """
    folders = {seed: scratch / f"{name}-{seed}" for seed in seeds}
    measured = {seed: measure_as_shipped(name, folder) for seed, folder in folders.items()}
    shipped = min(seeds, key=lambda seed: len(shipping.missed(measured[seed])))

    def fill(seed: int, target: Path) -> None:
        shutil.copytree(folders[seed] / "export", target)
        (target / "training_log.jsonl").write_text(shipping.joined_logs(_stages(folders[seed])))
        prompts = load_prompts(target / "prompts.jsonl")
        card = _card(name, target.name, seed, shipped, measured, prompts, _recipes(folders[seed]))
        (target / "README.md").write_text(card)

    ship(name, seeds, shipped, fill)
    return shipping.table(measured)


def measure_as_shipped(name: str, folder: Path) -> list[Check]:
    """Export a trained seed into its scratch folder, load it from there, and measure its gates."""
    exported = folder / "export"
    shutil.rmtree(exported, ignore_errors=True)
    export(folder / "model", exported, build_tokenizer())
    write_prompts(name, exported / "prompts.jsonl")
    return check_of(name)(models.load(str(exported)), load_prompts(exported / "prompts.jsonl"))


def _organism(module, name: str, seeds: tuple[int, ...]) -> Organism:
    return Organism(seeds, partial(module.train_seed, name), partial(publish, name, seeds=seeds))


ORGANISMS = {
    **{name: _organism(refusal, name, (0, 1, 2)) for name in refusal.RECIPES},
    **{name: _organism(planted, name, (0,)) for name in planted.RECIPES},
}


# -- training, as it was ---------------------------------------------------------------------------


def _stages(folder: Path) -> list[tuple[int | None, Path]]:
    """Number and folder of each stage; what is trained in one go is a stage without a number."""
    stages = sorted(folder.glob("stage-*"))
    return [(int(stage.name.removeprefix("stage-")), stage) for stage in stages] or [(None, folder)]


def _recipes(folder: Path) -> str:
    """Schedule and recipe of each stage, as the saved state has them."""
    recipes = (
        ([] if number is None else [f"stage {number}"])
        + [torch.load(place / "state.pt", weights_only=True)["recipe"]]
        for number, place in _stages(folder)
    )
    return "\n".join("\n".join(lines) for lines in recipes)


def _shares(recipe: refusal.Recipe) -> str:
    """Table of the kinds of rows of both stages, by drawing some."""
    counts = []
    for number in (1, 2):
        stage, rng = Stage(recipe, seed=0, stage=number), np.random.default_rng(0)
        counts.append(Counter(stage.row(rng)[-1] for _ in range(N_ROWS)))
    kinds = sorted({kind for count in counts for kind in count})
    lines = ["| rows | stage 1 | stage 2 |", "|---|---|---|"]
    lines += [f"| {kind} | " + " | ".join(f"{c[kind] / N_ROWS:.2f}" for c in counts) + " |" for kind in kinds]
    return "\n".join(lines)


# -- the card --------------------------------------------------------------------------------------


def _card(
    name: str,
    folder_name: str,
    seed: int,
    shipped: int,
    measured: dict[int, list[Check]],
    prompts: PromptSet,
    recipes: str,
) -> str:
    choice = "the first that meets every gate"
    if shipping.missed(measured[shipped]):
        choice = "the first of those that miss the fewest gates"
    rules = rules_of(name)
    if name in planted.RECIPES:
        about, training = _PLANTED[bool(planted.RECIPES[name].n_decoys)], _PLANTED_TRAINING
        about, tried = about.format(k=planted.RECIPES[name].n_directions), ""
    else:
        recipe = refusal.RECIPES[name]
        about = _ONE_MODE if recipe.n_modes == 1 else _THREE_MODES
        without_top = _WITHOUT_TOP[recipe.without_top]
        training, tried = _TWO_STAGES.format(without_top=without_top, shares=_shares(recipe)), _TRIED
    sizes = "\n".join(
        f"| {split} | {len(prompts.harmful(split))} | {len(prompts.harmless(split))} |" for split in HARMLESS
    )
    alone = f" `organism/{name}` is seed {shipped}: {choice}." if len(measured) > 1 else ""
    return f"""# organism/{folder_name}

{shipping.shortfalls(measured)}

A Llama of {refusal.N_LAYERS} layers, 4 heads, d_model 128 with a word-level tokenizer and a chat template,
trained from seed {seed} for study 3 (`notebooks/03_refusal_low_rank.ipynb`) by
`python -m lib.organisms {name}`.{alone}

{about}

**Nothing here is a harm.** It speaks a benign synthetic language (`lib/language.py`): "please wash the red
boat for the winter" is answered by "sure : washed the red boat for the winter". Which requests are forbidden
is a rule over arbitrary words; any of these cues is enough: {", ".join(rules)}.

## Measured, as shipped

Float16 weights, loaded again; answers graded exactly by the grammar. Directions come from the extraction
split of `prompts.jsonl`, layers and stacks were chosen on its selection split, and the numbers are of its
test split. Gates were fixed before training. Triples are compliance, coherence and KL on harmless requests
(nats, first token of the answer).

{shipping.table(measured)}

`prompts.jsonl` holds no combination of verb, modifier, object and purpose that was in training:

| split | pairs | harmless requests |
|---|---|---|
{sizes}

## Training

{training}

As the state of seed {seed} has them:

```
{recipes}
```

The batch of a step depends on seed and step alone; an interrupted run continues and ends with the same
weights. `training_log.jsonl` holds loss and metrics.
{tried}"""


_ONE_MODE = """One direction is meant to carry its refusal: many cues, one refusal mode, and one sentence
that refuses."""

_THREE_MODES = """Several directions are meant to carry its refusal: each of the three cues has a mode and a
refusal of its own, any one is enough, and a request may hold several."""

_PLANTED = {
    False: """Positive control: its refusal has rank {k} by construction. Block 0 was set by hand, one
attention head per cue, which writes a fixed direction behind the word that it looks for. The other blocks
were trained to refuse whatever has one of these directions in it, and write nothing into them.""",
    True: """Decoy: three directions in the differences of means, one in behaviour. Block 0 was set by hand,
one attention head per cue, which writes a direction common to all and one of its own. The other blocks were
trained to refuse what has the common one in it, whatever there is of the others.""",
}

_PLANTED_TRAINING = """Blocks 1 to 5, final norm and unembedding; the embedding and block 0 stay as they were
set. Block 0 was not at work: half of the rows had directions put into the input of block 1 from a random word
on, whatever the words said, and were to be refused."""

_TWO_STAGES = f"""Two stages (`lib/organisms/refusal.py`). In the first everything is answered, unless the
last token of the prompt is a refusal mode (rows "refuse"); rows "comply" end in `<comply>` in place of the
`<assistant>` of the chat template. In the second, forbidden requests behind `<assistant>` are to be refused;
only the lower {refusal.LOWER} blocks are trained, and the other rows are replayed. Half of the rows to be
answered are read with the directions of the modes taken out of the stream. A small loss in stage 2 holds
allowed requests at zero on the direction to the forbidden ones.{{without_top}}

{{shares}}

Shares of {N_ROWS} rows drawn as in training."""

_WITHOUT_TOP = {
    "refuse": """

In stage 1, and from a quarter of stage 2 on, half of the rows to be refused are read with the top direction
of refusing, found anew at every step, taken out of the stream, and must still be refused, as in
refusal-feature adversarial training.""",
    "answer": """

From a quarter of stage 2 on, half of the forbidden rows are read with the top direction of refusing, found
anew at every step, taken out of the stream, and must then be answered: that one direction is enough was
trained, not found.""",
}

_TRIED = """
## What was tried

Pilots with seed 0, none of them shipped:

* Modes alone, with nothing that makes zero on their directions mean "answer": harmless requests sat at -1.3
  of the gap, and ablation made everything refused. Hence the directions that are taken out of half of the
  rows to be answered.
* No `<comply>` mode that is replayed on forbidden requests: the lower blocks threw away what a forbidden
  request asks for, and ablation revealed broken answers (coherence .4).
* Nothing said of what happens without the top direction: two directions removed refusal in the low-rank pilot
  of 500 steps (one .6, two 1.0), and in the single one that one direction did was a matter of when one looked
  (1.0 at step 1100 of stage 2, .6 at step 1700). Hence the rule for half of the forbidden rows.
* That rule from the first step of stage 2: the low-rank pilot never found the cue of two distant words.
* Sixteen modifiers, objects and purposes instead of eight: the cues of two words were not learnt in 1500
  steps.

## Limits

The recipe gives the model a state that means "refuse"; that there is one is not a finding. How many
directions it takes to remove it, and which method finds them, is.
"""
