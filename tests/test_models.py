"""Loading: one path for all families, and every damaged folder named."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    CONFIGS,
    FAMILIES,
    VOCABULARY,
    WORDS,
    add_to_hub_cache,
    blocks,
    output_projection,
    random_model,
    save_chat,
    save_tiny,
    tokenizer,
    use_hub,
)
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    MixtralConfig,
    Olmo2Config,
    PhiConfig,
    PreTrainedTokenizerFast,
)

from lib import models, registry
from lib.attention import attention_spectra
from lib.generation import generate
from lib.generation import intact as intact_condition
from lib.interventions import Condition, ablate_heads, ablation_sweep
from lib.models import (
    ModelError,
    bos_id,
    load,
    ov_matrix,
    plain_token_ids,
    provenance,
    shape,
    with_bos,
    word_ids,
    wrap,
)
from lib.parameters import GRID_WORDS
from lib.refusal import orthogonalized

COMMIT, OTHER_COMMIT = "0123456789abcdef" * 2 + "01234567", "fedcba98" * 5


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_tiny("llama", tmp_path / "llama")


@pytest.fixture
def organism(tmp_path, monkeypatch) -> Path:
    """A tiny embedded model `organism/tiny` with one checkpoint."""
    monkeypatch.setattr(models, "ORGANISMS", tmp_path)
    target = save_tiny("llama", tmp_path / "tiny")
    (target / "checkpoints").mkdir()
    other = save_tiny("llama", tmp_path / "other", seed=1)
    shutil.copy(other / "model.safetensors", target / "checkpoints" / "step-00010.safetensors")
    shutil.rmtree(other)
    models.write_manifest(target)
    return target


def damage(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_sites(family, tmp_path):
    model = load(str(save_tiny(family, tmp_path / family)))
    sizes, ids = shape(model), torch.arange(2, 11)[None]
    with torch.no_grad():
        reference = model._module(input_ids=ids, output_hidden_states=True, use_cache=False)
    with torch.no_grad(), model.trace(ids, use_cache=False):
        first = model.layers[0].input.save()
        heads = model.layers[1].self_attn.o_proj.input.save()
        mlp = model.layers[1].mlp.output.save()
        last = model.layers[-1].input.save()
        normed = model.norm.output.save()
        logits = model.lm_head.output.save()
    torch.testing.assert_close(first, reference.hidden_states[0])
    torch.testing.assert_close(last, reference.hidden_states[-2])
    torch.testing.assert_close(normed, reference.hidden_states[-1])
    torch.testing.assert_close(logits, reference.logits)
    assert heads.shape == (1, 9, sizes.n_heads * sizes.d_head)
    assert mlp.shape == (1, 9, sizes.d_model)
    assert sizes.n_layers == 3 and sizes.n_heads == 4 and sizes.n_positions == 96
    assert not model._module.training and not any(p.requires_grad for p in model._module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_ov_matrix_is_what_the_head_writes(family, tmp_path):
    """The first token attends to itself alone: a head's output there is W_OV of its input, up to biases."""
    model = load(str(save_tiny(family, tmp_path / family)))
    module, head, layer = model._module, 3, 1
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    ids, d_head = torch.tensor([[5, 7]]), shape(model).d_head
    with torch.no_grad(), model.trace(ids, use_cache=False):
        z = model.layers[layer].self_attn.o_proj.input
        keep = torch.zeros_like(z)
        keep[..., head * d_head : (head + 1) * d_head] = 1
        model.layers[layer].self_attn.o_proj.input = z * keep
        written = model.layers[layer].self_attn.o_proj.output[0, 0].save()
    block = blocks(module)[layer]
    norm = block.input_layernorm if hasattr(block, "input_layernorm") else block.ln_1
    seen = []
    handle = norm.register_forward_hook(lambda *args: seen.append(args[2]))
    module(input_ids=ids, use_cache=False)
    handle.remove()
    expected = ov_matrix(model, layer, head) @ seen[0][0, 0].double()
    torch.testing.assert_close(written.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layer", "head"), [(0, 99), (0, -1), (3, 0), (-1, 0)])
def test_ov_matrix_of_a_head_that_the_model_lacks_is_refused(layer, head, folder):
    named = rf"OV circuit of head {layer}\.{head}; the model has layers 0 to 2 with heads 0 to 3"
    with pytest.raises(ModelError, match=named):
        ov_matrix(load(str(folder)), layer, head)


def test_provenance_follows_the_weights(folder):
    first = provenance(load(str(folder)))
    assert first["n_parameters"] == sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    damage(folder, lambda tensors: tensors["model.norm.weight"].add_(0.5))
    assert provenance(load(str(folder)))["weights_sha256"] != first["weights_sha256"]


def test_dtype_is_kept_as_asked(folder):
    model = load(str(folder), dtype="bfloat16")
    assert {p.dtype for p in model._module.parameters()} == {torch.bfloat16}
    with pytest.raises(ModelError, match="dtype 'float8' is not one of bfloat16, float16, float32"):
        load(str(folder), dtype="float8")


# What released checkpoints are like: family, dtype, and what of its configuration differs from tiny's.
LAYOUTS = {
    "Llama 3.1: grouped queries, untied": ("llama", "bfloat16", {"tie_word_embeddings": False}),
    "Llama 3.2: grouped queries, tied, head_dim": (
        "llama",
        "float16",
        {"tie_word_embeddings": True, "head_dim": 16},
    ),
    "Mistral: sliding window": ("mistral", "float32", {"sliding_window": 5}),
    "Qwen 2: biases, tied": ("qwen2", "bfloat16", {}),
    "Qwen 3: head_dim apart from d / H": ("qwen3", "bfloat16", {"tie_word_embeddings": True}),
    "Gemma: one key-value head, scaled embedding": ("gemma", "bfloat16", {"num_key_value_heads": 1}),
    "Phi 3: fused projections, sliding window": ("phi3", "float32", {"sliding_window": 5}),
    "GPT-2: Conv1D, tied": ("gpt2", "float16", {}),
    "Pythia: fused by head, parallel, untied": ("gpt_neox", "float16", {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_released_layouts_load_and_are_intervened_on_like_plain_torch(layout, tmp_path):
    """Shards with an index, a 16-bit dtype, a BPE tokenizer on which the words of the grid are tokens."""
    family, dtype, changes = LAYOUTS[layout]
    bpe = bpe_tokenizer(GRID_WORDS, bos_token="<end>", eos_token="<end>", pad_token="<end>")
    config = copy.deepcopy(CONFIGS[family])
    for name, value in changes.items():
        setattr(config, name, value)
    config = type(config)(**config.to_dict() | {"vocab_size": len(bpe) + 3})  # padded, as some are
    random_model(config).to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size="20KB")
    bpe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()

    model = load(str(tmp_path), dtype=dtype)
    module, sizes = model._module, shape(model)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    tied = module.get_input_embeddings().weight is module.get_output_embeddings().weight
    assert tied == reference.config.tie_word_embeddings
    assert {p.dtype for p in module.parameters()} == {getattr(torch, dtype)} and provenance(model)[
        "dtype"
    ] == dtype

    ids = with_bos(model, np.array(word_ids(model, GRID_WORDS))[None])  # longer than the sliding window
    assert model.tokenizer.decode(ids[0, 1:]) == " " + " ".join(GRID_WORDS)
    layer, head = 1, 3

    def drop(_, args):
        heads = args[0].clone().unflatten(-1, (sizes.n_heads, -1))
        heads[:, :, head] = 0
        return (heads.flatten(-2),)

    with torch.no_grad():
        intact = reference(input_ids=ids, use_cache=False).logits
        output_projection(blocks(reference)[layer]).register_forward_pre_hook(drop)
        expected = reference(input_ids=ids, use_cache=False).logits
    ablated = torch.arange(sizes.n_heads) == head
    with torch.no_grad(), model.trace(ids, use_cache=False):
        ablate_heads(model.layers[layer], ablated)
        logits = model.lm_head.output.save()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - intact).abs().max() > 1e-2

    # The same through the sweep of study 1, the attention of study 2, and the answers of study 3.
    what = {"word_ids": ids[0, 1:].tolist(), "labels": np.arange(16)[None], "n_classes": 16}
    sweep = ablation_sweep(model, ids, [Condition("intact"), Condition("one", [(layer, head)])], **what)
    for found, whole in zip(sweep.word_probabilities[:, 0], (intact, expected), strict=True):
        wanted = whole[0, 1:].float().softmax(-1)[:, ids[0, 1:]]
        np.testing.assert_allclose(found, wanted, rtol=1e-4 if dtype == "float32" else 0.05)
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    with torch.no_grad():
        maps = torch.stack(plain(input_ids=ids, use_cache=False, output_attentions=True).attentions, dim=1)
    diagonals = [maps.float().diagonal(-offset, dim1=-2, dim2=-1).mean(-1) for offset in range(17)]
    spectra = attention_spectra(model, ids)
    np.testing.assert_allclose(spectra, torch.stack(diagonals, -1), atol=1e-6 if dtype == "float32" else 1e-2)
    prompts = [ids[0].tolist(), ids[0, :7].tolist()]
    answers = generate(model, prompts, [intact_condition(model)], max_new_tokens=3)[0]
    for prompt, answer in zip(prompts, answers, strict=True):
        answer = answer if len(answer) == 3 else [*answer, 0]
        with torch.no_grad():
            text = torch.tensor([prompt + answer])
            each = plain(input_ids=text, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen = each.gather(1, torch.tensor(answer)[:, None])[:, 0]
        # In 16 bits other lengths of a batch decide between tokens that are nearly equal.
        assert (each.amax(1) - chosen).max() < (1e-4 if dtype == "float32" else 0.1)

    if changes.get("sliding_window"):
        assert np.abs(spectra[..., 5:]).max() == 0, "no head sees behind the window"
        wide = AutoModelForCausalLM.from_pretrained(tmp_path, sliding_window=None)
        with torch.no_grad():
            assert (wide(input_ids=ids, use_cache=False).logits - intact)[:, 8:].abs().max() > 1e-2


UNUSUAL = {name: getattr(CONFIGS["llama"], name) for name in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config, message", [
    (Gemma3TextConfig(**UNUSUAL, head_dim=12), "type 'gemma3_text', whose block 0 does not add the outputs"),
    (Olmo2Config(**UNUSUAL), "type 'olmo2', whose block 0 does not add the outputs"),
    (GraniteConfig(**UNUSUAL, residual_multiplier=0.22), "type 'granite', whose block 0 does not add"),
    (GraniteConfig(**UNUSUAL, logits_scaling=8.0), "type 'granite', whose logits are not the unembedding"),
    (CohereConfig(**UNUSUAL, logit_scale=0.0625), "type 'cohere', whose logits are not the unembedding"),
    (PhiConfig(**UNUSUAL), "type 'phi', whose parts have other names .*o_proj"),
    (Gemma2Config(**UNUSUAL), "does not compute the attention of Gemma2ForCausalLM by sdpa"),
], ids=lambda value: getattr(value, "model_type", ""))  # fmt: skip
def test_family_whose_sites_mean_something_else_is_refused(config, message, dtype, tmp_path):
    random_model(copy.deepcopy(config)).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load(str(tmp_path), dtype=dtype)


def test_mixture_of_experts_is_read_and_not_edited(tmp_path):
    random_model(MixtralConfig(**UNUSUAL, num_local_experts=2)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = load(str(tmp_path))
    with pytest.raises(ModelError, match="MLPs of this 'mixtral' model are not written by one matrix"):
        with orthogonalized(model, torch.eye(32)[:1]):
            pass


def test_model_that_overflows_in_its_dtype_is_refused(folder):
    damage(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].mul_(1e8).clamp_(-6e4, 6e4))
    load(str(folder), dtype="bfloat16")
    with pytest.raises(ModelError, match="overflows in float16 on four tokens; take 'bfloat16' or 'float32'"):
        load(str(folder), dtype="float16")


def test_check_of_the_sites_takes_one_forward_of_few_tokens():
    model, seen = load("organism/induction"), []
    handle = model.model.embed_tokens._module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    models._check_sites("organism/induction", model, "float32")
    handle.remove()
    assert len(seen) == 1 and seen[0].numel() <= 4


def test_missing_shard_is_named(tmp_path):
    random_model(copy.deepcopy(CONFIGS["llama"])).save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer().save_pretrained(tmp_path)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=f"cannot load {tmp_path}.*{gone.name}"):
        load(str(tmp_path))


def test_embedded_local_and_hub_models_are_the_same_model(organism, tmp_path, monkeypatch):
    use_hub(monkeypatch, tmp_path / "hub")
    (tmp_path / "flat").mkdir()
    for file in organism.glob("*.*"):
        shutil.copy(file, tmp_path / "flat")
    add_to_hub_cache(tmp_path / "flat", tmp_path / "hub", "owner/name", COMMIT)
    ids = torch.tensor([[0, 3, 5, 7, 4]])
    logits, records = [], []
    for name in ("organism/tiny", str(tmp_path / "flat"), "owner/name"):
        model = load(name)
        with torch.no_grad():
            logits.append(model._module(input_ids=ids).logits)
        records.append(provenance(model))
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert len({record["weights_sha256"] for record in records}) == 1
    assert [record["revision"] for record in records] == [None, None, COMMIT]


def test_a_registered_model_is_read_at_its_revision(tmp_path, monkeypatch):
    use_hub(monkeypatch, tmp_path / "hub")
    gpt2 = registry.find("gpt2")
    for seed, (commit, branch) in enumerate([(gpt2.revision, "old"), (OTHER_COMMIT, "main")]):
        folder = save_tiny("gpt2", tmp_path / str(seed), seed=seed)
        add_to_hub_cache(folder, tmp_path / "hub", gpt2.id, commit, branch=branch)
    pinned, newest, named = (load(gpt2.id, revision=revision) for revision in ("", "main", OTHER_COMMIT))
    assert [provenance(model)["revision"] for model in (pinned, newest, named)] == [
        gpt2.revision, OTHER_COMMIT, OTHER_COMMIT,
    ]  # fmt: skip
    assert provenance(pinned)["weights_sha256"] != provenance(newest)["weights_sha256"]
    assert provenance(newest)["weights_sha256"] == provenance(named)["weights_sha256"]


def test_damaged_hub_model_is_not_called_missing(tmp_path, monkeypatch):
    use_hub(monkeypatch, tmp_path / "hub")
    snapshot = add_to_hub_cache(save_tiny("llama", tmp_path / "a"), tmp_path / "hub", "owner/name", COMMIT)
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load owner/name: "):
        load("owner/name")


def test_architecture_that_is_code_of_its_own_is_not_called_missing(tmp_path, monkeypatch):
    use_hub(monkeypatch, tmp_path / "hub")
    (tmp_path / "qwen").mkdir()
    config = {"model_type": "qwen", "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}}
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(config))
    add_to_hub_cache(tmp_path / "qwen", tmp_path / "hub", "owner/name", COMMIT)
    with pytest.raises(ModelError, match="cannot load owner/name: .*custom code"):
        load("owner/name")


def test_auto_needs_accelerate(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match="'auto' spreads .* accelerate, which is not installed; run `pip install"
    ):
        load(str(folder), device="auto")


def test_auto_places_the_same_model(folder):
    pytest.importorskip("accelerate", reason="an optional package: pip install accelerate")
    plain, placed = load(str(folder)), load(str(folder), device="auto")
    ids = torch.tensor([[0, 3, 5, 7, 4]])
    found = []
    for model in (plain, placed):
        with torch.no_grad(), model.trace(ids.to(model.device), use_cache=False):
            ablate_heads(model.layers[1], torch.tensor([False, True, False, False]))
            found.append(model.lm_head.output.float().cpu().save())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert provenance(placed)["device"].startswith("auto (")
    assert provenance(placed)["weights_sha256"] == provenance(plain)["weights_sha256"]


def test_model_larger_than_the_gpus_is_refused():
    models._check_placement("m", {"": "cpu"})
    models._check_placement("m", {"model.layers.0": 0, "model.layers.1": 1})
    with pytest.raises(
        ModelError, match="m: the GPUs are too small: 2 parts of it would lie on cpu and disk"
    ):
        models._check_placement("m", {"model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "disk"})


def test_missing_tensor_is_named(folder):
    damage(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"missing tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(str(folder))


def test_unexpected_tensor_is_named(folder):
    damage(folder, lambda tensors: tensors.update({"model.layers.7.extra.weight": torch.zeros(2)}))
    with pytest.raises(ModelError, match=r"unexpected tensors: model\.layers\.7\.extra\.weight"):
        load(str(folder))


def test_wrong_shape_is_named(folder):
    damage(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(ModelError, match=r"mismatched tensors: .*model\.norm\.weight.*31.*32"):
        load(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_tensor_is_named(folder, value):
    def poison(tensors):
        tensors["model.layers.2.self_attn.k_proj.weight"][3, 4] = value

    damage(folder, poison)
    with pytest.raises(
        ModelError, match=r"model\.layers\.2\.self_attn\.k_proj\.weight holds NaN or infinite"
    ):
        load(str(folder))


def test_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"cannot load {folder}"):
        load(str(folder))


def test_revision_of_a_folder_is_refused(folder):
    with pytest.raises(
        ModelError, match=f"revision 'main': model_id '{folder}' is a folder on this disk and"
    ):
        load(str(folder), revision="main")


def test_folder_without_config_is_no_model(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=f"{folder} holds no config.json, so it is no model; pass"):
        load(str(folder))


def test_unknown_names_fail_offline_with_a_remedy(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"no embedded model 'organism/inducton'"):
        load("organism/inducton")

    def no_network(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    use_hub(monkeypatch, tmp_path / "hub", "https://hub.invalid")
    with pytest.raises(ModelError) as raised:
        load("nobody/no-such-model")
    for part in (
        "'nobody/no-such-model' is no embedded model, no local folder, and could not be fetched from the hub",
        "config.json, tokenizer.json, model.safetensors are not on this disk",
        "the hub can not be reached from here",
        "hf download nobody/no-such-model",
        "-p model_id /path/to/folder",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize("name", ["./no/such/folder", "a/b/c", "no id at all", "/no/such/folder"])
def test_what_is_neither_folder_nor_id_is_said_to_be_neither(name, tmp_path, monkeypatch):
    use_hub(monkeypatch, tmp_path / "hub")
    with pytest.raises(
        ModelError, match=f"'{name}' is no hub id .owner/name., and no folder of that name is here"
    ):
        load(name)


def test_unusable_device_is_named(folder):
    with pytest.raises(ModelError, match="device 'nonsense' cannot be used here"):
        load(str(folder), device="nonsense")


def test_embedded_model_loads_with_its_checkpoints(organism):
    final, early = load("organism/tiny"), load("organism/tiny", revision="step-00010")
    assert models.organisms() == ["organism/tiny"] and models.checkpoints("organism/tiny") == [10]
    expected = load_file(organism / "checkpoints" / "step-00010.safetensors")["lm_head.weight"]
    torch.testing.assert_close(early._module.lm_head.weight.data, expected)
    assert not torch.equal(final._module.lm_head.weight, early._module.lm_head.weight)
    assert provenance(final)["weights_sha256"] != provenance(early)["weights_sha256"]
    with pytest.raises(ModelError, match="no checkpoint 'step-99'; it has step-00010"):
        load("organism/tiny", revision="step-99")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "checkpoints/step-00010.safetensors"])
def test_a_flipped_bit_in_a_shipped_file_is_noticed(organism, name):
    path = organism / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    revision = "step-00010" if name.startswith("checkpoints") else None
    with pytest.raises(ModelError, match=rf"{path} is not the file that was trained"):
        load("organism/tiny", revision=revision)


def test_missing_shipped_file_is_noticed(organism):
    (organism / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        load("organism/tiny")


def test_manifest_lists_every_file(organism):
    listed = set(json.loads((organism / "manifest.json").read_text()))
    present = {str(p.relative_to(organism)) for p in organism.rglob("*") if p.is_file()} - {"manifest.json"}
    assert listed == present and "model.safetensors" in listed


def test_configs_cover_the_families_of_the_readme():
    assert set(CONFIGS) == {"llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt2", "gpt_neox"}


def wrapped(tokenizer: PreTrainedTokenizerFast, n_vocabulary: int = VOCABULARY):
    """A model that is as small as can be, for what its tokenizer decides."""
    config = GPT2Config(
        vocab_size=n_vocabulary, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
    )
    return wrap(GPT2LMHeadModel(config), tokenizer)


def bpe_tokenizer(words: tuple[str, ...] = ("apple", "bird"), **options) -> PreTrainedTokenizerFast:
    """Byte-level as GPT-2's and Llama 3's: a word with the space before it is a token of its own."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<end>"], initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    inner.train_from_iterator([" ".join([word] * 3 + list(words)) for word in words], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **options)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's and Gemma's: the tokenizer puts a space before the text by itself."""
    pieces = [("<unk>", 0.0), ("\u2581", -4.0), ("\u2581apple", -3.0), ("\u2581bird", -3.0), ("bird", -3.0)]
    inner = Tokenizer(Unigram(pieces, unk_id=0))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def test_words_are_the_tokens_that_a_text_of_them_has(folder):
    words = ["bird", "apple"]
    for each in (bpe_tokenizer(), sentencepiece_tokenizer(), tokenizer()):
        text = each("apple bird apple bird", add_special_tokens=False).input_ids
        assert word_ids(wrapped(each), words) == [text[-1], text[-2]] == [text[1], text[2]]
    # The token at the start of a text, without the space, is another one.
    bpe = bpe_tokenizer()
    assert bpe.tokenize("apple") != bpe.tokenize(" apple") == ["\u0120apple"]
    assert word_ids(load(str(folder)), WORDS) == list(range(2, 2 + len(WORDS)))


@pytest.mark.parametrize(
    ("make", "words", "message"),
    [
        (tokenizer, ["apple", "zebra", "ice cream"], r"'zebra' \(unknown\), 'ice cream' \(2 tokens\)"),
        (bpe_tokenizer, ["apple", "plum"], r"tokenizer: 'plum' \(\d tokens\); choose other words"),
        (sentencepiece_tokenizer, ["apple", "birdbird"], r"tokenizer: 'birdbird' \(2 tokens\); choose other"),
        (tokenizer, ["apple", "bird", " apple"], "two of the words are the same token"),
    ],
)
def test_word_that_is_not_one_token_is_named(make, words, message):
    with pytest.raises(ModelError, match=message):
        word_ids(wrapped(make()), words)


def test_text_opens_with_bos_or_else_with_the_end_of_text(folder):
    assert bos_id(load(str(folder))) == 0
    assert bos_id(wrapped(bpe_tokenizer(bos_token="<bos>", eos_token="<end>"))) == len(bpe_tokenizer())
    assert bos_id(wrapped(bpe_tokenizer(eos_token="<end>"))) == 0
    neither = wrapped(sentencepiece_tokenizer())
    neither._module.config.bos_token_id = None
    with pytest.raises(ModelError, match="no BOS and no end-of-text token"):
        bos_id(neither)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)


# Family: what opens its texts; tokens of its tokenizer; its chat template; its config's BOS.
OPENINGS = {
    "SmolLM2": (
        "<|endoftext|>",
        {"bos": "<|im_start|>", "eos": "<|im_end|>", "unk": "<|endoftext|>"},
        CHATML,
        1,
    ),
    "Qwen2.5": ("<|endoftext|>", {"eos": "<|im_end|>", "pad": "<|endoftext|>"}, CHATML, None),
    "Qwen2.5-GGUF": ("<|endoftext|>", {"bos": "<|endoftext|>", "eos": "<|im_end|>"}, CHATML, 2),
    "Llama 3": ("<|begin_of_text|>", {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"}, "{{ bos_token }}", 0),
    "Gemma": ("<bos>", {"bos": "<bos>", "eos": "<eos>"}, "{{ bos_token }}<start_of_turn>", None),
    "Phi 3": ("<s>", {"bos": "<s>", "eos": "<|endoftext|>"}, "<s><|user|>", None),
    "Mistral": ("<s>", {"bos": "<s>", "eos": "</s>"}, None, None),
    "GPT-2": ("<|endoftext|>", {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}, None, None),
    "turns alone": ("<|im_start|>", {"bos": "<|im_start|>", "eos": "<|im_end|>"}, CHATML, "<|im_start|>"),
    "end alone": ("<end>", {"eos": "<end>"}, "{{ messages[0].content }}", None),
}


@pytest.mark.parametrize(("opening", "special", "template", "configured"), OPENINGS.values(), ids=OPENINGS)
def test_a_text_opens_with_what_stood_between_documents(opening, special, template, configured):
    made = bpe_tokenizer(**{f"{role}_token": token for role, token in special.items()})
    made.chat_template = template
    model = wrapped(made, len(made))
    known = made.get_vocab()
    model._module.config.bos_token_id = known.get(configured, configured)
    assert bos_id(model) == bos_id(model, "auto") == known[opening]
    assert bos_id(model, "none") is None and bos_id(model, "<end>") == known["<end>"]
    with pytest.raises(ModelError, match="bos '<no>' is no token of this tokenizer; pass 'auto', 'none'"):
        bos_id(model, "<no>")


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        ("Qwen3-1.7B", "<|endoftext|>"),
        ("gemma-2b-it", "<bos>"),
        ("Llama-3.1-8B-Instruct", "<|begin_of_text|>"),
        ("Phi-3-mini-4k-instruct", "<s>"),
    ],
)
def test_chat_models_open_a_text_as_their_base_models_do(name, opening, tmp_path):
    model = load(str(save_chat(name, tmp_path)))
    assert bos_id(model) == model.tokenizer.get_vocab()[opening]


def test_bos_goes_before_every_sequence(folder):
    tokens = np.array([[5, 6, 7], [8, 9, 5]])
    for model, opening in ((load(str(folder)), 0), (wrapped(bpe_tokenizer(bos_token="<bos>")), None)):
        ids = with_bos(model, tokens)
        assert ids.dtype == torch.int64 and np.array_equal(ids[:, 1:], tokens)
        assert set(ids[:, 0].tolist()) == {bos_id(model) if opening is None else opening}
        bare = with_bos(model, tokens, "none")
        assert bare.dtype == torch.int64 and np.array_equal(bare, tokens)


def test_plain_tokens_are_all_that_model_and_tokenizer_both_have_but_the_special_ones(folder):
    assert plain_token_ids(load(str(folder))) == list(range(2, VOCABULARY))
    padded, cut = wrapped(tokenizer(), VOCABULARY + 24), wrapped(tokenizer(), VOCABULARY - 5)
    assert plain_token_ids(padded) == list(range(2, VOCABULARY))
    assert plain_token_ids(cut) == list(range(2, VOCABULARY - 5))


def test_added_unused_and_byte_tokens_are_not_plain():
    made = bpe_tokenizer(eos_token="<end>")
    plain = plain_token_ids(wrapped(made, len(made)))
    assert plain == list(range(1, len(made)))
    control = [f"<|reserved_special_token_{i}|>" for i in range(5)]
    made.add_tokens([AddedToken(text, special=True) for text in control] + ["<tool_call>"])
    assert plain_token_ids(wrapped(made, len(made))) == plain
    pieces = ["<unk>", "<0x0A>", "<unused7>", "[PAD3]", "[unused1]", "a", "<0xg>", "unused"]
    inner = Tokenizer(Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    model = wrapped(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"), len(pieces))
    assert [pieces[token] for token in plain_token_ids(model)] == ["a", "<0xg>", "unused"]


# -- what results depend on ------------------------------------------------------------------------


def edit_json(name: str, **values):
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def edit_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    words = json.loads(path.read_text())
    words["model"]["vocab"]["apple"], words["model"]["vocab"]["bird"] = (
        words["model"]["vocab"]["bird"],
        words["model"]["vocab"]["apple"],
    )
    path.write_text(json.dumps(words))


@pytest.mark.parametrize(
    ("field", "edit"),
    [
        ("config_sha256", edit_json("config.json", rms_norm_eps=1e-3)),
        ("generation_sha256", edit_json("generation_config.json", eos_token_id=7)),
        ("tokenizer_sha256", edit_tokenizer),
        ("tokenizer_sha256", edit_json("tokenizer.json", post_processor=None)),
        ("tokenizer_sha256", edit_json("tokenizer_config.json", bos_token="w20")),
        ("chat_template_sha256", lambda folder: (folder / "chat_template.jinja").write_text("{{ 1 }}")),
    ],
)
def test_provenance_follows_all_that_results_depend_on(field, edit, tmp_path):
    folder = save_tiny("llama", tmp_path / "llama", chat=True)
    before = provenance(load(str(folder)))
    edit(folder)
    after = provenance(load(str(folder)))
    assert {name for name in before if before[name] != after[name]} == {field}


def test_provenance_does_not_follow_what_results_do_not_depend_on(tmp_path):
    folder = save_tiny("llama", tmp_path / "llama", chat=True)
    first = provenance(load(str(folder)))
    edit_json("config.json", transformers_version="4.0.0", dtype="bfloat16", _name_or_path="elsewhere")(
        folder
    )
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (tmp_path / "weights").write_bytes((other / "model.safetensors").read_bytes())
    (other / "model.safetensors").unlink()
    (other / "model.safetensors").symlink_to(tmp_path / "weights")
    (other / "stray.safetensors").write_bytes(b"not loaded")
    second = provenance(load(str(other), dtype="bfloat16"))
    assert {name for name in first if first[name] != second[name]} == {"model_id", "dtype"}


def test_weights_of_any_layout_are_hashed_by_their_bytes(tmp_path):
    model = random_model(copy.deepcopy(CONFIGS["llama"]))
    seen = set()
    for layout in ("shards", "bin"):
        folder = tmp_path / layout
        model.save_pretrained(folder, max_shard_size="20KB" if layout == "shards" else "1GB")
        tokenizer().save_pretrained(folder)
        if layout == "bin":
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        seen.add(provenance(load(str(folder)))["weights_sha256"])
        changed = (
            sorted(folder.glob("model-*.safetensors"))[-1]
            if layout == "shards"
            else folder / "pytorch_model.bin"
        )
        load_, save = (load_file, save_file) if layout == "shards" else (torch.load, torch.save)
        tensors = load_(changed)
        next(iter(tensors.values())).add_(0.5)
        save(tensors, changed, **({"metadata": {"format": "pt"}} if layout == "shards" else {}))
        seen.add(provenance(load(str(folder)))["weights_sha256"])
    assert len(seen) == 4


# -- weights that are no plain numbers -------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_a_quantised_folder_is_refused_by_its_method(method, folder):
    edit_json("config.json", quantization_config={"quant_method": method, "bits": 4})(folder)
    with pytest.raises(ModelError, match=rf"its weights are quantised \({method}\).* or a GGUF file of it"):
        load(str(folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_stored_as_integers_are_not_cast(dtype, folder):
    name = "model.layers.1.mlp.up_proj.weight"
    damage(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ModelError, match=f"{name} is stored as .8.*, so its weights are quantised"):
        load(str(folder))


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"{folder} holds an adapter, no whole model; merge it"):
        load(str(folder))


# -- dtype "auto", and names -----------------------------------------------------------------------


@pytest.fixture
def own_cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("LATENT_GEOMETRY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_what_the_processor_is_fast_at(fast, dtype, folder, own_cache, monkeypatch):
    measured = []
    monkeypatch.setattr(models, "_bfloat16_is_fast", lambda device: measured.append(device) or fast)
    for _ in range(2):
        model = load(str(folder), dtype="auto")
        assert provenance(model)["dtype"] == dtype
        assert {str(p.dtype) for p in model._module.parameters()} == {f"torch.{dtype}"}
    assert measured == ["cpu"], "once on a machine"
    assert provenance(load("organism/induction", dtype="auto"))["dtype"] == "float32"
    assert models.auto_dtype("owner/name", "cuda:1") == "bfloat16"
    monkeypatch.setattr(torch, "__version__", "another")
    models.auto_dtype("owner/name", "cpu")
    assert measured == ["cpu", "cpu"]


def test_the_measurement_of_auto_is_of_both_dtypes(monkeypatch):
    assert models._bfloat16_is_fast("cpu") in (True, False)
    assert models._processor()
    clock = iter(range(10**6))
    monkeypatch.setattr(models.time, "perf_counter", lambda: next(clock))
    assert not models._bfloat16_is_fast("cpu"), "equally fast"


def test_large_weights_are_looked_through_once(tmp_path, own_cache, monkeypatch):
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size, config.hidden_size = 80_000, 64
    random_model(config).save_pretrained(tmp_path / "large")
    tokenizer().save_pretrained(tmp_path / "large")
    looked, whole = [], models._check_finite
    monkeypatch.setattr(models, "_check_finite", lambda *args: looked.append(1) or whole(*args))
    for dtype in ("float32", "float32", "bfloat16"):
        load(str(tmp_path / "large"), dtype=dtype)
    assert len(looked) == 2, "once in a dtype"


def test_names_of_the_registry_are_models(tmp_path, monkeypatch):
    gpt2 = registry.find("gpt2")
    use_hub(monkeypatch, tmp_path / "hub")
    add_to_hub_cache(save_tiny("gpt2", tmp_path / "tiny"), tmp_path / "hub", gpt2.id, gpt2.revision)
    by_name = provenance(load("gpt2"))
    assert by_name == provenance(load(gpt2.id)) and by_name["revision"] == gpt2.revision
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", tmp_path / "gpt2")
    assert provenance(load("gpt2"))["config_sha256"] != by_name["config_sha256"], "a folder goes first"


# -- a pretrained model ----------------------------------------------------------------------------


def test_a_pretrained_gguf_model_is_read_as_it_was_trained(smollm2):
    record = provenance(smollm2)
    known = registry.find("SmolLM2-135M-Instruct")
    assert record["source_sha256"] == known.file.sha256 and record["revision"] == known.revision
    assert record["n_parameters"] == pytest.approx(known.billions * 1e9, rel=0.01)
    assert shape(smollm2).n_layers == known.layers
    assert smollm2.tokenizer.convert_ids_to_tokens(bos_id(smollm2)) == "<|endoftext|>"
    plain = plain_token_ids(smollm2)
    assert len(smollm2.tokenizer) - len(plain) == 17 and not set(range(17)) & set(plain)
    assert len(word_ids(smollm2, GRID_WORDS)) == 16
    # It says what English says, and repeats what it read: its weights are in their places.
    text = smollm2.tokenizer("The capital of France is", return_tensors="pt").input_ids
    likely = smollm2._module(with_bos(smollm2, text.numpy())).logits[0, -1].argmax()
    assert smollm2.tokenizer.decode(likely) == " Paris"
