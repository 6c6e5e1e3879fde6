"""The models that the studies are meant for (data/models.yaml), and what of them is on this disk.

`python -m lib models` lists them, `make run MODEL=NAME` runs their studies. Nothing here loads a model.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import json
import shlex
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import huggingface_hub
import yaml
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from lib import ROOT
from lib.core import downloads, sources
from lib.core.downloads import ModelError, WeightFile

REGISTRY = ROOT / "data" / "models.yaml"
PUBLISHED = ROOT / "data" / "published.json"

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_HEAD_TIMEOUT = 10  # seconds for one request to the hub


class RegistryError(ModelError):
    """A model that is not registered, or whose weights can not be had; the message says what to do."""


class StudyOfModel(BaseModel):
    """What a study runs a model with; see data/models.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parameters: dict[str, Any] = {}
    asks: dict[str, str] = {}
    depth_fraction: float | None = Field(None, gt=0, le=1)
    published: tuple[str, ...] = ()
    note: str = ""


class RegisteredModel(BaseModel):
    """A model of the hub, as data/models.yaml describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    id: Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")] | None
    dtype: Literal["float32", "bfloat16", "float16"]
    billions: float = Field(gt=0)
    layers: int = Field(gt=0)
    gated: bool
    licence: str
    weights: str = "*.safetensors"
    file: WeightFile | None = None
    base: str = ""
    chat: str = ""
    obstacle: str = ""
    studies: dict[str, StudyOfModel] = Field(min_length=1)

    @property
    def gigabytes(self) -> float:
        """Memory for the weights alone (GB)."""
        return self.billions * _BYTES[self.dtype]

    def parameters(self, study: str) -> dict[str, Any]:
        """The parameters of a study's notebook for this model, those aside that only the user can give.

        Raises:
            RegistryError: the model is not meant for the study.
        """
        if study not in self.studies:
            raise RegistryError(
                f"{self.name} is not meant for {study}, but for {', '.join(self.studies)}; to run it "
                f'nevertheless: make real STUDY={study} ARGS="-p model_id {self.id}"'
            )
        of_study = self.studies[study]
        model_id, dtype = (self.name, "auto") if self.file else (self.id, self.dtype)
        found = {"model_id": model_id, "dtype": dtype, **of_study.parameters}
        if of_study.depth_fraction:
            found["layer"] = round(of_study.depth_fraction * self.layers)
        return found


@cache
def registry() -> tuple[RegisteredModel, ...]:
    """All models of data/models.yaml, in its order.

    Raises:
        RegistryError: the file is not what it has to be.
    """
    try:
        entries = yaml.safe_load(REGISTRY.read_text(encoding="utf-8"))
        return TypeAdapter(tuple[RegisteredModel, ...]).validate_python(entries)
    except (yaml.YAMLError, ValidationError) as error:
        raise RegistryError(f"{REGISTRY}: {error}") from None


def find(name: str) -> RegisteredModel:
    """A model by its name or its hub id.

    Raises:
        RegistryError: there is none, with the nearest name.
    """
    known = {key.lower(): model for model in registry() for key in (model.id, model.name)}
    if name.lower() in known:
        return known[name.lower()]
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {known[close[0]].name}? " if close else ""
    names = ", ".join(model.name for model in registry())
    raise RegistryError(
        f"no model {name!r} in data/models.yaml; {hint}There are {names}. Any other one by its hub id "
        "or folder: make run MODEL=HUB_ID_OR_FOLDER"
    )


def lookup(name: str) -> RegisteredModel | None:
    """A model by its exact name or hub id; None if there is none."""
    return next((model for model in registry() if name in (model.name, model.id)), None)


def pinned(model_id: str) -> str | None:
    """The commit that data/models.yaml gives for a hub id; None for a model that it does not pin."""
    return next((model.revision for model in registry() if model.id == model_id), None)


def published(key: str) -> Any:
    """A published figure by its key, source/figure/...

    Raises:
        RegistryError: data/published.json has no such figure.
    """
    source, *path = key.split("/")
    found = json.loads(PUBLISHED.read_text(encoding="utf-8")).get(source, {}).get("figures", {})
    for part in path:
        if not isinstance(found, dict) or part not in found:
            raise RegistryError(f"data/published.json has no figure {key}")
        found = found[part]
    return found


# -- what is on disk -------------------------------------------------------------------------------


def snapshot(model_id: str, revision: str | None = None) -> Path | None:
    """Folder of a model in the hub's cache, whether complete or not; None if nothing of it is there."""
    if not _is_hub_id(model_id):
        return None
    for name in ("config.json", "pytorch_model.bin", "tokenizer.json"):
        found = try_to_load_from_cache(model_id, name, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def missing_files(
    model_id: str, revision: str | None = None, *, weights: str = "*.safetensors", base: str = ""
) -> list[str]:
    """What a model lacks in the hub's cache: names of files, empty if it can be loaded without network.

    Args:
        model_id: hub id.
        revision: commit, tag or branch; None is the default branch, as of its last download.
        weights: pattern of the files that hold the weights; empty if none are needed.
        base: hub id of a model whose configuration and tokenizer this one takes where it has none, at the
            revision that is pinned of it.
    """
    folder = snapshot(model_id, revision)
    have = {path.name for path in folder.iterdir() if path.exists()} if folder else set()
    missing = []
    if base:
        base_folder = snapshot(base, pinned(base))
        have_base = {path.name for path in base_folder.iterdir() if path.exists()} if base_folder else set()
        if "config.json" not in have | have_base:
            missing.append(f"config.json of {base}")
        if not (have | have_base) & set(_TOKENIZERS):
            missing.append(f"{_TOKENIZERS[0]} of {base}")
    else:
        missing += [] if "config.json" in have else ["config.json"]
        missing += [] if have & set(_TOKENIZERS) else [_TOKENIZERS[0]]
    if not weights:
        return missing
    index = next((name for name in sorted(have) if name.endswith(".safetensors.index.json")), None)
    if index:
        shards = set(json.loads((folder / index).read_text())["weight_map"].values())
        missing += sorted(shards - have)
    elif not fnmatch.filter(have, weights):
        missing.append(weights.replace("*", "model"))
    return missing


def missing(model: RegisteredModel) -> list[str]:
    """`missing_files` of a model of the registry, at its revision; of one that is a file, that file."""
    if model.file:
        return [] if sources.is_ready(model.file.sha256) else [model.file.name]
    return missing_files(model.id, model.revision, weights=model.weights, base=model.base)


def require(model: RegisteredModel) -> str:
    """Make sure, before a run starts, that a model is on disk or can be fetched; a GGUF file is fetched now.

    Returns:
        A line that says which.

    Raises:
        ModelError: it can be neither; the message says which file is missing, which licence to accept, and
            which command to run. Or the model can not be run as it is.
    """
    if model.obstacle:
        raise RegistryError(f"{model.name} can not be run as it is: {model.obstacle}")
    lacking = missing(model)
    if not lacking:
        return f"{model.name}: on disk"
    if model.file:
        return f"{model.name}: on disk, in {sources.obtain(model)}"
    owner = lacking[0].partition(" of ")[2] or model.id
    revision = model.revision if owner == model.id else pinned(owner)
    url = huggingface_hub.hf_hub_url(owner, lacking[0].split(" of ")[0], revision=revision)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=_HEAD_TIMEOUT)
    except EntryNotFoundError:
        pass  # the hub answers, and keeps this one in other files, such as shards
    except Exception as error:  # of the network in all its forms, or of the hub
        raise RegistryError(how_to_get(model.id, model.revision, error)) from error
    return f"{model.name}: will be fetched from the hub, about {model.gigabytes:.1f} GB"


