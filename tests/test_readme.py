"""The front page: links resolve, its numbers are those of the records, its commands are commands."""

from __future__ import annotations

import ast
import re
import shlex
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from papermill.cli import _resolve_type

from lib import ROOT
from lib.core import registry
from lib.core.parameters import check, schemas
from lib.core.record import validate_record
from sweeps import sweep

FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "sweeps/README.md", "benchmarks/README.md")]
PAGES = [*FRONT, *sorted((ROOT / "data" / "organisms").glob("*/README.md"))]
README = FRONT[0].read_text()
ROWS = re.findall(r"^\| \[(.+?)\]\(figures/(\w+)/.+?\) \|.*\| (.+?) \|$", README, flags=re.MULTILINE)
BLOCKS = re.findall(r"^```(\w*)\n(.+?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.strip()
    for kind, block in BLOCKS if not kind
    for line in block.replace("\\\n", " ").splitlines() if line.strip()
]  # fmt: skip
# Each sentence under "What was found" ends with a comment that says what its numbers are, in their order: a
# metric; a claim with its verdict, as in `geometry: fails`; the published value of a claim.
FOUND = re.findall(r"^(\d)\. (\*\*.+?)\s+<!-- (.+?) -->$", README, flags=re.MULTILINE | re.DOTALL)


def close_to(shown: str):
    """What rounds to a number as the page shows it."""
    return pytest.approx(float(shown), abs=0.51 * 10 ** -len(shown.split(".")[1]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_a_wing_knows_core_and_itself_and_core_knows_no_wing():
    """Tools and organisms may know all; what one function imports counts as well. There is no circle."""
    wings = {path.parent.name for path in (ROOT / "lib").glob("*/__init__.py")}
    named = set(re.findall(r"^ {2}(\w+)/ ", README, flags=re.MULTILINE))
    assert wings <= named, "README draws the house"
    knows = {path: imports(path) for path in (ROOT / "lib").rglob("*.py")}
    for path, others in knows.items():
        own = path.parent.name
        below = wings if own in ("lib", "tools", "organisms") else {"core", own}
        assert {other.parent.name for other in others} <= below | {"lib"}, path.relative_to(ROOT)
    TopologicalSorter(knows).prepare()  # a CycleError names the modules


def imports(path: Path) -> set[Path]:
    """Files of lib that a module imports, but for its type annotations alone."""
    found, tree = set(), ast.parse(path.read_text())
    annotations = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    skipped = {id(inner) for node in annotations for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module.split(".")[0] == "lib"
            and id(node) not in skipped
        ):
            folder = ROOT.joinpath(*node.module.split("."))
            candidates = [folder / alias.name for alias in node.names] if folder.is_dir() else [folder]
            found |= {file for each in candidates if (file := each.with_suffix(".py")).is_file()}
    return found


def test_every_study_has_a_row_and_a_sentence():
    studies = {path.stem for path in (ROOT / "notebooks").glob("0[1-9]_*.ipynb")}
    assert {study for _, study, _ in ROWS} == studies
    assert [int(number) for number, *_ in FOUND] == [int(study[:2]) for study in sorted(studies)]


@pytest.mark.parametrize(("figure", "study", "expected"), ROWS)
def test_expected_numbers_are_those_of_the_record(figure, study, expected):
    """Each row says "`name` value" of metrics, rounded to the digits that it shows."""
    metrics = validate_record(ROOT / "figures" / study / "record.json").metrics
    named = re.findall(r"`([^`]+)` (-?\d*\.\d+)", expected)
    assert named, f"the row of {figure} states no metric"
    for name, shown in named:
        assert metrics[name].value == close_to(shown), name


@pytest.mark.parametrize(("number", "sentence", "names"), FOUND, ids=[number for number, *_ in FOUND])
def test_what_was_found_is_what_the_record_says(number, sentence, names):
    [path] = (ROOT / "figures").glob(f"0{number}_*/record.json")
    record = validate_record(path)
    values = {name: metric.value for name, metric in record.metrics.items()}
    values |= {f"{claim.id}: {claim.verdict}": claim.measured for claim in record.claims}
    values |= {f"{claim.id}: published": claim.published for claim in record.claims}
    shown = re.findall(r"-?\d*\.\d+", sentence)
    for name, digits in zip(names.split(" | "), shown, strict=True):
        assert name in values, "no such metric, or the claim's verdict is another one: is the sentence true?"
        assert values[name] == close_to(digits), name


# --- commands: those that need a hub are read as the notebook would read them


@pytest.fixture(autouse=True)
def key(monkeypatch):
    """The reader has exported a key, as the page says."""
    monkeypatch.setenv("NDIF_API_KEY", "a key")


def given(words: list[str]) -> dict[str, object]:
    """Parameters among a command's words, as papermill hands them to a notebook."""
    found: dict[str, object] = {}
    while words:
        option, *words = words
        if option == "-p":
            name, value, *words = words
            found[name] = _resolve_type(value)
        elif option == "-y":
            text, *words = words
            found |= yaml.safe_load(text)
        else:
            raise ValueError(f"{option}: neither -p nor -y")
    return found


def checked(study: str, parameters: dict[str, object]) -> None:
    lines = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    check(schemas()[study], {**parameters, "In": ["", "seed: int = 0", f"# Parameters\n{lines}"]})


def read_command(command: str) -> str:
    """Check one command line; returns what kind it is.

    Raises:
        ParameterError, LookupError, ValueError: it would not do what it says.
    """
    program, *words = shlex.split(command, comments=True)
    if program == "papermill":
        notebook, output, *words = words
        assert (ROOT / notebook).is_file() and output.endswith(".ipynb")
        study = (ROOT / notebook).stem
        checked(study, given(words))
        return program
    if program == "make":
        target, *variables = words
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        values = dict(variable.split("=", 1) for variable in variables)
        parameters = {} if target == "sweep" else given(shlex.split(values.get("ARGS", "")))
        if "STUDY" in values:
            checked(values["STUDY"], parameters)
        if "MODEL" in values:
            model = registry.find(values["MODEL"])
            for study in model.studies:
                fitting = {k: v for k, v in parameters.items() if k in schemas()[study].model_fields}
                checked(study, {**model.parameters(study), **fitting})
                assert set(model.studies[study].asks) <= set(parameters), command
            assert parameters.keys() <= {k for s in model.studies for k in schemas()[s].model_fields}
        return program
    known = ("python", "-m", "lib", "models")
    assert (program, *words) == known, f"{command}: no test knows this command"
    return program


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_commands(command):
    read_command(command)


def test_all_kinds_of_command_are_there():
    assert {read_command(command) for command in COMMANDS} == {"papermill", "make", "python"}


def test_sweep_of_the_readme_is_a_sweep(tmp_path):
    [text] = [block for kind, block in BLOCKS if kind == "yaml"]
    (tmp_path / "noise.yaml").write_text(text)
    jobs = sweep.read_sweep(tmp_path / "noise.yaml")
    assert len(jobs) == 6 and {job.study for job in jobs} == {"02_neighbor_mixing"}
