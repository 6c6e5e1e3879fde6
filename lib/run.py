"""Execute the studies and print their claims: `python -m lib.run [--study NAME] [--model NAME] [papermill's
options]`.

Each notebook runs by papermill in a process of its own, notebook 00 last because it reads the others'
records. A study succeeded when this run of it left a valid record.json, whatever the notebook says of
itself: papermill marks cells as completed even where the kernel died. A study removes its old record when it
starts; one that did not get so far, by a misspelt parameter, leaves the old one and does not pass by it.

A model of data/models.yaml runs through the studies that it is meant for, with the parameters that stand
there, in folders of its own: runs/NAME, with its figures and records in runs/NAME/figures.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import queue
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from lib import ROOT
from lib.claims import claims_table
from lib.progress import clock
from lib.record import (
    Lock,
    Record,
    RecordError,
    figures_folder,
    validate_record,
    why_not_writable,
    write_whole,
)

if TYPE_CHECKING:
    from lib.registry import RegisteredModel

_CELL_STARTS = re.compile(r"Executing Cell (\d+)-")
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d .*\| +(INFO|WARNING) ")


class Outcome(NamedTuple):
    """How one study ended: a record, or what went wrong."""

    study: str
    record: Record | None
    problem: str
    seconds: float


def main(
    argv: list[str] | None = None,
    notebooks: Path = ROOT / "notebooks",
    output: Path = ROOT / "runs" / "latest",
) -> int:
    """Run the command line; returns the exit status, 0 when every study left a valid record."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.run",
        allow_abbrev=False,
        description="Execute the studies and print their claims.",
        epilog="Everything else goes to papermill: -p NAME VALUE, -r NAME STRING, -y YAML, -f FILE.",
    )
    parser.add_argument("--study", help="one study, such as 01_induction_ablation or 01")
    parser.add_argument("--model", help="a model of data/models.yaml; python -m lib.models lists them")
    parser.add_argument("--timeout", type=float, help="seconds for each study (3600; 86400 with --model)")
    parser.add_argument("--refresh", action="store_true", help="store the outputs in notebooks/")
    options, papermill_options = parser.parse_known_args(argv)
    if options.refresh and papermill_options:
        parser.error("--refresh stores what a run with default parameters shows; leave the parameters out")
    if options.refresh and options.model:
        parser.error("--refresh stores what a run with default parameters shows; leave the model out")
    try:
        given = parameters_given(papermill_options)
        if "out_dir" in given:
            parser.error("a run writes to FIGURES_DIR/STUDY; set the variable FIGURES_DIR instead of out_dir")
        chosen = _choose(notebooks, options.study)
        model_options: dict[str, list[str]] = {}
        if options.model:
            model, model_options = _of_model(options.model, chosen, bool(options.study), given)
            chosen = [path for path in chosen if path.stem in model_options]
            output = output.parent / model.name
            os.environ.setdefault("FIGURES_DIR", str(output / "figures"))
    except (LookupError, ValueError) as error:
        parser.error(str(error))

    if reason := why_not_writable(output):
        parser.error(reason)
    outcomes = []
    for notebook in chosen:
        words = [*model_options.get(notebook.stem, ()), *papermill_options]
        timeout = options.timeout or (86400 if options.model else 3600)
        outcome = run_study(notebook, output / notebook.name, words, timeout)
        if outcome.record and options.refresh:
            _refresh(notebook, output / notebook.name)
        outcomes.append(outcome)

    failed = [outcome for outcome in outcomes if outcome.record is None]
    print()
    if records := [outcome.record for outcome in outcomes if outcome.record]:
        print(claims_table(records))
    for outcome in failed:
        print(f"FAILED {outcome.study} (log: {output / outcome.study}.log)\n{outcome.problem}\n")
    print(
        f"{len(outcomes) - len(failed)} of {len(outcomes)} studies left a valid record "
        f"in {clock(sum(outcome.seconds for outcome in outcomes))}; "
        f"figures in {figures_folder()}, notebooks in {output}"
    )
    return 1 if failed else 0


def run_study(notebook: Path, executed: Path, papermill_options: Sequence[str], timeout: float) -> Outcome:
    """Execute one notebook in a process of its own, with a progress line.

    Args:
        notebook: its file name is the study's name.
        executed: where papermill writes the notebook as far as it came; its log goes beside it. One run at a
            time writes there.
        papermill_options: such as ["-p", "seq_len", "200"].
        timeout: seconds, after which the run is stopped and has failed.

    Returns:
        The outcome; nothing is raised for a notebook that fails.
    """
    lock = Lock(executed.with_suffix(".lock"))
    if holder := lock.take():
        problem = f"  another run ({holder}) writes to {executed}; wait for it, or stop it"
        return Outcome(notebook.stem, None, problem, 0.0)
    try:
        return _run_study(notebook, executed, papermill_options, timeout)
    finally:
        lock.release()


