"""Sweeps: one YAML names studies, models, seeds and parameters; every combination is a job of its own.

`sweeps/Snakefile` runs the jobs. This module reads and checks the YAML, runs one job
(`python sweeps/sweep.py job YAML FOLDER NAME`) and collects what all of them left in FOLDER
(`python sweeps/sweep.py collect YAML FOLDER`), at any time, whether or not they have finished.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lib import ROOT
from lib.core import registry
from lib.core.cache import code_version, versions
from lib.core.files import Lock
from lib.core.parameters import ParameterError, StudyParameters, check, schemas
from lib.core.record import Record, RecordError, cells_hash, validate_record
from lib.tools.run import interrupt_on_signals, run_study
from lib.tools.seeds import SeedNumber, write_numbers

NOTEBOOKS = ROOT / "notebooks"
_ENTRIES = ("models", "seeds", "parameters", "grid", "headline")
_PAIRS = "data/prompts/pairs.jsonl"  # of study 3, where neither a file nor an organism has prompts
_OWN = {"model_id": "models", "seed": "seeds", "out_dir": None}  # parameters that a sweep sets itself


class SweepError(ValueError):
    """A sweep's YAML is wrong; the message has one line for each problem."""


class Job(NamedTuple):
    """One run of one study."""

    study: str
    group: str  # models that are seeds of one another share a group
    model: str
    seed: int
    parameters: dict[str, Any]  # as the YAML gives them, defaults left out

    @property
    def name(self) -> str:
        """Its folder's name: what it is, and a hash of all that it was given."""
        given = json.dumps([self.study, self.model, self.seed, self.parameters], sort_keys=True)
        model = re.sub(r"[^\w.-]+", "-", self.model.rstrip("/").split("/")[-1])
        return f"{self.study}-{model}-seed{self.seed}-{hashlib.sha256(given.encode()).hexdigest()[:8]}"


class Result(NamedTuple):
    """How a job stands: "done", "outdated" (done by other code or of other files), "failed" or "not run"."""

    job: Job
    status: str
    record: Record | None
    error: str


# --- the YAML


