"""The notebooks run with small parameters, are stored executed, and keep to the shape that a reader expects.

nbval compares the stored outputs with a fresh run; a cell whose output was never stored compares equal to
anything, hence the guard here.
"""

from __future__ import annotations

import ast
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import nbformat
import numpy as np
import papermill
import pytest
import yaml

from lib import ROOT
from lib.core.parameters import schemas
from lib.core.record import validate_record
from lib.induction.geometry import dirichlet_energy
from lib.induction.walks import grid_graph

NOTEBOOKS = sorted((ROOT / "notebooks").rglob("[0-9][0-9a-z]_*.ipynb"))  # appendices as well

# Small enough for seconds, large enough that every cell has something to do; other studies run as `make run`
# has them. All on embedded models.
SMALL = {
    "00_start_here": {},
    "01_induction_ablation": {
        "seq_len": 160,
        "window": 100,
        "n_layouts": 4,
        "n_selecting": 1,
        "k_values": [1, 2],
        "n_random_sets": 2,
        "n_bootstrap": 100,
    },
    "02_neighbor_mixing": {
        "seq_len": 160,
        "window": 100,
        "n_layouts": 4,
        "n_selecting": 1,
        "dim": 256,
        "n_seeds": 3,
        "n_bootstrap": 100,
    },
    "1b_emergence": {
        "seq_len": 160,
        "window": 60,
        "n_walks": 4,
        "n_layouts": 4,
        "k_values": [1, 2],
        "n_bootstrap": 100,
    },
    "2a_mixing_theory": {"dim": 256, "n_seeds": 3, "ranks": [1, 4], "dims": [16, 64]},
    "03_refusal_low_rank": {
        "n_prompts": 14,
        "k_values": [1, 3],
        "strengths": [0.5, 1.0],
        "n_random": 1,
        "n_bootstrap": 100,
    },
    "3a_refusal_instrument": {
        "compare_with": ["organism/refusal-planted-1"],
        "n_prompts": 16,
        "k_values": [1, 2],
        "strengths": [0.5, 1.0],
        "n_random": 1,
        "n_bootstrap": 100,
    },
    "3b_refusal_by_gradient": {"n_prompts": 14, "n_steps": 4, "n_starts": 1, "n_bootstrap": 100},
    "04_codi_attention": {"compare_with": ["organism/codi-results"], "n_problems": 60, "n_bootstrap": 100},
}

# Verdicts that these must give: what was published of another setting is not compared.
AWAY_FROM_THE_PUBLISHED = {"2a_mixing_theory": {"toy-before": "not tested", "toy-after": "not tested"}}

# Notebooks that are still longer than a reader of ten minutes wants.
TO_BE_RETOLD = {"00_start_here", "3a_refusal_instrument", "04_codi_attention"}

# Calls that a cell may end with and show nothing.
SILENT = {
    "figure",
    "page",
    "claim",
    "metric",
    "model",
    "use_house_style",
    "append",
    "extend",
    "update",
    "seed",
    "manual_seed",
}
SPEAKING = {"print", "display", "show"}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_runs_with_small_parameters_from_any_folder(path, figures, tmp_path):
    small = schemas()[path.stem].embedded | SMALL.get(path.stem, {})
    command = [sys.executable, "-m", "papermill", path, "out.ipynb", "-y", yaml.safe_dump(small)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    record = validate_record(figures / path.stem / "record.json")
    assert record.study == path.stem
    assert {name: record.parameters[name] for name in small} == small
    verdicts = {claim.id: claim.verdict for claim in record.claims}
    assert verdicts.items() >= AWAY_FROM_THE_PUBLISHED.get(path.stem, {}).items()


@each_notebook
def test_misspelt_parameter_stops_it(path, figures, tmp_path):
    command = [sys.executable, "-m", "papermill", path, "out.ipynb", "-p", "use_cash", "1"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert run.returncode != 0
    assert "use_cash: no such parameter; did you mean use_cache?" in run.stderr
    assert not figures.exists()


@each_notebook
def test_is_stored_as_executed(path):
    assert unexecuted(read(path)) == []


@each_notebook
def test_keeps_to_its_shape(path):
    assert misshapen(read(path)) == []
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem not in TO_BE_RETOLD],
                         ids=lambda path: path.stem)  # fmt: skip
