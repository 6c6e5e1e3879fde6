"""Every trace that can go remote is sent to a server without `lib` and gives the numbers of a local one."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from functools import partial
from pathlib import Path

import nnsight.ndif
import numpy as np
import pytest
import torch
from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES
from nnsight.intervention.backends.remote import RemoteError
from nnsight.schema.config import CONFIG
from papermill_runs import complaints, finish, start
from tiny import WORDS, save_tiny, use_hub
from transformers import GenerationConfig

from lib import ROOT
from lib.core import attention, families, interventions, models, sweeps
from lib.core.interventions import Condition, Projection, Shift
from lib.core.models import ModelError
from lib.core.parameters import ParameterError, check, schemas
from lib.core.record import validate_record
from lib.refusal import generation, removal, weight_edit

HUB_ID = "Lab/tiny"
ENDS = [1, 11, 12]
FAMILIES = ("llama", "gpt2")  # the two ways of naming everything


class Server:
    """The server in its interpreter, and the same model here."""

    def __init__(self, family: str, folder: Path, dtype: str = "float32"):
        self.family = family
        self.folder = save_tiny(family, folder / "model", chat=True)
        # As the makers of chat models have them answer; the tiny tokenizers know no end.
        settings = GenerationConfig(
            do_sample=True, temperature=2.0, top_p=0.9, repetition_penalty=5.0, eos_token_id=ENDS
        )
        settings.save_pretrained(self.folder)
        self.log = folder / "log"
        command = [sys.executable, "-I", "-S", str(ROOT / "tests" / "ndif_server.py")]
        self.process = subprocess.Popen(
            [*command, site.getsitepackages()[0], str(self.folder), HUB_ID, dtype], cwd=folder,
            env=os.environ | {"HF_HOME": str(folder / "cache")}, stdout=subprocess.PIPE, text=True,
            stderr=self.log.open("w"),
        )  # fmt: skip
        port = self.process.stdout.readline().strip()
        assert port, self.log.read_text()
        self.url = f"http://127.0.0.1:{port}"
        self.here = models.load(str(self.folder), dtype=dtype)


@pytest.fixture(scope="module", params=FAMILIES)
def server(request, tmp_path_factory):
    started = Server(request.param, tmp_path_factory.mktemp(request.param))
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture
def ndif(server, monkeypatch, tmp_path):
    """The environment of a user with a key."""
    use_hub(monkeypatch, tmp_path / "hub", server.url)
    monkeypatch.setenv("NDIF_API_KEY", "a key")
    monkeypatch.setattr(CONFIG.API, "APIKEY", "a key")
    monkeypatch.setattr(CONFIG.API, "HOST", server.url)
    monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
    return server


@pytest.fixture
def there(ndif):
    return models.load(HUB_ID, remote=True)


IDS = torch.randint(2, 30, (5, 24), generator=torch.Generator().manual_seed(0))
LABELS = np.random.default_rng(0).integers(-1, 4, (5, 23))
HEADS = {"a": [(0, 1), (2, 3)], "b": [(1, 0)], "c": [(2, 1)]}
PROMPTS = [[0, 5, 6, 7], [0, 8, 9], [0, 5, 6, 7, 10, 11]]
CHOSEN = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(1)))[0].T


def sweep(model, fill=None):
    conditions = [Condition("baseline")]
    conditions += [Condition(name, heads) for name, heads in HEADS.items()]
    planes, shifts = CHOSEN.expand(5, -1, -1).numpy(), np.linspace(-1, 1, 640).reshape(5, 4, 32)
    conditions.append(Condition("plane", HEADS["b"], edits={1: Projection(planes, shifts[:, 0], 0.5)}))
    conditions.append(Condition("shift", edits={2: Shift(shifts, LABELS)}))
    what = dict(word_ids=[3, 5, 8], labels=LABELS, n_classes=4, batch_size=6)
    found = sweeps.ablation_sweep(model, IDS, conditions, fill=fill, **what)
    return found.word_probabilities, found.class_sums


def ablations(model):
    middle = removal.Ablation("middle", CHOSEN, center=CHOSEN[0], layers=range(1, 3))
    steer = removal.Ablation("steer", CHOSEN[:0], shift=(1, 6 * CHOSEN[1]))
    return [removal.intact(model), removal.Ablation("all", CHOSEN, strength=0.5), middle, steer]


TRACES = {
    "attention_spectra": lambda model: attention.attention_spectra(model, IDS, n_prefix=1, batch_size=3),
    "second_copy_loss": partial(
        attention.second_copy_loss, tokens=range(2, 30), n_sequences=4, period=10, bos=0
    ),
    "mean_head_outputs": lambda model: interventions.mean_head_outputs(model, IDS, batch_size=2),
    "ablation_sweep": lambda model: sweep(model),
    "ablation_sweep, mean": lambda model: sweep(model, torch.linspace(-1, 1, 96).reshape(3, 4, 8)),
    "last_token_streams": lambda model: generation.last_token_streams(model, PROMPTS),
    "first_token_kl": lambda model: generation.first_token_kl(model, PROMPTS, ablations(model)),
    "first_token_log_probabilities": lambda model: generation.first_token_log_probabilities(
        model, PROMPTS, ablations(model)
    ),
}


@pytest.mark.parametrize("measure", TRACES.values(), ids=TRACES)
def test_remote_gives_the_numbers_of_local(measure, server, there):
    def flat(values):
        return [np.asarray(value) for value in (values if isinstance(values, tuple) else [values])]

    for local, remote in zip(flat(measure(server.here)), flat(measure(there)), strict=True):
        assert local.shape == remote.shape and np.isfinite(local).all() and np.ptp(local) or local.ndim == 0
        np.testing.assert_allclose(remote, local, rtol=1e-5, atol=1e-6)
        assert remote.dtype == local.dtype


def answers(model, conditions, **options):
    return generation.generate(model, PROMPTS, conditions, max_new_tokens=8, **options)


def test_answers_are_those_of_a_local_model(server, there):
    conditions = [*ablations(server.here), removal.Ablation("reflect", CHOSEN, strength=2.0)]
    local = answers(server.here, conditions)
    assert local == answers(there, conditions) == answers(there, conditions, batch_size=5)
    assert len({str(row) for row in local}) == len(conditions), "they all do something"
    lengths = {len(answer) for row in local for answer in row}
    assert 8 in lengths and min(lengths) < 8, "some answers end, others are cut"


def test_answers_that_all_end_early_end_the_job(server, there):
    """Where nothing is edited, too."""
    (row,) = answers(server.here, [removal.intact(there)])
    ended = [prompt for prompt, answer in zip(PROMPTS, row, strict=True) if len(answer) < 7]
    assert ended
    for model in (server.here, there):
        found = generation.generate(model, ended, [removal.intact(model)], max_new_tokens=8)
        assert found == [[answer for answer in row if len(answer) < 7]]


def test_a_pad_token_that_a_prompt_holds_is_read(server, there):
    prompt = [0, server.here.tokenizer.pad_token_id, 6, 7]
    local, remote = (
        generation.generate(model, [prompt], ablations(model), max_new_tokens=8)
        for model in (server.here, there)
    )
    assert local == remote and any(answer for (answer,) in local)


def test_a_whole_notebook_runs_remote(server, tmp_path):
    if server.family != "llama":
        pytest.skip("one family is enough")
    parameters = {
        "model_id": HUB_ID, "remote": True, "rows": 3, "words": list(WORDS), "seq_len": 90, "window": 60,
        "n_layouts": 4, "n_selecting": 1, "k_values": [1, 2], "n_random_sets": 2, "dtype": "float32",
        "n_bootstrap": 100, "out_dir": str(tmp_path / "out"),
    }  # fmt: skip
    there = {"NDIF_HOST": server.url, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf")}
    notebook = ROOT / "notebooks" / "01_induction_ablation.ipynb"
    run = finish(start(notebook, tmp_path, parameters, NDIF_API_KEY="a key", **there))
    assert run.returncode == 0, run.stderr[-3000:]
    assert complaints(tmp_path) == []
    [model] = validate_record(tmp_path / "out" / "record.json").models
    assert model["device"] == "NDIF" and model["model_id"] == HUB_ID and model["revision"] == "5" * 40
    assert model["n_parameters"] == models.provenance(server.here)["n_parameters"]


def test_a_helper_that_is_not_sent_fails_there(there, monkeypatch):
    monkeypatch.setattr(nnsight.ndif, "_PULLED_ENV", True)
    _PICKLE_BY_VALUE_MODULES.discard("lib")
    try:
        with pytest.raises(RemoteError, match="No module named 'lib"):
            attention.attention_spectra(there, IDS)
    finally:
        _PICKLE_BY_VALUE_MODULES.add("lib")


def test_sums_are_kept_out_of_autocast(server):
    stream, labels = torch.randn(2, 40, 8), torch.randint(-1, 3, (2, 40))
    final, words = torch.randn(2, 5, 32), torch.tensor([3, 4])
    edited = stream.clone()

    def measure(edited):
        interventions.remove_subspace(edited, torch.eye(8)[:2], 0.3, torch.ones(8) / 3)
        sums = sweeps.class_sums(stream, labels, 3)
        return edited, sums, sweeps.word_probabilities(server.here, final, words)

    plain = measure(stream.clone())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = measure(edited)
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


def test_remote_model_has_no_weights_and_says_so(there):
    assert families.is_remote(there) and there.device == torch.device("cpu")
    provenance = models.provenance(there)
    assert provenance["revision"] == "5" * 40 and provenance["device"] == "NDIF"
    with pytest.raises(ModelError, match="OV circuit is made of weights"):
        families.ov_matrix(there, 0, 0)
    with pytest.raises(ModelError, match="cannot be edited"), weight_edit.orthogonalized(there, CHOSEN):
        pass
    with pytest.raises(ModelError, match="has no weights here"):
        there.generate(IDS[:1], max_new_tokens=1)


def test_loading_names_what_is_wrong(ndif, monkeypatch):
    with pytest.raises(ModelError, match="Lab/tiny in float32, asked for bfloat16"):
        models.load(HUB_ID, remote=True, dtype="bfloat16")
    with pytest.raises(ModelError, match="Lab/tiny: .*is not deployed"):
        models.load(HUB_ID, remote=True, revision="5" * 40)
    with pytest.raises(ModelError, match="'Lab/other'"):
        models.load("Lab/other", remote=True)
    with pytest.raises(ModelError, match="folder on this disk"):
        models.load(str(ndif.folder), remote=True)
    monkeypatch.delenv("NDIF_API_KEY")
    with pytest.raises(ModelError, match="NDIF_API_KEY"):
        models.load(HUB_ID, remote=True)


CHAT = {"model_id": HUB_ID, "judge": "phrases"}


@pytest.mark.parametrize(
    ("study", "given", "culprit"),
    [
        ("01_induction_ablation", {"model_id": "organism/induction"}, "'organism/induction'"),
        ("01_induction_ablation", {"model_id": HUB_ID, "device": "cuda"}, "device: 'cuda'"),
        ("02_neighbor_mixing", {"model_id": HUB_ID}, "remote: this study"),
        ("3a_refusal_instrument", CHAT, "compare_with: .* organism/refusal-single, "),
        ("3b_refusal_by_gradient", {"model_id": HUB_ID}, "remote: gradients"),
    ],
)
def test_parameters_refuse_what_cannot_go_remote(study, given, culprit, monkeypatch):
    monkeypatch.setenv("NDIF_API_KEY", "a key")
    with pytest.raises(ParameterError, match=culprit):
        check(schemas()[study], {"remote": True, **given})


def test_parameters_ask_for_the_key(monkeypatch):
    given = {"remote": True, "model_id": HUB_ID}
    monkeypatch.setenv("NDIF_API_KEY", "a key")
    assert check(schemas()["01_induction_ablation"], given).remote
    assert check(schemas()["3a_refusal_instrument"], given | CHAT | {"compare_with": ["Lab/other"]}).remote
    monkeypatch.delenv("NDIF_API_KEY")
    with pytest.raises(ParameterError, match="NDIF_API_KEY"):
        check(schemas()["01_induction_ablation"], given)
