"""Sweeps: the YAML is checked before anything runs, jobs fail and are killed without harm to the others."""

from __future__ import annotations

import csv
import fcntl
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from scipy import stats

from lib import ROOT
from lib.record import validate_record
from lib.seeds import read_numbers
from sweeps import sweep

TINY = {
    "seq_len": 60, "window": 40, "n_layouts": 4, "n_selecting": 1, "layer": 4, "n_heads": 2, "dim": 64,
    "n_seeds": 2, "n_bootstrap": 100,
}  # fmt: skip
MEASURE = """study.metric("accuracy/induction", 0.5 + 0.1 * p.seed, n=4)
study.metric("lost", None, reason="nothing was lost")
from lib.claims import Claim
study.claim(Claim.test("rises", "Accuracy rises", source="here",
                       measured=0.3, interval=(0.2, 0.4), above=0.1))
study.close()"""


def write(folder: Path, **studies: dict) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"studies": studies}))
    return path


def write_mixing(folder: Path, models: list[str], seeds: list[int]) -> Path:
    return write(folder, **{"02_neighbor_mixing": {"models": models, "seeds": seeds, "parameters": TINY}})


def read_csv(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- the YAML


def test_every_combination_is_a_job_with_a_folder_of_its_own(tmp_path):
    path = write(tmp_path, **{
        "01_induction_ablation": {
            "models": {"induction": ["organism/induction", "organism/induction-seed1"]},
        },
        "02_neighbor_mixing": {
            "models": ["organism/induction"], "seeds": [0, 1], "parameters": {"layer": 4, "dim": 64},
            "grid": {"layer": [3, 4], "n_heads": [2, 8]},
        },
    })  # fmt: skip
    with pytest.raises(sweep.SweepError, match="layer: it stands in parameters and in grid"):
        sweep.read_sweep(path)
    content = yaml.safe_load(path.read_text())
    del content["studies"]["02_neighbor_mixing"]["parameters"]["layer"]
    jobs = sweep.read_sweep(write(tmp_path, **content["studies"]))
    assert len(jobs) == 2 + 1 * 2 * 2 * 2 == len({job.name for job in jobs})
    assert {job.group for job in jobs[:2]} == {"induction"}
    assert {(job.seed, job.parameters["layer"], job.parameters["n_heads"]) for job in jobs[2:]} == {
        (seed, layer, n_heads) for seed in (0, 1) for layer in (3, 4) for n_heads in (2, 8)
    }


def test_shipped_sweep_names_all_studies_and_trained_seeds():
    jobs = sweep.read_sweep(ROOT / "sweeps" / "seeds.yaml")
    assert len({job.study for job in jobs}) == 4
    models = {job.model for job in jobs}
    assert {"organism/induction-seed2", "organism/refusal-lowrank-seed0", "organism/codi-seed1"} <= models


WRONG = [
    ({"02_neighbor_mixin": {}}, "no such study, '02_neighbor_mixin'; did you mean 02_neighbor_mixing?"),
    ({"00_start_here": {"models": ["m"]}}, "no such study, '00_start_here'"),
    ({"02_neighbor_mixing": {"seeds": [0]}}, "02_neighbor_mixing: models: none"),
    ({"02_neighbor_mixing": {"models": []}}, "models: none"),
    ({"02_neighbor_mixing": {"model": ["m"]}}, "no such entry, 'model'; did you mean models?"),
    ({"02_neighbor_mixing": {"models": ["m"], "seeds": 3}}, "seeds: a list is needed, not 3"),
    ({"02_neighbor_mixing": {"models": ["m"], "seeds": ["a"]}}, "seed: got 'a'; a whole number is needed"),
    ({"02_neighbor_mixing": {"models": ["m"], "parameters": {"dimm": 64}}}, "'dimm'; did you mean dim?"),
    ({"02_neighbor_mixing": {"models": ["m"], "parameters": {"dim": "x"}}}, "dim: got 'x'; a whole number"),
    ({"02_neighbor_mixing": {"models": ["m"], "grid": {"n_heads": 1}}}, "grid: names are needed, each"),
    ({"02_neighbor_mixing": {"models": ["m"], "grid": {"n_heads": [-1]}}}, "n_heads: got -1; at least 1"),
    ({"02_neighbor_mixing": {"models": ["m"], "parameters": {"out_dir": "x"}}}, "out_dir: the sweep sets it"),
    ({"02_neighbor_mixing": {"models": ["m"], "parameters": {"seed": 1}}}, "seed: give it as seeds"),
    ({"02_neighbor_mixing": {"models": ["m"], "headline": ["a"]}}, "headline: names of numbers, each with"),
    ({"02_neighbor_mixing": {"models": ["m", "m"]}}, "the same job is given 2 times"),
    ({"02_neighbor_mixing": {"models": ["organism/inductoin"]}}, "did you mean organism/induction?"),
    ({"02_neighbor_mixing": {"models": ["/no/such/folder"]}}, "/no/such/folder: there is no such folder"),
]


@pytest.mark.parametrize(("studies", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_sweep_is_refused_with_the_culprit_named(tmp_path, studies, message):
    with pytest.raises(sweep.SweepError) as error:
        sweep.read_sweep(write(tmp_path, **studies))
    assert message in str(error.value)
    assert all(line.startswith(f"{tmp_path / 'sweep.yaml'}: ") for line in str(error.value).splitlines())


def test_name_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("studies:\n  02_neighbor_mixing: {models: [a]}\n  02_neighbor_mixing: {models: [b]}\n")
    with pytest.raises(sweep.SweepError, match="02_neighbor_mixing stands twice"):
        sweep.read_sweep(path)


# --- jobs and what is collected of them, without Snakemake


@pytest.fixture
def notebooks(write_notebook, figures) -> Path:
    return write_notebook(MEASURE).parent


def jobs_of(tmp_path: Path, seeds: list[int]) -> list[sweep.Job]:
    entry = {"models": ["organism/induction"], "seeds": seeds}
    return sweep.read_sweep(write(tmp_path, **{"01_induction_ablation": entry}))


def test_job_runs_again_only_when_its_result_or_notebook_changed(tmp_path, notebooks, write_notebook):
    [job] = jobs_of(tmp_path, [1])
    record = tmp_path / "out" / job.name / job.study / "record.json"
    assert sweep.result(job, tmp_path / "out", notebooks).status == "not run"
    assert sweep.run_job(job, tmp_path / "out", 600, notebooks) == ""
    first = record.stat()
    assert validate_record(record).parameters["seed"] == 1
    assert sweep.run_job(job, tmp_path / "out", 600, notebooks) == ""
    assert record.stat() == first, "a finished job ran again"
    record.write_text(record.read_text()[:-20])
    assert sweep.result(job, tmp_path / "out", notebooks).status == "failed"
    assert sweep.run_job(job, tmp_path / "out", 600, notebooks) == ""
    validate_record(record)
    write_notebook("print('changed')", MEASURE)
    assert sweep.result(job, tmp_path / "out", notebooks).status == "outdated"
    assert sweep.run_job(job, tmp_path / "out", 600, notebooks) == ""
    assert sweep.result(job, tmp_path / "out", notebooks).status == "done"


def test_new_weights_under_an_old_name_are_run_again(tmp_path, notebooks, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_text("weights")
    entry = {"models": [str(model)], "seeds": [1]}
    [job] = sweep.read_sweep(write(tmp_path, **{"01_induction_ablation": entry}))
    record = tmp_path / "out" / job.name / job.study / "record.json"
    assert sweep.run_job(job, tmp_path / "out", 600, notebooks) == ""
    first = record.stat()
    assert sweep.result(job, tmp_path / "out", notebooks).status == "done"
    (model / "model.safetensors").write_text("others!")
    assert sweep.result(job, tmp_path / "out", notebooks).status == "outdated"
    collected = sweep.collect(tmp_path / "sweep.yaml", tmp_path / "out", notebooks)
    assert collected.startswith("1 jobs: 1 outdated;")
    assert sweep.run_job(job, tmp_path / "out", 600, notebooks) == ""
    assert record.stat() != first and sweep.result(job, tmp_path / "out", notebooks).status == "done"
    monkeypatch.setattr(sweep, "versions", lambda: {"torch": "0.0"})
    assert sweep.result(job, tmp_path / "out", notebooks).status == "outdated"


@pytest.mark.parametrize(
    "changed",
    [
        "data/organisms/a/manifest.json", "data/organisms/b/manifest.json", "my/model/model.safetensors",
        "my/pairs.jsonl", "data/prompts/pairs.jsonl",
    ],
)  # fmt: skip
def test_every_file_that_a_job_reads_is_part_of_what_it_is(tmp_path, monkeypatch, changed):
    def put(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    for organism in "ab":
        put(f"data/organisms/{organism}/manifest.json", '{"model.safetensors": "1", "README.md": "1"}')
    for name in ("my/model/model.safetensors", "my/pairs.jsonl", "data/prompts/pairs.jsonl"):
        put(name, "1")
    others = {"compare_with": ["organism/b", "my/model"]}
    prompts = {} if changed.startswith("data/prompts") else {"prompts": "my/pairs.jsonl"}
    job = sweep.Job("3a_refusal_instrument", "g", "organism/a", 0, others | prompts)
    before = sweep._identity(job, sweep.NOTEBOOKS)
    put("data/organisms/a/README.md", "a card that is reworded changes no result")
    put("data/organisms/a/manifest.json", '{"model.safetensors": "1", "README.md": "2"}')
    assert sweep._identity(job, sweep.NOTEBOOKS) == before
    put(changed, '{"model.safetensors": "2"}')
    assert sweep._identity(job, sweep.NOTEBOOKS) != before


def test_gguf_file_is_known_by_its_bytes(tmp_path):
    def identity(model: str) -> str:
        return sweep._identity(sweep.Job("1a_heads_in_language", "g", model, 0, {}), sweep.NOTEBOOKS)

    named = sweep.registry.find("SmolLM2-135M-Instruct")
    assert named.file.sha256 in identity(named.name)
    (tmp_path / "a.gguf").write_bytes(b"1")
    before = identity(str(tmp_path / "a.gguf"))
    (tmp_path / "a.gguf").write_bytes(b"2")
    assert identity(str(tmp_path / "a.gguf")) != before


def test_model_of_the_hub_is_known_by_its_revision():
    def identity(**given) -> str:
        return sweep._identity(sweep.Job("02_neighbor_mixing", "g", model, 0, given), sweep.NOTEBOOKS)

    model = "openai-community/gpt2"
    pinned = sweep.registry.pinned(model)
    assert (
        pinned in identity()
        and pinned not in identity(revision="main")
        and "main" in identity(revision="main")
    )
    model = "someone/else"
    assert '"someone/else": "newest"' in identity()


def test_failed_job_keeps_its_notebook_and_is_named_in_the_table(tmp_path, notebooks, write_notebook):
    good, bad = jobs_of(tmp_path, [1, 2])
    write_notebook("assert p.seed != 2, 'no such walk'", MEASURE)
    assert sweep.run_job(good, tmp_path / "out", 600, notebooks) == ""
    assert "AssertionError: no such walk" in sweep.run_job(bad, tmp_path / "out", 600, notebooks)
    said = sweep.collect(tmp_path / "sweep.yaml", tmp_path / "out", notebooks)
    assert said.startswith("2 jobs: 1 done, 1 failed") and "AssertionError: no such walk" in said
    executed = tmp_path / "out" / bad.name / f"{bad.study}.ipynb"
    assert "no such walk" in executed.read_text()
    [row] = [row for row in read_csv(tmp_path / "out" / "results.csv") if row["seed"] == "2"]
    assert (row["status"], row["note"]) == ("failed", "AssertionError: no such walk") and not row["name"]


def test_run_of_the_same_job_is_waited_for_and_its_result_taken(tmp_path, notebooks):
    [job] = jobs_of(tmp_path, [1])
    assert sweep.run_job(job, tmp_path / "out", 600, notebooks) == ""
    record = tmp_path / "out" / job.name / job.study / "record.json"
    first = record.stat()
    waiting = threading.Thread(target=sweep.run_job, args=(job, tmp_path / "out", 600, notebooks))
    with (tmp_path / "out" / job.name / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting.start()
        time.sleep(1)
        assert waiting.is_alive()
    waiting.join(600)
    assert not waiting.is_alive() and record.stat() == first


def test_kernel_that_outlived_its_job_is_waited_for_and_its_result_taken(tmp_path, notebooks):
    [job] = jobs_of(tmp_path, [1])
    home = tmp_path / "out" / job.name
    assert sweep.run_job(job, tmp_path / "out", 600, notebooks) == ""
    hold = f"""from pathlib import Path
from lib.record import Lock
lock = Lock(Path({str(home / job.study / ".lock")!r}))
lock.take()
input(print("held", flush=True) or "")"""
    kernel = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert kernel.stdout.readline() == "held\n"
    first = (home / job.study / "record.json").stat()
    waiting = threading.Thread(target=sweep.run_job, args=(job, tmp_path / "out", 600, notebooks))
    waiting.start()
    time.sleep(1.5)
    assert waiting.is_alive()
    kernel.communicate("")
    waiting.join(600)
    assert not waiting.is_alive() and (home / job.study / "record.json").stat() == first


LOOP = """import sys
from pathlib import Path
from sweeps import sweep
path, out, notebooks = map(Path, sys.argv[1:])
for job in sweep.read_sweep(path):
    print(sweep.run_job(job, out, 600, notebooks), flush=True)"""


@pytest.mark.parametrize("killed", ["all", "sweep"])
def test_loop_over_jobs_that_is_killed_resumes_and_redoes_nothing(tmp_path, write_notebook, figures, killed):
    go = tmp_path / "go"  # what the second job waits for
    wait = f"""import time
from pathlib import Path
while p.seed == 2 and not Path({str(go)!r}).exists():
    time.sleep(0.05)"""
    notebooks = write_notebook(wait, MEASURE).parent
    jobs, out = jobs_of(tmp_path, [1, 2]), tmp_path / "out"

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", LOOP, tmp_path / "sweep.yaml", out, notebooks]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    run = start()
    while not (out / jobs[1].name / jobs[1].study).exists():  # its study has begun
        assert run.poll() is None
        time.sleep(0.05)
    family = psutil.Process(run.pid).children(recursive=True)
    for member in (psutil.Process(run.pid), *(family if killed == "all" else ())):
        member.kill()
    run.wait()
    before = identities(out)
    assert list(before) == [jobs[0].name]
    go.touch()
    said = start().communicate(timeout=1500)[0]
    assert said == "\n\n"
    after = identities(out)
    assert len(after) == 2 and before.items() <= after.items(), "a finished job ran again"
    assert [sweep.result(job, out, notebooks).status for job in jobs] == ["done", "done"]
    assert psutil.wait_procs(family, timeout=120)[1] == []


def test_unknown_job_is_named_with_the_nearest(tmp_path):
    [job] = jobs_of(tmp_path, [1])
    with pytest.raises(sweep.SweepError, match=f"no such job, '{job.name[:-1]}'; did you mean {job.name}?"):
        sweep.main(["job", str(tmp_path / "sweep.yaml"), str(tmp_path / "out"), job.name[:-1]])


def test_collected_table_holds_every_number_with_where_it_is_from(tmp_path, notebooks):
    jobs = jobs_of(tmp_path, [0, 1, 3])
    for job in jobs[:2]:
        assert sweep.run_job(job, tmp_path / "out", 600, notebooks) == ""
    collected = sweep.collect(tmp_path / "sweep.yaml", tmp_path / "out", notebooks)
    assert collected.startswith("3 jobs: 2 done, 1 not run")
    rows = read_csv(tmp_path / "out" / "results.csv")
    assert [(row["seed"], row["status"], row["kind"], row["value"]) for row in rows] == [
        ("0", "done", "metric", "0.5"), ("0", "done", "metric", ""), ("0", "done", "claim", "0.3"),
        ("1", "done", "metric", "0.6"), ("1", "done", "metric", ""), ("1", "done", "claim", "0.3"),
        ("3", "not run", "", ""),
    ]  # fmt: skip
    assert rows[0]["name"] == "accuracy/organism/induction" and rows[1]["note"] == "nothing was lost"
    assert (rows[2]["low"], rows[2]["high"], rows[2]["verdict"]) == ("0.2", "0.4", "holds")
    record = validate_record(tmp_path / "out" / jobs[0].name / jobs[0].study / "record.json")
    assert (rows[0]["code"], rows[0]["commit"][:40]) == (record.code, record.commit)
    mean, lost, claim = read_numbers(tmp_path / "out" / "between_seeds.csv")
    assert (mean.mean, mean.n, mean.unit) == (pytest.approx(0.55), 2, "seeds")
    assert mean.values == {"0": 0.5, "1": 0.6, "3": None}
    assert (lost.mean, lost.low, lost.n, lost.summary) == (None, None, 0, "none, n = 0 of 3")
    assert claim.low == claim.high == 0.3 and claim.verdicts == {"0": "holds", "1": "holds", "3": "none"}
    for suffix in ("svg", "png"):
        assert (tmp_path / "out" / f"between_seeds.{suffix}").stat().st_size > 1000
    figure = (tmp_path / "out" / "between_seeds.svg").read_bytes()
    sweep.collect(tmp_path / "sweep.yaml", tmp_path / "out", notebooks)
    assert (tmp_path / "out" / "between_seeds.svg").read_bytes() == figure


def row(model: str, seed: int, value: float | None, name: str = "a") -> dict:
    return {
        "study": "s",
        "group": "g",
        "parameters": "{}",
        "kind": "metric",
        "name": name,
        "model": model,
        "seed": seed,
        "value": value,
    }


def test_interval_is_over_models_where_a_group_has_several_else_over_seeds():
    rows = [row("m0", 0, 1.0), row("m0", 1, 3.0), row("m1", 0, 4.0), row("m1", 1, 4.0)]
    [found] = sweep.between_seeds(rows)
    assert (found.mean, found.n, found.unit) == (3.0, 2, "models")
    assert found.values == {"m0": 2, "m1": 4}
    [found] = sweep.between_seeds([row("m0", 0, 1.0), row("m0", 1, 3.0), row("m0", 2, None)])
    assert (found.mean, found.n, found.unit) == (2.0, 2, "seeds")
    assert found.values == {"0": 1, "1": 3, "2": None}


def test_model_that_lacks_a_number_is_no_part_of_its_mean():
    rows = [row("m0", 0, 1.0), row("m1", 0, 2.0, "b"), row("m2", 0, None, "")]
    first, second = sweep.between_seeds(rows)
    assert (first.mean, first.low, first.n, first.values) == (1.0, None, 1, {"m0": 1, "m1": None, "m2": None})
    assert second.values == {"m0": None, "m1": 2, "m2": None}


def test_headline_numbers_come_first_in_their_order_and_unknown_ones_are_told(tmp_path, notebooks):
    rows = [row("m", 0, 1.0), row("m", 0, 2.0, "b/g"), row("m", 0, 3.0, "c")]
    found = sweep.between_seeds(rows, {"s": {"c": "see", "b/{group}": "be"}})
    assert [(number.name, number.label) for number in found] == [("c", "see"), ("b/g", "be"), ("a", "")]
    entry = {"models": ["organism/induction"], "headline": {"rises": "accuracy", "raises": "what is not"}}
    path = write(tmp_path, **{"01_induction_ablation": entry})
    [job] = sweep.read_sweep(path)
    assert sweep.run_job(job, tmp_path / "out", 600, notebooks) == ""
    said = sweep.collect(path, tmp_path / "out", notebooks)
    assert "headline: no job has a number called 'raises'" in said and "'rises'" not in said


def test_t_interval_is_that_of_the_t_test_and_none_for_one_value():
    values = [0.3, 0.5, 0.4]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert sweep.t_interval(values) == pytest.approx((np.mean(values), low, high))
    assert sweep.t_interval([2.0]) == (2.0, None, None)
    assert sweep.t_interval([]) == (None, None, None)


def test_number_named_after_its_model_is_compared_between_seeds():
    job = sweep.Job("3a_refusal_instrument", "lowrank", "organism/refusal-lowrank-seed2", 0, {})
    assert sweep._common_name("k_star/lowrank-seed2/layers", job) == "k_star/lowrank/layers"
    assert sweep._common_name("one-direction-lowrank-seed2", job) == "one-direction-lowrank"
    codi = sweep.Job("04_codi_attention", "G", "organism/codi", 0, {})
    assert sweep._common_name("accuracy/codi", codi) == "accuracy/G"
    assert sweep._common_name("accuracy/codi-results", codi) == "accuracy/codi-results"


# --- by Snakemake


@pytest.fixture
def snakemake(tmp_path):
    pytest.importorskip("snakemake", reason="Snakemake is in the extra sweep: pip install -e '.[sweep]'")

    def start(path: Path, *options: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", "-s", ROOT / "sweeps" / "Snakefile", "--cores", "1",
             "--config", f"sweep={path}", f"out={tmp_path / 'out'}", *options],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


def identities(folder: Path) -> dict[str, tuple]:
    records = sorted(folder.glob("*/*/record.json"))
    return {path.parts[-3]: (path.stat().st_ino, path.stat().st_mtime_ns) for path in records}


def test_snakemake_runs_nothing_of_a_wrong_sweep(tmp_path, snakemake):
    run = snakemake(write(tmp_path, **{"02_neighbor_mixing": {"models": ["m"], "parameters": {"dimm": 64}}}))
    said = run.communicate(timeout=1500)[0]
    assert run.returncode != 0 and "no such parameter, 'dimm'; did you mean dim?" in said
    assert not (tmp_path / "out").exists()


def test_failing_job_keeps_no_other_from_running_and_is_collected(tmp_path, snakemake):
    (tmp_path / "empty").mkdir()
    path = write_mixing(tmp_path, [str(tmp_path / "empty"), "organism/induction"], [0])
    run = snakemake(path)
    said = run.communicate(timeout=1500)[0]
    assert run.returncode != 0 and "2 jobs: 1 failed, 1 done" in said, said
    rows = read_csv(tmp_path / "out" / "results.csv")
    assert [row["note"] for row in rows if row["status"] == "failed"][0].startswith("ModelError: ")
    assert sum(row["status"] == "done" for row in rows) > 15
    [failed] = [job for job in sweep.read_sweep(path) if job.model != "organism/induction"]
    assert "ModelError" in (tmp_path / "out" / failed.name / "02_neighbor_mixing.ipynb").read_text()
    before = identities(tmp_path / "out")
    assert len(before) == 1
    assert snakemake(path).communicate(timeout=1500) and identities(tmp_path / "out") == before


def test_killed_sweep_resumes_and_redoes_nothing(tmp_path, snakemake):
    path, out = write_mixing(tmp_path, ["organism/induction"], [0, 1]), tmp_path / "out"
    run = snakemake(path)
    while len(list(out.glob("*/job.json"))) < 2:
        assert run.poll() is None
        time.sleep(0.1)
    family = psutil.Process(run.pid).children(recursive=True)
    for member in (psutil.Process(run.pid), *family):
        member.kill()
    psutil.wait_procs(family)
    run.communicate()
    before = identities(out)
    assert len(before) == 1 and not (out / "results.csv").exists()
    run = snakemake(path)
    said = run.communicate(timeout=1500)[0]
    assert run.returncode == 0 and "2 jobs: 2 done" in said, said
    after = identities(out)
    assert len(after) == 2 and before.items() <= after.items(), "a finished job ran again"
    assert {number.n for number in read_numbers(out / "between_seeds.csv") if number.n} == {2}
    for job in sweep.read_sweep(path):
        assert json.loads((out / job.name / "job.json").read_text())["seed"] == job.seed
        validate_record(out / job.name / job.study / "record.json")
