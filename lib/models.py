"""Load a causal language model by name, checked, with the same sites for every family.

`load` takes an embedded name (`organism/induction`), a name of data/models.yaml, a local folder, a `.gguf`
file or a hub id, and returns an nnsight model. Whatever the family, these names work in a trace:

    model.layers[i].input / .output         residual stream around block i       [batch, token, d_model]
    model.layers[i].self_attn.o_proj.input  head outputs, concatenated           [batch, token, head * d_head]
    model.layers[i].self_attn.output[1]     attention probabilities, eager only  [batch, head, query, key]
    model.layers[i].mlp.output              MLP's contribution to the stream     [batch, token, d_model]
    model.embed_tokens, model.norm, model.lm_head

Tested on Llama, Mistral, Qwen2, Qwen3, Gemma, Phi3, GPT-2 and GPT-NeoX (Pythia). Of any other family `load`
makes sure, by a forward of four tokens, that a block adds to the stream what its attention and its MLP put
out and nothing else, and that the logits are the unembedding of `norm`: Gemma 2 and 3, OLMo 2, Granite and
Cohere are refused. Of a remote model nothing is run before the first trace.

`python -m lib models` lists the models that the studies are meant for (`lib.registry`); where their weights
come from is `lib.sources`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import platform
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from nnsight import TransformersModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from lib import ROOT, registry, sources
from lib.sources import ModelError

ORGANISMS = ROOT / "data" / "organisms"

# GPT-2's and GPT-NeoX's names -> Llama's. Keys that a family lacks are skipped by nnsight.
ALIASES = {
    "model.layers": "layers",
    "model.norm": "norm",
    "model.embed_tokens": "embed_tokens",
    "transformer.h": "layers",
    "transformer.ln_f": "norm",
    "transformer.wte": "embed_tokens",
    "attn": "self_attn",
    "attn.c_proj": "attn.o_proj",
    "gpt_neox.layers": "layers",
    "gpt_neox.final_layer_norm": "norm",
    "gpt_neox.embed_in": "embed_tokens",
    "attention": "self_attn",
    "attention.dense": "attention.o_proj",
}

# What stood between documents in pretraining, by family: the first one among a tokenizer's added tokens.
DOCUMENT_MARKS = (
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<bos>",
    "<s>",
    "<｜begin▁of▁sentence｜>",
)
# Tokens that no text has: padding of GGUF vocabularies, reserves of several families, bytes of SentencePiece.
_UNUSED = re.compile(r"\[PAD\d+\]|\[unused\d+\]|<unused\d+>|<\|reserved_special_token_\d+\|>|<0x[0-9A-F]{2}>")


class ModelShape(NamedTuple):
    """Sizes that every family names differently."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_model: int
    n_vocabulary: int
    n_positions: int


