from __future__ import annotations

import base64
import io
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
from PIL import Image
from tiny import add_to_hub_cache, save_tiny, use_hub

from lib.core import registry
from lib.core.claims import Claim
from lib.core.record import Study, validate_record
from lib.induction.parameters import InductionAblation, NeighborMixing
from lib.tools import run

FINISH = """from lib.core.claims import Claim
study.claim(Claim.test("a", "Accuracy rises", source="Arditi-26", measured=0.3, interval=(0.2, 0.4),
                       above=0.1, published=0.9, n="16 walks"))
print("k_values", p.k_values, "seq_len", p.seq_len)
study.close()"""


@pytest.fixture
def run_studies(tmp_path, figures, capsys, monkeypatch):
    """Run the command line on the notebooks of this test; returns its status and what it printed."""
    monkeypatch.setenv("COLUMNS", "120")  # the table takes the terminal's width
    monkeypatch.setattr(InductionAblation, "embedded", {})

    def main(*argv: str) -> tuple[int, str]:
        status = run.main(list(argv), tmp_path / "notebooks", tmp_path / "runs")
        return status, capsys.readouterr().out

    return main


def test_finished_study_leaves_record_notebook_and_table(run_studies, write_notebook, figures, tmp_path):
    path = write_notebook(FINISH)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("![x](../figures/01_induction_ablation/x.png)"))
    nbformat.write(notebook, path)
    status, said = run_studies()
    assert status == 0
    assert "Accuracy rises (Arditi-26)  0.3 [0.2, 0.4] (16 walks)  > 0.1  0.9        holds" in said
    assert "1 of 1 studies left a valid record" in said
    validate_record(figures / "01_induction_ablation" / "record.json")
    output = tmp_path / "runs" / "latest"
    executed = nbformat.read(output / "01_induction_ablation.ipynb", as_version=4)
    assert executed.cells[0].source == "![x](figures/01_induction_ablation/x.png)", "those of its own run"
    assert "0.3 [0.2, 0.4]" in str(executed.cells[-1].outputs)
    assert "Accuracy rises (Arditi-26)  0.3 [0.2, 0.4]" in (output / "claims.txt").read_text()


