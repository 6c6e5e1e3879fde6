"""A notebook on its own fetches what it needs; badges and pins are written to every place at once."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import venv
from pathlib import Path

import nbformat
import numpy
import pytest
import yaml
from packaging.requirements import Requirement

from lib import ROOT, publish

BINDER = ROOT / "binder"
URL = "https://github.com/someone/notebooks"
SETUP = """from lib.parameters import StartHere
from lib.record import Study

study = Study(StartHere, globals())"""


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> tuple[Path, str]:
    """A git repository of what notebook 00 needs, and its commit."""
    folder = tmp_path_factory.mktemp("origin")
    for name in ("lib", "binder", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("requirements.lock", "pyproject.toml", "README.md", "CITATION.cff"):
        shutil.copy(ROOT / name, folder)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "all")
    return folder, git(folder, "rev-parse", "HEAD")


@pytest.fixture
def alone(tmp_path):
    """Run a notebook in a folder of its own, by a Python that has the packages and lacks lib."""
    made = tmp_path / "venv"
    venv.create(made, with_pip=False)
    [site] = made.glob("lib/python*/site-packages")
    # Of a folder that a .pth file names, packages are found and further .pth files, as that of lib, are not.
    (site / "others.pth").write_text(str(Path(numpy.__file__).parent.parent))

    def run(*sources: str) -> subprocess.CompletedProcess:
        new = nbformat.v4
        cells = [new.new_code_cell(source) for source in sources]
        cells[0].metadata["tags"] = ["parameters"]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        folder = tmp_path / "alone"
        folder.mkdir()
        nbformat.write(new.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "a.ipynb")
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FIGURES_DIR")}
        return subprocess.run(
            [made / "bin" / "python", "-m", "papermill", "a.ipynb", "out.ipynb", "-p", "use_cache", "False"],
            cwd=folder, capture_output=True, text=True, env=environment,
        )  # fmt: skip

    return run


PARAMETERS = 'out_dir: str = ""  # folder\nuse_cache: bool = True  # reuse'


def test_notebook_alone_fetches_its_repository_at_the_commit(repository, alone, tmp_path):
    folder, commit = repository
    cell = publish.CELL.format(url=f"file://{folder}", commit=commit)
    run = alone(PARAMETERS, cell, SETUP, "study.close()")
    assert run.returncode == 0, run.stderr[-3000:]
    fetched = tmp_path / "alone" / "repository"
    record = json.loads((fetched / "figures" / "00_start_here" / "record.json").read_text())
    assert record["commit"] == commit == git(fetched, "rev-parse", "HEAD")
    assert record["parameters"]["use_cache"] is False, "parameters reach the study past this cell"


def test_notebook_alone_of_an_unpublished_repository_says_what_to_do(alone):
    run = alone(PARAMETERS, publish.CELL.format(url="", commit=""), SETUP)
    assert run.returncode != 0
    assert "clone the repository and open this notebook there" in run.stderr + run.stdout


@pytest.mark.parametrize("path", publish.notebooks(), ids=lambda path: path.stem)
def test_every_notebook_has_the_cell_after_its_parameters(path):
    url, commit = publish.published()
    cells = nbformat.read(path, as_version=4).cells
    tags = [cell.metadata.get("tags") for cell in cells]
    assert tags.count(["install"]) == 1 and tags.index(["install"]) == tags.index(["parameters"]) + 1
    source = cells[tags.index(["install"])].source
    assert source == publish.CELL.format(url=url, commit=commit), "run `python -m lib.publish`"


def test_cell_beside_its_repository_does_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    exec(publish.CELL.format(url="/nowhere", commit="none"), {})
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ("", "")


def test_readme_has_badges_when_there_is_an_address_alone():
    readme = (ROOT / "README.md").read_text()
    url, commit = publish.published()
    studies = [path.stem for path in publish.notebooks()]
    assert publish.with_badges(readme, url, commit, studies) == readme, "run `python -m lib.publish`"
    assert bool(url) is ("mybinder.org" in readme) is ("colab" in readme.lower())


def test_publishing_writes_every_place(repository, tmp_path):
    folder, commit = repository
    git(tmp_path, "clone", "-q", str(folder), "clone")
    root = tmp_path / "clone"
    before = (root / "README.md").read_text()
    publish.main([URL], root)
    assert publish.published(root) == (URL, commit)
    readme = (root / "README.md").read_text()
    assert f"https://mybinder.org/v2/gh/someone/notebooks/{commit}?" in readme
    assert "/github/someone/notebooks/blob/main/notebooks/00_start_here.ipynb" in readme
    for path in publish.notebooks(root):
        [cell] = [c for c in nbformat.read(path, 4).cells if c.metadata.get("tags") == ["install"]]
        assert f'"{URL}", "{commit}"' in cell.source
    changed = set(git(root, "diff", "--name-only").splitlines())
    assert changed <= {"README.md", "CITATION.cff", *(f"notebooks/{p.name}" for p in publish.notebooks())}

    once = git(root, "diff")
    publish.main([], root)  # nothing is left to do
    assert git(root, "diff") == once
    publish.main([URL.replace("someone", "another"), commit], root)
    assert "someone" not in (root / "README.md").read_text() + (root / "CITATION.cff").read_text()
    assert (root / "README.md").read_text().count("[![Binder]") == 1
    assert publish.with_badges(readme, "", "", []) == publish.with_badges(before, "", "", [])


@pytest.mark.parametrize("written", [f"{URL}.git", f"{URL}/", f"{URL}.git/"])
def test_address_of_a_remote_is_that_of_its_page(repository, tmp_path, written):
    git(tmp_path, "clone", "-q", str(repository[0]), "clone")
    publish.main([written], tmp_path / "clone")
    assert publish.published(tmp_path / "clone")[0] == URL


@pytest.mark.parametrize("minor", [4, 5])
def test_new_notebook_gets_the_cell(tmp_path, minor):
    for name in ("CITATION.cff", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    path = tmp_path / "notebooks" / "05_new.ipynb"
    cells = [
        {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": [source]}
        | ({"id": str(i)} if minor == 5 else {})
        for i, source in enumerate(("x: int = 1  # one", "print(x)"))
    ]
    cells[0]["metadata"]["tags"] = ["parameters"]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": minor}))
    publish.main([], tmp_path)
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert [cell.metadata.get("tags") for cell in notebook.cells] == [["parameters"], ["install"], None]


def test_notebook_without_parameters_is_named_before_anything_is_written(repository, tmp_path, capsys):
    git(tmp_path, "clone", "-q", str(repository[0]), "clone")
    root = tmp_path / "clone"
    nbformat.write(nbformat.v4.new_notebook(), root / "notebooks" / "05_new.ipynb")
    with pytest.raises(SystemExit):
        publish.main([URL], root)
    assert "05_new.ipynb: no cell is tagged parameters" in capsys.readouterr().err
    assert git(root, "status", "--porcelain") == "?? notebooks/05_new.ipynb"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["https://example.org/a/b"], "need an address as https://github.com/OWNER/NAME"),
        ([URL, "0" * 40], "this repository has no such commit"),
    ],
)
def test_address_that_would_be_a_dead_badge_is_refused(repository, capsys, words, message):
    with pytest.raises(SystemExit):
        publish.main(words, repository[0])
    assert message in capsys.readouterr().err
    assert not git(repository[0], "status", "--porcelain")


# --- what is installed where a notebook stands alone, and on Binder


def test_what_is_there_is_not_installed_again():
    wanted = runpy.run_path(str(BINDER / "install.py"))["wanted"]
    everything = {Requirement(text).name: str(Requirement(text).specifier)[2:] for text in wanted({})}
    assert {"torch", "nnsight", "transformers", "pyyaml"} <= set(everything)
    assert not {"jupyterlab", "papermill"} & set(everything)
    assert wanted(everything) == []
    host = everything | {"torch": "2.8.0+cu126", "numpy": "2.0.2", "transformers": "4.57.1"}
    assert wanted(host) == [f"transformers=={everything['transformers']}"], "torch and numpy of the host stay"
    del host["nnsight"]
    assert f"nnsight=={everything['nnsight']}" in wanted(host)


def test_binder_installs_the_lock_and_the_package():
    """repo2docker reads runtime.txt, requirements.txt and an executable postBuild, in binder/ alone."""
    assert (BINDER / "runtime.txt").read_text() == "python-3.11\n"
    lines = (BINDER / "requirements.txt").read_text().splitlines()
    included = [line.removeprefix("-r ") for line in lines if line.startswith("-r ")]
    assert [(BINDER / name).resolve() for name in included] == [ROOT / "requirements.lock"]
    assert os.access(BINDER / "postBuild", os.X_OK)
    assert "--no-deps -e ." in (BINDER / "postBuild").read_text()
    assert not (BINDER / "environment.yml").exists(), "repo2docker would take it in place of requirements.txt"


def test_citation_has_what_a_citation_needs():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "type", "authors", "version", "license"} <= set(citation)
    holder = (ROOT / "LICENSE").read_text().partition("(c) 2026 ")[2].split("\n")[0]
    assert [author["name"].lower() for author in citation["authors"]] == [holder.lower()]
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert set(citation) & {"repository-code", "commit"} in (set(), {"repository-code", "commit"})
