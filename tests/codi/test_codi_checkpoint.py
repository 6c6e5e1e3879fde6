"""Both layouts of a CODI model: what arrives is what the file holds, and a wrong file is named."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import add_to_hub_cache, use_hub
from tiny_codi import D_MODEL, byte_tokenizer, official_tensors, save_embedded, save_official
from transformers import GPT2LMHeadModel

from lib.codi.checkpoint import load_codi
from lib.codi.latents import think
from lib.codi.problems import Equation, Problem
from lib.codi.readings import read_solution, read_thoughts, teacher_text
from lib.core import embedded, registry
from lib.core.models import ModelError, provenance

BASE = "codi.base_model.model."
N_WORDS = len(byte_tokenizer())
OTHER_COMMIT = "fedcba98" * 5
HIGH = Problem(
    "p", "Ann has 60 pears, 13 more and 7 nuts", (Equation.parse("60+13=73"), Equation.parse("73-7=66")), 66
)


@pytest.fixture
def official(tmp_path):
    """Writes a checkpoint of the tensors and loads it."""

    def load(tensors=None, **options):
        folder = save_official(tmp_path / "official", tensors)
        return load_codi(str(folder), base=str(folder / "base"), **options)

    return load


@pytest.fixture
def tensors():
    return official_tensors(N_WORDS)


# -- embedded --------------------------------------------------------------------------------------


def test_an_embedded_model_is_what_its_files_hold(tmp_path):
    folder = save_embedded(tmp_path / "codi", cot="results")
    codi = load_codi(str(folder))
    vocabulary = codi.model.tokenizer.get_vocab()
    assert (codi.bot, codi.eot) == (vocabulary["<bot>"], vocabulary["<eot>"])
    assert (codi.n_thoughts, codi.answer_prompt, codi.cot) == (6, "The answer is :", "results")
    plain = GPT2LMHeadModel.from_pretrained(folder)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, codi.model._module.state_dict()[name]), name
    assert provenance(codi.model)["model_id"] == str(folder)
    # Dropout, Linear, GELU, Linear, LayerNorm in numpy.
    w = {
        name: tensor.double().numpy() for name, tensor in load_file(folder / "projection.safetensors").items()
    }
    x = np.random.default_rng(0).normal(size=(3, D_MODEL))
    h = x @ w["1.weight"].T + w["1.bias"]
    h = 0.5 * h * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    y = h @ w["3.weight"].T + w["3.bias"]
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    expected = y * w["ln.weight"] + w["ln.bias"]
    np.testing.assert_allclose(codi.projection(torch.from_numpy(x).float()), expected, atol=1e-5)


def test_values_of_tokens_that_are_numbers(tmp_path):
    codi = load_codi(str(save_embedded(tmp_path / "codi")))
    numbers = {text: codi.token_values[i] for i, text in enumerate(codi.token_texts) if text.isdigit()}
    assert numbers == {str(n): n for n in range(61)}
    assert np.isnan(codi.token_values).sum() == len(codi.token_values) - 61
    assert codi.token_texts[codi.bot] == "<bot>"


def test_half_precision_and_an_organism(tmp_path, monkeypatch):
    folder = save_embedded(tmp_path / "mine")
    embedded.write_manifest(folder)
    monkeypatch.setattr(embedded, "ORGANISMS", tmp_path)
    codi = load_codi("organism/mine", dtype="bfloat16")
    assert codi.folder == folder and codi.projection[1].weight.dtype == torch.bfloat16
    found = think(codi, [HIGH.question.replace(",", " ")[:7]])
    assert found.z.dtype == np.float32 and np.isfinite(found.z).all()
    for name, options, culprit in [
        ("mine", {"revision": "step-00100"}, "step-00100"),
        ("mina", {}, "organism/mine"),
        ("mine", {"dtype": "int8"}, "int8"),
    ]:
        with pytest.raises(ModelError, match=culprit):
            load_codi(f"organism/{name}", **options)
    (folder / "projection.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="projection.safetensors"):
        load_codi("organism/mine")


@pytest.mark.parametrize(
    "change, wrong",
    [({"bot": "<begin>"}, "<begin>"), ({"cot": "prose"}, "cot"), ({"eot": None}, "eot")],
)
def test_wrong_settings_are_named(change, wrong, tmp_path):
    folder = save_embedded(tmp_path / "codi")
    settings = json.loads((folder / "codi.json").read_text()) | change
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "codi.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=wrong) as error:
        load_codi(str(folder))
    assert "codi.json" in str(error.value)


def test_a_wrong_projection_is_named(tmp_path):
    folder = save_embedded(tmp_path / "codi")
    path = folder / "projection.safetensors"
    whole = load_file(path)
    for changed, wrong in [
        ({k: v for k, v in whole.items() if k != "1.weight"}, "missing tensors: 1.weight"),
        (whole | {"5.weight": torch.zeros(2)}, "unexpected tensors: 5.weight"),
    ]:
        save_file(changed, path)
        with pytest.raises(ModelError, match=wrong):
            load_codi(str(folder))
    path.write_bytes(b"rubbish")
    with pytest.raises(ModelError, match="projection.safetensors is damaged"):
        load_codi(str(folder))
    path.unlink()
    with pytest.raises(ModelError, match="projection.safetensors is missing"):
        load_codi(str(folder))


# -- official --------------------------------------------------------------------------------------


def test_official_logits_equal_adapters_that_are_not_merged(official, tensors):
    """The adapters as peft runs them, y + alpha / rank * (x A^T) B^T, on hooks beside the stored base."""
    codi = official(tensors)
    assert (codi.bot, codi.eot, codi.n_thoughts) == (N_WORDS + 1, N_WORDS + 2, 6)
    reference = GPT2LMHeadModel(codi.model._module.config)
    state = {
        key.removeprefix(BASE).replace(".base_layer.", "."): tensor.float()
        for key, tensor in tensors.items()
        if key.startswith(BASE) and "lora" not in key
    }
    reference.load_state_dict(state)
    reference.eval()
    for name, module in reference.named_modules():
        if f"{BASE}{name}.lora_A.default.weight" in tensors:
            a, b = (tensors[f"{BASE}{name}.lora_{side}.default.weight"] for side in "AB")
            module.register_forward_hook(
                lambda _, args, output, a=a, b=b: output + 32 / 128 * (args[0] @ a.T) @ b.T
            )
    ids = torch.tensor([[5, 9, codi.bot, N_WORDS, codi.eot, 77]])
    with torch.no_grad():
        expected, base_alone = reference(ids).logits, GPT2LMHeadModel(reference.config)
        base_alone.load_state_dict(state)
        found = codi.model._module(ids).logits
        assert (base_alone.eval()(ids).logits - found).abs().max() > 0.1  # the adapters matter
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_official_projection_is_stored_and_half_precision_rounds_what_was_merged(official, tensors):
    codi = official(tensors)
    for name in ("1.weight", "3.bias", "ln.bias"):
        assert torch.equal(codi.projection.state_dict()[name], tensors[f"prj.{name}"])
    merged = codi.model._module.state_dict()
    half = official(tensors, dtype="bfloat16").model._module.state_dict()
    assert all(torch.equal(tensor, merged[name].to(torch.bfloat16)) for name, tensor in half.items())


def test_an_official_head_may_be_missing_or_written_last(official, tensors):
    stored = tensors.pop(f"{BASE}lm_head.weight")
    assert torch.equal(official(tensors).model._module.lm_head.weight, stored.float())
    # The official loader copies the embedding, then the head, into the one tensor that they share.
    tensors[f"{BASE}lm_head.weight"] = stored + 1
    assert torch.equal(official(tensors).model._module.transformer.wte.weight, (stored + 1).float())


def test_official_model_thinks_and_numbers_may_be_many_tokens(official):
    codi = official()
    found = think(codi, [HIGH.question])
    read = read_thoughts(codi, [HIGH], found.z)
    np.testing.assert_allclose(read.z[:, :7], found.z, atol=1e-4)
    words = read.texts[0]
    of = [read.categories[kind] for kind in read.kinds[0][0]]
    operands = [t for t, kind in enumerate(of) if kind == "operand"]
    assert [words[t] for t in operands] == [" 60", " 1", "3"]  # 60 + 13
    assert [words[t] for t, kind in enumerate(of) if kind == "other operand"] == ["7"]
    assert codi.token_values[codi.ids(HIGH.question)[operands[0]]] == 60

    text = teacher_text(codi, HIGH)
    decode = codi.model.tokenizer.decode
    assert decode(text.ids) == HIGH.question + "<<60+13=73>>" + "The answer is:"
    assert [decode(text.ids[s[0] : s[-1] + 1]) for s in text.results] == ["73"]
    row = read_solution(codi, [HIGH]).kinds[0][0]
    assert (row >= 0).sum() == text.results[0][0]  # the row before the first token of the result


def test_wrong_official_tensors_are_named(official, tensors):
    key = f"{BASE}transformer.h.0.attn.c_attn"
    a, base, norm = (
        f"{key}.lora_A.default.weight",
        f"{key}.base_layer.weight",
        f"{BASE}transformer.ln_f.weight",
    )
    without = {k: v for k, v in tensors.items() if k not in (a, norm)}
    for changed, wrong in [
        (without, f"missing tensors: {a}, {norm}"),
        ({k: v for k, v in tensors.items() if k.startswith("prj")}, "missing tensors"),
        (tensors | {"decoder.weight": tensors[base]}, "unexpected tensors: decoder.weight"),
        (tensors | {base: tensors[base].T.clone()}, f"misshapen tensors: {base}"),
        (tensors | {norm: torch.full((32,), torch.inf)}, f"NaN or infinite tensors: {norm}"),
        (official_tensors(N_WORDS, rank=64), "rank 64"),
        (official_tensors(N_WORDS - 1), f"{N_WORDS + 2} rows"),
    ]:
        with pytest.raises(ModelError, match=wrong):
            official(changed)


class Harmful:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def test_files_that_are_no_checkpoint_are_named(tmp_path, capsys):
    folder = save_official(tmp_path / "official")
    path = folder / "pytorch_model.bin"
    torch.save({"x": Harmful()}, path)
    with pytest.raises(ModelError, match="pytorch_model.bin"):
        load_codi(str(folder), base=str(folder / "base"))
    assert "ran" not in capsys.readouterr().out
    path.unlink()
    with pytest.raises(ModelError, match="neither codi.json"):
        load_codi(str(folder))


def test_base_of_another_family_or_none(tmp_path):
    folder = save_official(tmp_path / "official")
    config = folder / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama"}))
    with pytest.raises(ModelError, match="llama"):
        load_codi(str(folder), base=str(folder / "base"))
    with pytest.raises(ModelError, match="base"):
        load_codi(str(folder), base=str(tmp_path / "none"))


# -- from the hub ----------------------------------------------------------------------------------

CODI, GPT2 = registry.find("CODI-gpt2"), registry.find("gpt2")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """CODI-gpt2 in a hub cache, two commits of it, and no network; returns a way to put GPT-2 there, too."""
    cache = tmp_path / "hub"
    use_hub(monkeypatch, cache)
    for seed, (commit, branch) in enumerate([(CODI.revision, "old"), (OTHER_COMMIT, "main")]):
        folder = save_official(tmp_path / str(seed), official_tensors(N_WORDS, seed))
        folder.joinpath("base").rename(tmp_path / f"base{seed}")
        add_to_hub_cache(folder, cache, CODI.id, commit, branch=branch)
    return lambda: add_to_hub_cache(tmp_path / "base0", cache, GPT2.id, GPT2.revision)


def test_a_hub_model_is_read_at_its_revision(hub, tmp_path):
    hub()
    pinned, newest, named = (
        load_codi(CODI.id, dtype="float32", revision=revision) for revision in ("", "main", OTHER_COMMIT)
    )
    found = [provenance(codi.model) for codi in (pinned, newest, named)]
    assert [each["revision"] for each in found] == [CODI.revision, OTHER_COMMIT, OTHER_COMMIT]
    assert {each["model_id"] for each in found} == {CODI.id}
    assert found[0]["weights_sha256"] != found[1]["weights_sha256"] == found[2]["weights_sha256"]
    local = load_codi(str(tmp_path / "0"), dtype="float32", base=str(tmp_path / "base0"))
    for name, tensor in local.model._module.state_dict().items():
        assert torch.equal(tensor, pinned.model._module.state_dict()[name]), name


def test_what_is_missing_of_a_hub_model_is_named_with_the_command(hub, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=f"hf download {GPT2.id} --revision {GPT2.revision}") as raised:
        load_codi(CODI.id)
    assert "*.safetensors" not in str(raised.value), "of the base no weights are needed"
    hub()
    weights = tmp_path / "hub" / f"models--{CODI.id.replace('/', '--')}" / "snapshots" / CODI.revision
    (weights / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=f"hf download {CODI.id} --revision {CODI.revision}"):
        load_codi(CODI.id)
    use_hub(monkeypatch, tmp_path / "empty")
    with pytest.raises(ModelError) as raised:
        load_codi(CODI.id)
    for needed in (CODI, GPT2):
        assert f"hf download {needed.id} --revision {needed.revision}" in str(raised.value)
    with pytest.raises(ModelError, match="no id at all"):
        load_codi("no id at all")


def test_revision_of_a_folder_and_several_devices_are_refused(tmp_path):
    folder = save_embedded(tmp_path / "codi")
    for option, value in (("revision", "main"), ("device", "auto")):
        with pytest.raises(ModelError, match=f"{option} '{value}'"):
            load_codi(str(folder), **{option: value})
