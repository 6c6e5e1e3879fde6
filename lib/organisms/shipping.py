"""How trained organisms come into `data/organisms`: exported, measured as shipped, with record and card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lib.core import embedded
from lib.organisms import cards
from lib.organisms.cards import Measured, OrganismRecord
from lib.organisms.training import save_weights


class Organism(NamedTuple):
    """What `python -m lib organisms NAME` needs of one.

    Attributes:
        name: as in `organism/NAME`.
        seeds: those that are trained and shipped.
        train_seed: (seed, scratch) -> the seed's folder; continues what was interrupted.
        export: (seed, scratch, folder), makes the folder with weights, tokenizer, log and what else is
            shipped, and returns the record of how it was trained.
        measure: folder -> the gates, of a model as it was exported.
    """

    name: str
    seeds: tuple[int, ...]
    train_seed: Callable[[int, Path], Path]
    export: Callable[[int, Path, Path], OrganismRecord]
    measure: Callable[[Path], Measured]


def publish(organism: Organism, scratch: Path) -> str:
    """Ship trained seeds: `organism/NAME`, and the others beside it as `organism/NAME-seedN`.

    The one that bears the name is the first of those that miss the fewest gates.

    Returns:
        The tables of the card.
    """
    exported, records = {}, {}
    for seed in organism.seeds:
        folder = exported[seed] = scratch / "export" / f"{organism.name}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        record = organism.export(seed, scratch, folder)
        records[seed] = record.with_measured(organism.measure(folder))
        records[seed].write(folder)
    named = min(organism.seeds, key=lambda seed: len(records[seed].missed))
    # Earlier ones may be of other seeds.
    for earlier in (embedded.ORGANISMS / organism.name, *embedded.ORGANISMS.glob(f"{organism.name}-seed*")):
        shutil.rmtree(earlier, ignore_errors=True)
    for seed, folder in exported.items():
        target = embedded.ORGANISMS / (organism.name if seed == named else f"{organism.name}-seed{seed}")
        shutil.copytree(folder, target)
        if seed != named:  # checkpoints are large
            shutil.rmtree(target / "checkpoints", ignore_errors=True)
    return cards.write_cards(organism.name)


def measure_again(organism: Organism) -> str:
    """Measure the shipped seeds and write their records and cards, without training; see `publish`."""
    for folder, record in cards.seeds_of(organism.name).items():
        record.with_measured(organism.measure(folder)).write(folder)
    return cards.write_cards(organism.name)


def write_model(trained: Path, target: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a model as it is shipped: float16 weights, configuration and tokenizer.

    Args:
        trained: folder that `save_pretrained` wrote.
        target: new folder.
        tokenizer: of the model.
    """
    target.mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(trained)
    config = model.config.to_dict() | {"dtype": "float16", "architectures": [type(model).__name__]}
    config.pop("_name_or_path", None)
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_weights(model, target / "model.safetensors")
    tokenizer.save_pretrained(target)


def write_log(stages: Iterable[tuple[str | int | None, Path]], target: Path) -> None:
    """Write the logs of stages (name, folder), one behind the other; one that is alone has no name."""
    rows = []
    for name, folder in stages:
        for line in (folder / "log.jsonl").read_text().splitlines():
            rows.append(({} if name is None else {"stage": name}) | json.loads(line))
    (target / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
