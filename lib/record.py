"""What a study leaves behind: checked parameters, cached results, figures with their numbers, record.json.

A run succeeded when its folder holds a valid record.json. The record is written last, in one step, and
the old one goes when a run starts: a run that stopped leaves none. One run at a time has a folder.
"""

from __future__ import annotations

import functools
import hashlib
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
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib import ROOT, kernel
from lib.claims import Claim, ClaimsTable
from lib.parameters import NotebookParameters, ParameterError, check
from lib.progress import unit_was_read

# Modules and packages of lib that no result depends on, but for what is in its key, as the weights are that
# organisms come from. A change in any other one makes cached results void.
_NOT_COMPUTING = {"__init__", "__main__", "appendix", "artifacts", "claims", "compare", "dashboard",
                  "figures", "kernel", "language_figures", "organisms", "parameters", "plots", "progress",
                  "record", "refusal_plots", "registry", "run", "seeds", "sources", "widgets"}  # fmt: skip
_PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "nnsight",
    "scipy",
    "networkx",
    "safetensors",
    "matplotlib",
    "pydantic",
)
_CACHE_PACKAGES = _PACKAGES[:4]
_PART = ".part"  # ends the name of a file that is being written
STORED_FIGURES = ROOT / "figures"  # what `make notebooks` writes, and no other run


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
    notebook: str | None = None  # of the cells that ran, from the setup cell on; None outside a notebook
    versions: dict[str, str]
    started: datetime
    seconds: float
    peak_memory_mb: float


class RecordError(kernel.PlainError, ValueError):
    """A record.json that is missing, broken, or not of the files beside it."""


class Study:
    """One run of one study. Put it in the setup cell: it stops the notebook if a parameter is wrong.

    In a notebook it also shortens the errors of traces, and asks for a restart when lib was edited; see
    `lib.kernel`.

    Args:
        schema: the study's parameters.
        namespace: `globals()` of the notebook.

    Attributes:
        parameters: what arrived, checked.
        folder: where figures and record.json go: `out_dir` (a relative one is taken from the repository's
            root, whatever the working directory), else FIGURES_DIR/STUDY, else runs/figures/STUDY.
        cache: results of earlier runs.

    Raises:
        ParameterError: see `lib.parameters.check`; or the folder can not be written to, holds a run of
            another study, or another run is at work in it. The folder is left as it was.
    """

    def __init__(self, schema: type[NotebookParameters], namespace: Mapping[str, Any]):
        kernel.refuse_edited()
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
        self._cells = kernel.cells_from_here()
        self._lock = Lock(self.folder / ".lock")
        self._check_folder()
        self._reopen()
        _remove_parts(self.folder)
        _remove_parts(self.cache.folder, age=86400)  # others may be at work there

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

    def claim(
        self,
        claim: Claim | str,
        statement: str = "",
        estimate: Any = None,
        *,
        source: str = "here",
        reason: str = "",
        **rule: Any,
    ) -> None:
        """Add a claim to the record; one with the same id is replaced.

        Args:
            claim: its id, or a whole `Claim`.
            statement: in a sentence.
            estimate: of `lib.statistics`, a bare number, which has no interval, or None.
            source: who made it.
            reason: why it was not tested; without an estimate.
            rule: above, below or between, and n, unit and published, as for `Claim.test`.
        """
        if isinstance(claim, str):
            if estimate is None:
                told = {name: rule[name] for name in ("published", "unit") if name in rule}
                claim = Claim.not_tested(claim, statement, source=source, reason=reason, **told)
            else:
                value, *ends = estimate if isinstance(estimate, tuple) else (estimate,)
                # Of one draw there is nothing to take an interval over, and none of width 0 is told.
                interval = tuple(ends) if ends and ends[0] < ends[1] else None
                claim = Claim.test(claim, statement, source=source, measured=value, interval=interval, **rule)
        self._reopen()
        self._claims[claim.id] = claim

    def metric(
        self,
        name: str,
        value: float | None,
        interval: Iterable[float] | None = None,
        n: str | int | None = None,
        reason: str = "",
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
            study=self.name,
            parameters=self.parameters.model_dump(),
            claims=list(self._claims.values()),
            metrics=self._metrics,
            models=self._models,
            artifacts=self._artifacts,
            commit=commit,
            dirty=dirty,
            code=code_version(),
            notebook=cells_hash(self._cells),
            versions=versions(),
            started=self._started,
            seconds=round(time.monotonic() - self._clock, 1),
            peak_memory_mb=round(_peak_memory_mb(), 1),
        )
        write_whole(self.folder / "record.json", (record.model_dump_json(indent=1) + "\n").encode())
        self._lock.release()
        return ClaimsTable(record.claims)

    def _artifact(self, name: str, data: bytes, alt: str = "") -> None:
        write_whole(self.folder / name, data)
        self._artifacts[name] = Artifact(sha256=hashlib.sha256(data).hexdigest(), alt=alt)

    def _check_folder(self) -> None:
        if reason := why_not_writable(self.folder):
            raise ParameterError(f"out_dir: {reason}; name another folder")
        try:
            study = json.loads((self.folder / "record.json").read_bytes())["study"]
        except (OSError, ValueError, LookupError, TypeError):
            return  # no record, or a broken one, which this run replaces
        if study != self.name:
            raise ParameterError(f"out_dir: {self.folder} holds a run of {study}; name another folder")

    def _reopen(self) -> None:
        # No record may describe a run that is not finished, an earlier one in this folder included.
        if holder := self._lock.take():
            raise ParameterError(
                f"out_dir: another run ({holder}) is at work in {self.folder}; wait for it, end its "
                "kernel, or name another folder"
            )
        (self.folder / "record.json").unlink(missing_ok=True)


