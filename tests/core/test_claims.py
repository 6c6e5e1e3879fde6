from __future__ import annotations

import pytest

from lib.core.claims import Claim, ClaimsTable, claims_table


def claim(**values) -> Claim:
    return Claim.test("id", "Accuracy rises with context", source="Arditi-26", **values)


@pytest.mark.parametrize(
    ("rule", "interval", "verdict"),
    [
        ({"above": 0.5}, (0.51, 0.9), "holds"),
        ({"above": 0.5}, (0.4, 0.6), "unclear"),
        ({"above": 0.5}, (0.1, 0.5), "fails"),
        ({"above": 0.5}, (0.5, 0.9), "unclear"),  # the bound is excluded
        ({"below": 0.5}, (0.1, 0.49), "holds"),
        ({"below": 0.5}, (0.5, 0.9), "fails"),
        ({"between": (1, 2)}, (1.1, 1.9), "holds"),
        ({"between": (1, 2)}, (0.5, 2.5), "unclear"),
        ({"between": (1, 2)}, (2.0, 2.5), "fails"),
        ({"between": (1, 2)}, (0.0, 1.0), "fails"),
        ({"above": 0.5}, None, "fails"),
    ],
)
def test_verdict_is_about_the_whole_interval(rule, interval, verdict):
    assert claim(measured=sum(interval or (0.2, 0.8)) / 2, interval=interval, **rule).verdict == verdict


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        ({"measured": 1}, "not 0"),
        ({"measured": 1, "above": 0, "below": 2}, "not 2"),
        ({"measured": float("nan"), "above": 0}, "finite"),
        ({"measured": 1, "interval": (0, float("inf")), "above": 0}, "finite"),
        ({"measured": 1, "interval": (2, 0), "above": 0}, "upside down"),
        ({"measured": 1, "between": (2, 1)}, "nothing lies between"),
    ],
)
def test_claim_that_says_nothing_is_refused(values, culprit):
    with pytest.raises(ValueError, match=culprit):
        claim(**values)


def test_claim_not_tested_needs_a_reason():
    untested = Claim.not_tested("id", "Late heads matter", source="here", reason="the model has 4 layers")
    assert untested.verdict == "not tested"
    with pytest.raises(ValueError, match="why"):
        Claim.not_tested("id", "Late heads matter", source="here", reason="")


def test_table_has_value_interval_rule_published_and_verdict():
    tested = claim(measured=0.61234, interval=(0.58, 0.66), above=0.5, published=0.902, n="16 walks")
    untested = Claim.not_tested("b", "Late heads matter", source="here", reason="too few layers")
    header, _, first, second = claims_table([tested, untested], width=140).splitlines()
    assert header.split() == ["claim", "measured", "rule", "published", "verdict"]
    assert "Accuracy rises with context (Arditi-26)" in first
    assert "0.612 [0.58, 0.66] (16 walks)" in first and "> 0.5" in first and "0.902" in first
    assert first.endswith("holds")
    assert "too few layers" in second and second.endswith("not tested")


def test_text_table_keeps_to_its_width():
    long = Claim.test("a", "word " * 40, source="here", measured=1.0, above=0.0, published="some " * 20)
    lines = claims_table([long], width=100).splitlines()
    assert max(map(len, lines)) <= 100
    assert " ".join(lines).count("word") == 40


def test_table_escapes_what_it_shows():
    nasty = Claim.test("a", "<script>alert(1)</script> a|b", source="here", measured=1.0, above=0.0)
    table = claims_table([nasty], "html")
    assert "<script>" not in table and "&lt;script&gt;" in table


def test_no_claims_are_said_so():
    assert "No claims" in repr(ClaimsTable([])) and "No claims" in ClaimsTable([])._repr_html_()


def test_a_bound_next_to_its_rule_is_told_from_it():
    close = claim(measured=0.00869, interval=(0.00749, 0.0099981), above=0.01)
    assert close.verdict == "fails"
    assert "0.00869 [0.00749, 0.009998]" in claims_table([close], width=160)
    assert "-0" not in claims_table([claim(measured=-0.0, below=1)])
