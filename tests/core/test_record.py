from __future__ import annotations

import ast
import functools
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel

import lib.core.record
from lib import ROOT
from lib.core.cache import Cache
from lib.core.claims import Claim
from lib.core.parameters import ParameterError
from lib.core.record import RecordError, Study, cells_hash, read_records, record_paths, validate_record
from lib.induction.parameters import InductionAblation, NeighborMixing

KEY = {"code": "of this file", "seq_len": 200, "weights": "abc", "ks": [1, 2]}


@pytest.fixture
def study(figures) -> Study:
    return Study(InductionAblation, {"seq_len": 300})


@pytest.fixture
def figure():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(2, 2))
    axes.plot([0, 1], [0, 1], "o-")
    axes.imshow(np.eye(3))
    yield fig
    plt.close(fig)


class Counted:
    """A computation that counts its calls."""

    def __init__(self, **arrays):
        self.arrays, self.calls = arrays or {"a": np.arange(1000.0), "nan": np.array([np.nan])}, 0

    def __call__(self):
        self.calls += 1
        return self.arrays


# --- cache


def test_second_run_reads_what_the_first_computed(tmp_path, capsys):
    compute = Counted()
    first = Cache(tmp_path).get("sweep", KEY, compute)
    again = Cache(tmp_path).get("sweep", KEY, compute)
    assert compute.calls == 1 and capsys.readouterr() == ("", "")
    for name, array in compute.arrays.items():
        np.testing.assert_array_equal(first[name], array)
        np.testing.assert_array_equal(again[name], array)
        assert again[name].dtype == array.dtype


@pytest.mark.parametrize(
    "other",
    [{**KEY, "seq_len": 201}, {**KEY, "ks": [2, 1]}, {**KEY, "ks": [1.0, 2]}, {**KEY, "mask": np.eye(2)}],
)
def test_another_key_is_another_result(tmp_path, other):
    compute = Counted()
    Cache(tmp_path).get("sweep", KEY, compute)
    Cache(tmp_path).get("sweep", other, compute)
    Cache(tmp_path).get("other sweep", KEY, compute)
    assert compute.calls == 3


def test_arrays_in_a_key_count_by_content(tmp_path):
    compute = Counted()
    for mask in (np.eye(2), np.eye(2), np.eye(2, dtype=bool), np.eye(2).reshape(-1)):
        Cache(tmp_path).get("sweep", KEY | {"mask": mask}, compute)
    assert compute.calls == 3


def test_code_and_library_versions_are_part_of_the_key(tmp_path, monkeypatch):
    compute = Counted()
    Cache(tmp_path).get("sweep", KEY, compute)
    with monkeypatch.context() as patch:
        patch.setattr(lib.core.cache, "code_version", lambda wing: "other code")
        Cache(tmp_path).get("sweep", KEY, compute)
    with monkeypatch.context() as patch:
        patch.setattr(lib.core.cache.metadata, "version", lambda package: "0.0")
        Cache(tmp_path).get("sweep", KEY, compute)
    assert compute.calls == 3


def test_function_whose_code_is_in_no_key_is_refused(tmp_path):
    computes = [Counted(), lambda: {"x": 1}, functools.partial(Counted().__call__)]
    for enabled in (True, False):
        for compute in computes:
            with pytest.raises(ValueError, match="cache sweep: test_record"):
                Cache(tmp_path, enabled).get("sweep", {"seq_len": 200}, compute)
    compute = functools.partial(lib.core.cache._arrays, "x", {"x": [1]})
    assert Cache(tmp_path).get("sweep", {"seq_len": 200}, compute)["x"].tolist() == [1]


def test_edit_of_lib_in_a_running_process_gives_a_version_of_its_own(monkeypatch):
    before, edited = lib.core.cache.code_version(), {"core/record.py": "edited"}
    monkeypatch.setattr(lib.core.cache, "_sources", lambda: edited)
    during = lib.core.cache.code_version()
    monkeypatch.setattr(lib.core.cache, "_AT_IMPORT", edited)
    assert len({before, during, lib.core.cache.code_version()}) == 3