def test_parameters_pass_through_papermill(run_studies, write_notebook, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    write_notebook("import os; print(os.environ['HF_HUB_OFFLINE'], os.environ['PROGRESS_FILE'])", FINISH)
    assert run_studies("-p", "k_values", "[4, 8]", "-y", "{seq_len: 3e2}")[0] == 0
    output = tmp_path / "runs" / "latest"
    log = (output / "01_induction_ablation.log").read_text()
    assert "k_values [4, 8] seq_len 300" in log and f"1 {output}/01_induction_ablation.progress" in log
    assert not list(output.glob("*.progress"))


def test_error_in_a_cell_is_shown_and_leaves_no_record(run_studies, write_notebook, figures):
    write_notebook(FINISH)
    assert run_studies()[0] == 0
    write_notebook("1 / 0", FINISH)
    status, said = run_studies()
    assert status == 1
    assert 'Exception encountered at "In [3]"' in said and "ZeroDivisionError: division by zero" in said
    assert not list(figures.rglob("record.json")), "the record of the earlier run is still there"


def test_killed_kernel_is_reported(run_studies, write_notebook, figures):
    write_notebook("import os; os.kill(os.getpid(), 9)", FINISH)
    status, said = run_studies()
    assert status == 1
    assert "Kernel died" in said and "0 of 1 studies" in said
    assert not list(figures.rglob("record.json"))


def test_notebook_that_starts_no_study_does_not_pass_by_the_old_record(run_studies, write_notebook):
    write_notebook(FINISH)
    assert run_studies()[0] == 0
    write_notebook("print('nothing')", setup="import os")
    status, said = run_studies()
    assert status == 1 and "is of an earlier run" in said


def test_misspelt_parameter_keeps_the_last_record(run_studies, write_notebook, figures):
    write_notebook(FINISH)
    assert run_studies()[0] == 0
    status, said = run_studies("-p", "seqlen", "200")
    assert status == 1 and "ParameterError: seqlen: " in said and "Traceback" not in said
    validate_record(figures / "01_induction_ablation" / "record.json")


def test_notebook_without_record_has_failed(run_studies, write_notebook):
    write_notebook("print('all fine')")
    status, said = run_studies()
    assert status == 1
    assert "there is no record; the study did not finish" in said


def test_study_that_takes_too_long_is_stopped_with_its_kernel(
    run_studies, write_notebook, tmp_path, monkeypatch
):
    mark, follow = tmp_path / "at work", run._follow

    def follow_once_at_work(*arguments) -> bool:
        while not mark.exists() or not mark.read_text():
            time.sleep(0.1)
        return follow(*arguments)

    monkeypatch.setattr(run, "_follow", follow_once_at_work)
    write_notebook(f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)")
    status, said = run_studies("--timeout", "0.5")
    assert status == 1 and "longer than 0.5 s" in said
    deadline = time.monotonic() + 60
    while psutil.pid_exists(int(mark.read_text())):
        assert time.monotonic() < deadline, "the kernel goes on"
        time.sleep(0.1)


def test_one_failure_does_not_keep_others_from_running_and_start_here_comes_last(
    run_studies, write_notebook, tmp_path
):
    good = write_notebook(FINISH)
    (tmp_path / "notebooks" / "00_start_here.ipynb").write_bytes(good.read_bytes())
    good.rename(tmp_path / "notebooks" / "02_neighbor_mixing.ipynb")
    write_notebook("1 / 0")
    status, said = run_studies()
    assert status == 1
    order = [said.index(f"\n{study} ") for study in ("02_neighbor_mixing", "00_start_here")]
    assert said.startswith("01_induction_ablation ") and order == sorted(order)


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [
        (["--study", "03"], "no study '03'"),
        (["-p", "out_dir", "x"], "FIGURES_DIR"),
        (["-f", "own.yaml"], "FIGURES_DIR"),
        (["--parameter", "seq_len", "300"], "--parameter"),
        (["-f", "none.yaml"], "none.yaml"),
        (["-y", "seed"], "parameters can not be read"),
        (["--refresh", "-p", "seq_len", "300"], "leave the parameters out"),
        (["--refresh", "--real"], "--real"),
        (["-p", "model_id", "openai-community/gpt2"], "--model"),
    ],
)
def test_impossible_request_is_refused_before_anything_runs(
    write_notebook, tmp_path, capsys, monkeypatch, argv, culprit
):
    write_notebook(FINISH)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("out_dir: x")
    with pytest.raises(SystemExit) as stop:
        run.main(argv, tmp_path / "notebooks", tmp_path / "runs")
    assert stop.value.code == 2
    assert culprit in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


TELL = """print(p.model_id, p.dtype, p.layer, "k_values", p.k_values, "seq_len", p.seq_len)
study.close()"""


@pytest.fixture
def gpt2_on_disk(tmp_path, monkeypatch):
    gpt2 = registry.find("gpt2")
    use_hub(monkeypatch, tmp_path / "hub")
    add_to_hub_cache(save_tiny("gpt2", tmp_path / "tiny"), tmp_path / "hub", gpt2.id, gpt2.revision)


def test_model_runs_with_its_parameters_in_a_folder_of_its_own(
    write_notebook, gpt2_on_disk, tmp_path, monkeypatch, capsys
):
    write_notebook(TELL)
    monkeypatch.delenv("FIGURES_DIR")
    words = ["--model", "gpt2", "-p", "seq_len", "300"]
    assert run.main(words, tmp_path / "notebooks", tmp_path / "runs") == 0
    assert capsys.readouterr().out.startswith("gpt2: on disk\n")
    [folder] = (tmp_path / "runs").iterdir()
    log = (folder / "01_induction_ablation.log").read_text()
    assert folder.name == "gpt2"
    assert "openai-community/gpt2 float32 10 k_values [1, 2, 4, 8, 16] seq_len 300" in log
    record = validate_record(folder / "figures" / "01_induction_ablation" / "record.json")
    assert record.parameters["revision"] == registry.find("gpt2").revision


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [
        (["--model", "gtp2"], "'gtp2'"),
        (["--model", "gpt2"], "none is here"),
        (["--model", "CODI-gpt2", "-p", "n_problems", "20"], "-p problems"),
        (["--model", "Qwen3-1.7B"], "HF_HUB_OFFLINE is set"),
    ],
)
def test_model_that_can_not_run_is_refused_before_anything_runs(
    write_notebook, gpt2_on_disk, tmp_path, capsys, argv, culprit
):
    path = write_notebook(TELL)
    for study in ("03_refusal_low_rank", "04_codi_attention"):
        (path.parent / f"{study}.ipynb").write_bytes(path.read_bytes())
    path.unlink()
    with pytest.raises(SystemExit) as stop:
        run.main(argv, tmp_path / "notebooks", tmp_path / "runs")
    assert stop.value.code == 2
    assert culprit in capsys.readouterr().err
    assert {each.name for each in tmp_path.iterdir()} == {"notebooks", "hub", "tiny"}


