"""Execute the notebooks and print their claims: `python -m lib run`, by which `make` runs them.

    --embedded     on embedded models, with the parameters that a study's schema has for
                   them; nothing is fetched; what runs where no other kind is asked for    runs/latest/
    --real         as the notebooks stand, on their default models                         runs/real/
    --model NAME   on another model, in the studies that take it                           runs/NAME/
    --refresh      as the notebooks stand, appendices too; stores outputs in notebooks/
                   and figures in figures/                                                 runs/stored/

The folder gets executed notebooks, papermill's logs, claims.txt, and figures/STUDY with figures and record,
unless the variable FIGURES_DIR names another place for these. Notebook 00 runs last because it reads the
others' records; an appendix runs when --study names it.

Each notebook runs by papermill in a process of its own. A study succeeded when this run of it left a valid
record.json, whatever the notebook says of itself: papermill marks cells as completed even where the kernel
died. A study removes its old record when it starts; one that did not get so far, by a misspelt parameter,
leaves the old one and does not pass by it.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from lib import ROOT
from lib.core.claims import claims_table
from lib.core.files import Lock, why_not_writable, write_whole
from lib.core.parameters import schemas
from lib.core.progress import ProgressLine, clock
from lib.core.record import STORED_FIGURES, Record, RecordError, figures_folder, record_paths, validate_record

if TYPE_CHECKING:
    from lib.core.registry import RegisteredModel

_CELL_STARTS = re.compile(r"Executing Cell (\d+)-")
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d .*\| +(INFO|WARNING) ")


class StudyRun(NamedTuple):
    """How the run of a study ended: with a record, or with a problem."""

    study: str
    record: Record | None
    problem: str
    seconds: float


class Plan(NamedTuple):
    """What a command line asks for."""

    folder: str  # below runs/
    notebooks: list[Path]
    parameters: dict[str, dict[str, Any]]  # by study; those of the command line go before them
    offline: bool = False
    timeout: float = 86400  # s for each study: weights may have to be fetched


def main(
    argv: list[str] | None = None, notebooks: Path = ROOT / "notebooks", runs: Path = ROOT / "runs"
) -> int:
    """Run the command line; returns the exit status, 0 when every study left a valid record."""
    interrupt_on_signals()
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        given = parameters_given(options)
        plan = _plan(options, notebooks, given)
    except (LookupError, ValueError) as error:
        parser.error(str(error))
    output = runs / plan.folder
    if reason := why_not_writable(output):
        parser.error(reason)
    os.environ.setdefault("FIGURES_DIR", str(STORED_FIGURES if options.refresh else output / "figures"))
    finished = []
    try:
        for notebook in plan.notebooks:
            executed = output / notebook.name
            parameters = plan.parameters.get(notebook.stem, {}) | given
            ended = run_study(notebook, executed, parameters, options.timeout or plan.timeout, plan.offline)
            if ended.record:
                _store(notebook, executed) if options.refresh else _show_own_figures(executed)
            finished.append(ended)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; what is cached will not be computed again")
    _write_claims(output / "claims.txt")
    _report(finished, output)
    return 0 if all(ended.record for ended in finished) else 1


def run_study(
    notebook: Path, executed: Path, parameters: Mapping[str, Any], timeout: float, offline: bool = False
) -> StudyRun:
    """Execute one notebook in a process of its own, with a progress line.

    Args:
        notebook: its file name is the study's name.
        executed: where papermill writes the notebook as far as it came; its log goes beside it. One run at a
            time writes there.
        parameters: other ones than the notebook's own.
        timeout: seconds, after which the run is stopped and has failed.
        offline: whether nothing may be fetched from the hub.

    Returns:
        How it ended; nothing is raised for a notebook that fails.
    """
    lock = Lock(executed.with_name(f".{executed.stem}.lock"))
    if holder := lock.take():
        problem = f"  another run ({holder}) writes to {executed}; wait for it, or stop it"
        return StudyRun(notebook.stem, None, problem, 0.0)
    try:
        return _run_study(notebook, executed, parameters, timeout, offline)
    finally:
        lock.release()


def parameters_given(options: argparse.Namespace) -> dict[str, Any]:
    """Parameters of a command line by name: of files, over these YAML, over these single ones.

    Raises:
        ValueError: they can not be read, or are not for a command line to give.
    """
    given: dict[str, Any] = {}
    try:
        for text in [*(Path(file).read_text(encoding="utf-8") for file in options.f), *options.y]:
            given |= yaml.safe_load(text) or {}
    except (yaml.YAMLError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"parameters can not be read: {error}") from None
    given |= {name: _value(text) for name, text in options.p} | dict(options.r)
    if given and options.refresh:
        raise ValueError("--refresh stores what runs with default parameters show; leave the parameters out")
    if "out_dir" in given:
        raise ValueError("a run writes to FIGURES_DIR/STUDY; set the variable FIGURES_DIR instead of out_dir")
    return given


def interrupt_on_signals() -> None:
    """Let SIGTERM and SIGHUP, of a scheduler and of a terminal that closes, end this process as Ctrl-C does:
    papermill and its kernel have to go as well."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # no SIGHUP on Windows
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, signal.default_int_handler)


