"""Sweeps: the YAML is checked before anything runs, jobs fail and are killed without harm to the others."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from scipy import stats

from lib import ROOT
from lib.core.record import validate_record
from lib.tools.seeds import read_numbers
from sweeps import sweep

TINY = {
    "seq_len": 60, "window": 40, "n_layouts": 4, "n_selecting": 1, "layer": 4, "n_heads": 2, "dim": 64,
    "n_seeds": 2, "n_bootstrap": 100,
}  # fmt: skip
MEASURE = """study.metric("accuracy/induction", 0.5 + 0.1 * p.seed, n=4)
study.metric("lost", None, reason="nothing was lost")
from lib.core.claims import Claim
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
    with pytest.raises(sweep.SweepError, match="layer"):
        sweep.read_sweep(path)
    content = yaml.safe_load(path.read_text())
    del content["studies"]["02_neighbor_mixing"]["parameters"]["layer"]
    jobs = sweep.read_sweep(write(tmp_path, **content["studies"]))
    assert len(jobs) == 2 + 1 * 2 * 2 * 2 == len({job.name for job in jobs})
    assert {job.group for job in jobs[:2]} == {"induction"}
    assert {(job.seed, job.parameters["layer"], job.parameters["n_heads"]) for job in jobs[2:]} == {
        (seed, layer, n_heads) for seed in (0, 1) for layer in (3, 4) for n_heads in (2, 8)
    }


WRONG = [
    ({"02_neighbor_mixin": {}}, "'02_neighbor_mixin'"),
    ({"02_neighbor_mixing": {"models": []}}, "models"),
    ({"02_neighbor_mixing": {"model": ["m"]}}, "'model'"),
    ({"02_neighbor_mixing": {"models": ["m"], "seeds": 3}}, "seeds"),
    ({"02_neighbor_mixing": {"models": ["m"], "parameters": {"dimm": 64}}}, "'dimm'"),
    ({"02_neighbor_mixing": {"models": ["m"], "grid": {"n_heads": 1}}}, "grid"),
    ({"02_neighbor_mixing": {"models": ["m"], "grid": {"n_heads": [-1]}}}, "n_heads"),
    ({"02_neighbor_mixing": {"models": ["m"], "parameters": {"out_dir": "x"}}}, "out_dir"),
    ({"02_neighbor_mixing": {"models": ["m"], "headline": ["a"]}}, "headline"),
    ({"02_neighbor_mixing": {"models": ["m", "m"]}}, "2 times"),
    ({"02_neighbor_mixing": {"models": ["/no/such/folder"]}}, "/no/such/folder"),
]


