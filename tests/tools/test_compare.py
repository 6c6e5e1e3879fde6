"""What `python -m lib compare` says of two runs, against what was changed between them."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lib.core.claims import Claim
from lib.core.record import Metric, Record, Study
from lib.induction.parameters import InductionAblation
from lib.tools.compare import beyond, beyond_last_digits, beyond_tolerance, main, results

SAME = "01_induction_ablation: all results agree (2 claims, 3 metrics, 2 files)"


@pytest.fixture
def runs(tmp_path, figures) -> tuple[Path, Path]:
    """Two folders with the same run."""
    study = Study(InductionAblation, {"seq_len": 300, "out_dir": str(tmp_path / "a")})
    study.page("<p>", "page", alt="A page.")
    study.page("<p>", "other", alt="Another page.")
    tested = dict(source="here", measured=0.5, interval=(0.4, 0.6), n="9 walks")
    study.claim(Claim.test("falls", "It falls", below=0.7, **tested))
    study.claim(Claim.not_tested("grows", "It grows", source="here", reason="too short"))
    study.metric("accuracy", 0.5, (0.4, 0.6))
    study.metric("exact", 1 / 3)
    study.metric("absent", None, reason="no pairs")
    study.model({"model_id": "organism/induction", "revision": "ab", "dtype": "float32"})
    study.close()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    edit(tmp_path / "b", lambda record: record["parameters"].update(out_dir=str(tmp_path / "b")))
    return tmp_path / "a", tmp_path / "b"


def edit(folder: Path, change) -> None:
    record = json.loads((folder / "record.json").read_text())
    change(record)
    (folder / "record.json").write_text(json.dumps(record))


def compare(capsys, *words) -> tuple[int, list[str]]:
    """Status, and what was said after the two paths."""
    status = main(list(map(str, words)))
    return status, [line.strip() for line in capsys.readouterr().out.splitlines()[2:] if line.strip()]


def test_of_equal_runs_nothing_is_said_but_that(runs, capsys):
    assert compare(capsys, *runs) == (0, [SAME])


@pytest.mark.parametrize(
    ("change", "kind", "line"),
    [
        (lambda r: r["parameters"].update(seq_len=200), "parameters", "seq_len: 300 -> 200"),
        (lambda r: r["versions"].update(torch="1.0"), "versions", "torch: {torch} -> 1.0"),
        (lambda r: r.update(notebook="ab" * 8), "notebook", "null -> abababababababab"),
        (lambda r: r["models"][0].update(revision="cd"), "models", "revision of model 1: ab -> cd"),
        (lambda r: r.update(code="0" * 16, commit=None), "code", "{code} -> 0000000000000000"),
    ],
)
def test_what_explains_a_difference_is_said_and_is_none(runs, capsys, change, kind, line):
    record = json.loads((runs[0] / "record.json").read_text())
    edit(runs[1], change)
    status, (same, title, said) = compare(capsys, *runs)
    assert (status, same, title) == (0, SAME, kind)
    assert said.startswith(line.format(torch=record["versions"]["torch"], code=record["code"]))


def claim(record, **values):
    record["claims"][0].update(values)


@pytest.mark.parametrize(
    ("change", "summary", "lines"),
    [
        (
            lambda r: claim(r, measured=0.8, interval=[0.7, 0.9], verdict="fails"),
            "1 of 2 claims differ",
            ["claims", "falls: holds -> fails; 0.5 [0.4, 0.6] -> 0.8 [0.7, 0.9]"],
        ),
        (
            lambda r: claim(r, rule=[None, 0.9], unit="heads"),
            "1 of 2 claims differ",
            ["claims", 'falls: rule < 0.7 -> < 0.9; unit "" -> heads; 0.5 [0.4, 0.6] -> 0.5 [0.4, 0.6]'],
        ),
        (
            lambda r: r["metrics"].update(
                accuracy={"value": 0.3}, absent={"value": 2.0}, exact={"value": 0.334}, new={"value": 1.0}
            ),
            "4 of 4 metrics differ",
            ["metrics", "absent: none (no pairs) -> 2", "accuracy: 0.5 [0.4, 0.6] -> 0.3",
             "exact: 0.333 -> 0.334", "new: not in A"],
        ),
        (
            lambda r: r["artifacts"].update({"more\n.png": r["artifacts"].pop("page.html")}),
            "2 of 3 files differ",
            ["files", '"more\\n.png": not in A', "page.html: not in B"],
        ),
    ],
)  # fmt: skip
def test_result_that_differs_is_said_with_both_values(runs, capsys, change, summary, lines):
    edit(runs[1], change)
    status, said = compare(capsys, *runs)
    assert status == 1 and said[0] == f"01_induction_ablation: {summary}"
    assert said[1:] == lines


def test_result_within_the_interval_is_the_same(runs, capsys):
    edit(runs[1], lambda r: claim(r, measured=0.59, interval=[0.52, 0.68]))
    edit(runs[1], lambda r: r["metrics"].update(accuracy={"value": 0.39, "interval": [0.3, 0.5]}))
    edit(runs[1], lambda r: r["metrics"].update(exact={"value": 0.33333}))
    assert compare(capsys, *runs) == (0, [SAME])


def test_files_that_are_gone_or_altered_are_named(runs, capsys):
    (runs[0] / "page.html").unlink()
    (runs[1] / "other.html").write_bytes(b"other")
    assert compare(capsys, *runs) == (1, [
        "01_induction_ablation: 2 of 2 files differ", "files",
        "other.html: in B it is not the file that was recorded", "page.html: in A it is missing",
    ])  # fmt: skip


def test_beyond_is_neither_value_in_the_others_interval():
    values = [-1.0, 0.0, 0.0004, 1.0, 1.0004, 2.0]
    intervals = [None, *itertools.combinations(values, 2)]
    measured = [(v, i) for v in values for i in intervals if i is None or i[0] <= v <= i[1]]
    for (a, of_a), (b, of_b) in itertools.product(measured, measured):
        inside = False
        for value, interval in ((a, of_b), (b, of_a)):
            inside = inside or (interval is not None and not value < interval[0] and not value > interval[1])
        expected = not inside and f"{a:.3g}" != f"{b:.3g}"
        assert beyond("", Metric(value=a, interval=of_a), Metric(value=b, interval=of_b)) == expected


@pytest.mark.parametrize("apart", [beyond, beyond_tolerance, beyond_last_digits])
def test_no_value_differs_from_any(apart):
    none, some = Metric(value=None, reason="no pairs"), Metric(value=1.0, interval=(0.0, 2.0))
    assert apart("", none, some) and apart("", some, none)
    assert not apart("", none, none) and not apart("", some, some)


# --- by values


@pytest.fixture
def real_runs(runs):
    """Two folders with the same run on a model that is not embedded."""
    for run in runs:
        edit(run, lambda r: r["models"][0].update(model_id="Qwen2.5-Coder-0.5B-Instruct", dtype="bfloat16"))
    edit(runs[1], lambda r: r["models"][0].update(dtype="float32"))
    return runs


@pytest.mark.parametrize(
    ("name", "a", "interval", "b", "differs"),
    [
        ("accuracy", 0.5, (0.4, 0.6), 0.615, False),
        ("accuracy", 0.5, (0.4, 0.6), 0.375, True),
        ("accuracy", 0.5, None, 0.475, True),
        ("Energy, intact", 2.0, (1.9, 2.1), 2.19, False),
        ("Energy, intact", 2.0, (1.9, 2.1), 2.21, True),
        ("energy", 0.0, None, 0.015, False),
    ],
)
def test_values_of_another_machine_lie_within_the_tolerance(name, a, interval, b, differs):
    assert beyond_tolerance(name, Metric(value=a, interval=interval), Metric(value=b)) is differs


def test_by_values_small_differences_agree_and_are_explained(real_runs, capsys):
    edit(real_runs[1], lambda r: claim(r, measured=0.51, interval=[0.42, 0.61]))
    edit(real_runs[1], lambda r: r["metrics"].update(exact={"value": 0.34}))
    explained = ["models", "dtype of model 1: bfloat16 -> float32"]
    assert compare(capsys, *real_runs, "--by-values") == (0, [SAME, *explained])
    assert compare(capsys, *real_runs)[0] == 1, "a third digit is another one"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda r: claim(r, measured=0.63), "falls: 0.5 [0.4, 0.6] -> 0.63 [0.4, 0.6]"),
        (lambda r: claim(r, verdict="unclear"), "falls: holds -> unclear; 0.5 [0.4, 0.6] -> 0.5 [0.4, 0.6]"),
        (lambda r: r["metrics"].update(exact={"value": 0.36}), "exact: 0.333 -> 0.36"),
    ],
)
def test_planted_disagreement_is_found_by_values(real_runs, capsys, change, line):
    edit(real_runs[1], change)
    status, said = compare(capsys, *real_runs, "--by-values")
    assert status == 1 and said[-1] == line


@pytest.mark.parametrize(
    ("rule", "interval", "tolerated"),
    [
        ({"below": 0.61}, (0.4, 0.6), True),
        ({"below": 0.63}, (0.4, 0.6), False),
        ({"above": 0.0}, (0.01, 0.9), True),
        ({"above": 0.0}, (0.03, 0.9), False),
        ({"between": (0.39, 5.0)}, (0.4, 0.6), True),
        ({"below": 1e-4}, (0.0, 2e-5), False),  # the tolerance is wider than what the rule is about
    ],
)
def test_verdict_may_differ_where_the_tolerance_reaches_its_rule(rule, interval, tolerated):
    measured = dict(source="here", measured=sum(interval) / 2, interval=interval)
    a = Claim.test("x", "It is so", **measured, **rule)
    b = replace(a, verdict="unclear")
    assert a.verdict == "holds"
    records = [record_of(claims=[each]) for each in (a, b)]
    assert (results(*records, beyond_tolerance)["claims"] == []) is tolerated
    assert results(*records, beyond_last_digits)["claims"] != []


def test_verdict_of_another_value_is_not_excused_by_its_rule():
    a, b = (Claim.test("x", "It is so", source="here", measured=m, above=0.5) for m in (0.51, 0.2))
    assert results(record_of(claims=[a]), record_of(claims=[b]), beyond_tolerance)["claims"] != []


def test_embedded_models_in_float32_agree_to_the_last_digits(runs, capsys):
    edit(runs[1], lambda r: r["metrics"].update(exact={"value": 0.33334}))
    edit(runs[1], lambda r: claim(r, measured=0.50002, interval=[0.40001, 0.6]))
    assert compare(capsys, *runs, "--by-values") == (0, [SAME])
    edit(runs[1], lambda r: claim(r, interval=[0.4001, 0.6]))
    edit(runs[1], lambda r: r["metrics"].update(exact={"value": 0.3334}))
    status, said = compare(capsys, *runs, "--by-values")
    assert status == 1 and said[1] == "claims" and said[3:] == ["metrics", "exact: 0.333 -> 0.333"]
    for run in runs:
        edit(run, lambda r: r["models"].append({"model_id": "gpt2", "dtype": "float32"}))
    assert compare(capsys, *runs, "--by-values") == (0, [SAME]), "one of another kind is enough"


def record_of(**values) -> Record:
    empty = dict(study="01_induction_ablation", parameters={}, claims=[], metrics={}, models=[], artifacts={})
    run = dict(commit=None, dirty=None, code="", versions={}, started=datetime.now(UTC), seconds=1)
    return Record(**empty | run | {"peak_memory_mb": 1} | values)


# --- requests


def test_folders_of_studies_are_compared_study_by_study(runs, tmp_path, capsys):
    for run in runs:
        shutil.copytree(run, tmp_path / "all" / run.name / "01")
    shutil.copytree(runs[0], tmp_path / "all" / "a" / "02")
    edit(tmp_path / "all" / "a" / "02", lambda r: r.update(study="02_neighbor_mixing"))
    status, said = compare(capsys, tmp_path / "all" / "a", tmp_path / "all" / "b")
    assert (status, said) == (1, [SAME, "02_neighbor_mixing: not in B"])
    assert main([str(runs[0]), str(tmp_path / "all" / "a" / "02" / "record.json")]) == 2
    assert "give two runs of one study" in capsys.readouterr().err


def test_two_runs_of_one_study_in_a_folder_are_named(runs, tmp_path, capsys):
    """By study alone the last would stand for both, and what differs in the other would go unseen."""
    edit(runs[0], lambda r: r["metrics"].update(exact={"value": 0.9}))
    assert main([str(tmp_path), str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert all(f"{folder}/record.json" in said for folder in runs)


@pytest.mark.parametrize("text", [None, "{"])
def test_record_that_can_not_be_read_is_status_2(runs, capsys, text):
    path = runs[1] / "record.json"
    path.unlink() if text is None else path.write_text(text)
    assert main(list(map(str, runs))) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"{path}: ")
