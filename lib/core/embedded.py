"""Embedded models on disk: their folders, their checkpoints, and the manifest that files are held to."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from lib import ROOT
from lib.core import downloads
from lib.core.downloads import ModelError

ORGANISMS = ROOT / "data" / "organisms"


def organisms() -> list[str]:
    """Names of the embedded models that are present, e.g. `organism/induction`."""
    return sorted(f"organism/{p.parent.name}" for p in ORGANISMS.glob("*/manifest.json"))


def checkpoints(model_id: str) -> list[int]:
    """Training steps whose weights are kept with an embedded model, ascending."""
    files = (organism_folder(model_id) / "checkpoints").glob("step-*.safetensors")
    return sorted(int(f.stem.removeprefix("step-")) for f in files)


def write_manifest(folder: Path) -> None:
    """Record the sha256 of every file of an embedded model, which `load` verifies."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    hashes = {str(p.relative_to(folder)): downloads.sha256(p) for p in files}
    (folder / "manifest.json").write_text(json.dumps(hashes, indent=1) + "\n")


def organism_folder(model_id: str) -> Path:
    folder = ORGANISMS / model_id.removeprefix("organism/")
    if not (folder / "manifest.json").is_file():
        known = organisms()
        close = difflib.get_close_matches(model_id, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ModelError(f"no embedded model {model_id!r}; {hint}embedded models: {', '.join(known)}")
    return folder


def verify_manifest(model_id: str, folder: Path) -> None:
    """Every file of an embedded model is the one that was trained and measured."""
    for name, expected in json.loads((folder / "manifest.json").read_text()).items():
        path = folder / name
        # The checkpoints are many megabytes and verified when one of them is asked for.
        if path.parent.name == "checkpoints":
            continue
        _verify_file(model_id, path, expected)


def _verify_file(model_id: str, path: Path, expected: str) -> None:
    remedy = f"restore it with `git checkout -- {path}`"
    if not path.is_file():
        raise ModelError(f"{model_id}: {path} is missing; {remedy}")
    if downloads.sha256(path) != expected:
        raise ModelError(
            f"{model_id}: {path} is not the file that was trained (its sha256 differs); {remedy}"
        )


def load_checkpoint(module: torch.nn.Module, model_id: str, folder: Path, revision: str) -> None:
    path = folder / "checkpoints" / f"{revision}.safetensors"
    if not path.is_file():
        known = ", ".join(f"step-{step:05d}" for step in checkpoints(model_id)) or "none"
        raise ModelError(f"{model_id} has no checkpoint {revision!r}; it has {known}")
    _verify_file(
        model_id, path, json.loads((folder / "manifest.json").read_text())[f"checkpoints/{path.name}"]
    )
    module.load_state_dict(load_file(path), strict=True)
