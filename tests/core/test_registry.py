"""The registry is true to notebooks and published figures; what is on disk; what to do when it is not."""

from __future__ import annotations

import copy
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import CONFIGS, add_to_hub_cache, random_model, save_tiny, tokenizer, use_hub

from lib.core import registry
from lib.core.models import ModelError, load
from lib.core.parameters import schemas
from lib.core.registry import (
    RegistryError,
    find,
    how_to_get,
    main,
    missing,
    missing_files,
    pinned,
    published,
    require,
)

PAIRS = [(model, study) for model in registry.registry() for study in model.studies]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stand in for the hub: answers every request with one status and error code; returns how to set them."""
    answer = {"status": 200, "code": ""}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(answer["status"])
            for name, value in {
                "X-Error-Code": answer["code"],
                "X-Repo-Commit": "0" * 40,
                "ETag": '"1"',
                "Content-Length": "10",
            }.items():
                self.send_header(name, value)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_hub(monkeypatch, tmp_path / "cache", f"http://127.0.0.1:{server.server_port}")
    yield lambda status, code="": answer.update(status=status, code=code)
    server.shutdown()
    server.server_close()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A hub's cache of this test, and no network at all."""

    def no_network(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    use_hub(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


# -- data/models.yaml ------------------------------------------------------------------------------


def test_the_models_of_the_studies_are_all_there():
    chat = set(
        json.loads(registry.PUBLISHED.read_text())["refusal-26"]["figures"]["peak_compliance_one_vector"]
    )
    real = "Qwen2.5-Coder-0.5B-Instruct"  # the notebook's own
    with_chat = {model.name for model in registry.registry() if "03_refusal_low_rank" in model.studies}
    assert with_chat == chat | {real}
    names = [model.name for model in registry.registry()]
    assert len(set(names)) == len(names)
    assert {"Llama-3.1-8B", "CODI-gpt2", "gpt2", "pythia-160m"} <= set(names)


@pytest.mark.parametrize(("model", "study"), PAIRS, ids=[f"{m.name}-{s}" for m, s in PAIRS])
def test_every_entry_is_what_its_notebook_and_the_literature_know(model, study):
    schema = schemas()[study]
    parameters = schema.model_validate(model.parameters(study))
    named = (model.name, "auto") if model.file else (model.id, model.dtype)
    assert (parameters.model_id, parameters.dtype) == named
    assert set(model.studies[study].asks) <= set(schema.model_fields)
    for key in model.studies[study].published:
        assert published(key), key
    if "layer" in model.parameters(study):
        assert 0 < parameters.layer < model.layers
    assert model.revision, "the newest commit of a model of the studies is not what was measured"
    # The notebooks' own defaults are for the models that are files.
    assert (study == "01_induction_ablation" and not model.file) == bool(model.studies[study].depth_fraction)
    assert bool(model.chat) == (study == "03_refusal_low_rank" or bool(model.file))
    assert not (model.file and model.studies[study].parameters)


@pytest.mark.parametrize("model", [m for m in registry.registry() if m.file], ids=lambda m: m.name)
def test_wheels_carry_the_whole_file(model):
    wheels = model.file.wheels
    assert sum(wheel.bytes for wheel in wheels) == model.file.bytes
    assert len({wheel.sha256 for wheel in wheels}) == len(wheels)
    assert len(wheels) > 1 or wheels[0].sha256 == model.file.sha256


def test_llama_is_run_as_published():
    parameters = find("Llama-3.1-8B").parameters("01_induction_ablation")
    assert (parameters["seq_len"], parameters["window"], parameters["layer"]) == (1400, 200, 26)
    assert parameters["k_values"] == published("arditi-26/ablated_heads")[1:]


def test_models_are_found_by_name_and_id():
    assert find("gpt2") == find("GPT2") == find("openai-community/gpt2")
    assert pinned("openai-community/gpt2") == find("gpt2").revision and pinned("gpt2") is None


def test_unknown_names_are_met_with_the_nearest():
    with pytest.raises(RegistryError, match="'LLama-3.1-8'.* did you mean Llama-3.1-8B"):
        find("LLama-3.1-8")
    with pytest.raises(RegistryError, match="no-such-model"):
        find("no-such-model")
    with pytest.raises(RegistryError, match="arditi-26/accuracy/3"):
        published("arditi-26/accuracy/3")
    with pytest.raises(RegistryError, match="gpt2 .* 03_refusal_low_rank"):
        find("gpt2").parameters("03_refusal_low_rank")


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("- {name: a", "while parsing"),
        ("- {name: a, id: a/b, revisoin: main}", "revisoin"),
        ("- {name: a, id: a/b, file: {name: ../a.gguf, bytes: 1, sha256: x}}", "file.name"),
    ],
)
def test_broken_registry_is_named(tmp_path, monkeypatch, text, culprit):
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "models.yaml")
    (tmp_path / "models.yaml").write_text(text)
    registry.registry.cache_clear()
    try:
        with pytest.raises(RegistryError, match=f"(?s){tmp_path}/models.yaml: .*{culprit}"):
            registry.registry()
    finally:
        registry.registry.cache_clear()


# -- on disk ---------------------------------------------------------------------------------------


