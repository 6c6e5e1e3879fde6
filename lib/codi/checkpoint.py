"""Load a CODI model: a causal language model, and the projection that feeds its thoughts back.

Two layouts are read:

* embedded: an ordinary model folder with `projection.safetensors` (absent for a model that thinks no
  thoughts) and `codi.json`: {"n_thoughts": 6, "bot": "<bot>", "eot": "<eot>", "answer_prompt": "The answer
  is :", "cot": "operators"};
* official, as `zen-E/CODI-gpt2` on the hub: one file of tensors, where `codi.base_model.model.*` is GPT-2
  under LoRA adapters as peft names it, and `prj.*` the projection. The adapters are merged on load. Behind
  the tokenizer's vocabulary stand three rows: padding, <bot>, <eot>.

Source of the official layout: Shen et al. (2025), code zhenyi4/codi.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from nnsight import TransformersModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lib.codi.problems import extract_answer
from lib.core import embedded, registry
from lib.core.downloads import ModelError
from lib.core.families import float_dtype, shape
from lib.core.models import as_loaded, load, revision_of

LORA_RANK, LORA_ALPHA = 128, 32
LORA_TARGETS = ("c_attn", "c_proj", "c_fc")
COTS = ("operators", "results", "compact")

_BASE, _PROJECTION = "codi.base_model.model.", "prj."
_FILES = ["*.json", "*.txt", "*.safetensors", "pytorch_model.bin"]


@dataclass(frozen=True, eq=False)
class CodiModel:
    """A model that thinks in vectors.

    Attributes:
        model: nnsight model, sites as in `lib.core.models`.
        projection: takes a final hidden state to the embedding that is fed back [..., d_model]; None for a
            model without thoughts.
        bot, eot: tokens that open and close the thoughts.
        n_thoughts: that it was trained to think.
        answer_prompt: text that it writes after `eot`, before the number.
        cot: how its teacher writes a step: "operators" is << 3 + 5 = 8 >>, "results" is 8 ; and "compact" is
            <<3+5=8>>, the official one.
        folder: where it came from; an embedded one holds problems.jsonl.
    """

    model: TransformersModel
    projection: nn.Module | None
    bot: int
    eot: int
    n_thoughts: int
    answer_prompt: str
    cot: str
    folder: Path

    def ids(self, text: str) -> list[int]:
        """Tokens of a bare text, nothing in front of it or behind it."""
        return self.model.tokenizer(text, add_special_tokens=False).input_ids

    @cached_property
    def token_texts(self) -> list[str]:
        """Text of every token of the model's vocabulary [token]."""
        tokenizer, n = self.model.tokenizer, shape(self.model).n_vocabulary
        known = min(n, len(tokenizer))
        texts = [tokenizer.decode([token]) for token in range(known)] + [""] * (n - known)
        texts[self.bot], texts[self.eot] = "<bot>", "<eot>"
        return texts

    @cached_property
    def token_values(self) -> np.ndarray:
        """Value of every token that is a number, NaN for the others, float64 [token].

        A number that is written as several tokens has no entry: GPT-2 has one token for most up to three
        digits, with and without a leading space.
        """
        values = np.full(len(self.token_texts), np.nan)
        for token, text in enumerate(self.token_texts):
            if text.strip().isdecimal() and text.isascii():
                values[token] = extract_answer(text)
        return values


def load_codi(
    model_id: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    base: str = "openai-community/gpt2",
) -> CodiModel:
    """Load a CODI model and check what arrived.

    Args:
        model_id: `organism/NAME`, a local folder in either layout, or a hub id such as "zen-E/CODI-gpt2".
        device: one torch device; "auto" is refused, for thoughts go from the last block back to the first.
        dtype: as for `lib.core.models.load`; adapters are merged in float32 before the cast.
        revision: hub commit, tag or branch, None or "" for the one that data/models.yaml pins, else the
            default branch.
        base: hub id or folder of the model whose configuration and tokenizer a checkpoint in the official
            layout takes where it has none of its own; a hub id at the revision that data/models.yaml pins.

    Returns:
        CodiModel, with the projection on `device` in `dtype`. Of a hub id, `provenance` has the commit.

    Raises:
        ModelError: unknown name, "auto", no access, a revision of a folder, missing, unexpected, misshapen or
            non-finite tensors, a vocabulary or an adapter rank that is not CODI's, naming culprit and remedy.
    """
    if device == "auto":
        raise ModelError(
            "device 'auto' spreads a model over several GPUs; a CODI model is small, and its thoughts go "
            "from the last block back to the first: name one device, such as 'cuda'"
        )
    is_embedded = model_id.startswith("organism/")
    if is_embedded and revision:
        raise ModelError(
            f"{model_id}: revision {revision!r}: a CODI organism has no checkpoints; leave it out"
        )
    if is_embedded:  # `load` says if there is no such folder
        folder, commit = embedded.ORGANISMS / model_id.removeprefix("organism/"), None
    else:
        folder, commit = _folder(model_id, revision_of(model_id, revision))
    if is_embedded or (folder / "codi.json").is_file():
        return _load_embedded(model_id, folder, device, dtype, commit)
    return _load_official(model_id, folder, device, dtype, commit, base)


