"""What a study leaves behind: checked parameters, cached results, figures with their numbers, record.json.

A run succeeded when its folder holds a valid record.json. The record is written last, in one step, and
the old one goes when a run starts: a run that stopped leaves none.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib import ROOT, kernel
from lib.claims import Claim, ClaimsTable
from lib.parameters import NotebookParameters, check
from lib.progress import unit_was_read

# Modules and packages of lib that no result depends on, but for what is in its key, as the weights are that
# organisms come from. A change in any other one makes cached results void.
_NOT_COMPUTING = {"__init__", "artifacts", "claims", "compare", "dashboard", "hero", "kernel", "memory",
                  "organisms", "parameters", "plots", "progress", "publish", "record", "registry", "run",
                  "seeds", "widgets"}  # fmt: skip
_PACKAGES = ("torch", "numpy", "transformers", "nnsight", "scipy", "networkx", "safetensors", "matplotlib",
             "pydantic")
_CACHE_PACKAGES = _PACKAGES[:4]


class Metric(BaseModel):
    """A measured number; `reason` says why there is none."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    value: float | None
    interval: tuple[float, float] | None = None
    n: str | int | None = None
    reason: str = ""


class Artifact(BaseModel):
    """A file beside the record."""

    model_config = ConfigDict(extra="forbid")

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    alt: str = ""


class Record(BaseModel):
    """Contents of record.json."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    study: str
    parameters: dict[str, Any]
    claims: list[Claim]
    metrics: dict[str, Metric]
    models: list[dict[str, Any]]
    artifacts: dict[str, Artifact]  # by file name
    commit: str | None  # of the repository; None outside git
    dirty: bool | None  # whether lib, data or requirements.lock differ from that commit
    code: str  # hash of the modules that compute
    versions: dict[str, str]
    started: datetime
    seconds: float
    peak_memory_mb: float


class RecordError(kernel.PlainError, ValueError):
    """A record.json that is missing, broken, or not of the files beside it."""


class Study:
    """One run of one study. Put it in the setup cell: it stops the notebook if a parameter is wrong.

    In a notebook it also shortens the errors of traces, and when lib was edited since the last time imports
    it anew; see `lib.kernel`.

    Args:
        schema: the study's parameters.
        namespace: `globals()` of the notebook.

    Attributes:
        parameters: what arrived, checked.
        folder: where figures and record.json go: `out_dir` (a relative one is taken from the repository's
            root, whatever the working directory), else FIGURES_DIR/STUDY, else figures/STUDY.
        cache: results of earlier runs.

    Raises:
        ParameterError: see `lib.parameters.check`; the folder is left as it was.
    """

    def __new__(cls, schema: type[NotebookParameters], namespace: Mapping[str, Any]) -> Study:
        if kernel.reload_edited(namespace):  # this class is of the old code
            return kernel.renewed(cls)(kernel.renewed(schema), namespace)
        return super().__new__(cls)

    def __init__(self, schema: type[NotebookParameters], namespace: Mapping[str, Any]):
        kernel.shorten_trace_errors()
        self.parameters = check(schema, namespace)
        self.name = schema.study
        out_dir = Path(self.parameters.out_dir).expanduser()
        self.folder = ROOT / out_dir if self.parameters.out_dir else figures_folder() / self.name
        self.cache = Cache(enabled=self.parameters.use_cache)
        self._started, self._clock = datetime.now(UTC), time.monotonic()
        self._claims: dict[str, Claim] = {}
        self._metrics: dict[str, Metric] = {}
        self._models: list[dict[str, Any]] = []
        self._artifacts: dict[str, Artifact] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._reopen()

    def figure(self, fig: Any, name: str, *, alt: str, **arrays: Any) -> None:
        """Save a figure as NAME.svg and NAME.png with its numbers as NAME.npz; same figure, same bytes.

        Args:
            fig: a matplotlib figure.
            name: file name without suffix.
            alt: what a reader who cannot see it should know.
            arrays: every number that the figure draws.
        """
        if not alt.strip() or not arrays:
            raise ValueError(f"figure {name}: give alt text, and the numbers that it draws as arrays")
        self._reopen()
        self._artifact(f"{name}.svg", _svg(fig, alt), alt)
        self._artifact(f"{name}.png", _png(fig, alt), alt)
        self._artifact(f"{name}.npz", _npz({key: np.asarray(value) for key, value in arrays.items()}))

    def page(self, html: str, name: str, *, alt: str) -> None:
        """Save a page that needs no other file as NAME.html.

        Args:
            html: of `lib.dashboard.page`.
            name: file name without suffix.
            alt: what it shows.
        """
        if not alt.strip():
            raise ValueError(f"page {name}: give alt text")
        self._reopen()
        self._artifact(f"{name}.html", html.encode(), alt)

    def claim(self, claim: Claim) -> None:
        """Add a claim to the record; one with the same id is replaced."""
        self._reopen()
        self._claims[claim.id] = claim

    def metric(
        self, name: str, value: float | None, interval: Iterable[float] | None = None,
        n: str | int | None = None, reason: str = "",
    ) -> None:
        """Add a number to the record.

        Raises:
            ValueError: a value that is not finite, or None without a reason.
        """
        ends = None if interval is None else tuple(float(end) for end in interval)
        numbers = [] if value is None else [float(value), *(ends or ())]
        if not all(map(math.isfinite, numbers)) or (value is None and not reason):
            raise ValueError(f"metric {name}: {value} {ends or ''} is no number; pass None and a reason")
        self._reopen()
        self._metrics[name] = Metric(
            value=None if value is None else float(value), interval=ends, n=n, reason=reason
        )

    def model(self, provenance: Mapping[str, Any]) -> None:
        """Add a model's provenance (id, revision, weight hash) to the record."""
        self._reopen()
        entry = json.loads(_canonical_json(provenance))
        if entry not in self._models:
            self._models.append(entry)

    def close(self) -> ClaimsTable:
        """Write record.json and return the claims as a table to display."""
        commit, dirty = _git_state()
        record = Record(
            study=self.name, parameters=self.parameters.model_dump(), claims=list(self._claims.values()),
            metrics=self._metrics, models=self._models, artifacts=self._artifacts, commit=commit, dirty=dirty,
            code=code_version(), versions={"python": platform.python_version(), **_versions(_PACKAGES)},
            started=self._started, seconds=round(time.monotonic() - self._clock, 1),
            peak_memory_mb=round(_peak_memory_mb(), 1),
        )
        _write(self.folder / "record.json", (record.model_dump_json(indent=1) + "\n").encode())
        return ClaimsTable(record.claims)

    def _artifact(self, name: str, data: bytes, alt: str = "") -> None:
        _write(self.folder / name, data)
        self._artifacts[name] = Artifact(sha256=hashlib.sha256(data).hexdigest(), alt=alt)

    def _reopen(self) -> None:
        # No record may describe a run that is not finished, an earlier one in this folder included.
        (self.folder / "record.json").unlink(missing_ok=True)