def test_complete_model_is_on_disk_without_network(offline, tmp_path, capsys):
    gpt2 = find("gpt2")
    assert missing(gpt2) == ["config.json", "tokenizer.json", "model.safetensors"]
    add_to_hub_cache(save_tiny("gpt2", tmp_path / "gpt2"), offline, gpt2.id, gpt2.revision)
    assert missing(gpt2) == [] and require(gpt2) == "gpt2: on disk"
    assert main([]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert re.search(r"607a30d7 +0.5 GB float32 +open +yes +01, 02", lines["gpt2"])
    assert re.search(r"d04e592b +16.1 GB bfloat16 +gated +no +01, 02", lines["Llama-3.1-8B"])


def test_shards_that_are_missing_are_named(offline, tmp_path, capsys):
    llama = find("Llama-3.1-8B")
    folder = tmp_path / "llama"
    random_model(copy.deepcopy(CONFIGS["llama"])).save_pretrained(folder, max_shard_size="20KB")
    tokenizer().save_pretrained(folder)
    gone = sorted(folder.glob("model-*.safetensors"))[1:3]
    for path in gone:
        path.unlink()
    snapshot = add_to_hub_cache(folder, offline, llama.id, llama.revision)
    # A download that broke off leaves a link without a file behind it.
    (snapshot / "tokenizer.json").resolve().unlink()
    assert missing(llama) == ["tokenizer.json", *(path.name for path in gone)]
    main(["Llama-3.1-8B"])
    said = capsys.readouterr().out
    assert f"on disk: lacks tokenizer.json, {gone[0].name}, {gone[1].name}" in said
    assert "published arditi-26/accuracy_random_32_ablated: 0.878" in said
    main([])
    assert re.search("Llama-3.1-8B +d04e592b.*gated +in part", capsys.readouterr().out)


def test_codi_needs_its_weights_and_what_gpt2_has(offline, tmp_path):
    codi = find("CODI-gpt2")
    base = "openai-community/gpt2"
    of_base = [f"config.json of {base}", f"tokenizer.json of {base}"]
    assert missing(codi) == [*of_base, "pytorch_model.bin"]
    (tmp_path / "codi").mkdir()
    (tmp_path / "codi" / "pytorch_model.bin").write_bytes(b"weights")
    add_to_hub_cache(tmp_path / "codi", offline, codi.id, codi.revision)
    assert missing(codi) == of_base
    with pytest.raises(RegistryError, match=f"(?s){of_base[0]}.*hf download {base} --revision"):
        require(codi)
    add_to_hub_cache(save_tiny("gpt2", tmp_path / "gpt2"), offline, base, pinned(base))
    assert missing(codi) == [] and require(codi) == "CODI-gpt2: on disk"


def test_model_with_code_of_its_own_is_refused(offline):
    with pytest.raises(RegistryError, match="Qwen-1.8B-Chat .*Qwen/Qwen1.5-1.8B-Chat"):
        require(find("Qwen-1.8B-Chat"))


# -- not on disk -----------------------------------------------------------------------------------

LLAMA_PAGE = "accept the Llama 3.1 Community License at https://huggingface.co/meta-llama/Llama-3.1-8B"
DOWNLOAD = "hf download meta-llama/Llama-3.1-8B --revision d04e592bb4f6aa9cfee91e2e20afa771667e1d4b --include"


@pytest.mark.parametrize(
    ("status", "code", "parts"),
    [
        (403, "GatedRepo", ("model.safetensors", "it is gated", LLAMA_PAGE, "hf auth login", DOWNLOAD)),
        (401, "RepoNotFound", ("no such model, or hides it", LLAMA_PAGE, "hf auth login")),
        (404, "RevisionNotFound", ("no revision 'd04e592b", "commits/main")),
        (500, "", ("status 500", DOWNLOAD)),
    ],
)
def test_refusals_of_the_hub_say_what_to_do(hub, status, code, parts):
    hub(status, code)
    with pytest.raises(RegistryError) as raised:
        require(find("Llama-3.1-8B"))
    assert [part for part in parts if part not in str(raised.value)] == []


def test_open_hub_will_be_asked(hub):
    hub(200)
    assert require(find("Llama-3.1-8B")) == "Llama-3.1-8B: will be fetched from the hub, about 16.1 GB"
    hub(404, "EntryNotFound")  # in shards, or a tokenizer under another name
    assert require(find("gemma-2b-it")).startswith("gemma-2b-it: will be fetched")


def test_load_says_the_same(hub):
    hub(403, "GatedRepo")
    with pytest.raises(ModelError, match=f"(?s)it is gated.*{LLAMA_PAGE}"):
        load("meta-llama/Llama-3.1-8B", dtype="bfloat16")


def test_no_network_says_what_to_fetch_elsewhere(offline, monkeypatch):
    for reason in ("HF_HUB_OFFLINE is set", "the hub can not be reached from here"):
        with pytest.raises(RegistryError, match=f"(?s){reason}.*{LLAMA_PAGE}.*{DOWNLOAD}"):
            require(find("Llama-3.1-8B"))
        use_hub(monkeypatch, offline, "https://hub.invalid")


def test_error_that_is_not_of_the_network_is_not_told_as_one(offline, monkeypatch):
    use_hub(monkeypatch, offline, "https://hub.invalid")
    said = how_to_get("some/model", None, ValueError("rope_type is none\nand more"))
    assert "(rope_type is none)" in said and "hf download some/model" in said
    assert "where there is network" not in said


def test_id_that_is_none_is_said_to_be_none(offline):
    assert "'no id at all' is no hub id" in how_to_get("no id at all", None)
    assert missing_files("some/model") == ["config.json", "tokenizer.json", "model.safetensors"]