def _folder(model_id: str, revision: str | None) -> tuple[Path, str | None]:
    """Where the files of a local or hub model are, and the commit of the latter."""
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return folder, None
    try:
        folder = Path(snapshot_download(model_id, revision=revision, allow_patterns=_FILES))
    except Exception as error:  # of the network, the hub, or a name that is none
        raise ModelError(
            f"model_id {model_id!r} is no embedded model, no local folder, and could not be fetched from the "
            f"hub. {registry.how_to_get(model_id, revision, error)}"
        ) from error
    return folder, folder.name  # the hub's cache calls a snapshot by its commit


# -- embedded --------------------------------------------------------------------------------------


def _load_embedded(model_id: str, folder: Path, device: str, dtype: str, commit: str | None) -> CodiModel:
    model = load(model_id, device=device, dtype=dtype, revision=commit)
    where = folder / "codi.json"
    try:
        settings = json.loads(where.read_text())
        n_thoughts, cot = settings["n_thoughts"], settings["cot"]
        names, prompt = (settings["bot"], settings["eot"]), settings["answer_prompt"]
    except OSError:
        raise ModelError(
            f"{model_id} is no CODI model: {where} is missing; name one, such as organism/codi"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ModelError(
            f"{where}: {error!r}; it needs n_thoughts, bot, eot, answer_prompt and cot"
        ) from None
    if not isinstance(n_thoughts, int) or n_thoughts < 0 or cot not in COTS:
        raise ModelError(
            f"{where}: n_thoughts {n_thoughts!r} must be 0 or more, cot {cot!r} one of {', '.join(COTS)}"
        )
    vocabulary = model.tokenizer.get_vocab()
    for name in names:
        if name not in vocabulary:
            raise ModelError(f"{where}: {name!r} is no token of the tokenizer beside it; name one that is")
    projection, path = None, folder / "projection.safetensors"
    if path.is_file():
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ModelError(f"{path} is damaged ({error}); fetch it again") from None
        projection = _projection(tensors, shape(model).d_model, str(path), "", device, dtype)
    elif n_thoughts:
        raise ModelError(f"{path} is missing, and {where.name} says n_thoughts {n_thoughts}; fetch the file")
    bot, eot = (vocabulary[name] for name in names)
    return CodiModel(model, projection, bot, eot, n_thoughts, prompt, cot, folder)


def _projection(
    tensors: Mapping[str, torch.Tensor], d_model: int, where: str, prefix: str, device: str, dtype: str
) -> nn.Module:
    """Dropout, Linear, GELU, Linear, LayerNorm, numbered as the official code does."""
    hidden = len(tensors["1.weight"]) if "1.weight" in tensors else d_model
    layers = {
        "0": nn.Dropout(0.0),  # only holds the number
        "1": nn.Linear(d_model, hidden),
        "2": nn.GELU(),
        "3": nn.Linear(hidden, d_model),
        "ln": nn.LayerNorm(d_model),
    }
    module = nn.Sequential(OrderedDict(layers))
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    _check_tensors(tensors, expected, where, prefix)
    module.load_state_dict(dict(tensors))
    return module.to(device, float_dtype(dtype)).eval().requires_grad_(False)


# -- official --------------------------------------------------------------------------------------


def _load_official(
    model_id: str, folder: Path, device: str, dtype: str, commit: str | None, base: str
) -> CodiModel:
    path, tensors = _read_tensors(model_id, folder, commit)
    strange = sorted(key for key in tensors if not key.startswith((_BASE, _PROJECTION)))
    if strange:
        raise ModelError(
            f"{path}: unexpected tensors: {_few(strange)}; a CODI checkpoint holds {_BASE}* and "
            f"{_PROJECTION}* alone"
        )
    adapted, projection = (_under(prefix, tensors) for prefix in (_BASE, _PROJECTION))
    config, tokenizer = _config_and_tokenizer(folder, base)
    if config.model_type != "gpt2":
        raise ModelError(
            f"{path}: its base is a {config.model_type} model; the official layout is read for GPT-2 alone"
        )
    n_words = tokenizer.vocab_size
    rows = len(adapted.get("transformer.wte.weight", ()))
    if rows and rows != n_words + 3:
        raise ModelError(
            f"{path}: {_BASE}transformer.wte.weight has {rows} rows; the tokenizer's {n_words} tokens with "
            f"padding, <bot> and <eot> behind them are {n_words + 3}: checkpoint and tokenizer do not belong "
            "together; pass the right base"
        )
    config.vocab_size, config.tie_word_embeddings = n_words + 3, True
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    module.load_state_dict(_merge(adapted, module, path))
    module.tie_weights()
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    model = as_loaded(
        module.to(float_dtype(dtype)),
        tokenizer,
        model_id=model_id,
        device=device,
        dtype=dtype,
        revision=commit,
        weights_sha256=sha256,
    )
    projection = _projection(projection, config.n_embd, str(path), _PROJECTION, device, dtype)
    return CodiModel(model, projection, n_words + 1, n_words + 2, 6, "The answer is:", "compact", folder)


def _read_tensors(model_id: str, folder: Path, commit: str | None) -> tuple[Path, dict[str, torch.Tensor]]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = folder / name
        if path.is_file():
            try:
                if path.suffix == ".safetensors":
                    return path, load_file(path)
                return path, dict(torch.load(path, map_location="cpu", weights_only=True))
            except Exception as error:  # whatever a damaged file makes pickle and zipfile raise
                first = str(error).strip().splitlines()[0]
                raise ModelError(f"{path} cannot be read as tensors ({first}); fetch it again") from None
    # Without network, a download that broke off passes for the whole model.
    rest = f", or fetch what is missing: hf download {model_id} --revision {commit}" if commit else ""
    raise ModelError(
        f"{model_id}: {folder} holds neither codi.json (embedded layout) nor pytorch_model.bin or "
        f"model.safetensors (official layout); pass a CODI model{rest}"
    )


def _config_and_tokenizer(folder: Path, base: str):
    own_config = folder / "config.json"
    has_config = own_config.is_file() and "model_type" in json.loads(own_config.read_text())
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    revision = registry.pinned(base)

    def source(own: bool) -> dict[str, str | None]:
        where, commit = (str(folder), None) if own else (base, revision)
        return {"pretrained_model_name_or_path": where, "revision": commit}

    try:
        config = AutoConfig.from_pretrained(**source(has_config))
        tokenizer = AutoTokenizer.from_pretrained(**source(has_tokenizer))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if not Path(base).is_dir():
            reason = registry.how_to_get(base, revision, error, weights="")
        raise ModelError(
            f"{folder} has no configuration or tokenizer of its own, and base {base!r} could not be had. "
            f"{reason}"
        ) from error
    return config, tokenizer


def _merge(adapted: dict[str, torch.Tensor], module: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """The weights of the plain model: W + alpha / rank * (B A)^T, for GPT-2 keeps its weights [in, out]."""
    plain = module.state_dict()
    targets = {
        name
        for name, _ in module.named_modules()
        if name.rpartition(".")[2] in LORA_TARGETS and f"{name}.weight" in plain
    }
    expected: dict[str, torch.Size] = {}
    source = {}  # name in the file of each weight of the plain model
    for name, tensor in plain.items():
        owner, _, kind = name.rpartition(".")
        source[name] = f"{owner}.base_layer.{kind}" if owner in targets else name
        expected[source[name]] = tensor.shape
    for name in targets:
        n_in, n_out = plain[f"{name}.weight"].shape
        for side, size in {"A": (LORA_RANK, n_in), "B": (n_out, LORA_RANK)}.items():
            key = f"{name}.lora_{side}.default.weight"
            expected[key] = torch.Size(size)
            rank = adapted[key].shape[0 if side == "A" else 1] if key in adapted else LORA_RANK
            if rank != LORA_RANK:
                raise ModelError(
                    f"{path}: {_BASE}{key} is an adapter of rank {rank}, CODI's are of rank {LORA_RANK}; "
                    "its scale alpha / rank would be a guess"
                )
    if "lm_head.weight" not in adapted:  # tied
        del expected["lm_head.weight"]
    _check_tensors(adapted, expected, str(path), _BASE)
    found = {name: adapted[key].float() for name, key in source.items() if key in adapted}
    for name in targets:
        a, b = (adapted[f"{name}.lora_{side}.default.weight"].float() for side in "AB")
        found[f"{name}.weight"] = found[f"{name}.weight"] + LORA_ALPHA / LORA_RANK * (b @ a).T
    # The official loader writes both into one tied tensor, the head last.
    table = found.get("lm_head.weight", found["transformer.wte.weight"])
    return found | dict.fromkeys(("lm_head.weight", "transformer.wte.weight"), table)


def _check_tensors(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size], where: str, prefix: str
) -> None:
    """Raise ModelError unless the tensors are those expected, of these shapes, and finite."""
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "misshapen": sorted(
            f"{name} {tuple(tensors[name].shape)} for {tuple(size)}"
            for name, size in expected.items()
            if name in tensors and tensors[name].shape != size
        ),
        "NaN or infinite": sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()),
    }
    for problem, names in problems.items():
        if names:
            raise ModelError(
                f"{where}: {problem} tensors: {_few([prefix + name for name in names])}; fetch a complete "
                "checkpoint of this layout"
            )


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
