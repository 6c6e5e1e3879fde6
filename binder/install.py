"""Install what the studies need and this Python lacks: for a notebook on its own, as on Colab.

What is there stays: torch, which a host has fitted to its GPU, and what the kernel may have loaded already.
Only transformers and nnsight must have the tested versions, those of requirements.lock.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXACT = {"transformers", "nnsight"}
NOT_IN_A_NOTEBOOK = {"jupyterlab", "papermill"}  # what runs it is there already


def wanted(installed: Mapping[str, str]) -> list[str]:
    """Requirements to install, such as nnsight==0.8.1.

    Args:
        installed: version by name of package, lower case.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE))
    names = [re.match(r"[\w.-]+", requirement)[0] for requirement in project["dependencies"]]
    return [
        f"{name}=={pins[name]}"
        for name in names
        if name not in NOT_IN_A_NOTEBOOK
        and (name not in installed or (name in EXACT and installed[name] != pins[name]))
    ]


def main() -> None:
    names = (distribution.metadata["Name"] for distribution in metadata.distributions())
    installed = {name.lower(): metadata.version(name) for name in names if name}
    if missing := wanted(installed):
        print("installing", *missing, flush=True)
        kept = [f"{name}=={installed[name]}" for name in ("torch", "numpy") if name in installed]
        command = [sys.executable, "-m", "pip", "install", "--quiet", *missing, *kept]
        sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
