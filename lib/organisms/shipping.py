"""How trained organisms come into `data/organisms`, the same way for all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lib import models
from lib.organisms.training import save_weights


class Organism(NamedTuple):
    """What `python -m lib.organisms NAME` needs of one.

    Attributes:
        seeds: those that are trained and shipped.
        train_seed: (seed, scratch) -> the seed's folder; continues what was interrupted.
        publish: scratch -> the table of the card, once every seed is trained.
    """

    seeds: tuple[int, ...]
    train_seed: Callable[[int, Path], Path]
    publish: Callable[[Path], str]


def export(trained: Path, target: Path, tokenizer: PreTrainedTokenizerFast) -> None:
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


def ship(name: str, seeds: Iterable[int], shipped: int, fill: Callable[[int, Path], None]) -> None:
    """Ship every seed: one as `organism/NAME`, the others as `organism/NAME-seedN`.

    Args:
        shipped: the seed that bears the name.
        fill: (seed, folder), makes the folder and all in it but the manifest.
    """
    # Earlier ones may be of other seeds.
    for earlier in (models.ORGANISMS / name, *models.ORGANISMS.glob(f"{name}-seed*")):
        shutil.rmtree(earlier, ignore_errors=True)
    for seed in seeds:
        target = models.ORGANISMS / (name if seed == shipped else f"{name}-seed{seed}")
        fill(seed, target)
        models.write_manifest(target)
