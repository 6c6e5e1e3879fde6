"""Loading: one path for all families, and every damaged folder named."""

from __future__ import annotations

import copy
import json
import shutil
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
    random_model,
    save_tiny,
    tokenizer,
    use_hub,
)
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram
from transformers import (
    AddedToken,
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

from lib.core import embedded, models, registry
from lib.core.attention import attention_spectra
from lib.core.families import ov_matrix, shape, wrap
from lib.core.interventions import ablate_heads
from lib.core.models import ModelError, load, provenance
from lib.core.tokens import bos_id, plain_token_ids, with_bos, word_ids
from lib.induction.parameters import GRID_WORDS
from lib.refusal.weight_edit import orthogonalized

COMMIT, OTHER_COMMIT = "0123456789abcdef" * 2 + "01234567", "fedcba98" * 5


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_tiny("llama", tmp_path / "llama")


@pytest.fixture
def organism(tmp_path, monkeypatch) -> Path:
    """A tiny embedded model `organism/tiny` with one checkpoint."""
    monkeypatch.setattr(embedded, "ORGANISMS", tmp_path)
    target = save_tiny("llama", tmp_path / "tiny")
    (target / "checkpoints").mkdir()
    other = save_tiny("llama", tmp_path / "other", seed=1)
    shutil.copy(other / "model.safetensors", target / "checkpoints" / "step-00010.safetensors")
    shutil.rmtree(other)
    embedded.write_manifest(target)
    return target


def damage(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_sites(family, dtype, tmp_path):
    model = load(str(save_tiny(family, tmp_path / family)), dtype=dtype)
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


def test_dtype_is_kept_as_asked(folder):
    model = load(str(folder), dtype="bfloat16")
    assert {p.dtype for p in model._module.parameters()} == {torch.bfloat16}
    with pytest.raises(ModelError, match="float8"):
        load(str(folder), dtype="float8")


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_no_head_sees_behind_a_sliding_window(family, tmp_path):
    config = copy.deepcopy(CONFIGS[family])
    config.sliding_window = 5
    random_model(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    spectra = attention_spectra(load(str(tmp_path)), torch.arange(2, 19)[None])
    assert np.abs(spectra[..., 5:]).max() == 0 < np.abs(spectra[..., 4]).min()


UNUSUAL = {name: getattr(CONFIGS["llama"], name) for name in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config, culprit", [
    (Gemma3TextConfig(**UNUSUAL, head_dim=12), "'gemma3_text', whose block 0"),
    (Olmo2Config(**UNUSUAL), "'olmo2', whose block 0"),
    (GraniteConfig(**UNUSUAL, residual_multiplier=0.22), "'granite', whose block 0"),
    (GraniteConfig(**UNUSUAL, logits_scaling=8.0), "'granite', whose logits"),
    (CohereConfig(**UNUSUAL, logit_scale=0.0625), "'cohere', whose logits"),
    (PhiConfig(**UNUSUAL), "'phi', .*o_proj"),
    (Gemma2Config(**UNUSUAL), "Gemma2ForCausalLM by sdpa"),
], ids=lambda value: getattr(value, "model_type", ""))  # fmt: skip
def test_family_whose_sites_mean_something_else_is_refused(config, culprit, dtype, tmp_path):
    random_model(copy.deepcopy(config)).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=culprit):
        load(str(tmp_path), dtype=dtype)


def test_mixture_of_experts_is_read_and_not_edited(tmp_path):
    random_model(MixtralConfig(**UNUSUAL, num_local_experts=2)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = load(str(tmp_path))
    with pytest.raises(ModelError, match="mixtral"), orthogonalized(model, torch.eye(32)[:1]):
        pass


def test_model_that_overflows_in_its_dtype_is_refused(folder):
    damage(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].mul_(1e8).clamp_(-6e4, 6e4))
    load(str(folder), dtype="bfloat16")
    with pytest.raises(ModelError, match="overflows in float16"):
        load(str(folder), dtype="float16")


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


def test_hub_model_that_can_not_be_read_is_not_called_missing(tmp_path, monkeypatch):
    use_hub(monkeypatch, tmp_path / "hub")
    snapshot = add_to_hub_cache(save_tiny("llama", tmp_path / "a"), tmp_path / "hub", "owner/name", COMMIT)
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load owner/name: "):
        load("owner/name")
    config = {"model_type": "qwen", "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}}
    (snapshot / "config.json").resolve().write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot load owner/name: .*custom code"):
        load("owner/name")


def test_auto_needs_accelerate(folder, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install accelerate"):
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
    with pytest.raises(ModelError, match="2 parts .* cpu and disk"):
        models._check_placement("m", {"model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "disk"})


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
KEYS = "model.layers.2.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda tensors: tensors.pop(UP), f"missing tensors: {UP}"),
        (lambda tensors: tensors.update({"layers.7.extra": torch.zeros(2)}), "unexpected .*7.extra"),
        (lambda tensors: tensors.update({NORM: torch.ones(31)}), f"mismatched .*{NORM}"),
        (lambda tensors: tensors[KEYS].view(-1)[5:6].fill_(float("nan")), KEYS),
        (lambda tensors: tensors[KEYS].view(-1)[5:6].fill_(float("-inf")), KEYS),
        (lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)}), f"{UP} is stored as I8"),
        (lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)}), f"{UP} is stored as F8"),
    ],
    ids=["missing", "unexpected", "misshapen", "NaN", "infinite", "integers", "8 bits"],
)
def test_tensor_that_is_not_what_it_has_to_be_is_named(change, culprit, folder):
    damage(folder, change)
    with pytest.raises(ModelError, match=culprit):
        load(str(folder))


