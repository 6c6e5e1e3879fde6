"""The front page: links resolve, every notebook has its row, and its numbers are those of the records."""

from __future__ import annotations

import re

import pytest

from lib import ROOT
from lib.record import validate_record

PAGES = [ROOT / "README.md", *sorted((ROOT / "data" / "organisms").glob("*/README.md"))]
README = PAGES[0].read_text()
ROWS = re.findall(r"^\| \[(.+?)\]\(figures/(\w+)/.+?\) \|.*\| (.+?) \|$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_resolve(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_study_has_a_row():
    studies = {path.stem for path in (ROOT / "notebooks").glob("0[1-9]_*.ipynb")}
    assert {study for _, study, _ in ROWS} == studies


@pytest.mark.parametrize(("figure", "study", "expected"), ROWS)
def test_expected_numbers_are_those_of_the_record(figure, study, expected):
    """Each row says "`name` value" of metrics, rounded to the digits that it shows."""
    metrics = validate_record(ROOT / "figures" / study / "record.json").metrics
    named = re.findall(r"`([^`]+)` (-?\d*\.\d+)", expected)
    assert named, f"the row of {figure} states no metric"
    for name, shown in named:
        digits = len(shown.split(".")[1])
        assert metrics[name].value == pytest.approx(float(shown), abs=0.51 * 10**-digits), name