def test_a_version_is_of_core_and_one_wing(monkeypatch):
    files = {"core/record.py": "1", "codi/latents.py": "1", "refusal/search.py": "1"}
    versions = []
    for edited in (None, "codi/latents.py", "refusal/search.py", "core/record.py"):
        now = files | ({edited: "2"} if edited else {})
        monkeypatch.setattr(lib.core.cache, "_sources", lambda now=now: now)
        monkeypatch.setattr(lib.core.cache, "_AT_IMPORT", now)
        versions.append([lib.core.cache.code_version(wing) for wing in ("codi", "")])
    of_codi, of_all = zip(*versions, strict=True)
    assert len({*of_all}) == 4
    assert of_codi[0] == of_codi[2] and len({*of_codi}) == 3


def test_what_computes_imports_nothing_that_draws():
    """A study's key is made of the modules that compute, so none of them may rest on one that draws."""
    for name, text in lib.core.cache._sources().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib."):
                names = {*node.module.split("."), *(alias.name for alias in node.names)}
                drawing = {part for part in names if part.split("_")[-1] in lib.core.cache._DRAWING}
                assert not drawing or name.startswith("tools/"), f"lib/{name} imports {drawing}"


@pytest.mark.parametrize("value", [float("nan"), {1: 2}, object(), {"x": {3}}])
def test_key_that_json_would_change_is_refused(tmp_path, value):
    with pytest.raises((TypeError, ValueError)):
        Cache(tmp_path).get("sweep", KEY | {"value": value}, Counted())
    assert not list(tmp_path.iterdir())


def test_objects_are_refused_before_they_are_pickled(tmp_path):
    with pytest.raises(TypeError, match="sweep: x is no array"):
        Cache(tmp_path).get("sweep", KEY, lambda: {"x": [object()]})


def test_flip_of_any_bit_is_noticed_and_named(tmp_path, capsys):
    compute = Counted(a=np.arange(4.0))
    cache = Cache(tmp_path)
    cache.get("sweep", KEY, compute)
    [entry] = tmp_path.iterdir()
    good = entry.read_bytes()
    places = [*range(0, len(good), 7), len(good) - 1]
    for calls, place in enumerate(places, start=2):
        entry.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        np.testing.assert_array_equal(cache.get("sweep", KEY, compute)["a"], compute.arrays["a"])
        assert compute.calls == calls, f"flip in byte {place} was not noticed"
        assert str(entry) in capsys.readouterr().err
        assert entry.read_bytes() == good


def test_entry_of_another_key_is_not_taken(tmp_path, capsys):
    cache, compute = Cache(tmp_path), Counted()
    cache.get("sweep", KEY, compute)
    [mine] = tmp_path.iterdir()
    cache.get("sweep", KEY | {"other": 1}, compute)
    [other] = set(tmp_path.iterdir()) - {mine}
    other.replace(mine)
    cache.get("sweep", KEY, compute)
    assert compute.calls == 3
    assert "another key" in capsys.readouterr().err


def test_cache_turned_off_neither_reads_nor_writes(tmp_path):
    compute = Counted()
    for _ in range(2):
        Cache(tmp_path, enabled=False).get("sweep", KEY, compute)
    assert compute.calls == 2 and not list(tmp_path.iterdir())


def _write_and_read(folder: str, worker: int) -> bool:
    expected = np.full(200_000, 1.0)
    results = [Cache(folder).get("shared", KEY | {"i": i}, lambda: {"x": expected})["x"] for i in range(5)]
    return all((result == expected).all() for result in results)


def test_many_processes_write_the_same_entries(tmp_path, capfd):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert all(pool.starmap(_write_and_read, [(str(tmp_path), worker) for worker in range(8)]))
    assert len(list(tmp_path.iterdir())) == 5
    assert "damaged" not in capfd.readouterr().err


def test_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "elsewhere"))
    Cache().get("sweep", KEY, Counted())
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1
    monkeypatch.delenv("CACHE_DIR")
    assert Cache().folder == ROOT / ".cache"