def read_sweep(path: Path) -> list[Job]:
    """Jobs of a sweep, every parameter checked as the study's notebook will check it.

    Raises:
        SweepError: a line for each problem: misspelt names with the nearest right one, wrong values,
            models that are not there, a study without models, a job that is given twice.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError:
        raise SweepError(f"{path}: there is no such file") from None
    except yaml.YAMLError as error:
        raise SweepError(f"{path}: this is no YAML: {error}") from None
    studies = content.get("studies") if isinstance(content, dict) else None
    if not isinstance(studies, dict) or not studies or set(content) != {"studies"}:
        raise SweepError(f"{path}: one entry is needed, studies, with the name of each study below it")
    known = [name for name, schema in schemas().items() if issubclass(schema, StudyParameters)]
    jobs: list[Job] = []
    problems: list[str] = []
    for study, entry in studies.items():
        if study not in known:
            problems.append(f"{study}: {_unknown('study', study, known)}")
        else:
            problems += [f"{study}: {problem}" for problem in _expand(study, entry, jobs)]
    names = [job.name for job in jobs]
    problems += [
        f"{name}: the same job is given {names.count(name)} times"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if problems:
        raise SweepError("\n".join(f"{path}: {problem}" for problem in dict.fromkeys(problems)))
    return jobs


def read_headlines(path: Path) -> dict[str, dict[str, str]]:
    """What a checked sweep calls its headline numbers: study -> name of a metric or claim -> words."""
    studies = yaml.safe_load(path.read_text(encoding="utf-8"))["studies"]
    return {study: entry.get("headline") or {} for study, entry in studies.items()}


def _expand(study: str, entry: Any, jobs: list[Job]) -> list[str]:
    """Add a study's jobs to `jobs`; returns what is wrong with its entry."""
    if not isinstance(entry, dict):
        return [f"its entries are missing; there are {', '.join(_ENTRIES)}"]
    problems = [_unknown("entry", name, _ENTRIES) for name in entry if name not in _ENTRIES]
    models, seeds = entry.get("models"), entry.get("seeds", [0])
    fixed, grid = entry.get("parameters") or {}, entry.get("grid") or {}
    if isinstance(models, list):
        groups = [(model, [model]) for model in models]
    else:
        groups = list(models.items()) if isinstance(models, dict) else []
    if not groups or not all(_is_list(members) for _, members in groups):
        problems.append("models: none; give a list, or lists of one another's seeds, each under a name")
    if not _is_list(seeds):
        problems.append(f"seeds: a list is needed, not {seeds!r}")
    if not isinstance(fixed, dict):
        problems.append(f"parameters: names with values are needed, not {fixed!r}")
    if not isinstance(grid, dict) or not all(map(_is_list, grid.values())):
        problems.append("grid: names are needed, each with a list of values to try")
    headline = entry.get("headline") or {}
    if not isinstance(headline, dict) or not all(isinstance(x, str) and x for x in headline.values()):
        problems.append(f"headline: names of numbers, each with its meaning, are needed, not {headline!r}")
    if problems:
        return problems
    schema = schemas()[study]
    for name in [*fixed, *grid]:
        if name in _OWN:
            problems.append(f"{name}: {f'give it as {_OWN[name]}' if _OWN[name] else 'the sweep sets it'}")
        elif name not in schema.model_fields:
            problems.append(f"{name}: {_unknown('parameter', name, schema.model_fields)}")
        elif name in fixed and name in grid:
            problems.append(f"{name}: it stands in parameters and in grid")
    problems += [problem for _, members in groups for model in members if (problem := _absent(model))]
    if problems:
        return problems
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    for group, members in groups:
        for model, seed, chosen in itertools.product(members, seeds, combinations):
            given = {**fixed, **chosen}
            try:
                check(schema, {**given, "model_id": model, "seed": seed})
                jobs.append(Job(study, str(group), model, int(seed), given))
            except ParameterError as error:
                problems += str(error).splitlines()
    return problems


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _absent(model: Any) -> str:
    """What is wrong with a model that should be on this machine; a hub id is left to the study."""
    if not isinstance(model, str) or not model:
        return f"models: {model!r} is no name of a model"
    organisms = [f"organism/{path.parent.name}" for path in (ROOT / "data/organisms").glob("*/manifest.json")]
    if model.startswith("organism/") and model not in organisms:
        return f"models: {model}: {_unknown('embedded model', model, sorted(organisms))}"
    if model.startswith(("/", "~", ".")) and not (ROOT / Path(model).expanduser()).is_dir():
        return f"models: {model}: there is no such folder"
    return ""


def _unknown(kind: str, name: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), known := list(known), n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return f"no such {kind}, {name!r}; {hint}"


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a name that stands twice is an error; PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


# --- one job


def run_job(job: Job, folder: Path, timeout: float = float("inf"), notebooks: Path = NOTEBOOKS) -> str:
    """Run a job into its folder, unless it has finished there; returns "", or what went wrong.

    FOLDER/JOB holds the executed notebook as far as it came, papermill's log, error.txt if it failed, and
    STUDY/ with figures and record.json. Two runs of one job wait for each other: jobs that outlive a
    killed sweep, and kernels that outlive their jobs, are waited for by the next one, which takes their
    results.
    """
    home = folder / job.name
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            print(f"{home}: no locks on this file system ({error}); do not run the sweep twice at a time")
        kernel = Lock(home / job.study / ".lock")
        while kernel.path.exists() and kernel.take():
            time.sleep(1)
        kernel.release()
        if result(job, folder, notebooks).status == "done":
            return ""
        shutil.rmtree(home / job.study, ignore_errors=True)
        (home / "error.txt").unlink(missing_ok=True)
        (home / "job.json").write_text(_identity(job, notebooks), encoding="utf-8")
        given = {**job.parameters, "model_id": job.model, "seed": job.seed}
        os.environ["FIGURES_DIR"] = str(home)
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()):  # its progress line
            ended = run_study(_notebook(job, notebooks), home / f"{job.study}.ipynb", given, timeout)
        if ended.record is None:
            (home / "error.txt").write_text(ended.problem + "\n", encoding="utf-8")
        return ended.problem