@pytest.mark.parametrize(("studies", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_sweep_is_refused_with_the_culprit_named(tmp_path, studies, message):
    with pytest.raises(sweep.SweepError, match=f"sweep.yaml: .*{message}"):
        sweep.read_sweep(write(tmp_path, **studies))


def test_name_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("studies:\n  02_neighbor_mixing: {models: [a]}\n  02_neighbor_mixing: {models: [b]}\n")
    with pytest.raises(sweep.SweepError, match="02_neighbor_mixing"):
        sweep.read_sweep(path)


# --- jobs and what is collected of them, without Snakemake


@pytest.fixture
def notebooks(write_notebook, figures) -> Path:
    return write_notebook(MEASURE).parent


def jobs_of(tmp_path: Path, seeds: list[int]) -> list[sweep.Job]:
    entry = {"models": ["organism/induction"], "seeds": seeds}
    return sweep.read_sweep(write(tmp_path, **{"01_induction_ablation": entry}))


def test_job_runs_again_only_when_its_result_or_notebook_changed(
    tmp_path, notebooks, write_notebook, monkeypatch
):
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
    others = {"compare_with": ["organism/a", "organism/b"]}
    prompts = {} if changed.startswith("data/prompts") else {"prompts": "my/pairs.jsonl"}
    job = sweep.Job("3a_refusal_instrument", "g", "my/model", 0, {"judge": "phrases"} | others | prompts)
    before = sweep._identity(job, sweep.NOTEBOOKS)
    put("data/organisms/a/README.md", "a card that is reworded changes no result")
    put("data/organisms/a/manifest.json", '{"model.safetensors": "1", "README.md": "2", "record.json": "2"}')
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


LOOP = """import sys
from pathlib import Path
from sweeps import sweep
path, out, notebooks = map(Path, sys.argv[1:])
for job in sweep.read_sweep(path):
    print(sweep.run_job(job, out, 600, notebooks), flush=True)"""


def test_killed_loop_over_jobs_takes_the_result_of_the_kernel_that_outlived_it(
    tmp_path, write_notebook, figures
):
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
    run.kill()
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
    with pytest.raises(sweep.SweepError, match=f"did you mean {job.name}"):
        sweep.main(["job", str(tmp_path / "sweep.yaml"), str(tmp_path / "out"), job.name[:-1]])


def test_collected_table_holds_every_number_with_where_it_is_from_and_what_failed(
    tmp_path, write_notebook, figures
):
    notebooks = write_notebook("assert p.seed != 2, 'no such walk'", MEASURE).parent
    jobs = jobs_of(tmp_path, [0, 1, 2, 3])
    said = [sweep.run_job(job, tmp_path / "out", 600, notebooks) for job in jobs[:3]]
    assert said[:2] == ["", ""] and "AssertionError: no such walk" in said[2]
    assert "no such walk" in (tmp_path / "out" / jobs[2].name / f"{jobs[2].study}.ipynb").read_text()
    collected = sweep.collect(tmp_path / "sweep.yaml", tmp_path / "out", notebooks)
    assert collected.startswith("4 jobs: 2 done, 1 failed, 1 not run")
    rows = read_csv(tmp_path / "out" / "results.csv")
    assert [(row["seed"], row["status"], row["kind"], row["value"]) for row in rows] == [
        ("0", "done", "metric", "0.5"), ("0", "done", "metric", ""), ("0", "done", "claim", "0.3"),
        ("1", "done", "metric", "0.6"), ("1", "done", "metric", ""), ("1", "done", "claim", "0.3"),
        ("2", "failed", "", ""), ("3", "not run", "", ""),
    ]  # fmt: skip
    assert rows[6]["note"] == "AssertionError: no such walk"
    assert rows[0]["name"] == "accuracy/organism/induction" and rows[1]["note"] == "nothing was lost"
    assert (rows[2]["low"], rows[2]["high"], rows[2]["verdict"]) == ("0.2", "0.4", "holds")
    record = validate_record(tmp_path / "out" / jobs[0].name / jobs[0].study / "record.json")
    assert (rows[0]["code"], rows[0]["commit"][:40]) == (record.code, record.commit)
    mean, lost, claim = read_numbers(tmp_path / "out" / "between_seeds.csv")
    assert (mean.mean, mean.n, mean.unit) == (pytest.approx(0.55), 2, "seeds")
    assert mean.values == {"0": 0.5, "1": 0.6, "2": None, "3": None}
    assert (lost.mean, lost.low, lost.n, lost.summary) == (None, None, 0, "none, n = 0 of 4")
    assert claim.low == claim.high == 0.3 and claim.verdicts["1"] == "holds" and claim.verdicts["3"] == "none"
    for suffix in ("svg", "png"):
        assert (tmp_path / "out" / f"between_seeds.{suffix}").stat().st_size > 1000


def row(model: str, seed: int, value: float | None, name: str = "a") -> dict:
    fixed = {"study": "s", "group": "g", "parameters": "{}", "kind": "metric"}
    return fixed | {"name": name, "model": model, "seed": seed, "value": value}


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


def test_headline_numbers_come_first_in_their_order():
    rows = [row("m", 0, 1.0), row("m", 0, 2.0, "b/g"), row("m", 0, 3.0, "c")]
    found = sweep.between_seeds(rows, {"s": {"c": "see", "b/{group}": "be"}})
    assert [(number.name, number.label) for number in found] == [("c", "see"), ("b/g", "be"), ("a", "")]


def test_t_interval_is_that_of_the_t_test_and_none_for_one_value():
    values = [0.3, 0.5, 0.4]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert sweep.t_interval(values) == pytest.approx((np.mean(values), low, high))
    assert sweep.t_interval([2.0]) == (2.0, None, None)
    assert sweep.t_interval([]) == (None, None, None)


def test_number_named_after_its_model_is_compared_between_seeds():
    job = sweep.Job("3a_refusal_instrument", "lowrank", "organism/refusal-lowrank-seed2", 0, {})
    assert sweep._common_name("k_star/lowrank-seed2/layers", job) == "k_star/lowrank/layers"
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
