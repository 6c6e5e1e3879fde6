"""Tests and nbval write figures, records and cached results to folders of their own, not the repository's."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Before torch is imported, here and in kernels: more threads than cores wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(workers))))

_SCRATCH = tempfile.TemporaryDirectory(prefix="latent-geometry-tests-")
# Before any test or kernel starts: kernels inherit them, those of nbval included.
os.environ["FIGURES_DIR"] = str(Path(_SCRATCH.name, "figures"))
os.environ["CACHE_DIR"] = str(Path(_SCRATCH.name, "cache"))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the cells of stored notebooks, which nbval runs again, where this needs a model to be fetched."""
    record = Path(__file__).parent / "figures" / item.path.stem / "record.json"
    if item.path.suffix == ".ipynb" and not used_embedded_models_alone(record):
        item.add_marker(pytest.mark.real)


def used_embedded_models_alone(record: Path) -> bool:
    if not record.is_file():
        return False
    models = json.loads(record.read_text(encoding="utf-8"))["models"]
    return all(model["model_id"].startswith("organism/") for model in models)


@pytest.fixture(scope="session", autouse=True)
def committed_figures_stay_as_they_are():
    before = _figures()
    yield
    assert _figures() == before, "a test wrote to figures/"


@pytest.fixture
def figures(tmp_path, monkeypatch) -> Path:
    """An empty figures folder for this test and the processes that it starts."""
    monkeypatch.setenv("FIGURES_DIR", str(tmp_path / "figures"))
    return tmp_path / "figures"


@pytest.fixture
def write_notebook(tmp_path):
    """Write a small notebook of study 1 from the sources of its cells; returns its path."""
    import nbformat

    def write(*sources: str, parameters: str = PARAMETERS, setup: str = SETUP) -> Path:
        new = nbformat.v4
        cells = [new.new_code_cell(source) for source in (parameters, setup, *sources)]
        cells[0].metadata["tags"] = ["parameters"]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = new.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        path = tmp_path / "notebooks" / "01_induction_ablation.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(notebook, path)
        return path

    return write


@pytest.fixture(scope="module")
def codi(tmp_path_factory):
    """A tiny random CODI model."""
    from tiny_codi import save_embedded

    from lib.codi.checkpoint import load_codi

    return load_codi(str(save_embedded(tmp_path_factory.mktemp("codi") / "codi")))


@pytest.fixture(scope="module")
def problems(codi):
    """Its problems."""
    from lib.codi.problems import read_problems

    return read_problems(codi.folder / "problems.jsonl")


@pytest.fixture(scope="module")
def questions(problems):
    return [problem.question for problem in problems]


@pytest.fixture(scope="module")
def thoughts(codi, questions):
    from lib.codi.latents import think

    return think(codi, questions)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in bfloat16, from the user's own cache; fetched there once, 98 MB."""
    from lib.core import models

    try:
        return models.load("SmolLM2-135M-Instruct", dtype="bfloat16")
    except models.ModelError as error:
        pytest.skip(f"no pretrained model can be had: {error}")


PARAMETERS = """seq_len: int = 400  # tokens in a walk
k_values: list[int] = [1, 2]  # heads ablated at a time
window: int = 200  # tokens averaged at the end of a walk
"""
SETUP = """from lib.induction.parameters import InductionAblation
from lib.core.record import Study
study = Study(InductionAblation, globals())
p = study.parameters"""


def _figures() -> dict[str, str]:
    root = Path(__file__).parent / "figures"
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