def load(
    model_id: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    remote: bool = False,
) -> TransformersModel:
    """Load a causal language model and check what arrived.

    Args:
        model_id: `organism/NAME`, a name of data/models.yaml, a local folder in the Hugging Face layout, the
            path of a `.gguf` file, or a hub id. What is not on this disk is fetched.
        device: torch device, e.g. "cpu", "cuda", "cuda:1", "mps"; "auto" spreads the blocks over all GPUs,
            by accelerate. `lib` brings what it adds to a block to that block's device, and what it reads to
            the CPU; it was never run on several GPUs.
        dtype: torch dtype by name: "float32", "bfloat16", "float16"; "auto" is what `auto_dtype` says.
        revision: hub commit, tag or branch, None or "" for the one that data/models.yaml pins, else the
            default branch; for an organism a training checkpoint such as "step-00600" (see `checkpoints`).
        remote: leave the weights on NDIF and run every trace there, under the key in NDIF_API_KEY; the model
            is a `lib.remote.RemoteModel`. Hub ids only, without the pinned revision: NDIF serves the main
            branch.

    Returns:
        An nnsight model in eval mode without gradients. `provenance(model)` tells where it came from.

    Raises:
        ModelError: unknown name or device, no access, a revision of a folder, changed embedded file, missing,
            unexpected, misshapen, quantised or non-finite tensors, another dtype than asked, or a family of
            which the names above would be wrong.
    """
    embedded = model_id.startswith("organism/")
    is_path = embedded or Path(model_id).expanduser().is_dir()
    if registered := None if is_path else registry.lookup(model_id):
        model_id = registered.name if registered.file else registered.id
    if remote:
        from lib import remote as ndif  # registers this package with nnsight, which no local run needs

        return ndif.load(model_id, dtype="bfloat16" if dtype == "auto" else dtype, revision=revision)
    placement = _placement(device)
    dtype = auto_dtype(model_id, device) if dtype == "auto" else dtype
    torch_dtype = float_dtype(dtype)
    if embedded:
        folder, revision = _organism_folder(model_id), revision or None
        _verify_manifest(model_id, folder)
    else:
        folder, revision = Path(model_id).expanduser(), revision_of(model_id, revision)
        if registered and registered.file:
            folder = sources.obtain(registered)
        elif folder.suffix.lower() == ".gguf":
            folder = sources.from_gguf(folder)
        elif (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder} holds an adapter, no whole model; merge it into its base model first")
    source = str(folder) if folder.is_dir() else model_id
    # An organism's revision is a checkpoint file inside its folder, not a git revision.
    options = {"trust_remote_code": False, "revision": None if folder.is_dir() else revision}
    # A local folder never needs the network, not even for a look whether a file is newer.
    options["local_files_only"] = folder.is_dir()

    try:
        config = AutoConfig.from_pretrained(source, **options)
        _check_config(model_id, config)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        with sources.quiet_transformers():
            module, report = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=torch_dtype,
                attn_implementation="sdpa",
                # Reported by the check below with the file's name, never initialised at random.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **placement,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _explain_load_failure(model_id, folder, options["revision"], error) from error
    _check_report(model_id, report)
    _check_placement(model_id, getattr(module, "hf_device_map", {}))
    if embedded and revision:
        _load_checkpoint(module, model_id, folder, revision)
    if not folder.is_dir() and (snapshot := registry.snapshot(model_id, revision)):
        # Its name is the commit, where a branch, a tag or nothing was asked for.
        folder, revision = snapshot, snapshot.name
    files = _weight_files(folder, config, revision if embedded else None)
    _check_stored(model_id, files)
    return adopt(
        module,
        tokenizer,
        model_id=model_id,
        device=device,
        dtype=dtype,
        revision=revision,
        weights_sha256=_weights_hash(files, module),
        source_sha256=sources.source_sha256(folder),
    )


def revision_of(model_id: str, revision: str | None) -> str | None:
    """The revision that is read: of a hub id the one asked for, else the pinned one; of a local path none.

    Raises:
        ModelError: a revision of a local folder or file, which is one version and does not say which; another
            one than the pinned one of a model that is known by its hash.
    """
    path = Path(model_id).expanduser()
    if not (path.is_dir() or path.suffix.lower() == ".gguf"):
        registered = registry.lookup(model_id)
        if registered and registered.file and revision not in (None, "", registered.revision):
            raise ModelError(
                f"revision {revision!r}: {model_id} is the file with sha256 {registered.file.sha256}, whose "
                f"revision is {registered.revision}; leave revision out"
            )
        return revision or (registered.revision if registered else None)
    if revision:
        kind = "folder" if path.is_dir() else "file"
        raise ModelError(
            f"revision {revision!r}: model_id {model_id!r} is a {kind} on this disk and holds one version; "
            "leave revision out, or pass the hub id"
        )
    return None