class Lock:
    """A file that one process at a time holds; it stays behind. In a process all locks of a file are one."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = FileLock(path, timeout=0, is_singleton=True, thread_local=False, on_acquired=_sign)

    def take(self) -> str:
        """Hold the file until `release` or the end of the process; returns "", or who holds it."""
        try:
            if not self._lock.is_locked:
                self._lock.acquire()
        except Timeout:
            process = self.path.read_text()
            return f"process {process}" if process else "another process"
        return ""

    def release(self) -> None:
        """Let go of the file."""
        self._lock.release(force=True)


def _sign(handle: int) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)


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
        self._is_usable = True

    def get(
        self, name: str, key: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
    ) -> dict[str, np.ndarray]:
        """The stored result of `compute`, or a fresh one.

        Args:
            name: of the result, readable; part of the key.
            key: all that `compute` depends on besides code: parameters, weight hash, condition, device.
                Plain values and arrays. The code of lib and the versions of torch, numpy, transformers and
                nnsight are added.
            compute: a function of lib; returns arrays by name. For any other one the key needs an entry
                `code`, which changes when its code does.

        Returns:
            Arrays by name. A damaged entry is reported on stderr and computed again. So is, once, a folder
            that can not be read or written, whose results are not kept.

        Raises:
            ValueError: a function of another place and a key without `code`.
            TypeError: a key or results that are neither plain nor arrays.
        """
        if "code" not in key and _module_of(compute).split(".")[0] != __package__:
            raise ValueError(
                f"cache {name}: {_module_of(compute)} is not of lib, whose code is part of every key; give "
                "the key an entry code that changes when the code does"
            )
        if not self.enabled:
            return _arrays(name, compute())
        full_key = _canonical_json(
            {"name": name, "key": key, "code": code_version(), "versions": _versions(_CACHE_PACKAGES)}
        )
        path = self.folder / f"{name}-{hashlib.sha256(full_key.encode()).hexdigest()[:32]}.npz"
        try:
            stored = _read_entry(path.read_bytes(), full_key)
            unit_was_read()
            return stored
        except FileNotFoundError:
            pass
        except OSError as error:
            self._say_unusable(error)
        except Exception as error:  # whatever a damaged file makes numpy and zipfile raise
            print(f"cache: {path} is damaged ({error}); computing it again", file=sys.stderr)
        arrays = _arrays(name, compute())
        try:
            write_whole(path, _entry(arrays, full_key))
        except OSError as error:
            self._say_unusable(error)
        return arrays

    def _say_unusable(self, error: OSError) -> None:
        if self._is_usable:
            reason = error.strerror or error
            print(f"cache: {self.folder} can not be used ({reason}); results are not kept", file=sys.stderr)
        self._is_usable = False


def figures_folder() -> Path:
    """Where a run writes figures and records, a folder a study: FIGURES_DIR, else runs/figures.

    A relative one is taken from the repository's root.
    """
    return ROOT / Path(os.environ.get("FIGURES_DIR") or "runs/figures").expanduser()


def record_paths(folder: str | Path | None = None) -> dict[str, Path]:
    """The record.json of every study, by the name of its folder, in order.

    Args:
        folder: holds STUDY/record.json; None for `figures_folder()`, and for a study without a record
            there, the stored one of the repository.
    """
    folders = [Path(folder)] if folder else [STORED_FIGURES, figures_folder()]
    found = {path.parent.name: path for each in folders for path in each.glob("*/record.json")}
    return dict(sorted(found.items()))


def read_records(folder: str | Path | None = None) -> list[Record]:
    """Valid records of all studies, in order; see `record_paths` for where they are.

    Raises:
        RecordError: naming the file and what is wrong with it.
    """
    return [validate_record(path) for path in record_paths(folder).values()]


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


def cells_hash(sources: Iterable[str]) -> str | None:
    """Hash over the code cells of a notebook; None if there are none."""
    cells = [source.rstrip() for source in sources]
    return _short_hash(json.dumps(cells)) if cells else None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **_versions(_PACKAGES)}


def why_not_writable(folder: Path) -> str:
    """Make a folder, and try to write into it; returns "", or what is wrong."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder} can not be written to ({error.strerror or error})"


def write_whole(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write a file in one step: whoever looks sees the old one, the new one, or none.

    Raises:
        FileExistsError: there is one, and `replace` is off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        if not replace:
            os.link(temporary, path)  # unlike a rename, fails when the name was taken meanwhile
        else:
            os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _remove_parts(folder: Path, age: float = 0) -> None:
    """Remove what killed processes left half written, at least `age` seconds ago."""
    for part in folder.glob(f".*{_PART}"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime >= age:
                part.unlink()


def _module_of(function: Callable) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return function.__module__


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
        return {
            "shape": list(array.shape),
            "dtype": array.dtype.str,
            "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        }
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
    fig.savefig(
        buffer,
        format="png",
        dpi=150,
        facecolor="white",
        bbox_inches="tight",
        metadata={"Software": None, "Description": alt},
    )
    return buffer.getvalue()


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