# -- what to run -----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lib run",
        allow_abbrev=False,
        description="Execute the notebooks and print their claims.",
    )
    add = parser.add_mutually_exclusive_group().add_argument
    add("--embedded", action="store_true", help="on embedded models; nothing is fetched (the default)")
    add("--real", action="store_true", help="as the notebooks stand, on their default models")
    add("--model", metavar="NAME", help="on a model of data/models.yaml, a folder, a .gguf file or a hub id")
    add("--refresh", action="store_true", help="store outputs in notebooks/ and figures in figures/")
    add = parser.add_argument
    add("--study", help="one study, such as 01_induction_ablation, 01, or 1a of the appendices")
    add("--timeout", type=float, help="seconds for each study (3600 on embedded models, else 86400)")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")
    add("-r", nargs=2, action="append", default=[], metavar=("NAME", "TEXT"), help="one that is text")
    add("-y", action="append", default=[], metavar="YAML", help="several")
    add("-f", action="append", default=[], metavar="FILE", help="several, of a YAML file")
    return parser


def _value(text: str) -> Any:
    """A number or a list in JSON; what is none is text, and for the study to read."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _plan(options: argparse.Namespace, notebooks: Path, given: Mapping[str, Any]) -> Plan:
    """What a command line asks for.

    Raises:
        LookupError, ValueError: there is no such study or model, or the model can not be had.
    """
    chosen = _choose(notebooks, options.study, with_appendices=options.refresh)
    if options.real or options.refresh:
        return Plan("real" if options.real else "stored", chosen, {})
    if options.model:
        folder, parameters = _of_model(options.model, [path.stem for path in chosen], options.study, given)
        return Plan(folder, [path for path in chosen if path.stem in parameters], parameters)
    model = str(given.get("model_id", "organism/"))
    if not (model.startswith("organism/") or Path(model).expanduser().exists()):
        raise LookupError(f"model_id: {model!r} may have to be fetched; ask for it by --model (make: MODEL=)")
    embedded = {study: schema.embedded for study, schema in schemas().items()}
    return Plan("latest", chosen, embedded, offline=True, timeout=3600)


def _choose(notebooks: Path, study: str | None, with_appendices: bool) -> list[Path]:
    """Notebooks to run, in order: 00 last."""
    found = list(notebooks.glob("[0-9][0-9]_*.ipynb"))
    if study or with_appendices:
        found += notebooks.glob("appendix/[0-9][a-z]_*.ipynb")
    found.sort(key=lambda path: (path.stem[:2] == "00", path.stem))
    chosen = [path for path in found if path.stem == study] or [
        path for path in found if path.stem.startswith(study or "")
    ]
    if not chosen or (study and len(chosen) != 1):
        names = ", ".join(path.stem for path in found) or f"none in {notebooks}"
        raise LookupError(f"no study {study!r}; there are: {names}")
    return chosen


def _of_model(
    name: str, chosen: Sequence[str], study: str | None, given: Mapping[str, Any]
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Folder of a model's runs, and the parameters of each of its studies among the chosen ones.

    Raises:
        LookupError, RegistryError: no such model, one that the studies do not take, or that can not be had.
    """
    import torch

    from lib.core import registry  # heavy as well, and not needed without a model

    try:
        model = registry.find(name)
    except registry.RegistryError:
        if not ("/" in name or name.endswith(".gguf") or Path(name).exists()):
            raise
        folder, parameters = _of_other_weights(name, chosen, study)
    else:
        folder, parameters = model.name, _of_registered(model, chosen, study, given)
    for values in parameters.values():
        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        if "model_id" in given:  # other weights, which have no such revision
            values.pop("revision", None)
        if _is_remote(given):  # on NDIF, which serves a branch
            values.pop("revision", None)
            del values["device"]
    return folder, parameters