class Cache:
    """Results on disk, by everything that they depend on.

    An entry is an .npz whose zip comment is the SHA-256 of all bytes before it, written in one step: a
    process killed at any point leaves a whole entry or none, and several may write at once.

    Args:
        folder: None for CACHE_DIR, else .cache; a relative one is taken from the repository's root.
        enabled: whether to read and write at all.
    """

    def __init__(self, folder: str | Path | None = None, enabled: bool = True):
        self.folder = ROOT / Path(folder or os.environ.get("CACHE_DIR") or ".cache").expanduser()
        self.enabled = enabled

    def get(
        self, name: str, key: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
    ) -> dict[str, np.ndarray]:
        """The stored result of `compute`, or a fresh one.

        Args:
            name: of the result, readable; part of the key.
            key: all that `compute` depends on besides code: parameters, weight hash, condition, device.
                Plain values and arrays. The code of lib, that of `compute` and of the notebook's functions
                that it calls, and the versions of torch, numpy, transformers and nnsight are added.
            compute: returns arrays by name.

        Returns:
            Arrays by name. A damaged entry is reported on stderr and computed again.
        """
        if not self.enabled:
            return _arrays(name, compute())
        full_key = _canonical_json({
            "name": name, "key": key, "code": code_version(), "compute": _function_code(compute),
            "versions": _versions(_CACHE_PACKAGES),
        })
        path = self.folder / f"{name}-{hashlib.sha256(full_key.encode()).hexdigest()[:32]}.npz"
        try:
            stored = _read_entry(path.read_bytes(), full_key)
            unit_was_read()
            return stored
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever a damaged file makes numpy and zipfile raise
            print(f"cache: {path} is damaged ({error}); computing it again", file=sys.stderr)
        arrays = _arrays(name, compute())
        _write(path, _entry(arrays, full_key))
        return arrays


def figures_folder() -> Path:
    """Folder of all studies' figures and records: FIGURES_DIR, else figures; see `Study` on relative ones."""
    return ROOT / Path(os.environ.get("FIGURES_DIR") or "figures").expanduser()


def read_records(folder: str | Path | None = None) -> list[Record]:
    """Valid records of all studies, in order.

    Args:
        folder: holds STUDY/record.json; None for `figures_folder()`, and for a study without a record
            there, the one that came with the repository.
    """
    folders = [Path(folder)] if folder else [figures_folder(), ROOT / "figures"]
    found: dict[str, Record] = {}
    for path in (path for each in folders for path in sorted(each.glob("*/record.json"))):
        if path.parent.name not in found:
            found[path.parent.name] = validate_record(path)
    return [found[study] for study in sorted(found)]


def validate_record(path: str | Path) -> Record:
    """Read a record.json and check it against its schema and the files beside it.

    Raises:
        RecordError: naming the file and what is wrong with it.
    """
    record = read_record(path)
    for name, artifact in record.artifacts.items():
        if problem := artifact_problem(path, name, artifact):
            raise RecordError(f"{path}: {name} {problem}; run the study again")
    return record


