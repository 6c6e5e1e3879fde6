"""How trained organisms come into `data/organisms`, and what their cards share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        write_cards: measures what is shipped again, writes its cards and returns the table; None without such
            a thing.
    """

    seeds: tuple[int, ...]
    train_seed: Callable[[int, Path], Path]
    publish: Callable[[Path], str]
    write_cards: Callable[[], str] | None = None


class Check(NamedTuple):
    """One row of a card.

    Attributes:
        name: what was measured.
        value: a number, or several as text.
        gate: the condition on it as text; "" for what is only reported.
        met: whether it holds.
    """

    name: str
    value: float | str
    gate: str = ""
    met: bool = True

    def __str__(self) -> str:
        return self.value if isinstance(self.value, str) else f"{self.value:.3f}"


BySeed = Mapping[int, Sequence[Check]]  # rows of a card


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


def missed(checks: Sequence[Check]) -> list[Check]:
    """The gates that do not hold."""
    return [check for check in checks if not check.met]


def table(measured: BySeed) -> str:
    """What was measured, a column a seed."""
    lines = ["| | gate | " + " | ".join(f"seed {seed}" for seed in measured) + " |"]
    lines.append("|---" * (2 + len(measured)) + "|")
    for checks in zip(*measured.values(), strict=True):
        lines.append(f"| {checks[0].name} | {checks[0].gate} | " + " | ".join(map(str, checks)) + " |")
    return "\n".join(lines)


def shortfalls(measured: BySeed) -> str:
    """The first words of a card: which gates were missed."""
    if not any(check.gate for checks in measured.values() for check in checks):
        return "A baseline: it has no gates."
    found = [
        f"* seed {seed} misses `{check.name}` {check.gate}: {check}"
        for seed, checks in measured.items()
        for check in missed(checks)
    ]
    if not found:
        return f"{'All seeds meet' if len(measured) > 1 else 'It meets'} every gate."
    return "**Not every gate was met:**\n\n" + "\n".join(found)


def joined_logs(stages: Iterable[tuple[str | int | None, Path]]) -> str:
    """The logs of stages (name, folder), one behind the other; one that is alone has no name."""
    rows = []
    for name, folder in stages:
        for line in (folder / "log.jsonl").read_text().splitlines():
            rows.append(({} if name is None else {"stage": name}) | json.loads(line))
    return "".join(json.dumps(row) + "\n" for row in rows)
