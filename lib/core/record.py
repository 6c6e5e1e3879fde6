"""What a study leaves behind: checked parameters, cached results, figures with their numbers, record.json.

A run succeeded when its folder holds a valid record.json. The record is written last, in one step, and
the old one goes when a run starts: a run that stopped leaves none. One run at a time has a folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib import ROOT
from lib.core import kernel
from lib.core.cache import Cache, canonical_json, code_version, short_hash, versions
from lib.core.claims import Claim, ClaimsTable
from lib.core.files import Lock, npz_bytes, remove_parts, why_not_writable, write_whole
from lib.core.parameters import NotebookParameters, ParameterError, check

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
    code: str  # hash of the modules of core and of the study's wing that compute
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
    `lib.core.kernel`.

    Args:
        schema: the study's parameters.
        namespace: `globals()` of the notebook.

    Attributes:
        parameters: what arrived, checked.
        folder: where figures and record.json go: `out_dir` (a relative one is taken from the repository's
            root, whatever the working directory), else FIGURES_DIR/STUDY, else runs/figures/STUDY.
        cache: results of earlier runs.

    Raises:
        ParameterError: see `lib.core.parameters.check`; or the folder can not be written to, holds a run of
            another study, or another run is at work in it. The folder is left as it was.
    """

    def __init__(self, schema: type[NotebookParameters], namespace: Mapping[str, Any]):
        kernel.refuse_edited()
        kernel.shorten_trace_errors()
        self.parameters = check(schema, namespace)
        self.name = schema.study
        out_dir = Path(self.parameters.out_dir).expanduser()
        self.folder = ROOT / out_dir if self.parameters.out_dir else figures_folder() / self.name
        self.wing = schema.wing()
        self.cache = Cache(enabled=self.parameters.use_cache, wing=self.wing)
        self._started, self._clock = datetime.now(UTC), time.monotonic()
        self._claims: dict[str, Claim] = {}
        self._metrics: dict[str, Metric] = {}
        self._models: list[dict[str, Any]] = []
        self._artifacts: dict[str, Artifact] = {}
        self._cells = kernel.cells_from_here()
        self._lock = Lock(self.folder / ".lock")
        self._check_folder()
        self._reopen()
        remove_parts(self.folder)
        remove_parts(self.cache.folder, age=86400)  # others may be at work there

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
        self._artifact(f"{name}.npz", npz_bytes({key: np.asarray(value) for key, value in arrays.items()}))

    def page(self, html: str, name: str, *, alt: str) -> None:
        """Save a page that needs no other file as NAME.html.

        Args:
            html: of `lib.codi.dashboard.page`.
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
            estimate: of `lib.core.statistics`, a bare number, which has no interval, or None.
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
        entry = json.loads(canonical_json(provenance))
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
            code=code_version(self.wing),
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


def cells_hash(sources: Iterable[str]) -> str | None:
    """Hash over the code cells of a notebook; None if there are none."""
    cells = [source.rstrip() for source in sources]
    return short_hash(json.dumps(cells)) if cells else None


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
