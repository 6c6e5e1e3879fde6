"""What differs between models that differ by their training seed: the file that a sweep leaves, and its
headline numbers as the notebooks quote them.

`sweeps/sweep.py` writes between_seeds.csv for any sweep; that of the models of this repository is kept in
`sweeps/seeds/`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lib import ROOT
from lib.core import registry
from lib.core.claims import Table, number
from lib.core.files import write_whole
from lib.core.kernel import PlainError

SHIPPED = ROOT / "sweeps" / "seeds" / "between_seeds.csv"
LADDER = ROOT / "sweeps" / "ladder" / "between_seeds.csv"


class SeedsError(PlainError, ValueError):
    """The numbers between seeds can not be read, or do not cover the study."""


class SeedNumber(NamedTuple):
    """One metric or claim of a study, by model or seed, with Student's 95% interval of the mean.

    A unit without a value had none to measure and does not count in n; one value makes no interval.
    """

    study: str
    group: str  # models that are seeds of one another
    parameters: str  # JSON, as the sweep gave them
    kind: str  # metric or claim
    name: str
    label: str  # in words, of a headline number; else empty
    mean: float | None
    low: float | None
    high: float | None
    n: int
    unit: str  # what values are by: models or seeds
    values: dict[str, float | None]
    verdicts: dict[str, str]  # of a claim

    @property
    def summary(self) -> str:
        """Mean, interval and n in words."""
        n = f"n = {self.n}" + (f" of {len(self.values)}" if self.n < len(self.values) else "")
        if self.low is None:
            return f"{_number(self.mean)}, {n}"
        if self.low == self.high:
            return f"{_number(self.mean)}, no spread, {n}"
        return f"{_number(self.mean)} [{_number(self.low)}, {_number(self.high)}], {n}"


def main(argv: list[str] | None = None) -> int:
    """Print a study's table; returns the exit status, 1 if there is none."""
    parser = argparse.ArgumentParser(
        prog="python -m lib seeds", description="Headline numbers between seeds."
    )
    parser.add_argument("study", help="such as 04_codi_attention")
    parser.add_argument("file", nargs="?", type=Path, default=SHIPPED, help="a between_seeds.csv of a sweep")
    options = parser.parse_args(argv)
    try:
        print(seeds_table(options.study, options.file))
    except SeedsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def write_numbers(path: Path, numbers: Iterable[SeedNumber]) -> None:
    """Write numbers as CSV, in one step."""
    file = io.StringIO(newline="")
    table = csv.writer(file, lineterminator="\n")
    table.writerow(SeedNumber._fields)
    for each in numbers:
        table.writerow(each._replace(values=json.dumps(each.values), verdicts=json.dumps(each.verdicts)))
    write_whole(path, file.getvalue().encode())


def read_numbers(path: str | Path = SHIPPED) -> list[SeedNumber]:
    """The numbers of a between_seeds.csv.

    Raises:
        SeedsError: the file is missing, or is not one that a sweep wrote.
    """
    remedy = "take it from the repository, or write it by `make sweep` (sweeps/README.md)"
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file)
        if tuple(header) != SeedNumber._fields:
            raise ValueError(f"its columns are {', '.join(header)}")
        return [_parsed(SeedNumber(*line)) for line in lines]
    except FileNotFoundError:
        raise SeedsError(f"{path}: there is no such file; {remedy}") from None
    except (ValueError, TypeError) as error:
        raise SeedsError(f"{path}: no numbers between seeds ({error}); {remedy}") from None


def seeds_table(study: str, path: str | Path = SHIPPED) -> str:
    """Headline numbers of a study for each of its trained seeds, as text: a line a model, in the order of the
    title, so that a notebook's page holds it.

    The numbers are those of the models and parameters in the file, whatever model a notebook runs on.

    Raises:
        SeedsError: see `read_numbers`; or the file has no headline numbers of this study.
    """
    numbers = [each for each in read_numbers(path) if each.label]
    chosen = [each for each in numbers if each.study == study]
    if not chosen:
        known = ", ".join(dict.fromkeys(each.study for each in numbers)) or "none"
        raise SeedsError(f"{path}: no headline numbers of {study!r}; there are those of {known}")
    parts = []
    for group, parameters in dict.fromkeys((each.group, each.parameters) for each in chosen):
        rows = [each for each in chosen if (each.group, each.parameters) == (group, parameters)]
        units = list(rows[0].values)
        title = f"{rows[0].unit}: {', '.join(units)}"
        lines = [["", "each", "claim", "mean [95% t-interval]"]]
        for each in rows:
            heads, summaries = ([text] + [""] * (len(units) - 1) for text in (each.label, each.summary))
            verdicts = [each.verdicts.get(unit, "") for unit in units]
            values = [_number(each.values[unit]) for unit in units]
            lines += zip(heads, values, verdicts, summaries, strict=True)
        parts.append(f"{title}\n{repr(Table(lines))}")
    return "\n\n".join(parts)


def ladder_table(study: str, published_as: str, path: str | Path = LADDER) -> Table:
    """Headline numbers of a study on models of different size, a column a model, beside published ones.

    Args:
        study: its name.
        published_as: title of the column of published figures (data/published.json, ladder/STUDY, by label).
        path: a between_seeds.csv, whose units are the models.

    Raises:
        SeedsError: see `read_numbers`; or the file has no headline numbers of this study.
    """
    rows = [each for each in read_numbers(path) if each.label and each.study == study]
    if not rows:
        raise SeedsError(f"{path}: no headline numbers of {study!r}; run the sweep ladder.yaml")
    known = registry.published(f"ladder/{study}")
    models = [model for each in rows[:1] for model in each.values]
    lines = [["", *(model.split("/")[-1] for model in models), published_as]]
    for each in rows:
        numbers = [_number(each.values[model]) for model in models]
        lines.append([each.label, *numbers, number(known.get(each.label))])
    return Table(lines)


def _parsed(row: SeedNumber) -> SeedNumber:
    mean, low, high = (float(text) if text else None for text in (row.mean, row.low, row.high))
    return row._replace(mean=mean, low=low, high=high, n=int(row.n), values=json.loads(row.values),
                        verdicts=json.loads(row.verdicts))  # fmt: skip


def _number(value: float | None) -> str:
    return "none" if value is None else number(value)