def read_record(path: str | Path) -> Record:
    """Read a record.json and check it against its schema, whether or not its files are there.

    Raises:
        RecordError: naming the file and what is wrong with it.
    """
    path = Path(path)
    try:
        return Record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RecordError(f"{path}: there is no record; the study did not finish, or never began") from None
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "JSON"
        raise RecordError(f"{path}: {place}: {first['msg']}; run the study again") from None


def artifact_problem(record_path: str | Path, name: str, artifact: Artifact) -> str:
    """What is wrong with a file beside a record; "" for nothing."""
    file = Path(record_path).parent / name
    if not file.is_file():
        return "is missing"
    if hashlib.sha256(file.read_bytes()).hexdigest() != artifact.sha256:
        return "is not the file that was recorded"
    return ""


def code_version() -> str:
    """Hash over the sources of the modules of lib that results depend on.

    When they were edited since this process imported lib, it may run either version, or some of both:
    the hash is then of its own, so that no other process takes those results for its own.
    """
    now = _sources_hash()
    return now if now == _SOURCES_AT_IMPORT else _short_hash(f"{_SOURCES_AT_IMPORT} {now}")


def _sources_hash() -> str:
    sources = {}
    for path in sorted((ROOT / "lib").rglob("*.py")):
        if _NOT_COMPUTING.isdisjoint({path.stem, path.parent.name}):
            sources[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    return _short_hash(json.dumps(sources))


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_SOURCES_AT_IMPORT = _sources_hash()


def _function_code(function: Callable) -> str:
    """Hash over a function's bytecode and that of the functions of its own module that it calls.

    Functions of lib are in `code_version`; those that a notebook defines are nowhere else.
    """
    home = _unwrapped(function).__module__
    texts, seen, waiting = [], set(), [function]
    while waiting:
        here = _unwrapped(waiting.pop())
        code = getattr(here, "__code__", None)
        if code is None or code in seen or here.__module__ != home:
            continue
        seen.add(code)
        names: set[str] = set()
        texts.append(_code_text(code, names))
        cells = inspect.getclosurevars(here).nonlocals if here.__closure__ else {}
        found = [cells.get(name, here.__globals__.get(name)) for name in sorted({*names, *code.co_freevars})]
        waiting += [value for value in found if isinstance(value, types.FunctionType | functools.partial)]
    return _short_hash("\n".join(texts))


def _unwrapped(function: Callable) -> Callable:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _code_text(code: types.CodeType, names: set[str]) -> str:
    """Bytecode and constants, without line numbers and addresses; collects the names it refers to."""
    names.update(code.co_names)
    parts = [code.co_code.hex(), repr(code.co_names)]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            parts.append(_code_text(constant, names))
        elif isinstance(constant, frozenset):
            parts.append(repr(sorted(map(repr, constant))))
        else:
            parts.append(repr(constant))
    return "\n".join(parts)


def _canonical_json(value: Any) -> str:
    """JSON in which equal values are equal text: sorted, arrays by hash, nothing that JSON would change."""
    return json.dumps(_plain(value), sort_keys=True, allow_nan=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        return {"shape": list(array.shape), "dtype": array.dtype.str,
                "sha256": hashlib.sha256(array.tobytes()).hexdigest()}
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} {value!r} can not be part of a key; pass plain values or arrays")


def _arrays(name: str, result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays = {key: np.asarray(value) for key, value in result.items()}
    for key, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"cache {name}: {key} is no array of numbers")
    return arrays


def _entry(arrays: dict[str, np.ndarray], full_key: str) -> bytes:
    data = _npz({"__key__": np.frombuffer(full_key.encode(), np.uint8), **arrays})
    body = data[:-2] + (64).to_bytes(2, "little")  # the last two bytes of a zip: length of its comment
    return body + hashlib.sha256(body).hexdigest().encode()


def _read_entry(data: bytes, full_key: str) -> dict[str, np.ndarray]:
    if hashlib.sha256(data[:-64]).hexdigest().encode() != data[-64:]:
        raise ValueError("its bytes are not those that were written")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = dict(file)
    if arrays.pop("__key__").tobytes().decode() != full_key:
        raise ValueError("it belongs to another key")
    return arrays


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _svg(fig: Any, alt: str) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    # A fixed salt and no date: the same figure has the same bytes, so git sees only what changed.
    with matplotlib.rc_context({"svg.hashsalt": "latent-geometry"}):
        fig.savefig(buffer, format="svg", facecolor="white", bbox_inches="tight", metadata={"Date": None})
    title = f"<title>{escape(alt)}</title>\n <metadata>"
    return buffer.getvalue().replace(b"<metadata>", title.encode(), 1)


def _png(fig: Any, alt: str) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=150, facecolor="white", bbox_inches="tight",
                metadata={"Software": None, "Description": alt})
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    """Write a file in one step: whoever looks sees the old one, the new one, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def _git_state() -> tuple[str | None, bool | None]:
    if shutil.which("git") is None:
        return None, None

    def git(*arguments: str) -> str | None:
        run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "lib", "data", "requirements.lock")
    return commit, None if commit is None or changes is None else bool(changes)


def _peak_memory_mb() -> float:
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, kilobytes elsewhere


if __name__ == "__main__":
    from lib.compare import main

    sys.exit(main())
