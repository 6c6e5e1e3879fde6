"""Numbers between training seeds: the file in sweeps/seeds is what a sweep of sweeps/seeds.yaml wrote, its
intervals are right, and what is quoted of it is of the studies as they are."""

from __future__ import annotations

import csv
import math
import re
import statistics

import pytest

from lib import ROOT
from lib.__main__ import main
from lib.core.parameters import schemas
from lib.core.record import validate_record
from lib.tools.seeds import SHIPPED, SeedsError, read_numbers, seeds_table, write_numbers
from sweeps import sweep

YAML = ROOT / "sweeps" / "seeds.yaml"
JOBS = sweep.read_sweep(YAML)
STUDIES = list(dict.fromkeys(job.study for job in JOBS))
T = {2: 12.706204736174707, 3: 4.302652729749464}  # n -> .975 quantile of Student's t with n - 1 degrees


@pytest.fixture(scope="module")
def results() -> list[dict]:
    """The rows of the kept results.csv, as `sweep.tidy` makes them."""
    with (SHIPPED.parent / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    value = {row["value"]: float(row["value"]) if row["value"] else None for row in rows}
    return [{**row, "seed": int(row["seed"]), "value": value[row["value"]]} for row in rows]


def test_kept_results_are_of_every_job_of_the_sweep_by_one_code(results):
    assert {row["job"] for row in results} == {job.name for job in JOBS}
    assert {row["status"] for row in results} == {"done"}
    assert len({row["code"] for row in results}) == 1
    [commit] = {row["commit"] for row in results}
    assert re.fullmatch("[0-9a-f]{40}", commit), "run the sweep from a commit, without changes"


def test_kept_numbers_are_those_that_collecting_the_kept_results_gives(results):
    kept, computed = read_numbers(), sweep.between_seeds(results, sweep.read_headlines(YAML))
    assert len(kept) == len(computed) > 100
    for a, b in zip(kept, computed, strict=True):
        assert a._replace(mean=0, low=0, high=0, values={}) == b._replace(mean=0, low=0, high=0, values={})
        for x, y in zip([*a[6:9], *a.values.values()], [*b[6:9], *b.values.values()], strict=True):
            assert x == y if y is None else x == pytest.approx(y, rel=1e-9, abs=1e-12), a.name
        assert list(a.values) == list(b.values)


def test_intervals_are_students_by_hand_and_are_printed():
    printed = {study: seeds_table(study).splitlines() for study in STUDIES}
    for number in (number for number in read_numbers() if number.label):
        values = [value for value in number.values.values() if value is not None]
        assert len(values) == number.n
        if len(values) > 1:
            half = T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
            low, high = statistics.fmean(values) - half, statistics.fmean(values) + half
            assert (number.low, number.high) == pytest.approx((low, high), abs=1e-9)
        lines = printed[number.study]
        assert any(line.startswith(f"{number.label}  ") and line.endswith(number.summary) for line in lines)


@pytest.mark.parametrize("study", STUDIES)
def test_kept_numbers_are_those_of_the_stored_run_of_the_study(study):
    """A study that has changed since the sweep would be quoted wrongly beside its own numbers."""
    record = validate_record(ROOT / "figures" / study / "record.json")
    if record.parameters != schemas()[study]().model_dump():
        pytest.skip("figures/ holds a run with other parameters")
    measured = {name: metric.value for name, metric in record.metrics.items()}
    measured |= {claim.id: claim.measured for claim in record.claims}
    model, compared = record.parameters["model_id"], 0
    if not any(model in number.values for number in read_numbers()):
        pytest.skip(f"the sweep holds no {model}")
    for number in read_numbers():
        if number.study == study and number.label and model in number.values:
            value = number.values[model]
            assert number.name in measured, f"{number.name}: run `make sweep` again"
            if value is None or measured[number.name] is None:
                assert value == measured[number.name], f"{number.name}: run `make sweep` again"
            else:
                assert value == pytest.approx(measured[number.name], rel=0.02, abs=0.02), (
                    f"{number.name}: run `make sweep` again and keep its result (sweeps/README.md)"
                )
            compared += 1
    assert compared >= 4


# --- what is wrong is said


def test_numbers_are_read_as_written(tmp_path):
    numbers = read_numbers()
    write_numbers(tmp_path / "again.csv", numbers)
    assert read_numbers(tmp_path / "again.csv") == numbers
    assert (tmp_path / "again.csv").read_bytes() == SHIPPED.read_bytes()


def test_missing_file_and_unknown_study_are_named_with_the_remedy(tmp_path):
    with pytest.raises(SeedsError, match="none.csv"):
        seeds_table(STUDIES[0], tmp_path / "none.csv")
    with pytest.raises(SeedsError, match="05_more"):
        seeds_table("05_more")


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"study,group", b"group,study"), (b",models,", b","), (b"0.", b"O."), (b"study", b"\xff")],
)
def test_file_that_no_sweep_wrote_is_refused(tmp_path, old, new):
    (tmp_path / "bad.csv").write_bytes(SHIPPED.read_bytes().replace(old, new))
    with pytest.raises(SeedsError, match="bad.csv"):
        read_numbers(tmp_path / "bad.csv")


def test_command_prints_the_table_or_says_which_there_are(capsys):
    assert main(["seeds", "04_codi_attention"]) == 0
    assert capsys.readouterr().out == seeds_table("04_codi_attention") + "\n"
    assert main(["seeds", "05_none"]) == 1
    assert "05_none" in capsys.readouterr().err
