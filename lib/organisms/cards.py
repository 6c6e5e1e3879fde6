"""What is on record of a trained organism, and the model card that is rendered from it: one way for all.

`record.json` beside the weights of a seed holds what was measured and how it was trained; the prose is in
`data/organisms/cards.yaml`. A gate is a claim of the repository's own, with a rule that was fixed before
training; what has no gate is reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields, replace
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict

from lib import ROOT
from lib.core import embedded
from lib.core.claims import Claim, rule_text
from lib.core.record import Metric
from lib.core.statistics import Estimate

PROSE = ROOT / "data" / "organisms" / "cards.yaml"
SECTIONS = {"data": "Data", "training": "Training", "tried": "What was tried", "limits": "Limits"}

Rows = list[list[str]]  # of a table, the header first


class Measured(NamedTuple):
    """What a seed does as it is shipped, with float16 weights.

    Attributes:
        gates: see `gate`.
        reported: what has no gate, by what it is called on the card.
        tables: more of it.
    """

    gates: Sequence[Claim]
    reported: Mapping[str, Metric | str]
    tables: Mapping[str, Rows] = {}


class OrganismRecord(BaseModel):
    """Contents of record.json of one seed.

    Attributes:
        organism: the name that its seeds share.
        recipe: schedule and recipe as the state of the training has them, where no table says it.
        gates, reported, tables: see `Measured`; tables also say how it was trained.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    organism: str
    seed: int
    recipe: str = ""
    gates: list[Claim] = []
    reported: dict[str, Metric | str] = {}
    tables: dict[str, Rows] = {}

    @property
    def missed(self) -> list[Claim]:
        return [claim for claim in self.gates if claim.verdict != "holds"]

    def with_measured(self, measured: Measured) -> OrganismRecord:
        tables = self.tables | dict(measured.tables)
        values = {"gates": measured.gates, "reported": measured.reported, "tables": tables}
        return OrganismRecord.model_validate(dict(self) | values)

    def write(self, folder: Path) -> None:
        (folder / "record.json").write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> OrganismRecord:
        path = folder / "record.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; ship it with `python -m lib organisms NAME`")
        return cls.model_validate_json(path.read_text())


def gate(id: str, statement: str, value: float | Estimate, **rule: Any) -> Claim:
    """A claim of which the value decides, not its interval; NaN, where there is no value, does not hold.

    Args:
        rule: `above`, `below` or `between`, as `Claim.test` takes them; `unit` for counts.
    """
    interval = value.interval if isinstance(value, Estimate) else None
    value = float(value.value if isinstance(value, Estimate) else value)
    if math.isnan(value):
        return Claim.not_tested(id, statement, source="here", reason="none")
    return replace(Claim.test(id, statement, source="here", measured=value, **rule), interval=interval)


def reported(value: float | Estimate) -> Metric:
    """A number of a card without a gate."""
    if isinstance(value, Estimate):
        return Metric(value=value.value, interval=value.interval)
    return Metric(value=float(value))


def stage_table(stages: Sequence[Any]) -> Rows:
    """The recipe of a training in stages, which are dataclasses of one kind."""
    header = [field.name.replace("_", " ") for field in fields(stages[0])]
    return [header, *([str(value) for value in astuple(stage)] for stage in stages)]


def seeds_of(organism: str) -> dict[Path, OrganismRecord]:
    """Folders and records of the shipped seeds of an organism, by seed.

    Raises:
        FileNotFoundError: one has no record.
    """
    folders = [embedded.ORGANISMS / organism, *embedded.ORGANISMS.glob(f"{organism}-seed*")]
    found = {folder: OrganismRecord.read(folder) for folder in folders}
    return dict(sorted(found.items(), key=lambda item: item[1].seed))


def write_cards(organism: str) -> str:
    """Write card and manifest of every shipped seed from the records; returns the tables of the card."""
    shipped = seeds_of(organism)
    for folder in shipped:
        (folder / "README.md").write_text(card(folder))
        embedded.write_manifest(folder)
    return measurements([*shipped.values()])