def test_cache_that_can_not_be_used_is_told_once_and_what_was_computed_is_returned(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    for value in (1, 2):
        assert cache.get("sweep", KEY | {"x": value}, lambda value=value: {"x": value})["x"] == value
    [said] = capsys.readouterr().err.splitlines()
    assert f"{cache.folder} can not be used" in said


# --- study and record


def finish(study: Study, figure) -> Path:
    study.figure(figure, "accuracy", alt="Accuracy <rises> & stays", accuracy=np.arange(3.0))
    study.claim(Claim.test("a", "It rises", source="here", measured=0.2, interval=(0.1, 0.3), above=0.0))
    study.metric("accuracy", 0.9, interval=(0.8, 0.95), n="16 walks")
    study.metric("energy", None, reason="a word never occurred")
    study.model({"model_id": "organism/induction", "sha256": "0" * 64})
    study.close()
    return study.folder / "record.json"


def test_record_tells_what_was_run(study, figure, figures):
    path = finish(study, figure)
    assert path == figures / "01_induction_ablation" / "record.json"
    record = validate_record(path)
    assert record.parameters["seq_len"] == 300 and record.parameters["k_values"] == [1, 2, 5, 10, 20, 32]
    assert record.claims[0].verdict == "holds" and record.claims[0].interval == (0.1, 0.3)
    assert record.metrics["accuracy"].n == "16 walks" and record.metrics["energy"].value is None
    assert record.models == [{"model_id": "organism/induction", "sha256": "0" * 64}]
    assert set(record.artifacts) == {"accuracy.svg", "accuracy.png", "accuracy.npz"}
    assert record.versions["torch"].startswith("2.13.0") and record.peak_memory_mb > 10
    assert {file.name for file in path.parent.glob("[!.]*")} == {*record.artifacts, "record.json"}


def run_by_papermill(notebook: Path, *options: str) -> None:
    command = [sys.executable, "-m", "papermill", notebook, notebook.with_name("out.ipynb"), *options]
    subprocess.run(command, check=True, capture_output=True)


def run_by_nbval(notebook: Path) -> None:
    options = ["-c", os.devnull, "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env"]
    command = [sys.executable, "-m", "pytest", *options, notebook]
    run = subprocess.run(command, cwd=notebook.parent, capture_output=True, text=True)
    assert " passed" in run.stdout and " failed" not in run.stdout, run.stdout


def run_in_lab(notebook: Path, order: tuple[int, ...]) -> None:
    """Cell by cell, as JupyterLab does."""
    sources = [cell.source for cell in nbformat.read(notebook, as_version=4).cells]
    manager, client = start_new_kernel()
    for i in order:
        reply = client.execute_interactive(sources[i], allow_stdin=True, timeout=600, output_hook=str)
        assert reply["content"]["status"] == "ok"
        client.execute_interactive("1", store_history=False, timeout=600, output_hook=str)  # a tool
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_record_knows_the_cells_that_ran_however_the_notebook_was_run(write_notebook, figures):
    """The setup cell and all after it, without prose and parameters."""
    path = figures / "01_induction_ablation" / "record.json"

    def cells_of(run, *arguments) -> str:
        path.unlink(missing_ok=True)
        run(*arguments)
        return validate_record(path).notebook

    body = "from lib.core import claims  # a comment\n\nx = [p.seq_len,\n     2]"
    notebook = write_notebook(body, "_ = study.close()")
    expected = cells_hash(cell.source for cell in nbformat.read(notebook, as_version=4).cells[1:])
    assert cells_of(run_by_papermill, notebook, "-p", "seq_len", "300") == expected
    assert cells_of(run_by_nbval, notebook) == expected
    assert cells_of(run_in_lab, notebook, (0, 1, 2, 1, 2, 3)) == expected, "run again from the setup cell"
    assert cells_of(run_in_lab, notebook, (0, 1, 2, 2, 3)) != expected
    Study(InductionAblation, {}).close()
    assert validate_record(path).notebook is None, "no notebook ran"


def test_claim_stated_twice_counts_once(study):
    for measured in (0.2, -0.2):
        study.claim(Claim.test("a", "It rises", source="here", measured=measured, above=0.0))
    study.close()
    assert [claim.verdict for claim in validate_record(study.folder / "record.json").claims] == ["fails"]


def test_new_run_removes_the_old_record(study, figure):
    path = finish(study, figure)
    Study(InductionAblation, {})
    assert not path.exists()


def test_wrong_parameter_leaves_the_folder_alone(study, figure):
    path = finish(study, figure)
    with pytest.raises(ParameterError):
        Study(InductionAblation, {"seq_len": "abc"})
    validate_record(path)


@pytest.mark.parametrize("change", ["claim", "metric", "figure", "model"])
def test_result_after_the_record_reopens_the_run(study, figure, change):
    path = finish(study, figure)
    {
        "claim": lambda: study.claim(Claim.test("b", "x", source="here", measured=1, above=0)),
        "metric": lambda: study.metric("more", 1.0),
        "figure": lambda: study.figure(figure, "accuracy", alt="again", x=1),
        "model": lambda: study.model({"model_id": "gpt2"}),
    }[change]()
    assert not path.exists()
    study.close()
    validate_record(path)


@pytest.mark.parametrize("value", [float("nan"), None])
def test_metric_that_is_no_number_needs_a_reason(study, value):
    with pytest.raises(ValueError, match="metric energy"):
        study.metric("energy", value)


def test_record_that_can_not_be_written_leaves_none(study, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        study.close()
    assert list(study.folder.glob("[!.]*")) == []


def test_folder_of_another_study_is_left_as_it_is(study, figure, tmp_path):
    path = finish(study, figure)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(ParameterError, match="^out_dir: .* 01_induction_ablation"):
        Study(NeighborMixing, {"out_dir": str(path.parent)})
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_folder_that_can_not_be_written_to_is_said_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ParameterError, match=f"^out_dir: {tmp_path}/file/below"):
        Study(InductionAblation, {"out_dir": str(tmp_path / "file" / "below")})
    assert (tmp_path / "file").read_text() == ""


def test_what_a_killed_run_left_half_written_goes(study, figure):
    killed = """import os, sys
from lib.core.files import os, write_whole
from pathlib import Path
os.replace = lambda *_: os.kill(os.getpid(), 9)
write_whole(Path(sys.argv[1]), b"numbers")"""
    subprocess.run([sys.executable, "-c", killed, study.folder / "accuracy.npz"])
    [left] = study.folder.glob(".accuracy.npz.*")
    old, new = (study.cache.folder / f".sweep-{name}.npz.{left.suffix}" for name in ("old", "new"))
    for path in (old, new):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("numbers")
    os.utime(old, (0, 0))
    path = finish(Study(InductionAblation, {}), figure)
    assert not left.exists() and not list(path.parent.glob(".*.part"))
    assert new.exists() and not old.exists(), "another process may still write the new one"
    new.unlink()


RUN = """import sys
from lib.induction.parameters import InductionAblation
from lib.core.record import Study
study = Study(InductionAblation, {})
print("at work", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


@pytest.fixture
def other_run(figures):
    """A run of the study in a process of its own, which executes lines."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "at work\n"

    def execute(line: str) -> None:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"

    yield SimpleNamespace(process=process, execute=execute)
    process.kill()
    process.communicate()


def test_two_runs_at_once_do_not_share_a_folder(other_run, figure):
    culprit = f"^out_dir: .*process {other_run.process.pid}"
    with pytest.raises(ParameterError, match=culprit):
        Study(InductionAblation, {})
    other_run.execute("study.close()")
    validate_record(lib.core.record.figures_folder() / InductionAblation.study / "record.json")
    study = Study(InductionAblation, {})  # one that has finished is in nobody's way
    finish(study, figure)
    other_run.execute("study.metric('more', 1.0)")  # a cell that is run again
    with pytest.raises(ParameterError, match=culprit):
        study.metric("more", 1.0)


def test_run_that_was_killed_is_in_nobodys_way(other_run, figure):
    other_run.process.kill()
    other_run.process.wait()
    validate_record(finish(Study(InductionAblation, {}), figure))


def test_setup_cell_may_run_again(study, figure):
    again = Study(InductionAblation, {})
    study.close()  # the older one lets go of what both have
    finish(again, figure)
    finish(Study(InductionAblation, {}), figure)


def test_out_dir_is_taken_from_the_repository_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = os.path.relpath(tmp_path / "results", ROOT)
    assert Study(InductionAblation, {"out_dir": relative}).folder.resolve() == tmp_path / "results"
    assert Study(InductionAblation, {"out_dir": str(tmp_path / "x")}).folder == tmp_path / "x"


# --- figures


def test_figure_needs_alt_text_and_numbers(study, figure):
    with pytest.raises(ValueError, match="alt text"):
        study.figure(figure, "accuracy", alt=" ", x=1)
    with pytest.raises(ValueError, match="numbers"):
        study.figure(figure, "accuracy", alt="Accuracy rises")


def test_figure_has_alt_text_white_ground_and_its_numbers(study, figure):
    import matplotlib.image

    finish(study, figure)
    svg = (study.folder / "accuracy.svg").read_text()
    assert "<title>Accuracy &lt;rises&gt; &amp; stays</title>" in svg and "<dc:date>" not in svg
    artifacts = validate_record(study.folder / "record.json").artifacts
    assert artifacts["accuracy.png"].alt == "Accuracy <rises> & stays"
    pixels = matplotlib.image.imread(study.folder / "accuracy.png")
    assert pixels.ndim == 3 and (pixels[0, 0] == 1).all(), "the corner is not opaque white"
    assert np.load(study.folder / "accuracy.npz")["accuracy"].tolist() == [0, 1, 2]


def test_same_figure_has_the_same_bytes_in_another_process(tmp_path):
    code = (
        "import sys, matplotlib; matplotlib.use('agg'); import matplotlib.pyplot as plt\n"
        "from lib.induction.parameters import InductionAblation; from lib.core.record import Study\n"
        "study = Study(InductionAblation, {'out_dir': sys.argv[1]})\n"
        "fig, ax = plt.subplots(); ax.plot([0, 1], 'o-', label='a'); ax.imshow([[0, 1]]); ax.legend()\n"
        "study.figure(fig, 'f', alt='A line', x=[0, 1])"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
    for name in ("f.svg", "f.png", "f.npz"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_page_is_recorded_with_what_it_shows(study, figure):
    with pytest.raises(ValueError, match="alt text"):
        study.page("<p>", "dashboard", alt=" ")
    path = finish(study, figure)
    study.page("<p>α", "dashboard", alt="Attention, problem by problem")
    assert not path.exists(), "a record lists a page that came after it"
    study.close()
    assert (study.folder / "dashboard.html").read_text(encoding="utf-8") == "<p>α"
    artifact = validate_record(path).artifacts["dashboard.html"]
    assert artifact.alt == "Attention, problem by problem"


# --- validation


def test_missing_record_is_said_so(tmp_path):
    with pytest.raises(RecordError, match="there is no record"):
        validate_record(tmp_path / "record.json")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("}", ""),
        ('"seconds"', '"minutes"'),
        ('"value": 0.9', '"value": NaN'),
        ('_version": 1', '_version": 2'),
    ],
)
def test_broken_record_is_refused(study, figure, old, new):
    path = finish(study, figure)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(RecordError, match="record.json: "):
        validate_record(path)


def test_record_is_of_the_files_beside_it(study, figure):
    path = finish(study, figure)
    figure_file = path.parent / "accuracy.png"
    figure_file.write_bytes(figure_file.read_bytes() + b" ")
    with pytest.raises(RecordError, match="accuracy.png is not"):
        validate_record(path)
    figure_file.unlink()
    with pytest.raises(RecordError, match="accuracy.png is missing"):
        validate_record(path)


def test_records_are_read_in_order(figures, figure):
    for name in ("02_b", "01_a"):
        study = Study(InductionAblation, {"out_dir": str(figures / name)})
        study.close()
    assert len(read_records(figures)) == 2
    assert list(record_paths(figures)) == ["01_a", "02_b"]
    (figures / "01_a" / "record.json").write_text("{")
    with pytest.raises(RecordError, match="01_a"):
        read_records(figures)


def test_record_that_came_with_the_repository_can_be_told_from_ones_own(figures):
    Study(InductionAblation, {}).close()
    paths = record_paths()
    assert [record.study for record in read_records()] == list(paths)
    own = [study for study, path in paths.items() if path.is_relative_to(figures)]
    assert own == ["01_induction_ablation"] and len(paths) > 4