def test_can_be_read_in_ten_minutes(path):
    notebook = read(path)
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert sum(len(text.split()) for text in prose) <= 2500
    cells = code_cells(notebook)
    assert len(cells) <= 30
    assert [line for cell in cells[1:] for line in cell.source.splitlines() if len(line) > 100] == []


@each_notebook
def test_parameters_cell_is_what_the_schema_says(path):
    assert disagreements(path, schemas()[path.stem]) == []


@each_notebook
def test_figures_and_record_are_those_of_one_run(path):
    folder = ROOT / "figures" / path.stem
    record = validate_record(folder / "record.json")
    files = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    assert files == {*record.artifacts, "record.json"}, "files of another run"
    if is_committed(folder):  # a reader's own run may have parameters of its own
        assert record.parameters == schemas()[path.stem]().model_dump(), "commit what `make notebooks` writes"


def test_study_of_induction_claims_what_its_numbers_can_carry():
    """Intervals over layouts, random heads over draws, published values at a like share of heads."""
    record = validate_record(ROOT / "figures" / "01_induction_ablation" / "record.json")
    claims, settings = {claim.id: claim for claim in record.claims}, record.parameters
    if settings != schemas()["01_induction_ablation"]().model_dump():
        pytest.skip("the stored run has parameters of its own")
    layouts, draws = f"{settings['n_layouts']} layouts", f"{settings['n_random_sets']} draws"
    for id in ("geometry", "grid privileged", "grid turns", "grid restores", "checkerboard", "bigram"):
        assert claims[id].n == layouts
    assert claims["random 10"].n == claims["random like previous token 32"].n == draws
    found = json.loads((ROOT / "data" / "published.json").read_text())["arditi-26"]["figures"]
    # Ten of 336 heads are Llama's 32 of 1024.
    for id, name in (("induction matters", "induction"), ("previous token matters", "previous_token")):
        llama = found[f"accuracy_{name}_ablated"]
        assert "top 10 " in claims[id].statement
        assert claims[id].published == pytest.approx(llama[0] - llama[-1])
    folder = ROOT / "figures" / "01_induction_ablation"
    with np.load(folder / "layers.npz") as file:
        intact = file["intact"]  # [layout, layer]
        assert intact.shape == (settings["n_layouts"], 25)
        shown = int(re.search(r"at layer (\d+)", record.artifacts["layers.png"].alt)[1])
        assert record.metrics["energy, intact"].value == pytest.approx(intact[:, shown].mean())
    with np.load(folder / "map.npz") as file:
        beyond = file["cost_grid"].mean(1) - file["cost_shuffled_grids"].mean(1)
        assert claims["grid privileged"].measured == pytest.approx(beyond.mean())
        share = file["turn_grid"].mean() / file["turn_everything"].mean()
        assert claims["grid turns"].measured == pytest.approx(share)
    with np.load(folder / "answer.npz") as file:  # the median layout, not the clearest
        grid = grid_graph(4, 4)
        assert dirichlet_energy(file["intact"], grid) == pytest.approx(np.sort(intact[:, shown])[4], rel=1e-6)


# --- the guards, and what they must catch


def is_committed(folder: Path) -> bool:
    git = subprocess.run(["git", "status", "--porcelain", folder], cwd=ROOT, capture_output=True, text=True)
    return git.returncode == 0 and not git.stdout.strip()


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def speaks(source: str) -> bool:
    """Whether a cell should have output: it prints or shows, or ends with a value."""
    body = ast.parse("\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))).body
    top_level = [node for node in body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    calls = {_called(node) for statement in top_level for node in ast.walk(statement)}
    if calls & SPEAKING:
        return True
    ends_with_value = bool(body) and isinstance(body[-1], ast.Expr) and not source.rstrip().endswith(";")
    return ends_with_value and _called(body[-1].value) not in SILENT


def _called(node: ast.AST) -> str | None:
    if not isinstance(node, ast.Call):
        return None
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)


def unexecuted(notebook) -> list[str]:
    """What shows that a notebook was not stored after one clean run from top to bottom."""
    found = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        if cell.execution_count != number:
            found.append(f"code cell {number} has execution count {cell.execution_count}")
        if speaks(cell.source) and not cell.outputs:
            found.append(f"code cell {number} should have output and has none")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"code cell {number} stores an error: {output.ename}")
            if output.get("name") == "stderr":
                found.append(f"code cell {number} stores stderr: {output.text[:80]!r}")
    return found


