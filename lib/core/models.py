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

`python -m lib models` lists the models that the studies are meant for (`lib.core.registry`); where their
weights come from is `lib.core.sources`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from nnsight import TransformersModel
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from lib.core import downloads, registry, sources
from lib.core.downloads import ModelError
from lib.core.embedded import load_checkpoint, organism_folder, verify_manifest
from lib.core.families import float_dtype, shape, wrap


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
            is a `lib.core.remote.RemoteModel`. Hub ids only, without the pinned revision: NDIF serves the
            main branch.

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
        from lib.core import remote as ndif  # registers this package with nnsight, which no local run needs

        return ndif.load(model_id, dtype="bfloat16" if dtype == "auto" else dtype, revision=revision)
    placement = _placement(device)
    dtype = auto_dtype(model_id, device) if dtype == "auto" else dtype
    torch_dtype = float_dtype(dtype)
    if embedded:
        folder, revision = organism_folder(model_id), revision or None
        verify_manifest(model_id, folder)
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
        load_checkpoint(module, model_id, folder, revision)
    if not folder.is_dir() and (snapshot := registry.snapshot(model_id, revision)):
        # Its name is the commit, where a branch, a tag or nothing was asked for.
        folder, revision = snapshot, snapshot.name
    files = _weight_files(folder, config, revision if embedded else None)
    _check_stored(model_id, files)
    return as_loaded(
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
    fast = downloads.remembered("bfloat16 is fast", key, lambda: _bfloat16_is_fast(measured_on))
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


def as_loaded(
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
        downloads.remembered("finite", key, lambda: _check_finite(model_id, module))
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


def provenance(model: TransformersModel) -> dict:
    """Where a loaded model came from: id, revision, dtype, device, size, and sha256 of all that its results
    depend on: weights, the GGUF file if it was one, config, generation settings, tokenizer, chat template."""
    return dict(model._module._provenance)


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
        digest.update(downloads.sha256(path).encode())
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
