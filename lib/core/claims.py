"""A claim: what the literature says, the rule that decides it, what was measured, and the verdict."""

from __future__ import annotations

import html
import math
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["holds", "fails", "unclear", "not tested"]


@dataclass(frozen=True)
class Claim:
    """One claim on the model that the study ran on. Build it with `test` or `not_tested`.

    Attributes:
        id: short name, unique in its study, such as "induction-lowers-accuracy".
        statement: the claim in a sentence.
        source: where it was made, such as "Arditi-26"; "here" for the repository's own.
        rule: (low, high), the open interval in which the measured value must lie; None is no bound.
        measured: the value, in `unit`; None when not tested.
        interval: (low, high) around it; None for a value without sampling error.
        published: the source's own value, or a few words; None when it gives none.
        verdict: "holds" when the whole interval satisfies the rule, "fails" when none of it does,
            "unclear" when it straddles, or "not tested".
        n: what the interval is over, such as "16 walks".
        unit: of measured, interval, rule and published.
        reason: why it was not tested.
    """

    id: str
    statement: str
    source: str
    rule: tuple[float | None, float | None]
    measured: float | None
    interval: tuple[float, float] | None
    published: float | str | None
    verdict: Verdict
    n: str = ""
    unit: str = ""
    reason: str = ""

    @classmethod
    def test(
        cls,
        id: str,
        statement: str,
        *,
        source: str,
        measured: float,
        interval: tuple[float, float] | None = None,
        above: float | None = None,
        below: float | None = None,
        between: tuple[float, float] | None = None,
        published: float | str | None = None,
        n: str = "",
        unit: str = "",
    ) -> Claim:
        """Compare a measurement with one rule: `above`, `below` or `between`, the bounds excluded.

        Raises:
            ValueError: no rule or two, a value that is not finite, or an interval upside down.
        """
        rules = {"above": (above, None), "below": (None, below), "between": between}
        given = [rule for rule in rules.values() if rule not in (None, (None, None))]
        if len(given) != 1:
            raise ValueError(f"claim {id}: give one rule of above, below and between, not {len(given)}")
        low, high = (None if bound is None else float(bound) for bound in given[0])
        measured = float(measured)
        lower, upper = (float(end) for end in interval) if interval is not None else (measured, measured)
        if not all(math.isfinite(x) for x in (measured, lower, upper, low or 0.0, high or 0.0)):
            raise ValueError(
                f"claim {id}: measured {measured} [{lower}, {upper}] must be finite; "
                "say why it could not be measured with Claim.not_tested"
            )
        if lower > upper:
            raise ValueError(f"claim {id}: interval [{lower}, {upper}] is upside down")
        if low is not None and high is not None and low >= high:
            raise ValueError(f"claim {id}: nothing lies between {low} and {high}")
        return cls(
            id,
            statement,
            source,
            (low, high),
            measured,
            None if interval is None else (lower, upper),
            _published(published),
            _verdict(lower, upper, low, high),
            n,
            unit,
        )

    @classmethod
    def not_tested(
        cls,
        id: str,
        statement: str,
        *,
        source: str,
        reason: str,
        published: float | str | None = None,
        unit: str = "",
    ) -> Claim:
        """A claim that this run could not decide, and why."""
        if not reason:
            raise ValueError(f"claim {id}: say why it was not tested")
        return cls(
            id,
            statement,
            source,
            (None, None),
            None,
            None,
            _published(published),
            "not tested",
            unit=unit,
            reason=reason,
        )


class Table:
    """Rows of text that a notebook displays as a table; the first is the header."""

    def __init__(self, rows: Sequence[Sequence[str]]):
        self.rows = [list(map(str, row)) for row in rows]

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in self.rows)

    def _repr_html_(self) -> str:
        return html_table(*self.rows)


class ClaimsTable:
    """Claims that a notebook displays as a table."""

    def __init__(self, items: Iterable[Any]):
        self.items = list(items)

    def __repr__(self) -> str:
        return claims_table(self.items, width=110)

    def _repr_html_(self) -> str:
        return claims_table(self.items, "html")