def auto_dtype(model_id: str, device: str) -> str:
    """The dtype that "auto" means: float32 for the embedded models; for others bfloat16 where the device
    multiplies it natively (CUDA, or at least 1.3 times as fast as float32), else float32.

    The processor is measured once, for a tenth of a second, and the answer kept in the user's cache folder.
    """
    if model_id.startswith("organism/"):
        return "float32"
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return "bfloat16"
    measured_on = "cpu" if device == "auto" else device
    key = f"{_processor()}, {measured_on}, torch {torch.__version__}"
    fast = sources.remembered("bfloat16 is fast", key, lambda: _bfloat16_is_fast(measured_on))
    return "bfloat16" if fast else "float32"


def _bfloat16_is_fast(device: str) -> bool:
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for turn in range(6):  # in turns, so that other work slows both; the first one warms up
        for dtype in best:
            x = torch.ones(256, 1024, dtype=dtype, device=device)
            w = torch.ones(1024, 1024, dtype=dtype, device=device)
            start = time.perf_counter()
            for _ in range(3):
                x = x @ w / 1024
            x.sum().item()  # waits for the device
            if turn:
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] > 1.3 * best[torch.bfloat16]


def _processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{platform.machine()} {platform.processor()}"


def adopt(
    module: torch.nn.Module,
    tokenizer,
    *,
    model_id: str,
    device: str,
    dtype: str,
    revision: str | None,
    weights_sha256: str,
    source_sha256: str | None = None,
) -> TransformersModel:
    """The nnsight model of a transformers model whose weights are complete, checked as `load` does.

    Args:
        module, tokenizer: the model, in `dtype` and on the CPU, or where "auto" has put it.
        model_id, revision, weights_sha256, source_sha256: where it came from, for `provenance`; the last one
            of a model that was unpacked from a GGUF file.
        device, dtype: where it shall go, and what its weights have to be.

    Raises:
        ModelError: unknown device, weights of another dtype or that are not finite, a family whose sites do
            not mean what this module says.
    """
    _check_dtype(model_id, module, float_dtype(dtype))
    n_parameters = sum(p.numel() for p in module.parameters())
    if n_parameters < 10**7:
        _check_finite(model_id, module)
    else:  # seconds, once for these weights
        key = f"{weights_sha256} {dtype}"
        sources.remembered("finite", key, lambda: _check_finite(model_id, module))
    if device == "auto":
        device = f"auto ({', '.join(sorted({str(p.device) for p in module.parameters()}))})"
    else:
        _check_device(device)
        module.to(device)
    model = wrap(module.eval().requires_grad_(False), tokenizer)
    _check_sites(model_id, model, dtype)
    # Plain attribute of the wrapped module, not of the nnsight tree.
    module._provenance = {
        "model_id": model_id,
        "revision": revision,
        "weights_sha256": weights_sha256,
        **({"source_sha256": source_sha256} if source_sha256 else {}),
        **_hashes(module, tokenizer),
        "dtype": dtype,
        "device": device,
        "n_parameters": n_parameters,
    }
    return model


def wrap(module: torch.nn.Module, tokenizer) -> TransformersModel:
    """Wrap a loaded transformers model so that every family answers to the same names."""
    return TransformersModel(module, tokenizer=tokenizer, task="text-generation", rename=ALIASES)


def provenance(model: TransformersModel) -> dict:
    """Where a loaded model came from: id, revision, dtype, device, size, and sha256 of all that its results
    depend on: weights, the GGUF file if it was one, config, generation settings, tokenizer, chat template."""
    return dict(model._module._provenance)


def is_remote(model: TransformersModel) -> bool:
    """Whether the traces of a model run on NDIF, where its weights are."""
    return next(model._module.parameters()).is_meta


def shape(model: TransformersModel) -> ModelShape:
    """The sizes of a model, from its configuration."""
    config = model._module.config
    n_heads = config.num_attention_heads
    return ModelShape(
        n_layers=config.num_hidden_layers,
        n_heads=n_heads,
        n_key_value_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        # Qwen3 and Gemma set head_dim apart from d_model / n_heads.
        d_head=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        d_model=config.hidden_size,
        n_vocabulary=config.vocab_size,
        n_positions=config.max_position_embeddings,
    )