def misshapen(notebook) -> list[str]:
    """Departures from the shape of a notebook: parameters, setup, then short cells after prose."""
    cells = code_cells(notebook)
    sizes = [len([line for line in cell.source.splitlines() if line.strip()]) for cell in cells]
    prose = [
        previous.cell_type == "markdown"
        for previous, cell in zip(notebook.cells, notebook.cells[1:], strict=False)
        if cell in cells[2:]
    ]
    first = ast.parse(cells[0].source).body
    parameters = {node.target.id for node in first if isinstance(node, ast.AnnAssign)}
    median, most = statistics.median(sizes[1:]), max(sizes[1:])
    found = []
    if notebook.cells[0].cell_type != "markdown" or not notebook.cells[0].source.startswith("# "):
        found.append("it does not open with a title")
    if cells[0].metadata.get("tags") != ["parameters"]:
        found.append("its first code cell is not tagged as the parameters")
    if "Study(" not in cells[1].source or sizes[1] > 6:
        found.append("its second code cell is no setup of at most 6 lines")
    if median > 12 or most > 25:
        found.append(f"its code cells have {median:g} lines (median), at most {most}; limits: 12, 25")
    if prose and sum(prose) < 0.85 * len(prose):
        found.append(f"only {sum(prose)} of {len(prose)} code cells follow prose")
    if "study.close()" not in cells[-1].source:
        found.append("its last code cell does not close the record")
    for number, cell in enumerate(cells, start=1):
        lines = cell.source.splitlines()
        if twice := [a for a, b in zip(lines, lines[1:], strict=False) if a == b and a.strip()]:
            found.append(f"code cell {number} says twice: {twice[0].strip()}")
    for number, cell in enumerate(cells[1:], start=2):
        stored = {
            n.id
            for n in ast.walk(ast.parse(cell.source))
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        if taken := stored & parameters:
            found.append(f"code cell {number} assigns {min(taken)}: its setup can not be run again")
        if ".figure(" in cell.source and not cell.source.rstrip().endswith("plt.show()"):
            found.append(f"code cell {number} draws a figure and does not end with plt.show()")
    return found


def disagreements(path: Path, schema) -> list[str]:
    """Where the parameters cell, papermill's reading of it, and the schema differ."""
    source = code_cells(read(path))[0].source
    found = [
        f"not a line `name: type = default  # help`: {line}"
        for line in source.splitlines()
        if not re.fullmatch(r"\w+: [\w\[\]]+ = [^#]+  # \S.+", line)
    ]
    fields = schema.model_fields
    seen = papermill.inspect_notebook(str(path))
    if set(seen) != set(fields):
        lacking, more = sorted({*fields} - {*seen}), sorted({*seen} - {*fields})
        found.append(f"papermill sees no {lacking} of the schema, and {more} besides")
    for statement in ast.parse(source).body:
        name = ast.unparse(statement.target)
        if name not in fields:
            continue
        written, default = ast.unparse(statement.annotation), ast.literal_eval(statement.value)
        meant, meant_default = plain(fields[name].annotation), fields[name].default
        if written not in (meant, meant.split("[")[0]) or default != meant_default:
            found.append(f"{name} is {written} = {default!r}, in the schema {meant} = {meant_default!r}")
    return found


def plain(annotation: Any) -> str:
    """A schema's type as a parameters cell writes it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return plain(arguments[0])
    if origin is Literal:
        return type(arguments[0]).__name__
    return f"list[{plain(arguments[0])}]" if origin is list else annotation.__name__


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1", False),
        ("assert x", False),
        ("import torch", False),
        ("x", True),
        ("f(x)", True),
        ("ax.plot(x);", False),
        ("print(x)\ny = 2", True),
        ("for i in x:\n    print(i)", True),
        ("def f():\n    print(1)", False),
        ("%matplotlib inline\nx = 1", False),
        ("fig = f()\nstudy.figure(fig, 'a')\nplt.show()", True),
        ("study.metric('a', 1)", False),
        ("study.close()", True),
    ],
)
def test_cells_that_should_have_output(source, expected):
    assert speaks(source) is expected


def stored(*sources: str, outputs=(), counts=None):
    new = nbformat.v4
    cells = [new.new_code_cell(source, outputs=list(outputs)) for source in sources]
    for cell, count in zip(cells, counts or range(1, len(cells) + 1), strict=True):
        cell.execution_count = count
    return new.new_notebook(cells=cells)


@pytest.mark.parametrize(
    ("notebook", "message"),
    [
        (stored("x = 1", "x"), "code cell 2 should have output and has none"),
        (stored("x = 1", "x = 2", counts=[1, 3]), "code cell 2 has execution count 3"),
        (stored("x = 1", counts=[None]), "code cell 1 has execution count None"),
        (
            stored("1 / 0", outputs=[nbformat.v4.new_output("error", ename="ZeroDivisionError", evalue="")]),
            "code cell 1 stores an error: ZeroDivisionError",
        ),
        (
            stored("f()", outputs=[nbformat.v4.new_output("stream", name="stderr", text="warning")]),
            "code cell 1 stores stderr: 'warning'",
        ),
    ],
)
def test_notebook_that_was_not_stored_after_a_clean_run_is_caught(notebook, message):
    assert unexecuted(notebook) == [message]


PARAMETERS = "seq_len: int = 400  # tokens"
GOOD = ["# Title", PARAMETERS, "study = Study(S, globals())", "prose", "x = 1", "prose", "study.close()"]


def drafted(sources: list[str]):
    new = nbformat.v4
    texts = ("# Title", "prose", "title")
    cells = [new.new_markdown_cell(s) if s in texts else new.new_code_cell(s) for s in sources]
    for cell in cells:
        if cell.source == PARAMETERS:
            cell.metadata["tags"] = ["parameters"]
    return new.new_notebook(cells=cells)


def test_notebook_in_good_shape_passes():
    assert misshapen(drafted(GOOD)) == []


@pytest.mark.parametrize(
    ("place", "instead", "message"),
    [
        (0, "title", "does not open with a title"),
        (1, PARAMETERS + " ", "not tagged"),
        (2, "x = 1\ny = 1\n" * 3 + "study = Study(S, globals())", "no setup of at most 6 lines"),
        (4, "x = 1\ny = 1\n" * 13, "at most 26"),
        (4, "if x:\n    y += 1\n    y += 1", "code cell 3 says twice: y += 1"),
        (3, "y = 1", "only 1 of 3 code cells follow prose"),
        (4, "seq_len = 3", "code cell 3 assigns seq_len"),
        (4, "study.figure(fig, 'a')", "does not end with plt.show()"),
        (6, "study.claim(c)", "does not close the record"),
    ],
)
def test_departure_from_the_shape_is_caught(place, instead, message):
    [found] = misshapen(drafted([*GOOD[:place], instead, *GOOD[place + 1 :]]))
    assert message in found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seq_len: int = 300  # tokens", "seq_len is int = 300, in the schema int = 400"),
        ("seq_len: float = 400  # tokens", "seq_len is float = 400"),
        ("seq_len: int = 400", "not a line"),
        ("seq_len: int = 400  # tokens\nx: int = 1  # more", "no [] of the schema, and ['x'] besides"),
    ],
)
def test_parameters_cell_that_differs_from_the_schema_is_caught(write_notebook, line, message):
    schema = schemas()["01_induction_ablation"]
    lines = {
        name: f"{name}: {plain(field.annotation)} = {field.default!r}  # help"
        for name, field in schema.model_fields.items()
    }
    assert disagreements(write_notebook(parameters="\n".join(lines.values())), schema) == []
    lines["seq_len"] = line
    [found] = disagreements(write_notebook(parameters="\n".join(lines.values())), schema)
    assert message in found