def parameters_given(papermill_options: Sequence[str]) -> dict[str, Any]:
    """Parameters among papermill's options, by name, as it reads them (numbers of -p as text).

    Raises:
        ValueError: options, or a file among them, that papermill can not read.
    """
    if not papermill_options:
        return {}
    import click  # and papermill, which takes two seconds
    import yaml
    from papermill.cli import papermill
    from papermill.exceptions import PapermillException
    from papermill.iorw import read_yaml_file

    try:
        found = papermill.make_context("papermill", ["notebook", "executed", *papermill_options]).params
        parts = [
            *(yaml.safe_load(base64.b64decode(text)) for text in found["parameters_base64"]),
            *map(read_yaml_file, found["parameters_file"]),
            *map(yaml.safe_load, found["parameters_yaml"]),
        ]
        given: dict[str, Any] = {}
        for part in parts:
            given |= part or {}
    except click.ClickException as error:
        raise ValueError(error.format_message()) from None
    except (yaml.YAMLError, PapermillException, OSError, TypeError, ValueError) as error:
        raise ValueError(f"parameters can not be read: {error}") from None
    return given | dict(found["parameters"]) | dict(found["parameters_raw"])


def interrupt_on_signals() -> None:
    """Let SIGTERM and SIGHUP, of a scheduler and of a terminal that closes, end this process as Ctrl-C does:
    papermill and its kernel have to go as well."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # no SIGHUP on Windows
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, signal.default_int_handler)


def _run_study(notebook: Path, executed: Path, papermill_options: Sequence[str], timeout: float) -> Outcome:
    study, started = notebook.stem, time.monotonic()
    record_path = figures_folder() / study / "record.json"
    old = _identity(record_path)
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    executed.unlink(missing_ok=True)
    work = executed.with_suffix(".progress")
    work.unlink(missing_ok=True)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "papermill",
            str(notebook),
            str(executed),
            "--no-progress-bar",
            "--log-output",
            "--log-level",
            "INFO",
            *papermill_options,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PROGRESS_FILE": str(work.resolve())},
        # A terminal that closes would kill it before it could end its kernel.
        start_new_session=True,
    )
    # papermill adds a cell when it has parameters to pass on.
    injects = any(word.startswith(("-p", "-r", "-y", "-f", "-b", "--param")) for word in papermill_options)
    progress = _Progress(study, len(cells) + injects, work)
    try:
        lines = _follow(process, executed.with_suffix(".log"), progress, started + timeout)
    except KeyboardInterrupt:
        _stop(process)
        raise
    seconds = time.monotonic() - started
    try:
        record, problem = validate_record(record_path), ""
    except RecordError as error:
        record, problem = None, str(error)
    if record and _identity(record_path) == old:
        record, problem = None, f"{record_path} is of an earlier run: the notebook never started its study"
    if lines is None:
        record, problem = None, f"  it was stopped: it took longer than {timeout:g} s (--timeout)"
    elif process.returncode != 0 or record is None:
        record, problem = None, _last_words(lines, process.returncode, problem)
    work.unlink(missing_ok=True)
    progress.close("done" if record else "FAILED", seconds)
    return Outcome(study, record, problem, seconds)


def _choose(notebooks: Path, study: str | None) -> list[Path]:
    """Notebooks to run, in order: 00 last."""
    found = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"), key=lambda path: (path.stem[:2] == "00", path.stem))
    names = ", ".join(path.stem for path in found) or "none"
    if study is None:
        if not found:
            raise LookupError(f"no study notebooks in {notebooks}")
        return found
    chosen = [path for path in found if path.stem == study] or [p for p in found if p.stem.startswith(study)]
    if len(chosen) != 1:
        raise LookupError(f"no study {study!r}; there are: {names}")
    return chosen


def _of_model(
    name: str, chosen: list[Path], one_study: bool, given: Mapping[str, Any]
) -> tuple[RegisteredModel, dict[str, list[str]]]:
    """A model of the registry, and the options of papermill for each of its studies that was chosen.

    Raises:
        RegistryError: no such model, one that is not meant for the study or can not be had.
    """
    from lib import registry  # and torch below: heavy, and not needed without a model

    model = registry.find(name)
    studies = [path.stem for path in chosen if one_study or path.stem in model.studies]
    if not studies:
        raise registry.RegistryError(f"{model.name} is meant for {', '.join(model.studies)}: none is here")
    parameters = {study: _parameters(model, study) for study in studies}
    for study in studies:
        for asked, what in model.studies[study].asks.items():
            if asked not in given:
                raise registry.RegistryError(f'{model.name} in {study}: give {what}: ARGS="-p {asked} ..."')
    if _is_true(given.get("remote")):  # on NDIF, which serves a branch
        for values in parameters.values():
            del values["revision"], values["device"]
    elif "model_id" in given:  # other weights, which have no such revision
        for values in parameters.values():
            del values["revision"]
    elif "revision" not in given:
        print(registry.require(model), flush=True)
    # papermill reads -b before all of its other ways to pass a parameter, so that each of them overrides it.
    return model, {study: ["-b", _base64(values)] for study, values in parameters.items()}


def _parameters(model: RegisteredModel, study: str) -> dict[str, Any]:
    """Parameters of the registry for a notebook, on the best device of this machine."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.parameters(study) | {"device": device, "revision": model.revision or ""}