def check_length(model: TransformersModel, length: int, remedy: str = "lower seq_len") -> None:
    """Raise ValueError if sequences of `length` tokens are longer than the model's positions."""
    limit = shape(model).n_positions
    if length > limit:
        raise ValueError(
            f"{length} tokens (BOS included) are more than the {limit} positions of this model; {remedy}"
        )


def check_layer(model: TransformersModel, layer: int) -> None:
    """Raise ModelError if a model has no block of this number."""
    n_layers = shape(model).n_layers
    if not 0 <= layer < n_layers:
        raise ModelError(f"layer {layer}: the model has layers 0 to {n_layers - 1}")


def check_head(sizes: ModelShape, layer: int, head: int, subject: str = "") -> None:
    """Raise ModelError if a model of these sizes has no such head; `subject` says who asks for it."""
    if not (0 <= layer < sizes.n_layers and 0 <= head < sizes.n_heads):
        raise ModelError(
            f"{subject}head {layer}.{head}; the model has layers 0 to {sizes.n_layers - 1} with heads 0 to "
            f"{sizes.n_heads - 1}"
        )


@contextmanager
def eager_attention(model: TransformersModel) -> Iterator[None]:
    """Within the block the model computes attention probabilities that a trace can read.

    The default attention (sdpa) never forms them: `self_attn.output[1]` would be None.
    """
    module = model._module
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)


def output_matrices(model: TransformersModel, layer: int) -> torch.Tensor:
    """What the output projection of a block makes of each head: [head, d_head, d_model], float32.

    A head's output [d_head] times its matrix is what it adds to the stream, the projection's bias apart.
    """
    attention = model._module.get_submodule(model.layers[layer].self_attn.path.removeprefix("model."))
    linear = getattr(attention, "o_proj", None) or getattr(attention, "dense", None)
    # GPT-2's Conv1D keeps [in, out].
    weight = linear.weight.T if linear is not None else attention.c_proj.weight
    return weight.detach().float().cpu().unflatten(0, (shape(model).n_heads, -1))