def test_missing_and_truncated_files_are_named(folder, tmp_path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"cannot load {folder}"):
        load(str(folder))
    random_model(copy.deepcopy(CONFIGS["llama"])).save_pretrained(tmp_path / "b", max_shard_size="20KB")
    tokenizer().save_pretrained(tmp_path / "b")
    gone = sorted((tmp_path / "b").glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=gone.name):
        load(str(tmp_path / "b"))


def test_revision_of_a_folder_is_refused(folder):
    with pytest.raises(ModelError, match=f"revision 'main': .*{folder}"):
        load(str(folder), revision="main")


def test_unknown_names_fail_offline_with_a_remedy(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="'organism/inducton'; did you mean 'organism/induction'"):
        load("organism/inducton")
    use_hub(monkeypatch, tmp_path / "hub")
    with pytest.raises(ModelError, match="'nobody/no-such-model'(?s:.*)hf download nobody/no-such-model"):
        load("nobody/no-such-model")
    with pytest.raises(ModelError, match="'no/such/folder' is no hub id"):
        load("no/such/folder")


def test_unusable_device_is_named(folder):
    with pytest.raises(ModelError, match="device 'nonsense'"):
        load(str(folder), device="nonsense")


def test_embedded_model_loads_with_its_checkpoints(organism):
    final, early = load("organism/tiny"), load("organism/tiny", revision="step-00010")
    assert embedded.organisms() == ["organism/tiny"] and embedded.checkpoints("organism/tiny") == [10]
    expected = load_file(organism / "checkpoints" / "step-00010.safetensors")["lm_head.weight"]
    torch.testing.assert_close(early._module.lm_head.weight.data, expected)
    assert not torch.equal(final._module.lm_head.weight, early._module.lm_head.weight)
    assert provenance(final)["weights_sha256"] != provenance(early)["weights_sha256"]
    with pytest.raises(ModelError, match="step-99.*step-00010"):
        load("organism/tiny", revision="step-99")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "checkpoints/step-00010.safetensors"])