def test_own_weights_need_no_hub(planned, write_notebook, tmp_path, monkeypatch, capsys):
    use_hub(monkeypatch, tmp_path / "hub")
    write_notebook(TELL)
    own = ["-p", "model_id", "/my/llama", "-p", "seq_len", "500"]
    [(_, parameters, folder, *_)] = planned("--model", "Llama-3.1-8B", *own)
    assert (parameters["model_id"], parameters["seq_len"], folder) == ("/my/llama", 500, "Llama-3.1-8B")
    assert "revision" not in parameters, "a folder has no revision"
    assert "on disk" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (["-p", "prompts", "my_remote_pairs.jsonl"], {"prompts": "my_remote_pairs.jsonl"}),
        (["-p", "layer", "-1", "-p", "words", '["a", "b"]'], {"layer": -1, "words": ["a", "b"]}),
        (["-y", "{remote: true}", "-r", "seed", "3"], {"remote": True, "seed": "3"}),
        # As papermill has it: files, YAML, -p, -r, whatever their order.
        (
            ["-r", "a", "1", "-p", "a", "2", "-y", "{a: 3, b: 3}", "-f", "own.yaml"],
            {"a": "1", "b": 3, "c": 4},
        ),
    ],
)
def test_parameters_are_read_as_papermill_reads_them(
    write_notebook, planned, tmp_path, monkeypatch, options, given
):
    write_notebook(FINISH)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("{a: 4, b: 4, c: 4}")
    [(_, parameters, *_)] = planned("--real", *options)
    assert parameters == given


@pytest.mark.parametrize(
    ("options", "is_remote"),
    [
        (["-r", "remote", "no"], False),
        (["-p", "edges", "remote-revision"], False),  # a word within a value
        (["-p", "remote", "True"], True),
        (["-y", "{remote: 1}"], True),
    ],
)
def test_model_is_remote_when_the_user_says_so_alone(
    write_notebook, planned, gpt2_on_disk, options, is_remote
):
    write_notebook(TELL)
    [(_, parameters, *_)] = planned("--model", "gpt2", *options)
    assert parameters.get("revision") == (None if is_remote else registry.find("gpt2").revision)
    assert ("device" in parameters) != is_remote


def test_another_revision_of_a_model(planned, write_notebook, tmp_path, monkeypatch):
    use_hub(monkeypatch, tmp_path / "hub")  # of the pinned one nothing is there
    write_notebook(TELL)
    [(_, parameters, *_)] = planned("--model", "gpt2", "-y", "{revision: main}")
    assert parameters["revision"] == "main"


# --- which notebooks run, with which parameters


@pytest.fixture
def planned(tmp_path, figures, monkeypatch):
    """What the command line would run, in order: study, parameters, folder, offline, timeout."""
    found = []

    def note(notebook, executed, parameters, timeout, offline):
        found.append((notebook.stem, parameters, executed.parent.name, offline, timeout))
        return run.StudyRun(notebook.stem, None, "", 0)

    monkeypatch.setattr(run, "run_study", note)

    def plan(*argv: str) -> list[tuple]:
        run.main(list(argv), tmp_path / "notebooks", tmp_path / "runs")
        return found

    return plan


@pytest.fixture
def all_notebooks(write_notebook) -> dict[str, Path]:
    """Notebooks of five studies and two appendices, by name."""
    path = write_notebook(FINISH)
    names = ["00_start_here", "02_neighbor_mixing", "03_refusal_low_rank", "04_codi_attention"]
    (path.parent / "appendix").mkdir()
    for name in (*names, "appendix/1a_more", "appendix/2a_more"):
        (path.parent / f"{name}.ipynb").write_bytes(path.read_bytes())
    return {found.stem: found for found in path.parent.rglob("*.ipynb")}