def ov_matrix(model: TransformersModel, layer: int, head: int) -> torch.Tensor:
    """The OV circuit of a head: what it writes to the stream per unit of (normalised) input.

    Args:
        model: any supported family; grouped-query heads use the value matrix of their group.
        layer: block index.
        head: query-head index.

    Returns:
        W_OV [d_model, d_model], float64, acting on column vectors: output = W_OV @ input.
        Biases and the gain of the layer norm before it are not included.

    Raises:
        ModelError: a head that the model does not have; a remote model, whose weights are not here.
    """
    if is_remote(model):
        raise ModelError(
            "the OV circuit is made of weights, and those of a remote model are on NDIF; load it here"
        )
    sizes = shape(model)
    check_head(sizes, layer, head, "the OV circuit of ")
    attention = model._module.get_submodule(model.layers[layer].self_attn.path.removeprefix("model."))
    d_head, group = sizes.d_head, sizes.n_heads // sizes.n_key_value_heads
    rows = slice(head // group * d_head, (head // group + 1) * d_head)
    if hasattr(attention, "v_proj"):
        value = attention.v_proj.weight  # [n_key_value_heads * d_head, d_model]
    elif hasattr(attention, "qkv_proj"):
        value = attention.qkv_proj.weight[-sizes.n_key_value_heads * d_head :]
    elif hasattr(attention, "query_key_value"):
        # GPT-NeoX: query, key and value of a head, then those of the next one.
        value = attention.query_key_value.weight.unflatten(0, (sizes.n_heads, 3, d_head))[:, 2].flatten(0, 1)
    else:  # GPT-2's Conv1D keeps [in, out]
        value = attention.c_attn.weight[:, -sizes.d_model :].T
    return output_matrices(model, layer)[head].T.double() @ value[rows].double()


def word_ids(model: TransformersModel, words: Sequence[str]) -> list[int]:
    """Token ids of words inside a text, that is with a leading space.

    Args:
        model: its tokenizer decides.
        words: distinct words.

    Raises:
        ModelError: naming the words that are not one token, or not in the vocabulary, of this tokenizer.
    """
    tokenizer, found, broken = model.tokenizer, [], []
    for word in words:
        # The word's second occurrence has a space before it in every kind of tokenizer.
        once = tokenizer(word, add_special_tokens=False).input_ids
        inside = tokenizer(f"{word} {word}", add_special_tokens=False).input_ids[len(once) :]
        if len(inside) != 1:
            broken.append(f"{word!r} ({len(inside)} tokens)")
        elif inside[0] == tokenizer.unk_token_id:
            broken.append(f"{word!r} (unknown)")
        found += inside
    if broken:
        raise ModelError(f"not one token of this tokenizer: {', '.join(broken)}; choose other words")
    if len(set(found)) < len(found):
        raise ModelError("two of the words are the same token of this tokenizer; choose other words")
    return found


def bos_id(model: TransformersModel, bos: str = "auto") -> int | None:
    """The token that opens a text.

    Args:
        model: its tokenizer and configuration decide.
        bos: "auto" is the mark that stood between documents in training: the tokenizer's BOS, unless that
            opens the turns of a chat (SmolLM2's `<|im_start|>`), or what families without one use; "none" is
            no token; any other text is one token of the vocabulary.

    Raises:
        ModelError: the tokenizer has no such token.
    """
    tokenizer = model.tokenizer
    vocabulary = tokenizer.get_vocab()
    if bos == "none":
        return None
    if bos != "auto":
        if bos not in vocabulary:
            raise ModelError(f"bos {bos!r} is no token of this tokenizer; pass 'auto', 'none' or one that is")
        return vocabulary[bos]
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    template = str(tokenizer.chat_template or "")
    own, end = tokenizer.bos_token, tokenizer.eos_token
    configured = getattr(model._module.config, "bos_token_id", None)
    if own and (own in DOCUMENT_MARKS or own not in template):
        return vocabulary[own]
    for mark in DOCUMENT_MARKS:
        if vocabulary.get(mark) in added:
            return vocabulary[mark]
    if configured in added:
        return configured
    if end and end not in template:
        return vocabulary[end]
    raise ModelError(
        "this tokenizer has no BOS and no end-of-text token to open a text with; pass bos='none', or a token"
    )


def with_bos(model: TransformersModel, tokens: np.ndarray, bos: str = "auto") -> torch.Tensor:
    """Token ids [sequence, 1 + token] of tokens [sequence, token] behind `bos_id`; without it for "none"."""
    opening = bos_id(model, bos)
    width = 0 if opening is None else 1
    return torch.from_numpy(np.pad(tokens, ((0, 0), (width, 0)), constant_values=opening or 0))


def plain_token_ids(model: TransformersModel) -> list[int]:
    """Ids of all tokens but special, added, unused and single-byte ones, to draw random tokens from."""
    left_out = set(model.tokenizer.all_special_ids) | set(model.tokenizer.added_tokens_decoder)
    # Some models pad their embedding beyond the tokenizer's vocabulary.
    size = min(len(model.tokenizer), shape(model).n_vocabulary)
    tokens = model.tokenizer.convert_ids_to_tokens(range(size))
    return [
        token
        for token, text in enumerate(tokens)
        if token not in left_out and text is not None and not _UNUSED.fullmatch(text)
    ]


def organisms() -> list[str]:
    """Names of the embedded models that are present, e.g. `organism/induction`."""
    return sorted(f"organism/{p.parent.name}" for p in ORGANISMS.glob("*/manifest.json"))


def checkpoints(model_id: str) -> list[int]:
    """Training steps whose weights are kept with an embedded model, ascending."""
    files = (_organism_folder(model_id) / "checkpoints").glob("step-*.safetensors")
    return sorted(int(f.stem.removeprefix("step-")) for f in files)


def write_manifest(folder: Path) -> None:
    """Record the sha256 of every file of an embedded model, which `load` verifies."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    hashes = {str(p.relative_to(folder)): sources.sha256(p) for p in files}
    (folder / "manifest.json").write_text(json.dumps(hashes, indent=1) + "\n")


# -- checks ---------------------------------------------------------------------------------------


def float_dtype(name: str) -> torch.dtype:
    """A dtype that models may have, by name."""
    allowed = {"float32", "bfloat16", "float16"}
    if name not in allowed:
        raise ModelError(f"dtype {name!r} is not one of {', '.join(sorted(allowed))}")
    return getattr(torch, name)


def _placement(device: str) -> dict[str, str]:
    """What from_pretrained has to be told of the device; a named one is moved to when the checks are done."""
    if device != "auto":
        _check_device(device)
        return {}
    if find_spec("accelerate") is None:
        raise ModelError(
            "device 'auto' spreads a model over all GPUs by accelerate, which is not installed; run "
            "`pip install accelerate`, or name one device, such as 'cuda' or 'cpu'"
        )
    return {"device_map": "auto"}


def _check_placement(model_id: str, devices: dict[str, object]) -> None:
    """No block may lie where its weights would have to be fetched for every forward."""
    swapped = {str(device) for device in devices.values()} & {"cpu", "disk"}
    if swapped and set(map(str, devices.values())) != {"cpu"}:
        n = sum(str(device) in swapped for device in devices.values())
        raise ModelError(
            f"{model_id}: the GPUs are too small: {n} parts of it would lie on "
            f"{' and '.join(sorted(swapped))}; take dtype 'bfloat16', more GPUs, or device 'cpu'"
        )


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"device {device!r} cannot be used here ({reason}); try device='cpu'") from None


def _organism_folder(model_id: str) -> Path:
    folder = ORGANISMS / model_id.removeprefix("organism/")
    if not (folder / "manifest.json").is_file():
        known = organisms()
        close = difflib.get_close_matches(model_id, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ModelError(f"no embedded model {model_id!r}; {hint}embedded models: {', '.join(known)}")
    return folder


def _verify_manifest(model_id: str, folder: Path) -> None:
    """Every file of an embedded model is the one that was trained and measured."""
    for name, expected in json.loads((folder / "manifest.json").read_text()).items():
        path = folder / name
        # The checkpoints are many megabytes and verified when one of them is asked for.
        if path.parent.name == "checkpoints":
            continue
        _verify_file(model_id, path, expected)


def _verify_file(model_id: str, path: Path, expected: str) -> None:
    remedy = f"restore it with `git checkout -- {path}`"
    if not path.is_file():
        raise ModelError(f"{model_id}: {path} is missing; {remedy}")
    if sources.sha256(path) != expected:
        raise ModelError(
            f"{model_id}: {path} is not the file that was trained (its sha256 differs); {remedy}"
        )


def _check_report(model_id: str, report: dict) -> None:
    for problem in ("missing", "unexpected", "mismatched"):
        # A mismatch is (name, shape in the file, shape in the model).
        keys = sorted(str(key) for key in report.get(f"{problem}_keys", ()))
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise ModelError(
                f"{model_id}: {problem} tensors: {shown}. transformers would have gone on with random or "
                "ignored weights; get a complete checkpoint that belongs to this config.json"
            )


def _check_config(model_id: str, config: PreTrainedConfig) -> None:
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise ModelError(
            f"{model_id}: its weights are quantised ({getattr(method, 'value', method)}), so they can not be "
            "read and edited as numbers; take the model without quantisation, or a GGUF file of it"
        )


def _check_stored(model_id: str, files: Sequence[Path]) -> None:
    """No weight is stored as integers or in 8 bits, which would be cast to numbers that mean nothing."""
    for path in files:
        if path.suffix != ".safetensors":
            continue
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                stored = tensors.get_slice(name).get_dtype()
                if name.endswith("weight") and stored not in ("F64", "F32", "F16", "BF16"):
                    raise ModelError(
                        f"{model_id}: {name} is stored as {stored}, so its weights are quantised; take the "
                        "model without quantisation, or a GGUF file of it"
                    )


def _check_dtype(model_id: str, module: torch.nn.Module, dtype: torch.dtype) -> None:
    for name, tensor in module.named_parameters():
        if tensor.dtype != dtype:
            raise ModelError(
                f"{model_id}: {name} is {tensor.dtype}, asked for {dtype}; ask for the checkpoint's"
            )


def _check_finite(model_id: str, module: torch.nn.Module) -> bool:
    for name, tensor in module.named_parameters():
        # The extremes are finite only if every entry is: no mask as large as the tensor.
        if not torch.stack(tensor.detach().aminmax()).isfinite().all():
            raise ModelError(
                f"{model_id}: tensor {name} holds NaN or infinite values; the file is damaged, fetch it again"
            )
    return True


def _check_sites(model_id: str, model: TransformersModel, dtype: str) -> None:
    """One short forward shows that the sites mean what the head of this module says."""
    module, sizes, seen = model._module, shape(model), {}
    family = f"{model_id} is a model of type {module.config.model_type!r}"
    try:
        writers = [(b._module, b.self_attn.o_proj._module, b.mlp._module) for b in model.layers]
        norm, unembedding = model.norm._module, model.lm_head._module
        model.embed_tokens  # noqa: B018
    except AttributeError as error:
        raise ModelError(f"{family}, whose parts have other names ({error}); choose another model") from None

    def keep(site: torch.nn.Module, args: tuple, kwargs: dict, output) -> None:
        seen[site] = args[0] if args else kwargs["hidden_states"], output

    handles = [
        site.register_forward_hook(keep, with_kwargs=True)
        for site in {norm, *(site for block in writers for site in block)}
    ]
    # Words, of most vocabularies: their first and last tokens are special.
    ids = torch.arange(1, 5)[None] * sizes.n_vocabulary // 6
    try:
        with torch.no_grad():
            logits = module(input_ids=ids.to(next(module.parameters()).device), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if not logits.isfinite().all():
        raise ModelError(f"{model_id} overflows in {dtype} on four tokens; take 'bfloat16' or 'float32'")

    rounding = torch.finfo(float_dtype(dtype)).eps
    for i, (block, o_proj, mlp) in enumerate(writers):
        (before, after), (heads, attended), (_, computed) = seen[block], seen[o_proj], seen[mlp]
        if {getattr(each, "shape", None) for each in (after, attended, computed)} != {before.shape}:
            raise ModelError(f"{family}, whose block {i} puts out more than the stream; choose another model")
        before, after, attended, computed = (x.double() for x in (before, after, attended, computed))
        off = (after - before - attended - computed).abs()
        if (off > 4 * rounding * (before.abs() + attended.abs() + computed.abs())).any():
            raise ModelError(
                f"{family}, whose block {i} does not add the outputs of its attention and its MLP to the "
                "stream as they are (norms behind them, or multipliers): what the studies read and edit "
                "there is not what it writes; choose another model"
            )
        if heads.shape[-1] != sizes.n_heads * sizes.d_head:
            raise ModelError(
                f"{family}, whose attention in block {i} puts out {heads.shape[-1]} numbers, not "
                f"{sizes.n_heads} heads of {sizes.d_head}; choose another model"
            )
    expected = torch.nn.functional.linear(seen[norm][1], unembedding.weight, unembedding.bias).to(logits)
    if (logits - expected).abs().max() > max(2 * rounding, 1e-5) * expected.abs().max():
        raise ModelError(
            f"{family}, whose logits are not the unembedding of its last norm (they are scaled or capped): "
            "the probabilities that the studies take from it would be wrong; choose another model"
        )


def _load_checkpoint(module: torch.nn.Module, model_id: str, folder: Path, revision: str) -> None:
    path = folder / "checkpoints" / f"{revision}.safetensors"
    if not path.is_file():
        known = ", ".join(f"step-{step:05d}" for step in checkpoints(model_id)) or "none"
        raise ModelError(f"{model_id} has no checkpoint {revision!r}; it has {known}")
    _verify_file(
        model_id, path, json.loads((folder / "manifest.json").read_text())[f"checkpoints/{path.name}"]
    )
    module.load_state_dict(load_file(path), strict=True)


def _explain_load_failure(model_id: str, folder: Path, revision: str | None, error: Exception) -> ModelError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if folder.is_dir() and not (folder / "config.json").is_file():
        files = ", ".join(path.name for path in sorted(folder.glob("*.gguf")))
        remedy = f"pass the path of {files}" if files else "pass the folder that does"
        return ModelError(f"{folder} holds no config.json, so it is no model; {remedy}")
    if "attn_implementation" in str(error):
        return ModelError(
            f"{model_id}: transformers does not compute the attention of {first.split()[0]} by sdpa, as it "
            "has to be here; choose another model"
        )
    if folder.is_dir():
        return ModelError(f"cannot load {folder}: {first}")
    # What the hub and the network raise is an OSError.
    if not isinstance(error, OSError) or not registry.missing_files(model_id, revision):
        return ModelError(f"cannot load {model_id}: {first}")
    return ModelError(
        f"model_id {model_id!r} is no embedded model, no local folder, and could not be fetched from the "
        f"hub. {registry.how_to_get(model_id, revision, error)}"
    )


def _weight_files(folder: Path, config: PreTrainedConfig, checkpoint: str | None) -> list[Path]:
    """The files that transformers reads the weights of a folder from; rather more than fewer."""
    if checkpoint:
        return [folder / "checkpoints" / f"{checkpoint}.safetensors"]
    named = getattr(config, "transformers_weights", None)
    for stem, suffix in () if named else (("model", "safetensors"), ("pytorch_model", "bin")):
        if (whole := folder / f"{stem}.{suffix}").is_file():
            return [whole]
        if (index := folder / f"{whole.name}.index.json").is_file():
            return [
                folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
            ]
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def _weights_hash(files: Sequence[Path], module: torch.nn.Module) -> str:
    """One sha256 for the weights: of the files where they are at hand, else of the tensors."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(sources.sha256(path).encode())
    if not files:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _hashes(module: torch.nn.Module, tokenizer) -> dict[str, str | None]:
    """sha256 of what results depend on beside the weights, without where, how and by whom it was loaded."""

    def digest(value: object) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()

    config = module.config.to_dict()
    generation = module.generation_config.to_dict() if module.can_generate() else {}
    for name in ("_name_or_path", "dtype", "transformers_version", "_from_model_config"):
        config.pop(name, None), generation.pop(name, None)
    words = {
        "class": type(tokenizer).__name__,
        "special": tokenizer.special_tokens_map,
        "vocabulary": tokenizer.get_vocab()
        if not tokenizer.is_fast
        else tokenizer.backend_tokenizer.to_str(),
    }
    template = tokenizer.chat_template
    return {
        "config_sha256": digest(config),
        "generation_sha256": digest(generation),
        "tokenizer_sha256": digest(words),
        "chat_template_sha256": digest(template) if template else None,
    }


if __name__ == "__main__":
    sys.exit(registry.main())