def card(folder: Path) -> str:
    """The model card of a shipped seed, Markdown: its own record, and what the other seeds measured."""
    own = OrganismRecord.read(folder)
    shipped = seeds_of(own.organism)
    records = [*shipped.values()]
    prose = yaml.safe_load(PROSE.read_text())[own.organism]
    choice = ""
    if len(records) > 1:
        named = shipped[embedded.ORGANISMS / own.organism].seed
        choice = f"`organism/{own.organism}` is seed {named}, the first of those that miss the fewest gates."
    words = {"organism": own.organism, "seed": str(own.seed), "choice": choice, "recipe": own.recipe}
    words |= {name: markdown_table(rows) for name, rows in own.tables.items()}
    words |= {f"all_{name}": markdown_table(_of_all(name, records)) for name in own.tables}
    # A section may stand in another one.
    words |= {name: text.strip() for name, text in prose.items() if name not in words}

    def section(name: str) -> str:
        return Template(prose.get(name, "")).substitute(words).strip()

    parts = [f"# organism/{folder.name}", shortfalls(records), section("what"), section("about")]
    parts += ["## Measured, as shipped", section("measured"), measurements(records), section("more")]
    parts += [f"## {title}\n\n{section(name)}" for name, title in SECTIONS.items()]
    parts += ["## Licence", "MIT, as the whole repository. Every text that it was trained on is generated."]
    return "\n\n".join(part for part in parts if part) + "\n"


def shortfalls(records: Sequence[OrganismRecord]) -> str:
    """The first words of a card: which gates were missed."""
    if not any(record.gates for record in records):
        return "A baseline: it has no gates."
    lines = [
        f"* seed {record.seed} misses `{claim.statement}` {rule_text(claim)}: {_cell(claim)}"
        for record in records
        for claim in record.missed
    ]
    if lines:
        return "**Not every gate was met:**\n\n" + "\n".join(lines)
    return f"{'All seeds meet' if len(records) > 1 else 'It meets'} every gate."


def measurements(records: Sequence[OrganismRecord]) -> str:
    """Gates and what is reported, a column a seed."""
    seeds = [f"seed {record.seed}" for record in records]
    gates = [["gate", "rule", *seeds]]
    for claims in zip(*(record.gates for record in records), strict=True):
        rules = dict.fromkeys(rule_text(claim) for claim in claims)
        gates.append([claims[0].statement, "; ".join(rules), *map(_cell, claims)])
    others = [["reported, without a gate", *seeds]]
    for name in records[0].reported:
        others.append([name, *(_cell(record.reported[name]) for record in records)])
    fixed = "Gates were fixed before training; a value on the limit itself would not pass."
    parts = [fixed, markdown_table(gates)] if len(gates) > 1 else []
    return "\n\n".join([*parts, markdown_table(others)])


def markdown_table(rows: Rows) -> str:
    header, *others = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([header, "|---" * len(rows[0]) + "|", *others])


def _of_all(name: str, records: Sequence[OrganismRecord]) -> Rows:
    """The rows of a table of every seed, under one header."""
    rows = [records[0].tables[name][0]]
    for record in records:
        rows += [[f"seed {record.seed}, {label}", *cells] for label, *cells in record.tables[name][1:]]
    return rows


def _cell(measured: Claim | Metric | str) -> str:
    """Three decimals, and the interval if there is one; counts, which have a unit, as whole numbers."""
    if isinstance(measured, str):
        return measured
    value = measured.value if isinstance(measured, Metric) else measured.measured
    if value is None:
        return measured.reason
    if measured.interval:
        return f"{Estimate(value, *measured.interval)}"
    is_count = isinstance(measured, Claim) and measured.unit
    return f"{value:.0f}" if is_count else f"{value:.3f}"
