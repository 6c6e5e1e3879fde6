"""Runs of a notebook as a person starts them, and what such a run must not leave."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import psutil
import yaml


def start(
    notebook: Path, folder: Path, parameters: Mapping[str, Any], *options: str, **environment: str
) -> subprocess.Popen:
    """Start a notebook from a folder, into its out.ipynb, with parameters by -y and more options."""
    command = [sys.executable, "-m", "papermill", str(notebook), "out.ipynb", "--no-progress-bar"]
    if parameters:
        command += ["-y", yaml.safe_dump(dict(parameters))]
    return subprocess.Popen(
        [*command, *options], cwd=folder, env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    out, error = process.communicate(timeout=1500)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for papermill, unless it ended, and for its kernel, which is in a session of its own."""
    if process.poll() is None:
        kernels = psutil.Process(process.pid).children(recursive=True)
        for member in (*kernels, process):
            member.kill()
        psutil.wait_procs(kernels)
    process.communicate()


def printed(folder: Path) -> str:
    """What the cells of a folder's out.ipynb printed."""
    return "".join(output.text for output in _streams(folder) if output.name == "stdout")


def complaints(folder: Path) -> list[str]:
    """What they wrote to stderr."""
    return [output.text for output in _streams(folder) if output.name == "stderr"]


def leftovers(folder: Path) -> list[str]:
    """What a run that stopped must not leave: a record, or part of a figure."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    ]  # one that nobody holds
    figures = {path.stem for path in files}
    whole = {f"{figure}.{suffix}" for figure in figures for suffix in ("svg", "png", "npz")}
    names = {path.name for path in files}
    return sorted(names ^ whole)


def _streams(folder: Path) -> list:
    notebook = nbformat.read(folder / "out.ipynb", as_version=4)
    return [o for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == "stream"]