def fetch(model: RegisteredModel) -> str:
    """Bring a model to this disk; returns a line that says where it is.

    Raises:
        ModelError: as `require`.
    """
    said = require(model)
    if not missing(model):
        return said
    parts = [(model.id, model.revision, model.weights)]
    parts += [(model.base, pinned(model.base), "")] if model.base else []
    try:
        for owner, revision, weights in parts:
            folder = huggingface_hub.snapshot_download(
                owner, revision=revision, allow_patterns=_patterns(weights)
            )
    except Exception as error:  # of the network in all its forms, or of the hub
        raise RegistryError(how_to_get(model.id, model.revision, error)) from error
    return f"{model.name}: on disk, in {folder}"


def how_to_get(
    model_id: str, revision: str | None, error: Exception | None = None, *, weights: str | None = None
) -> str:
    """What is missing of a hub model, why the hub did not give it, and what to do, as a message.

    Args:
        model_id, revision: as asked for.
        error: what the hub or the network raised; its causes are looked at, too.
        weights: as for `missing_files`; None is what data/models.yaml says of the model.
    """
    model = next((model for model in registry() if model.id == model_id), None)
    if weights is None:
        weights = model.weights if model else "*.safetensors"
    base = model.base if model else ""
    if not _is_hub_id(model_id):
        return f"{model_id!r} is no hub id (owner/name), and no folder of that name is here"
    lacking = missing_files(model_id, revision, weights=weights, base=base)
    page = f"https://huggingface.co/{model_id}"
    licence = f"the {model.licence}" if model else "its licence"
    causes = list(_causes(error))
    steps = [_download(model_id, revision, weights)]
    if base and any(name.endswith(f" of {base}") for name in lacking):
        steps.append(_download(base, pinned(base), ""))
    log_in = [f"accept {licence} at {page}, signed in", "hf auth login   (or set HF_TOKEN)"]
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        reason, steps = f"it has no revision {revision!r}", [f"choose one that {page}/commits/main lists"]
    elif any(isinstance(cause, GatedRepoError) for cause in causes):
        reason, steps = "it is gated, and this machine has no access to it", log_in + steps
    elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        reason = "the hub knows no such model, or hides it from you"
        steps = [f"check the id at {page}", *log_in]
    elif any(isinstance(cause, HfHubHTTPError) for cause in causes):
        status = next(cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError))
        reason = f"the hub answered with status {status}"
    elif causes and not constants.HF_HUB_OFFLINE and not any(map(_is_of_network, causes)):
        reason = f"it can not be had ({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
    else:
        offline = constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else "the hub can not be reached from here"
        steps = ["where there is network:", *(log_in if model and model.gated else []), *steps]
    lines = [
        f"{model_id}{f' at {revision}' if revision else ''}: {', '.join(lacking) or 'a file'} "
        f"{'is' if len(lacking) < 2 else 'are'} not on this disk, and {reason}. To get it:",
        *(f"  {step}" for step in steps),
        "or pass a folder with config.json, tokenizer and weights: -p model_id /path/to/folder",
    ]
    return "\n".join(lines)


