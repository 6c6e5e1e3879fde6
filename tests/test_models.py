"""Loading: one path for all families, and every damaged folder named."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, FAMILIES, VOCABULARY, WORDS, save_tiny, tokenizer
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lib import models
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
    block = (module.model.layers if hasattr(module, "model") else module.transformer.h)[layer]
    norm = block.input_layernorm if hasattr(block, "input_layernorm") else block.ln_1
    seen = []
    handle = norm.register_forward_hook(lambda *args: seen.append(args[2]))
    module(input_ids=ids, use_cache=False)
    handle.remove()
    expected = ov_matrix(model, layer, head) @ seen[0][0, 0].double()
    torch.testing.assert_close(written.double(), expected, rtol=1e-4, atol=1e-5)


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
    with pytest.raises(
        ModelError, match=r"'nobody/no-such-model' is no embedded model .* no local folder, and could not"
    ):
        load("nobody/no-such-model")


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
    assert set(CONFIGS) == {"llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt2"}


def wrapped(tokenizer: PreTrainedTokenizerFast, n_vocabulary: int = VOCABULARY):
    """A model that is as small as can be, for what its tokenizer decides."""
    config = GPT2Config(
        vocab_size=n_vocabulary, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
    )
    return wrap(GPT2LMHeadModel(config), tokenizer)


def bpe_tokenizer(**options) -> PreTrainedTokenizerFast:
    """Byte-level as GPT-2's and Llama 3's: a word with the space before it is a token of its own."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<end>"], initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    inner.train_from_iterator(["apple apple apple bird bird", "bird bird bird apple"], trainer)
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
    with pytest.raises(ModelError, match="no BOS and no end-of-text token"):
        bos_id(wrapped(bpe_tokenizer()))


def test_bos_goes_before_every_sequence(folder):
    tokens = np.array([[5, 6, 7], [8, 9, 5]])
    for model, opening in ((load(str(folder)), 0), (wrapped(bpe_tokenizer(bos_token="<bos>")), None)):
        ids = with_bos(model, tokens)
        assert ids.dtype == torch.int64 and np.array_equal(ids[:, 1:], tokens)
        assert set(ids[:, 0].tolist()) == {bos_id(model) if opening is None else opening}


def test_plain_tokens_are_all_that_model_and_tokenizer_both_have_but_the_special_ones(folder):
    assert plain_token_ids(load(str(folder))) == list(range(2, VOCABULARY))
    padded, cut = wrapped(tokenizer(), VOCABULARY + 24), wrapped(tokenizer(), VOCABULARY - 5)
    assert plain_token_ids(padded) == list(range(2, VOCABULARY))
    assert plain_token_ids(cut) == list(range(2, VOCABULARY - 5))