def test_a_shipped_file_that_was_changed_or_is_missing_is_noticed(organism, name):
    path, revision = organism / name, "step-00010" if "step" in name else None
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=f"{path} is not the file"):
        load("organism/tiny", revision=revision)
    path.unlink()
    with pytest.raises(ModelError, match=f"{path} is missing|no checkpoint"):
        load("organism/tiny", revision=revision)


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
    inner.train_from_iterator([f"{word} {word} {word} apple bird" for word in ("apple", "bird")], trainer)
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
    ("make", "words", "culprit"),
    [
        (tokenizer, ["apple", "zebra", "ice cream"], r"'zebra' \(unknown\), 'ice cream' \(2 tokens\)"),
        (bpe_tokenizer, ["apple", "plum"], "'plum'"),
        (sentencepiece_tokenizer, ["apple", "birdbird"], "'birdbird'"),
        (tokenizer, ["apple", "bird", " apple"], "the same token"),
    ],
)
def test_word_that_is_not_one_token_is_named(make, words, culprit):
    with pytest.raises(ModelError, match=culprit):
        word_ids(wrapped(make()), words)


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


def test_opening_that_a_tokenizer_lacks_is_named():
    model = wrapped(sentencepiece_tokenizer())
    model._module.config.bos_token_id = None
    with pytest.raises(ModelError, match="bos='none'"):
        bos_id(model)
    with pytest.raises(ModelError, match="'<no>'"):
        bos_id(model, "<no>")


def test_bos_goes_before_every_sequence(folder):
    model, tokens = load(str(folder)), np.array([[5, 6, 7], [8, 9, 5]])
    ids, bare = with_bos(model, tokens), with_bos(model, tokens, "none")
    assert ids.dtype == bare.dtype == torch.int64
    assert np.array_equal(ids, np.insert(tokens, 0, 0, axis=1)) and np.array_equal(bare, tokens)


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
    vocabulary = words["model"]["vocab"]
    vocabulary["apple"], vocabulary["bird"] = vocabulary["bird"], vocabulary["apple"]
    path.write_text(json.dumps(words))


def edit_weights(folder: Path) -> None:
    damage(folder, lambda tensors: tensors[NORM].add_(0.5))


@pytest.mark.parametrize(
    ("field", "edit"),
    [
        ("weights_sha256", edit_weights),
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
    assert before["n_parameters"] == sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    edit(folder)
    after = provenance(load(str(folder)))
    assert {name for name in before if before[name] != after[name]} == {field}


def test_weights_of_any_layout_are_hashed_by_their_bytes(tmp_path):
    """Shards, of which the last one changes, and a file that torch wrote."""
    model, seen = random_model(copy.deepcopy(CONFIGS["llama"])), set()
    for i in range(2):
        shards, pickled = tmp_path / f"shards {i}", tmp_path / f"pickled {i}"
        for folder, size in ((shards, "20KB"), (pickled, "1GB")):
            model.save_pretrained(folder, max_shard_size=size)
            tokenizer().save_pretrained(folder)
        torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
        (pickled / "model.safetensors").unlink()
        seen |= {provenance(load(str(folder)))["weights_sha256"] for folder in (shards, pickled)}
        with torch.no_grad():
            model.model.norm.weight.add_(0.5)
    assert len(seen) == 4


# -- weights that are no plain numbers -------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "fp8"])
def test_a_quantised_folder_is_refused_by_its_method(method, folder):
    edit_json("config.json", quantization_config={"quant_method": method, "bits": 4})(folder)
    with pytest.raises(ModelError, match=method):
        load(str(folder))


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"{folder} holds an adapter"):
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


def test_names_of_the_registry_are_models(tmp_path, monkeypatch):
    gpt2 = registry.find("gpt2")
    use_hub(monkeypatch, tmp_path / "hub")
    add_to_hub_cache(save_tiny("gpt2", tmp_path / "tiny"), tmp_path / "hub", gpt2.id, gpt2.revision)
    by_name = provenance(load("gpt2"))
    assert by_name == provenance(load(gpt2.id))
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