def _is_hub_id(model_id: str) -> bool:
    try:
        validate_repo_id(model_id)
    except HFValidationError:
        return False
    return True


def _download(model_id: str, revision: str | None, weights: str) -> str:
    return " ".join(
        [f"hf download {model_id}", *([f"--revision {revision}"] if revision else [])]
        + [f'--include "{pattern}"' for pattern in _patterns(weights)]
    )


def _patterns(weights: str) -> list[str]:
    """Files to fetch; without them some repositories bring the same weights in several formats."""
    return [pattern for pattern in ("*.json", "*.txt", "*.model", weights) if pattern]


def _is_of_network(error: BaseException) -> bool:
    """Whether an error can come of a network that is not there; the hub's client has several libraries'."""
    library = type(error).__module__.split(".")[0]
    return isinstance(error, OSError) or library in ("httpx", "httpcore", "urllib3")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# -- the listing -----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Print the registry, or all about one of its models; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lib models",
        description="The models that the studies are meant for, and what of them is on this disk.",
    )
    parser.add_argument("model", nargs="?", help="name or hub id, for all about it")
    options = parser.parse_args(argv)
    try:
        print(_details(find(options.model)) if options.model else _table())
    except RegistryError as error:
        parser.error(str(error))
    return 0


def _table() -> str:
    rows = [("name", "revision", "weights", "access", "on disk", "studies")]
    for model in registry():
        revision = model.revision[:8] if model.revision else "newest"
        size = f"{model.gigabytes:.1f} GB {model.dtype}"
        studies = ", ".join(study[:2] for study in model.studies) + (" (*)" if model.obstacle else "")
        rows.append((model.name, revision, size, "gated" if model.gated else "open", _state(model), studies))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    notes = [f"(*) {model.name}: {model.obstacle}" for model in registry() if model.obstacle]
    lines += ["", *(line for note in notes for line in textwrap.wrap(note, 110)), ""] if notes else [""]
    lines += [
        f"On disk: in {constants.HF_HUB_CACHE}, at the revision; models that are one GGUF file in the "
        "cache of this project.",
        _cache(),
        "Get one: python -m lib get NAME. Run one: make run MODEL=NAME [STUDY=...]. All about one: python -m "
        "lib models NAME.",
    ]
    return "\n".join(lines)


def _cache() -> str:
    folder = downloads.cache_folder()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    how = f"to empty it: rm -r {shlex.quote(str(folder))}" if size else "empty"
    return f"The cache of this project: {folder}, {size / 1e9:.2f} GB; {how}"


def _state(model: RegisteredModel) -> str:
    lacking = missing(model)
    if not lacking:
        return "yes"
    return "in part" if snapshot(model.id, model.revision) else "no"


def _details(model: RegisteredModel) -> str:
    lines = [
        f"{model.name}: {model.id}, revision {model.revision or 'not pinned: the newest'}",
        f"weights {model.gigabytes:.1f} GB in {model.dtype}, {model.billions:g} billion parameters, "
        f"{model.layers} layers",
        f"licence: {model.licence}{', to be accepted first' if model.gated else ''}",
    ]
    lines += [f"chat: {model.chat}"] if model.chat else []
    lines += [f"obstacle: {model.obstacle}"] if model.obstacle else []
    lacking = missing(model)
    if model.file:
        lines += [f"file: {model.file.name}, {model.file.bytes / 1e6:.0f} MB, sha256 {model.file.sha256}"]
        lines += [f"  the same bytes: {w.package} {w.version}, {w.member}" for w in model.file.wheels]
    lines += [f"on disk: {'yes' if not lacking else 'lacks ' + ', '.join(lacking)}"]
    for study, of_study in model.studies.items():
        lines += ["", study, f"  parameters: {json.dumps(model.parameters(study))}"]
        lines += [f"  asks for {name}: {what}" for name, what in of_study.asks.items()]
        lines += [f"  published {key}: {json.dumps(published(key))}" for key in of_study.published]
        lines += [f"  {of_study.note}"] if of_study.note else []
    if lacking and not model.obstacle:
        by_hand = how_to_get(model.id, model.revision).splitlines()[1:]
        steps = [f"  python -m lib get {model.name}"] if model.file else by_hand
        lines += ["", "to get it:", *steps]
    return "\n".join(lines)