MAIN = [
    "01_induction_ablation",
    "02_neighbor_mixing",
    "03_refusal_low_rank",
    "04_codi_attention",
    "00_start_here",
]


@pytest.mark.parametrize(
    ("argv", "studies"),
    [
        ([], MAIN),
        (["--real"], MAIN),
        (["--refresh"], [MAIN[0], "02_neighbor_mixing", *MAIN[2:4], "1a_more", "2a_more", "00_start_here"]),
        (["--study", "1a"], ["1a_more"]),
        (["--real", "--study", "01"], ["01_induction_ablation"]),
    ],
)
def test_appendices_run_when_named_or_to_be_stored(all_notebooks, planned, argv, studies):
    assert [study for study, *_ in planned(*argv)] == studies


def test_embedded_run_passes_the_schemas_parameters_and_fetches_nothing(all_notebooks, planned, monkeypatch):
    embedded = {"model_id": "organism/induction", "seq_len": 300}
    monkeypatch.setattr(InductionAblation, "embedded", embedded)
    by_study = {
        study: rest for study, *rest in planned("-p", "seq_len", "500", "-p", "model_id", "organism/x")
    }
    assert by_study["01_induction_ablation"][0] == {"model_id": "organism/x", "seq_len": 500}
    assert by_study["00_start_here"] == [{"seq_len": 500, "model_id": "organism/x"}, "latest", True, 3600]
    assert embedded["seq_len"] == 300


def test_real_run_is_as_the_notebooks_stand(all_notebooks, planned, monkeypatch):
    monkeypatch.setattr(InductionAblation, "embedded", {"seq_len": 300})
    assert planned("--real", "--study", "01") == [(MAIN[0], {}, "real", False, 86400)]


@pytest.mark.parametrize(
    ("name", "model_id", "folder"),
    [
        ("{tmp}/my model/", "{tmp}/my model", "my-model"),
        ("{tmp}/latest", "{tmp}/latest", "latest-model"),
        ("gone.gguf", "gone.gguf", "gone"),
        ("me/my-llama", "me/my-llama", "my-llama"),
    ],
)
def test_other_weights_run_through_the_studies_on_graphs(
    all_notebooks, planned, tmp_path, name, model_id, folder
):
    for each in ("my model", "latest"):
        (tmp_path / each).mkdir()
    runs = planned("--model", name.format(tmp=tmp_path))
    assert [study for study, *_ in runs] == ["01_induction_ablation", "02_neighbor_mixing"]
    for _, parameters, at, offline, _ in runs:
        assert (parameters["model_id"], at) == (model_id.format(tmp=tmp_path), folder) and not offline


def test_other_weights_run_in_the_study_that_is_named(all_notebooks, planned):
    [(study, parameters, *_)] = planned("--model", "me/my-llama", "--study", "03")
    assert study == "03_refusal_low_rank" and parameters["model_id"] == "me/my-llama"


def test_study_without_a_model_takes_none(all_notebooks, planned, capsys):
    with pytest.raises(SystemExit):
        planned("--model", "me/my-llama", "--study", "00")
    assert "me/my-llama: none of these takes a model: 00_start_here" in capsys.readouterr().err


# --- what is left behind


def test_table_is_of_all_records_beside_it(run_studies, write_notebook, tmp_path, figures):
    other = Study(NeighborMixing, {})
    other.claim(Claim.test("b", "Energy falls", source="here", measured=0.3, below=0.5))
    other.close()
    (figures / "04_broken").mkdir()
    (figures / "04_broken" / "record.json").write_text("{")
    write_notebook(FINISH)
    assert "Energy falls" not in run_studies("--study", "01")[1]
    table = (tmp_path / "runs" / "latest" / "claims.txt").read_text()
    assert "Accuracy rises" in table and "Energy falls" in table


DRAW = """import matplotlib.pyplot as plt
fig, ax = plt.subplots(figsize=(7, 3))
ax.imshow([[i * j for i in range(40)] for j in range(40)])
plt.show()"""


