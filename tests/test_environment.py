"""The ways to install agree, and the commands do what the Makefile says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from conftest import used_embedded_models_alone
from lib import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [
    line.split("#")[0].strip()
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line.split("#")[0].strip()
]
PINS = {name.lower(): version for name, _, version in (line.partition("==") for line in LOCK)}
REQUIRED = [
    Requirement(text)
    for text in [
        *PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"]["dev"],
        *PROJECT["build-system"]["requires"],
    ]
]


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, env={**outside, **environment}
    )


def test_lock_has_exact_public_versions_alone():
    strange = [line for line in LOCK if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line)]
    assert not strange, "a registry's own options or local versions can not be installed elsewhere"
    assert PINS["torch"] == "2.13.0"
    assert not [name for name in PINS if name.startswith(("nvidia", "triton", "cuda"))]


@pytest.mark.parametrize("requirement", REQUIRED, ids=str)
def test_everything_required_is_locked_and_installed(requirement):
    pinned = PINS[requirement.name.lower()]
    assert requirement.specifier.contains(pinned)
    installed = Version(metadata.version(requirement.name)).public  # 2.13.0+cpu is 2.13.0
    assert installed == pinned, "run `make test`: it installs from requirements.lock"


def test_conda_environment_installs_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}, "conda users must get the versions of the lock"
    [python] = [package for package in conda if package.startswith("python=")]
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(python.partition("=")[2])
    assert {package.partition("=")[0] for package in conda} == {"python", "pip"}


def test_code_is_clean():
    command = [sys.executable, "-m", "ruff", "check", "."]
    ruff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ruff.returncode == 0, ruff.stdout


def test_every_package_of_lib_is_installed():
    packages = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "lib").rglob("*.py")}
    assert packages == {name.replace(".", "/") for name in PROJECT["tool"]["setuptools"]["packages"]}


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["run"], "run --embedded"),
        (["run", "STUDY=01", 'ARGS=-p k_values "[1,2]"'], 'run --study 01 --embedded -p k_values "[1,2]"'),
        (["run", "MODEL=gpt2", "ARGS=-p seed 3"], "run --model gpt2 -p seed 3"),
        (["real"], "run --real"),
        (["notebooks", "STUDY=1a"], "run --study 1a --refresh"),
    ],
)
def test_commands_that_run_notebooks(words, command):
    assert make("--dry-run", *words).stdout.rstrip().endswith(f"-m lib {command}")


def test_tests_run_no_model_that_has_to_be_fetched_unless_asked():
    assert make("--dry-run", "test-real").stdout.rstrip().endswith("-m pytest tests/test_real.py -m real")
    by_default = collected("tests/test_real.py")
    assert by_default and not [test for test in by_default if "fresh_run" in test]


def test_nbval_runs_notebooks_of_embedded_models(tmp_path):
    notebooks = {path.stem for path in (ROOT / "notebooks").rglob("*.ipynb")}
    embedded = {
        each for each in notebooks if used_embedded_models_alone(ROOT / "figures" / each / "record.json")
    }
    cells = collected("notebooks", "--nbval")
    assert {Path(cell.partition("::")[0]).stem for cell in cells} == embedded
    for models, expected in (([], True), (["organism/codi"], True), (["organism/codi", "gpt2"], False)):
        (tmp_path / "record.json").write_text(json.dumps({"models": [{"model_id": name} for name in models]}))
        assert used_embedded_models_alone(tmp_path / "record.json") is expected
    assert not used_embedded_models_alone(tmp_path / "none.json")


def collected(*words: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *words]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    return [line for line in said.splitlines() if "::" in line]


def test_install_that_failed_is_tried_again(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\n[ "$2" != pip ] || { echo "no network" >&2; exit 1; }\n')
    python.chmod(0o755)
    for _ in range(2):
        run = make("run", f"VENV={tmp_path / 'venv'}")
        assert run.returncode != 0 and "no network" in run.stderr
        assert [path.name for path in (tmp_path / "venv").iterdir()] == ["bin"]


def test_python_that_is_too_old_is_named(tmp_path):
    shadows = tmp_path / "shadows"
    shadows.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (shadows / name).write_text("#!/bin/sh\nexit 1\n")
        (shadows / name).chmod(0o755)
    run = make("run", f"VENV={tmp_path / 'venv'}", PATH=f"{shadows}:/usr/bin:/bin")
    assert run.returncode != 0
    assert "No Python 3.11 or newer found" in run.stderr and "PYTHON=" in run.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("status", [0, 1])
def test_ci_ends_with_the_closing_line_of_pytest(tmp_path, status):
    fake = tmp_path / "make"
    closing = f"==== {'1 failed, ' * status}2 passed in 0.12s ===="
    fake.write_text(f"#!/bin/sh\n[ $1 = test ] && echo '{closing}' && echo 'and more' && exit {status}\n")
    fake.chmod(0o755)
    run = subprocess.run(
        [ROOT / ".ci" / "run"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert run.returncode == status
    assert run.stdout.splitlines()[-1] == closing