def _is_true(value: Any) -> bool:
    """As a study reads a parameter; what is neither true nor false is for the study to refuse."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False


def _base64(values: dict[str, Any]) -> str:
    return base64.b64encode(json.dumps(values).encode()).decode()


def _identity(record: Path) -> tuple[int, int] | None:
    """What changes when a record is replaced, even by one with the same contents."""
    return (record.stat().st_ino, record.stat().st_mtime_ns) if record.exists() else None


def _follow(process: subprocess.Popen, log: Path, progress: _Progress, deadline: float) -> list[str] | None:
    """Pass papermill's log on to file and progress line; returns its lines, or None at the deadline."""
    arrived: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            arrived.put(line)
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    lines: list[str] = []
    with log.open("w", encoding="utf-8") as file:
        while time.monotonic() < deadline:
            try:
                line = arrived.get(timeout=1)
            except queue.Empty:
                progress.show()
                continue
            if line is None:
                process.wait()
                return lines
            line = _ANSI.sub("", line)
            file.write(line)
            file.flush()
            lines.append(line.rstrip())
            if found := _CELL_STARTS.search(line):
                progress.show(int(found[1]))
    _stop(process)
    return None


def _stop(process: subprocess.Popen) -> None:
    """Stop papermill so that it takes its kernel with it; by force when it does not."""
    if process.poll() is None:
        # A script's background jobs ignore SIGINT; there papermill goes at once, and its kernel with it.
        deaf = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        process.send_signal(signal.SIGTERM if deaf else signal.SIGINT)
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_words(lines: list[str], status: int, problem: str) -> str:
    """What papermill said last: the notebook's own error where there is one."""
    spoken = [line for line in lines if line.strip() and not _LOG_LINE.match(line)]
    heads = [i for i, line in enumerate(spoken) if line.startswith("Exception encountered at")]
    words = [spoken[heads[-1]], *spoken[heads[-1] + 1 :][-11:]] if heads else spoken[-3:]
    if status < 0:
        words.append(f"papermill was killed by {signal.Signals(-status).name}")
    if status == 0:
        words = [problem]
    return textwrap.indent("\n".join(words), "  ")


def _refresh(notebook: Path, executed: Path) -> None:
    """Store the executed notebook, without papermill's times and paths, in place of the old one."""
    import nbformat
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    document = nbformat.read(executed, as_version=4)
    document.metadata.pop("papermill", None)
    for cell in document.cells:
        for noise in ("papermill", "execution"):
            cell.metadata.pop(noise, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        for output in cell.get("outputs", ()):
            if png := output.get("data", {}).get("image/png"):
                output.data["image/png"] = _smaller(png)
    # What a cell prints is one output, wherever the kernel happened to pass it on.
    document, _ = CoalesceStreamsPreprocessor().preprocess(document, {})
    text = nbformat.writes(document).rstrip("\n") + "\n"
    write_whole(notebook, text.encode())


def _smaller(png: str) -> str:
    """The picture (base64) in 256 colours, which is a third of its size and looks the same."""
    from PIL import Image

    small = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    image.convert("RGB").quantize(256).save(small, format="png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


class _Progress:
    """One line a study: rewritten in place on a terminal, else a new line every few seconds."""

    def __init__(self, study: str, n_cells: int, work: Path):
        self.study, self.n_cells, self.cell = study, n_cells, 0
        self.work = work  # file of `lib.progress`
        self.width = 28
        self.started = time.monotonic()
        self.shown = 0.0
        self.terminal = sys.stdout.isatty()
        self.show()

    def show(self, cell: int | None = None) -> None:
        """Tell that a cell has begun, or only that time goes by."""
        self.cell = self.cell if cell is None else cell
        now = time.monotonic()
        if self.terminal or now - self.shown >= 10:
            self.shown = now
            self._write(f"cell {self.cell} of {self.n_cells}{self._working()}", now - self.started, "")

    def close(self, word: str, seconds: float) -> None:
        place = "" if word == "done" else f" at cell {self.cell} of {self.n_cells}"
        self._write(word + place, seconds, "\n")

    def _working(self) -> str:
        """What the cell is at, such as ", ablation sweep 12/40, 1:10 left"."""
        text = self.work.read_text(encoding="utf-8") if self.work.is_file() else ""
        line = text.rpartition("\n")[0].rpartition("\n")[2]  # the last whole one
        return f", {line}" if line.endswith(" left") else ""

    def _write(self, state: str, seconds: float, end: str) -> None:
        self.width = max(self.width, len(state))  # a shorter line on a terminal covers the longer one
        line = f"{self.study:<24} {state:<{self.width}} {clock(seconds):>7}"
        print(f"\r{line}" if self.terminal else line, end=end if self.terminal else "\n", flush=True)


if __name__ == "__main__":
    interrupt_on_signals()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; what is cached will not be computed again")