def claims_table(
    items: Iterable[Any], fmt: Literal["text", "html"] = "text", width: int | None = None
) -> str:
    """One table of claims: claim, measured with its interval, rule, published, verdict.

    Args:
        items: claims, or records (anything with `.study` and `.claims`); with records, the table has
            a column for the study.
        fmt: "text" or "html", in which everything is escaped.
        width: of the text table, in characters; None for the terminal's.

    Returns:
        The table; numbers are rounded to three digits, so that reruns compare equal.
    """
    rows = list(_rows(items))
    if not rows:
        return "No claims.\n" if fmt == "text" else "<p>No claims.</p>"
    header = ["study", "claim", "measured", "rule", "published", "verdict"]
    if not any(row[0] for row in rows):
        header, rows = header[1:], [row[1:] for row in rows]
    return _text(header, rows, width) if fmt == "text" else html_table(header, *rows)


def number(value: float | str | None) -> str:
    """A number as it is printed, with three digits, so that reruns compare equal; words as they are."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    whole = value == round(value) and abs(value) >= 1000
    return f"{value:.0f}" if whole else f"{value + 0.0:.3g}"  # + 0.0: no "-0"


def rule_text(claim: Claim) -> str:
    """Such as "> 0.5"; "" for a claim that was not tested."""
    low, high = claim.rule
    if low is not None and high is not None:
        return f"{number(low)} to {number(high)}"
    return f"> {number(low)}" if low is not None else f"< {number(high)}" if high is not None else ""


def with_interval(value: float, interval: tuple[float, float] | None) -> str:
    """Such as "0.89 [0.88, 0.9]"."""
    return number(value) + (f" [{number(interval[0])}, {number(interval[1])}]" if interval else "")


def _verdict(lower: float, upper: float, low: float | None, high: float | None) -> Verdict:
    if (low is None or lower > low) and (high is None or upper < high):
        return "holds"
    if (low is not None and upper <= low) or (high is not None and lower >= high):
        return "fails"
    return "unclear"


def _published(value: Any) -> float | str | None:
    return value if value is None or isinstance(value, str) else float(value)


def _rows(items: Iterable[Any]) -> Iterator[list[str]]:
    for item in items:
        study, claims = (item.study, item.claims) if hasattr(item, "claims") else ("", [item])
        for claim in claims:
            yield [
                study,
                f"{claim.statement} ({claim.source})",
                _measured(claim),
                rule_text(claim),
                number(claim.published),
                claim.verdict,
            ]


def _measured(claim: Claim) -> str:
    if claim.measured is None:
        return claim.reason
    text = _beside(claim.measured, claim.rule)
    if claim.interval:
        low, high = (_beside(bound, claim.rule) for bound in claim.interval)
        text += f" [{low}, {high}]"
    return " ".join(filter(None, [text, claim.unit, f"({claim.n})" if claim.n else ""]))


def _beside(value: float, rule: tuple[float | None, float | None]) -> str:
    """A number with as many digits, three or more, as tell it from the bounds of a rule."""
    others, digits = [bound for bound in rule if bound not in (None, value)], 3
    while digits < 8 and any(f"{bound:.{digits}g}" == f"{value:.{digits}g}" for bound in others):
        digits += 1
    return f"{value + 0.0:.{digits}g}"


def _text(header: list[str], rows: list[list[str]], width: int | None) -> str:
    width = width or shutil.get_terminal_size((120, 24)).columns
    narrow = {name: max(len(row[i]) for row in [header, *rows]) for i, name in enumerate(header)}
    # The claim takes what the others leave; what is long among the others wraps too.
    for name, most in (("measured", 30), ("published", 16), ("study", 24)):
        if name in narrow:
            narrow[name] = min(narrow[name], most)
    others = sum(size for name, size in narrow.items() if name != "claim") + 2 * (len(header) - 1)
    narrow["claim"] = min(narrow["claim"], max(24, width - others))
    lines = []
    for row in [header, *rows]:
        cells = [textwrap.wrap(cell, narrow[name]) or [""] for name, cell in zip(header, row, strict=True)]
        for i in range(max(map(len, cells))):
            parts = (
                (cell[i] if i < len(cell) else "").ljust(narrow[name])
                for name, cell in zip(header, cells, strict=True)
            )
            lines.append("  ".join(parts).rstrip())
        if row is header:
            lines.append("  ".join("-" * narrow[name] for name in header))
    return "\n".join(lines) + "\n"


def html_table(header: list[str], *rows: list[str]) -> str:
    """An HTML table of text, which is escaped."""

    def line(tag: str, cells: list[str]) -> str:
        # JupyterLab sets the cells of outputs flush right, as for numbers; only a cell's own style wins.
        opening = f'<{tag} style="text-align: left">'
        return "<tr>" + "".join(f"{opening}{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f"<table>\n<thead>{line('th', header)}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