def _of_registered(
    model: RegisteredModel, chosen: Sequence[str], study: str | None, given: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Parameters of a model of the registry by study; says whether its weights have to be fetched."""
    from lib.core import registry

    parameters = {}
    for each in chosen if study else [each for each in chosen if each in model.studies]:
        parameters[each] = model.parameters(each) | {"revision": model.revision or ""}
        for asked, what in model.studies[each].asks.items():
            if asked not in given:
                raise LookupError(f'{model.name} in {each}: give {what}: ARGS="-p {asked} ..."')
    if not parameters:
        raise LookupError(f"{model.name} is meant for {', '.join(model.studies)}: none is here")
    if not (given.keys() & {"model_id", "revision"} or _is_remote(given)):
        print(registry.require(model), flush=True)
    return parameters


def _of_other_weights(
    name: str, chosen: Sequence[str], study: str | None
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Folder name, and parameters by study: any language model can walk on a graph."""
    fields = {each: schemas()[each].model_fields for each in chosen}
    takers = [each for each in chosen if "model_id" in fields[each] and (study or "graph" in fields[each])]
    if not takers:
        raise LookupError(f"{name}: none of these takes a model: {', '.join(chosen)}")
    path = Path(name).expanduser()
    model_id = str(path.resolve()) if path.exists() else name
    stem = re.sub(r"[^\w.-]+", "-", Path(model_id).name.removesuffix(".gguf"))
    folder = f"{stem}-model" if stem in ("latest", "real", "stored", "figures") else stem
    return folder, {each: {"model_id": model_id} for each in takers}


def _is_remote(given: Mapping[str, Any]) -> bool:
    return str(given.get("remote", "")).lower() in ("true", "t", "yes", "y", "on", "1")  # as a study reads it


# -- one notebook ----------------------------------------------------------------------------------


def _run_study(
    notebook: Path, executed: Path, parameters: Mapping[str, Any], timeout: float, offline: bool
) -> StudyRun:
    study, started, began = notebook.stem, datetime.now(UTC), time.monotonic()
    log, work = executed.with_suffix(".log"), executed.with_suffix(".progress")
    for old in (executed, work):
        old.unlink(missing_ok=True)
    words = ["-y", yaml.safe_dump(dict(parameters), allow_unicode=True)] if parameters else []
    # papermill adds a cell when it has parameters to pass on.
    n_cells = len(json.loads(notebook.read_text(encoding="utf-8"))["cells"]) + bool(parameters)
    progress = ProgressLine(study, n_cells, work)
    environment = {"PROGRESS_FILE": str(work.resolve())} | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "papermill", str(notebook), str(executed),
             "--no-progress-bar", "--log-output", "--log-level", "INFO", *words],
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment,
            start_new_session=True,  # a terminal that closes would kill it before it could end its kernel
        )  # fmt: skip
    try:
        in_time = _follow(process, log, progress, began + timeout)
    finally:
        _stop(process)
        work.unlink(missing_ok=True)
    seconds = time.monotonic() - began
    record, problem = _fresh_record(figures_folder() / study / "record.json", started)
    if not in_time:
        record, problem = None, f"  it was stopped: it took longer than {timeout:g} s (--timeout)"
    elif process.returncode != 0 or record is None:
        record, problem = None, _last_words(_clean(log).splitlines(), process.returncode, problem)
    progress.close("done" if record else "FAILED", seconds)
    return StudyRun(study, record, problem, seconds)


def _follow(process: subprocess.Popen, log: Path, progress: ProgressLine, deadline: float) -> bool:
    """Show how far papermill is by its log, until it ends; returns False where the deadline comes first."""
    while time.monotonic() < deadline:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
        cells = _CELL_STARTS.findall(log.read_text(encoding="utf-8", errors="replace"))
        progress.show(int(cells[-1]) if cells else 0)
        if process.returncode is not None:
            return True
    return False


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


def _fresh_record(path: Path, started: datetime) -> tuple[Record | None, str]:
    """The valid record of a run that started not before; else None, and what is wrong."""
    try:
        record = validate_record(path)
    except RecordError as error:
        return None, str(error)
    if record.started < started:
        return None, f"{path} is of an earlier run: the notebook never started its study"
    return record, ""


def _clean(log: Path) -> str:
    """A log without the colours of tracebacks, which go from the file as well."""
    text = _ANSI.sub("", log.read_text(encoding="utf-8", errors="replace"))
    log.write_text(text, encoding="utf-8")
    return text


def _last_words(lines: Sequence[str], status: int, problem: str) -> str:
    """What papermill said last: the notebook's own error where there is one."""
    spoken = [line for line in lines if line.strip() and not _LOG_LINE.match(line)]
    heads = [i for i, line in enumerate(spoken) if line.startswith("Exception encountered at")]
    words = spoken[heads[-1] :][:1] + spoken[heads[-1] + 1 :][-11:] if heads else spoken[-3:]
    if status < 0:
        words.append(f"papermill was killed by {signal.Signals(-status).name}")
    if status == 0:
        words = [problem]
    return textwrap.indent("\n".join(words), "  ")


# -- what is left behind ---------------------------------------------------------------------------


def _store(notebook: Path, executed: Path) -> None:
    """Put the executed notebook, without papermill's times and paths, in place of the old one."""
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


def _show_own_figures(executed: Path) -> None:
    """Let pictures in the text of an executed notebook be those of its run, which lie beside it."""
    text = executed.read_text(encoding="utf-8")
    write_whole(executed, re.sub(r"\((\.\./)+figures/", "(figures/", text).encode())


def _write_claims(path: Path) -> None:
    """One table of the claims of all valid records among the run's figures."""
    records = []
    for record in record_paths(figures_folder()).values():
        with suppress(RecordError):
            records.append(validate_record(record))
    write_whole(path, claims_table(records, width=120).encode())


def _report(finished: Sequence[StudyRun], output: Path) -> None:
    print()
    if records := [ended.record for ended in finished if ended.record]:
        print(claims_table(records))
    for study, record, problem, _ in finished:
        if not record:
            print(f"FAILED {study} (log: {output / study}.log)\n{problem}\n")
    print(
        f"{len(records)} of {len(finished)} studies left a valid record "
        f"in {clock(sum(ended.seconds for ended in finished))}; "
        f"figures in {figures_folder()}, notebooks and claims.txt in {output}"
    )
