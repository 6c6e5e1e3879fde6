"""Problems: numbers, answers and equations as they are written; a bad file names line and remedy."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from lib.codi.problems import (
    Equation,
    Problem,
    ProblemError,
    carried_answer,
    extract_answer,
    first_problems,
    pair_means,
    problems_of,
    question_numbers,
    read_problems,
    twin_indices,
)

ROW = {"question": "Ann has 16 eggs . she eats 3 .", "cot": "<<16-3=13>>", "answer": "13"}


def write(tmp_path, *rows) -> str:
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "text, value",
    [
        ("first 3, then -7.25.", -7.25),
        ("about $1,234,567.5 of them", 1234567.5),
        ("16-3", 3),
        ("it is .5", 0.5),
        ("three", None),
    ],
)
def test_answer_is_the_last_number(text, value):
    assert extract_answer(text) == value


def test_numbers_of_a_question_with_their_characters():
    text = "Two of 1,200.50 cost $3, 20% or 2/5 of twenty-one in a 60-mile half; one is -5 and Dozen."
    numbers = question_numbers(text)
    assert [text[n.start : n.stop] for n in numbers] == [
        "Two", "1,200.50", "3", "20", "2", "5", "twenty-one", "60", "half", "-5", "Dozen",
    ]  # fmt: skip
    assert [n.value for n in numbers] == [2, 1200.5, 3, 20, 2, 5, 21, 60, 0.5, -5, 12]
    assert question_numbers("nothing one often") == ()  # no "ten" within a word


@pytest.mark.parametrize(
    "text, operands, result",
    [
        ("<<20+(80/2)=60.00>>", (20, 80, 2), 60),
        ("10*.5=5", (10, 0.5), 5),
        ("<<1-1/3=2/3>>", (1, 1, 3), 2 / 3),
        ("<<1,000-250=$750>>", (1000, 250), 750),
        ("<<3-8=-5>>", (3, 8), -5),
        ("<<2*3=6=6>>", (2, 3, 6), 6),
    ],
)
def test_equations(text, operands, result):
    equation = Equation.parse(text)
    assert (equation.operands, equation.result) == (operands, result)


@pytest.mark.parametrize("text", ["<<3+5>>", "<<3+5=x>>", "<<1/0=1/0>>"])
def test_malformed_equations_are_named(text):
    with pytest.raises(ValueError, match=re.escape(text)):
        Equation.parse(text)


def test_a_file_of_all_forms(tmp_path):
    steps = {"question": "a  box has 2 nuts\n", "steps": ["<<2*3=6>>", "<<6+1=7>>"], "answer": 7.0, "more": 1}
    path = write(
        tmp_path,
        ROW | {"id": "x", "twin": "y"},
        "",
        ROW | {"id": "y", "twin": "x"},
        steps,
        ROW | {"cot": "", "answer": "#### 1,013"},
    )
    x, y, third, fourth = read_problems(path)
    assert (x.id, x.twin, y.twin, third.id, fourth.id) == ("x", "y", "x", "2", "3")
    assert third.question == "a box has 2 nuts"  # as CODI's evaluation cleans it
    assert third.intermediate_results == (6,) and third.answer == 7 and third.twin is None
    assert x.intermediate_results == () and fourth.equations == () and fourth.answer == 1013
    np.testing.assert_array_equal(twin_indices([y, x]), [1, 0])
    np.testing.assert_array_equal(twin_indices([third, x, fourth]), [0, 1, 2])


def test_readers_of_every_number():
    """15 is read twice by value, but the second 15 that is read is a result; 9 is read by no step."""
    equations = tuple(map(Equation.parse, ("5+10=15", "15-4=11", "11*5=55")))
    problem = Problem("p", "5 pears, 10 more, a box of 9, 15 nuts, 4 go, 5 left", equations, 55)
    assert [n.value for n in problem.numbers] == [5, 10, 9, 15, 4, 5]
    assert problem.readers == ({0, 2}, {0}, set(), set(), {1}, {0, 2})


@pytest.mark.parametrize(
    "row, wrong",
    [
        ("{", "JSON"),
        ("[1]", "JSON"),
        (ROW | {"question": " "}, "question"),
        (ROW | {"question": "how many ?"}, "question"),
        ({"question": "has 2", "cot": ""}, "answer"),
        (ROW | {"answer": "none"}, "answer"),
        ({"question": "has 2", "answer": "2"}, "cot"),
        (ROW | {"cot": "<<16-3=13>> so 13"}, "cot"),
        (ROW | {"cot": "<<16-3>>"}, "<<16-3>>"),
    ],
)
def test_a_bad_line_is_named(row, wrong, tmp_path):
    with pytest.raises(ProblemError, match=f"line 2.*{wrong}"):
        read_problems(write(tmp_path, ROW, row))


def test_a_bad_file_is_named(tmp_path):
    with pytest.raises(ProblemError, match="none.jsonl"):
        read_problems(tmp_path / "none.jsonl")
    with pytest.raises(ProblemError, match="problems.jsonl"):
        read_problems(write(tmp_path, ""))
    with pytest.raises(ProblemError, match="'x'"):
        read_problems(write(tmp_path, ROW | {"id": "x"}, ROW | {"id": "x"}))
    with pytest.raises(ProblemError, match="'z'"):
        read_problems(write(tmp_path, ROW | {"twin": "z"}))


def test_first_problems_are_spread_over_steps_and_keep_their_twins():
    def made(name: str, n_steps: int, twin: str) -> Problem:
        equations = tuple(Equation.parse(f"1+{i}={i + 1}") for i in range(n_steps))
        return Problem(name, "1 2", equations, 1.0, twin)

    pairs = [(f"{steps}{i}", steps) for steps in (1, 2, 3) for i in range(3)]
    whole = [
        made(f"{name}{side}", steps, f"{name}{other}")
        for name, steps in pairs
        for side, other in ("ab", "ba")
    ]
    few = first_problems(whole, 6)
    assert [problem.id for problem in few] == ["10a", "10b", "20a", "20b", "30a", "30b"]
    assert first_problems(whole, 0) == first_problems(whole, 99) == whole
    assert len(first_problems(whole, 13)) == 12  # no problem without its twin


def test_problems_of_a_folder_without_any_are_asked_for(tmp_path):
    with pytest.raises(ProblemError, match=str(tmp_path)):
        problems_of(tmp_path)
    write(tmp_path, ROW)
    (tmp_path / "other.jsonl").write_text(json.dumps(ROW | {"answer": "4"}))
    assert problems_of(tmp_path)[0].answer == 13
    assert problems_of(tmp_path, str(tmp_path / "other.jsonl"))[0].answer == 4


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        ("<<3+5=8>> <<20-8=12>>", "<<10+9=19>> <<30-19=11>>", 1),
        ("<<3+5=8>> <<8*2=16>>", "<<1+9=10>> <<10*3=30>>", 20),
        ("<<3+5=8>> <<8/2=4>>", "<<1+9=10>> <<10/5=2>>", 5),
        ("<<3+5=8>> <<7-2=5>>", "<<1+9=10>> <<10*3=30>>", None),  # does not take the result
        ("<<3+5=8>> <<8+8=16>>", "<<1+9=10>> <<10+10=20>>", None),  # which of the two?
        ("<<3+5=8>> <<8-2-1=5>>", "<<1+9=10>> <<10-3-1=6>>", None),
        ("<<13-9=4>>", "<<16-6=10>>", 7),  # one step: on the twin's start
        ("<<3+5=8>> <<8-2=6>>", "<<1+9=10>>", None),
        ("<<3+3=6>>", "<<1+9=10>>", None),
    ],
)
def test_answer_with_the_twins_intermediate_result(own, other, expected):
    rows = [
        Problem(name, "3 5", tuple(Equation.parse(step) for step in cot.split()), 1.0)
        for name, cot in (("a", own), ("b", other))
    ]
    found = carried_answer(*rows)
    assert np.isnan(found) if expected is None else found == expected


def test_means_over_pairs_of_twins():
    step = (Equation.parse("1+1=2"),)
    rows = [Problem(name, "1 1", step, 2.0, twin) for name, twin in (("a", "c"), ("b", None), ("c", "a"))]
    values = np.array([[1, np.nan], [3, np.nan], [2, 5]])
    np.testing.assert_array_equal(pair_means(rows, values), [[1.5, 5], [3, np.nan]])
    np.testing.assert_array_equal(pair_means(rows, values[:, 0]), [1.5, 3])
    np.testing.assert_array_equal(pair_means(rows[:2], values[:2, 0]), [1, 3])  # the twin is not among these


def test_operations_of_the_steps():
    steps = ("3+5=8", "-8*2=-16", "16-3-4=9", "9=9")
    made = Problem("a", "3", tuple(map(Equation.parse, steps)), 9.0)
    assert made.operations == ("+", "*", "-", "")
