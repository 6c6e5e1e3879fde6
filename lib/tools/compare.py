"""What differs between two runs: `python -m lib compare A B`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lib.core.claims import Claim, number, rule_text, with_interval
from lib.core.record import Artifact, Metric, Record, RecordError, artifact_problem, read_record

Apart = Callable[[str, Metric, Metric], bool]  # whether two numbers of that name differ

# What another processor or dtype may change: any number, and an energy as a share of itself. In float32 the
# embedded models leave the same digits but for the last ones.
_TOLERANCE, _OF_ENERGY, _LAST_DIGITS = 0.02, 0.05, 1e-4


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0 when all results agree, 1 when one differs, 2 for a wrong request."""
    parser = argparse.ArgumentParser(
        prog="python -m lib compare",
        allow_abbrev=False,
        description="Show what differs between two runs, and nothing that does not. Parameters, code, "
        "the notebook's cells, versions and models explain a difference. Claims, metrics and files are "
        "results: they differ when a verdict or a rule does, when neither value lies in the other's interval "
        "(where there is none: when they are not printed alike, with three digits), or when one is missing.",
        epilog="Exit status: 0 when all results agree, 1 when one differs, 2 when a record can not be read.",
    )
    for name in ("a", "b"):
        parser.add_argument(name, metavar=name.upper(), help="record.json, its folder, or a folder of such")
    parser.add_argument(
        "--by-values",
        action="store_true",
        help="B may be of another processor or dtype than A: its values may lie beyond A's intervals "
        f"by {_TOLERANCE}, energies by {100 * _OF_ENERGY:g}%%, and a verdict be another where A is as near "
        "to its rule; of embedded models in float32 only the last digits may differ",
    )
    options = parser.parse_args(argv)
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
        found = results(a, b, _measure(a, b) if options.by_values else beyond)
        found["files"] = files(a, b, path_a, path_b)
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


def results(a: Record, b: Record, apart: Apart) -> dict[str, list[str]]:
    """Lines on claims and metrics that differ, by kind, in order of their names.

    Args:
        a, b: two runs of a study.
        apart: `beyond`, `beyond_tolerance` or `beyond_last_digits`.
    """
    claims = [{claim.id: claim for claim in record.claims} for record in (a, b)]
    metrics = [{name: (name, metric) for name, metric in record.metrics.items()} for record in (a, b)]
    return {
        "claims": list(_pairs(*claims, partial(_claim_difference, apart))),
        "metrics": list(_pairs(*metrics, partial(_metric_difference, apart))),
    }


def files(a: Record, b: Record, path_a: Path, path_b: Path) -> list[str]:
    """Lines on files that one of the runs lacks, or that are not those that were recorded."""

    def difference(of_a: tuple[Path, str, Artifact], of_b: tuple[Path, str, Artifact]) -> str:
        problems = [("A", artifact_problem(*of_a)), ("B", artifact_problem(*of_b))]
        return ", ".join(f"in {run} it {problem}" for run, problem in problems if problem)

    of_a = {name: (path_a, name, artifact) for name, artifact in a.artifacts.items()}
    of_b = {name: (path_b, name, artifact) for name, artifact in b.artifacts.items()}
    return list(_pairs(of_a, of_b, difference))


def beyond(name: str, a: Metric, b: Metric) -> bool:
    """Whether two measurements differ: neither value lies in the other's interval, ends included.

    Where only one has an interval, that one decides. Where none has, they differ when they are not printed
    alike, with three digits; what is printed alike never differs. No value (None) differs from any value.
    """
    if a.value is None or b.value is None:
        return a.value != b.value
    if number(a.value) == number(b.value):
        return False
    return not (_within(a.value, b) or _within(b.value, a))


def beyond_tolerance(name: str, a: Metric, b: Metric) -> bool:
    """Whether B's value lies further from A's interval, or from its value, than by the tolerance."""
    if a.value is None or b.value is None:
        return a.value != b.value
    low, high = a.interval or (a.value, a.value)
    margin = _tolerance(name, a.value)
    return not low - margin <= b.value <= high + margin


def beyond_last_digits(name: str, a: Metric, b: Metric) -> bool:
    """Whether value or interval differ by more than their last digits."""
    if a.value is None or b.value is None or (a.interval is None) != (b.interval is None):
        return (a.value, a.interval) != (b.value, b.interval)
    numbers = zip((a.value, *(a.interval or ())), (b.value, *(b.interval or ())), strict=True)
    return not all(math.isclose(x, y, rel_tol=_LAST_DIGITS, abs_tol=_LAST_DIGITS / 100) for x, y in numbers)


def _measure(a: Record, b: Record) -> Apart:
    """How runs on possibly different machines are compared."""
    models = [*a.models, *b.models]
    same = all(m["model_id"].startswith("organism/") and m["dtype"] == "float32" for m in models)
    return beyond_last_digits if same else beyond_tolerance


def _tolerance(name: str, value: float) -> float:
    return max(_TOLERANCE, _OF_ENERGY * abs(value)) if "energy" in name.lower() else _TOLERANCE


def _within(value: float, other: Metric) -> bool:
    return other.interval is not None and other.interval[0] <= value <= other.interval[1]


def _claim_difference(apart: Apart, a: Claim, b: Claim) -> str:
    said = []
    if a.rule != b.rule:
        said.append(f"rule {rule_text(a)} -> {rule_text(b)}")
    if a.unit != b.unit:
        said.append(f"unit {_text(a.unit)} -> {_text(b.unit)}")
    if a.verdict != b.verdict and not (apart is beyond_tolerance and _near_its_rule(a)):
        said.append(f"{a.verdict} -> {b.verdict}")
    measured = [Metric(value=c.measured, interval=c.interval, reason=c.reason) for c in (a, b)]
    if said or apart(_name(a), *measured):
        said.append(" -> ".join(map(_value, measured)))
    return "; ".join(said)


def _name(claim: Claim) -> str:
    return f"{claim.id}: {claim.statement}"


def _near_its_rule(claim: Claim) -> bool:
    """Whether the verdict would be another one, were the interval moved by the tolerance.

    By no more than half of the rule itself: one of a millionth is not met by a hundredth.
    """
    if claim.measured is None:
        return False
    most = _tolerance(_name(claim), claim.measured)
    margins = {bound: min(most, abs(bound) / 2 or most) for bound in claim.rule if bound is not None}
    ends = claim.interval or (claim.measured,)
    return any(abs(end - bound) <= margin for bound, margin in margins.items() for end in ends)


def _metric_difference(apart: Apart, a: tuple[str, Metric], b: tuple[str, Metric]) -> str:
    return f"{_value(a[1])} -> {_value(b[1])}" if apart(*a, b[1]) else ""


def _value(metric: Metric) -> str:
    if metric.value is None:
        return f"none ({metric.reason})"
    return with_interval(metric.value, metric.interval)


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