def result(job: Job, folder: Path, notebooks: Path = NOTEBOOKS) -> Result:
    """How a job stands. It is done when its record is valid and of these parameters, notebook, code, versions
    of packages, and files of models and prompts."""
    home = folder / job.name
    try:
        record = validate_record(home / job.study / "record.json")
        same = (home / "job.json").read_text(encoding="utf-8") == _identity(job, notebooks)
    except (RecordError, OSError) as error:
        if (home / "error.txt").is_file():
            return Result(job, "failed", None, (home / "error.txt").read_text(encoding="utf-8").strip())
        broken = (home / job.study / "record.json").exists()
        return Result(job, "failed" if broken else "not run", None, str(error) if broken else "")
    done = (
        same and record.code == code_version(schemas()[record.study].wing()) and record.versions == versions()
    )
    return Result(job, "done" if done else "outdated", record, "")


def _identity(job: Job, notebooks: Path) -> str:
    """What a job is: its parameters, its notebook's code, and what is in the files that they name."""
    cells = json.loads(_notebook(job, notebooks).read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    p = check(schemas()[job.study], {**job.parameters, "model_id": job.model, "seed": job.seed})
    others = [*getattr(p, "compare_with", ()), *getattr(p, "answer_only", ())]
    models = {name: _model_digest(name) for name in others}
    models[p.model_id] = _model_digest(p.model_id, p.revision)
    given = [(p.prompts or _PAIRS) if hasattr(p, "prompts") else "", getattr(p, "problems", "")]
    paths = {name: ROOT / Path(name).expanduser() for name in given}
    files = {name: _file_digest(path) for name, path in paths.items() if path.is_file()}
    return json.dumps(
        {**job._asdict(), "notebook": cells_hash(code), "models": models, "files": files}, indent=1
    )


def _notebook(job: Job, notebooks: Path) -> Path:
    """Where a study's notebook stands."""
    folder = notebooks / "appendix" if schemas()[job.study].appendix else notebooks
    return folder / f"{job.study}.ipynb"


def _model_digest(model: str, revision: str = "") -> str:
    """What changes with a model's weights: a hash of its files, or the revision on the hub."""
    if model.startswith("organism/"):
        folder = ROOT / "data" / model.replace("organism/", "organisms/")
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))  # checked when loaded
        words = ("README.md", "record.json")  # on which no result depends
        files = {name: digest for name, digest in manifest.items() if name not in words}
    else:
        folder = ROOT / Path(model).expanduser()
        if folder.is_file():
            return _file_digest(folder)
        if not folder.is_dir():
            known = registry.lookup(model)
            pinned = known and (known.file.sha256 if known.file else known.revision)
            return revision or pinned or "newest"
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): _file_digest(path) for path in paths}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def _file_digest(path: Path) -> str:
    state = path.stat()
    return _digest_of(path, state.st_ino, state.st_size, state.st_mtime_ns)