def test_refresh_stores_outputs_and_nothing_of_the_run(run_studies, write_notebook, tmp_path):
    words = "print('one', flush=True)\nimport time\ntime.sleep(0.5)\nprint('two')"
    notebook = write_notebook(words, DRAW, FINISH)
    assert run_studies("--refresh")[0] == 0
    stored = nbformat.read(notebook, as_version=4)
    assert [cell.execution_count for cell in stored.cells] == [1, 2, 3, 4, 5]
    assert [output.text for output in stored.cells[2].outputs] == ["one\ntwo\n"]
    assert "0.3 [0.2, 0.4]" in str(stored.cells[-1].outputs)
    assert stored.cells[0].metadata == {"tags": ["parameters"]} and stored.cells[1].metadata == {}
    assert "papermill" not in notebook.read_text()
    first = notebook.read_bytes()
    assert run_studies("--refresh")[0] == 0
    assert notebook.read_bytes() == first, "a second refresh differs"

    executed = nbformat.read(tmp_path / "runs" / "stored" / notebook.name, as_version=4)
    small, large = (
        base64.b64decode(each.cells[3].outputs[0].data["image/png"]) for each in (stored, executed)
    )
    few, all_colours = (
        np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), float) for png in (small, large)
    )
    differences = np.abs(few - all_colours)
    assert len(small) < 0.6 * len(large)
    assert differences.mean() < 1 and np.quantile(differences, 0.99) < 12, "of 255"


def test_failed_refresh_leaves_the_notebook(run_studies, write_notebook):
    notebook = write_notebook("1 / 0")
    before = notebook.read_bytes()
    assert run_studies("--refresh")[0] == 1
    assert notebook.read_bytes() == before


def test_output_that_can_not_be_written_is_refused_before_anything_runs(write_notebook, tmp_path, capsys):
    write_notebook(FINISH)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").write_text("a file")
    with pytest.raises(SystemExit) as stop:
        run.main([], tmp_path / "notebooks", tmp_path / "runs")
    assert stop.value.code == 2
    assert f"{tmp_path / 'runs' / 'latest'} can not be written to (" in capsys.readouterr().err


def test_two_runs_at_once_do_not_write_one_notebook(
    run_studies, write_notebook, tmp_path, figures, monkeypatch
):
    write_notebook(FINISH)
    executed = tmp_path / "runs" / "latest" / "01_induction_ablation.ipynb"
    executed.parent.mkdir(parents=True)
    executed.write_text("of the other run")
    monkeypatch.setattr(run.Lock, "take", lambda lock: "process 7")
    status, said = run_studies()
    assert status == 1 and "another run (process 7)" in said
    assert executed.read_text() == "of the other run" and not figures.exists()


@pytest.mark.parametrize(("name", "ignored"), [("SIGHUP", []), ("SIGTERM", ["SIGINT", "SIGHUP"])])
def test_run_that_is_stopped_takes_its_kernel_with_it(write_notebook, figures, tmp_path, name, ignored):
    """As by a scheduler, by a terminal that closes, which signals all of its group, by Ctrl-C, and by a
    scheduler that started it in the background: there a process finds signals ignored."""
    mark = tmp_path / "still running"
    work = f"import time\nfor i in range(2400):\n    time.sleep(0.25); open({str(mark)!r}, 'w').close()"
    write_notebook(work, FINISH)
    start = "import sys, lib, pathlib; lib.ROOT = pathlib.Path(sys.argv.pop(1)); "
    start += "from lib.tools.run import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", start, tmp_path, "--study", "01"],
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=partial(set_signals, ignored),
    )  # fmt: skip
    while not mark.exists():
        assert process.poll() is None
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2, "papermill and its kernel"
    os.killpg(process.pid, signal.Signals[name])
    said = process.communicate(timeout=600)
    assert process.returncode == 1 and "interrupted; what is cached will not be computed again" in said[1]
    assert psutil.wait_procs(family, timeout=120)[1] == [], "the kernel goes on"
    assert not list(figures.rglob("record.json"))


def set_signals(ignored: list[str]) -> None:
    for name in ("SIGINT", "SIGHUP"):  # the tests themselves may run in the background
        signal.signal(signal.Signals[name], signal.SIG_IGN if name in ignored else signal.SIG_DFL)
