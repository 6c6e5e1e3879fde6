"""What differs between two runs: `python -m lib.record compare A B`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lib.claims import Claim, number, rule_text, with_interval
from lib.record import Artifact, Metric, Record, RecordError, artifact_problem, read_record

Interval = tuple[float, float] | None


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0 when all results agree, 1 when one differs, 2 for a wrong request."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.record", description="Records of runs.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", dest="command")
    command = commands.add_parser(
        "compare",
        help="what differs between two runs",
        description="Show what differs between two runs, and nothing that does not. Parameters, code, "
        "the notebook's cells, versions and models explain a difference. Claims, metrics and files are "
        "results: they differ when a verdict or a rule does, when neither value lies in the other's interval "
        "(where there is none: when they are not printed alike, with three digits), or when one is missing.",
        epilog="Exit status: 0 when all results agree, 1 when one differs, 2 when a record can not be read.",
    )
    for name in ("a", "b"):
        command.add_argument(name, metavar=name.upper(), help="record.json, its folder, or a folder of such")
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        first, second = _records(Path(options.a)), _records(Path(options.b))
    except RecordError as error:
        print(error, file=sys.stderr)
        return 2
    if len(first) == len(second) == 1 and first.keys() != second.keys():
        runs = f"{options.a} is a run of {', '.join(first)}, {options.b} of {', '.join(second)}"
        print(f"{runs}: give two runs of one study", file=sys.stderr)
        return 2
    print(f"A: {options.a}\nB: {options.b}")
    n_differences = 0
    for study in sorted(first.keys() | second.keys()):
        if study not in first or study not in second:
            print(f"\n{study}: not in {'B' if study in first else 'A'}")
            n_differences += 1
            continue
        (path_a, a), (path_b, b) = first[study], second[study]
        explains = background(a, b)
        found = results(a, b) | {"files": files(a, b, path_a, path_b)}
        n = sum(map(len, found.values()))
        n_differences += n
        print(f"\n{study}: {_summary(a, b, found)}")
        for title, lines in (explains | found).items():
            if lines:
                print("\n".join([f"  {title}", *(f"    {line}" for line in lines)]))
    return 1 if n_differences else 0


def background(a: Record, b: Record) -> dict[str, list[str]]:
    """Lines on what may explain that two runs of a study differ, by kind."""
    code = []
    if a.code != b.code:
        commits = [f"{r.commit or 'no commit'}{' with changes' if r.dirty else ''}" for r in (a, b)]
        code = [f"{a.code} -> {b.code} ({commits[0]} -> {commits[1]})"]
    # Where a run was written says nothing about it.
    parameters = [
        {name: value for name, value in record.parameters.items() if name != "out_dir"} for record in (a, b)
    ]
    return {
        "parameters": list(_changes(*parameters)),
        "code": code,
        "notebook": [] if a.notebook == b.notebook else [f"{_text(a.notebook)} -> {_text(b.notebook)}"],
        "versions": list(_changes(a.versions, b.versions)),
        "models": list(_changes(_models(a), _models(b))),
    }


def results(a: Record, b: Record) -> dict[str, list[str]]:
    """Lines on claims and metrics that differ beyond their intervals, by kind, in order of their names."""
    claims = [{claim.id: claim for claim in record.claims} for record in (a, b)]
    return {
        "claims": list(_pairs(*claims, _claim_difference)),
        "metrics": list(_pairs(a.metrics, b.metrics, _metric_difference)),
    }


def files(a: Record, b: Record, path_a: Path, path_b: Path) -> list[str]:
    """Lines on files that one of the runs lacks, or that are not those that were recorded."""

    def difference(of_a: tuple[Path, str, Artifact], of_b: tuple[Path, str, Artifact]) -> str:
        problems = [("A", artifact_problem(*of_a)), ("B", artifact_problem(*of_b))]
        return ", ".join(f"in {run} it {problem}" for run, problem in problems if problem)

    of_a = {name: (path_a, name, artifact) for name, artifact in a.artifacts.items()}
    of_b = {name: (path_b, name, artifact) for name, artifact in b.artifacts.items()}
    return list(_pairs(of_a, of_b, difference))


def beyond(a: float | None, interval_a: Interval, b: float | None, interval_b: Interval) -> bool:
    """Whether two measurements differ: neither value lies in the other's interval, ends included.

    Where only one has an interval, that one decides. Where none has, they differ when they are not printed
    alike, with three digits; what is printed alike never differs. No value (None) differs from any value.
    """
    if a is None or b is None:
        return (a is None) != (b is None)
    if number(a) == number(b):
        return False
    return not (_within(a, interval_b) or _within(b, interval_a))


def _within(value: float, interval: Interval) -> bool:
    return interval is not None and interval[0] <= value <= interval[1]


def _claim_difference(a: Claim, b: Claim) -> str:
    said = []
    if a.rule != b.rule:
        said.append(f"rule {rule_text(a)} -> {rule_text(b)}")
    if a.unit != b.unit:
        said.append(f"unit {_text(a.unit)} -> {_text(b.unit)}")
    if a.verdict != b.verdict:
        said.append(f"{a.verdict} -> {b.verdict}")
    if said or beyond(a.measured, a.interval, b.measured, b.interval):
        values = [_value(claim.measured, claim.interval, claim.reason) for claim in (a, b)]
        said.append(" -> ".join(values))
    return "; ".join(said)


def _metric_difference(a: Metric, b: Metric) -> str:
    if not beyond(a.value, a.interval, b.value, b.interval):
        return ""
    return f"{_value(a.value, a.interval, a.reason)} -> {_value(b.value, b.interval, b.reason)}"


def _value(value: float | None, interval: Interval, reason: str) -> str:
    return f"none ({reason})" if value is None else with_interval(value, interval)


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    return _pairs(a, b, lambda x, y: "" if x == y else f"{_text(x)} -> {_text(y)}")


def _pairs(
    a: Mapping[str, Any], b: Mapping[str, Any], difference: Callable[[Any, Any], str]
) -> Iterator[str]:
    """A line for every name that only one of them has, or of which `difference` has something to say."""
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            yield f"{_text(name)}: not in {'B' if name in a else 'A'}"
        elif said := difference(a[name], b[name]):
            yield f"{_text(name)}: {said}"


def _models(record: Record) -> dict[str, Any]:
    """Provenance of every model, one entry a field, by the order in which the study loaded them."""
    numbered = enumerate(record.models, 1)
    return {f"{field} of model {i}": value for i, model in numbered for field, value in model.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value and value.isprintable() else json.dumps(value)


def _records(path: Path) -> dict[str, tuple[Path, Record]]:
    """Records at a path by study: a file, one beside its figures, or those of a folder's folders."""
    one = path / "record.json" if path.is_dir() else path
    found = [one] if one.is_file() else sorted(path.glob("*/record.json")) or [one]
    records: dict[str, tuple[Path, Record]] = {}
    for each in found:
        record = read_record(each)
        if record.study in records:
            first = records[record.study][0]
            raise RecordError(f"{path} holds two runs of {record.study}: {first}, {each}; name one")
        records[record.study] = each, record
    return records


def _summary(a: Record, b: Record, found: Mapping[str, list[str]]) -> str:
    common = {
        "claims": {claim.id for claim in a.claims} | {claim.id for claim in b.claims},
        "metrics": a.metrics.keys() | b.metrics.keys(),
        "files": a.artifacts.keys() | b.artifacts.keys(),
    }
    counts = [f"{len(found[kind])} of {len(names)} {kind}" for kind, names in common.items() if found[kind]]
    if not counts:
        return "all results agree (" + ", ".join(f"{len(n)} {kind}" for kind, n in common.items()) + ")"
    return ", ".join(counts) + " differ"