@cache
def _digest_of(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- all of them


COLUMNS = ("study", "group", "model", "seed", "parameters", "status", "kind", "name", "value", "low", "high",
           "n", "verdict", "note", "job", "code", "commit", "seconds")  # fmt: skip


def tidy(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One row for each metric and claim of each job; a job without a record has one row, with its error."""
    rows = []
    for job, status, record, error in results:
        common = {
            "study": job.study,
            "group": job.group,
            "model": job.model,
            "seed": job.seed,
            "parameters": json.dumps(job.parameters, sort_keys=True),
            "status": status,
            "job": job.name,
        }
        if record is None:
            last = error.splitlines()[-1].strip() if error else ""
            rows.append(_row(common, note=_named_error(error) or last))
            continue
        commit = f"{record.commit or 'unknown'}{' with changes' if record.dirty else ''}"
        common |= {"code": record.code, "commit": commit, "seconds": record.seconds}
        for name, metric in record.metrics.items():
            low, high = metric.interval or (None, None)
            rows.append(
                _row(
                    common,
                    kind="metric",
                    name=_common_name(name, job),
                    value=metric.value,
                    low=low,
                    high=high,
                    n=metric.n,
                    note=metric.reason,
                )
            )
        for claim in record.claims:
            low, high = claim.interval or (None, None)
            rows.append(
                _row(
                    common,
                    kind="claim",
                    name=_common_name(claim.id, job),
                    value=claim.measured,
                    low=low,
                    high=high,
                    n=claim.n,
                    verdict=claim.verdict,
                    note=claim.reason,
                )
            )
    return rows


def between_seeds(
    rows: Iterable[Mapping[str, Any]], headlines: Mapping[str, Mapping[str, str]] | None = None
) -> list[SeedNumber]:
    """Mean and interval of each number over the seeds of its group.

    In a group of several models, a model is one unit, at the mean over its own seeds: walks drawn anew on
    the same weights are no further trained model. In a group of one model the units are its seeds.

    Args:
        rows: of `tidy`.
        headlines: of `read_headlines`. A study's headline numbers come first, in that order; {group} in
            their names stands for the group's.
    """
    runs: dict[tuple, dict[tuple, None]] = {}
    found: dict[tuple, dict[tuple, Mapping[str, Any]]] = {}
    for row in rows:
        place = tuple(row[key] for key in ("study", "group", "parameters"))
        runs.setdefault(place, {})[row["model"], row["seed"]] = None
        if row["name"]:
            found.setdefault((*place, row["kind"], row["name"]), {})[row["model"], row["seed"]] = row
    numbers = []
    for (*place, kind, name), measured in found.items():
        several = len({model for model, _ in runs[tuple(place)]}) > 1
        units: dict[str, list[Mapping[str, Any]]] = {}
        for run in runs[tuple(place)]:
            rows_of_unit = units.setdefault(str(run[0] if several else run[1]), [])
            rows_of_unit += [measured[run]] if run in measured else []
        values, verdicts = {}, {}
        for unit, rows_of_unit in units.items():
            known = [row["value"] for row in rows_of_unit if row["value"] is not None]
            values[unit] = sum(known) / len(known) if known else None
            if kind == "claim":
                verdicts[unit] = "/".join(dict.fromkeys(row["verdict"] for row in rows_of_unit)) or "none"
        known = [value for value in values.values() if value is not None]
        label = _labels(headlines or {}, *place[:2]).get(name, "")
        numbers.append(SeedNumber(*place, kind, name, label, *t_interval(known), len(known),
                                  "models" if several else "seeds", values, verdicts))  # fmt: skip

    def order(number: SeedNumber) -> tuple[int, int]:
        names = list(_labels(headlines or {}, number.study, number.group))
        place = (number.study, number.group, number.parameters)
        return list(runs).index(place), names.index(number.name) if number.label else len(names)

    return sorted(numbers, key=order)


def _labels(headlines: Mapping[str, Mapping[str, str]], study: str, group: str) -> dict[str, str]:
    return {name.replace("{group}", group): words for name, words in headlines.get(study, {}).items()}


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float | None, ...]:
    """Mean and both ends of Student's t-interval, for a few independent values that are about normal.

    Of one value there is no interval, of none no mean: None.
    """
    import numpy as np
    from scipy import stats

    n = len(values)
    mean = float(np.mean(values)) if n else None
    if n < 2:
        return mean, None, None
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return mean, mean - half, mean + half


def collect(path: Path, folder: Path, notebooks: Path = NOTEBOOKS) -> str:
    """Write results.csv, between_seeds.csv and the figure between_seeds.{svg,png}; returns a summary."""
    results = [result(job, folder, notebooks) for job in read_sweep(path)]
    headlines, rows = read_headlines(path), tidy(results)
    numbers = between_seeds(rows, headlines)
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "results.csv", rows)
    write_numbers(folder / "between_seeds.csv", numbers)
    for suffix in ("svg", "png"):
        (folder / f"between_seeds.{suffix}").unlink(missing_ok=True)
    shown = [each for each in numbers if each.label or (each.n and not headlines[each.study])]
    if any(each.n for each in shown):
        _draw(shown, folder)
    statuses = [each.status for each in results]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    troubles = [
        f"  {each.job.name}: {_named_error(each.error) or each.error}"
        for each in results
        if each.status == "failed"
    ]
    places = {(each.study, each.group): {n.name for n in numbers if n[:2] == each[:2]} for each in numbers}
    troubles += [
        f"  {study}, {group}: headline: no job has a number called {name!r}"
        for (study, group), names in places.items()
        for name in _labels(headlines, study, group)
        if name not in names
    ]
    return "\n".join([f"{len(results)} jobs: {counts}; table and figure in {folder}", *troubles])


def _row(common: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    return {**dict.fromkeys(COLUMNS), **common, **values}


def _named_error(problem: str) -> str:
    """The line of a problem that names the exception, such as "ModelError: there is no config.json"."""
    named = [line.strip() for line in problem.splitlines() if re.match(r"\s*[\w.]*(Error|Exception)\b", line)]
    return named[-1] if named else ""


def _common_name(name: str, job: Job) -> str:
    """A number's name with the model's own name in it replaced by that of its group."""
    last = job.model.rstrip("/").split("/")[-1]
    for short in sorted({last, last.removeprefix("refusal-")}, key=len, reverse=True):
        name = re.sub(rf"(^|[/ -]){re.escape(short)}(?=$|[/ ])", lambda found: f"{found[1]}{job.group}", name)
    return name


def _write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    part.replace(path)


def _draw(numbers: Sequence[SeedNumber], folder: Path) -> None:
    """A panel for each study, group and parameters; a row for each number, its seeds, mean and interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from lib.core import plots

    plots.use_house_style()
    panels: dict[tuple, list[SeedNumber]] = {}
    for number in numbers:
        panels.setdefault((number.study, number.group, number.parameters), []).append(number)
    heights = [len(rows) + 3 for rows in panels.values()]
    fig, axes = plt.subplots(
        len(panels), 1, figsize=(plots.PAGE, 0.2 * sum(heights)), squeeze=False, height_ratios=heights
    )
    for ax, ((study, group, parameters), rows) in zip(axes[:, 0], panels.items(), strict=True):
        several = len({other for *place, other in panels if place == [study, group]}) > 1
        given = "\n" + textwrap.shorten(parameters, 90) if several else ""
        ax.set_title(f"{study}, {group}{given}\n", fontsize=8.5)
        _draw_rows(ax, rows)
    label = "linear to 1, then logarithmic; tick: mean, band: its 95% t-interval, cut at the panel's edge"
    axes[-1, 0].set_xlabel(label, fontsize=7.5)
    alt = "Numbers of each study by trained seed, with their mean and its 95% interval between seeds."
    for suffix, metadata in (("svg", {"Date": None, "Title": alt}), ("png", {"Description": alt})):
        fig.savefig(folder / f"between_seeds.{suffix}", dpi=150, metadata=metadata)
    plt.close(fig)


def _draw_rows(ax: Any, rows: Sequence[SeedNumber]) -> None:
    """One row a number: a mark a seed, each a little lower than the one before so that equal ones show."""
    from lib.core import plots

    units = list(rows[0].values)
    heights = [0.4 * (i + 0.5) / len(units) - 0.2 for i in range(len(units))]
    for unit, below, marker in zip(units, heights, itertools.cycle("osD^vP")):
        found = [(row.values[unit], y + below) for y, row in enumerate(rows) if row.values[unit] is not None]
        ax.plot(*zip(*found, strict=True) if found else ((), ()), marker, color=plots.BLUE, markersize=4,
                label=unit.split("/")[-1])  # fmt: skip
    for y, row in enumerate(rows):
        if row.low is not None:
            ax.plot([row.low, row.high], [y, y], color=plots.SKY, linewidth=7, solid_capstyle="butt",
                    alpha=0.45, zorder=1)  # fmt: skip
        if row.n > 1:
            ax.plot(row.mean, y, "|", color=plots.BLACK, markersize=9)
        ax.annotate(row.summary, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=7.5)
    values = [0.0, *(value for row in rows for value in row.values.values() if value is not None)]
    edge = 0.15 * (max(values) - min(values) or 1)
    low, high = min(values) - edge, max(values) + edge
    ticks = [sign * part * 10.0**power for sign in (-1, 1) for power in range(9) for part in (0.2, 0.5, 1)]
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xticks([0, *(tick for tick in ticks if low < tick < high)])
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.set(xlim=(low, high), ylim=(len(rows) - 0.4, -0.6))
    ax.set_yticks(range(len(rows)), [row.label or row.name for row in rows], fontsize=7.5)
    ax.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncol=min(len(units), 4), fontsize=7.5,
              handletextpad=0.1, columnspacing=1)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    match argv:
        case ["collect", path, folder]:
            print(collect(Path(path), Path(folder)))
            return 0
        case ["job", path, folder, name]:
            jobs = {job.name: job for job in read_sweep(Path(path))}
            if name not in jobs:
                raise SweepError(f"{path}: {_unknown('job', name, jobs)}")
            interrupt_on_signals()
            problem = run_job(jobs[name], Path(folder))
            print(f"FAILED {name}\n{problem}" if problem else f"done {name}")
            return 1 if problem else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SweepError as wrong:
        sys.exit(str(wrong))
    except KeyboardInterrupt:
        sys.exit("interrupted")
