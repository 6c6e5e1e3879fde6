"""Models that run on NDIF (ndif.us), through nnsight: no weights here, every trace a job there.

`models.load(..., remote=True)` gives a `RemoteModel`, which the studies use as any other. What its traces
use of this package travels as source with the request, so that the server needs nothing of ours.

A block that is to go remote keeps to five rules, which a local one need not know:

* it names plain values, tensors and functions, never `self`, a module of ours or a parameters object: what
  it names is sent;
* tensors that it brings along are moved to where the activations are (`.to(stream.device)`);
* a tensor that it makes says its dtype (the server's default is bfloat16), and sums are kept out of the
  server's autocast;
* what it saves is detached and on the CPU, and as small as it can be: all of it is downloaded;
* nothing of one trace (a key-value cache, a stream) is needed in the next one: it would travel twice. Hence
  an answer of many tokens is one trace, of nnsight's `generate`.

What cannot go remote: models that are not on the hub as they are (the embedded ones, folders, CODI), the
weights themselves (`ov_matrix`, edits), raw torch hooks.
"""

from __future__ import annotations

import copyreg
import hashlib
from contextlib import suppress

import nnsight
import torch
from nnsight import TransformersModel
from nnsight.intervention.backends.remote import RemoteError
from transformers import AutoTokenizer, GenerationConfig
from websocket import WebSocketException

from lib.core import registry
from lib.core.downloads import ModelError
from lib.core.families import ALIASES, float_dtype
from lib.core.parameters import why_not_remote
from lib.core.tokens import bos_id

# Functions and classes of this package travel as source, where those of installed ones travel by name.
nnsight.register("lib")


class RemoteModel(TransformersModel):
    """A model without weights, whose traces run on NDIF."""

    # Of the inputs that are made for it; the weights on "meta" would swallow them.
    device = torch.device("cpu")

    def trace(self, *inputs, **options):
        """A trace as of any nnsight model; its block runs on the server, and what it saves comes back."""
        return super().trace(*inputs, remote=True, **options)

    def dispatch(self) -> None:
        raise ModelError(
            f"{self.repo_id} runs on NDIF and has no weights here; read them in a trace, or load it without "
            "remote"
        )

    # To the server it is an ordinary model, of the class that NDIF knows.

    def _remoteable_class(self) -> type:
        return TransformersModel

    def __reduce_ex__(self, protocol: int) -> tuple:
        return copyreg._reconstructor, (TransformersModel, object, None), self.__getstate__()


def load(model_id: str, *, dtype: str, revision: str | None = None) -> RemoteModel:
    """A model of the hub that NDIF runs; see `lib.core.models.load`.

    Args:
        model_id: hub id; its config and tokenizer are read here.
        dtype: in which NDIF serves it, usually "bfloat16".
        revision: None for what NDIF serves by default, the main branch.

    Raises:
        ModelError: no hub id, no key, no config or tokenizer, a model that NDIF does not run, another dtype.
    """
    if reason := why_not_remote(model_id):
        raise ModelError(reason)
    revision = revision or None
    try:
        model = RemoteModel(
            model_id,
            task="text-generation",
            tokenizer=AutoTokenizer.from_pretrained(model_id, revision=revision),
            revision=revision,
            rename=ALIASES,
            dtype=float_dtype(dtype),
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"config and tokenizer of {model_id!r} are needed here for remote as well. "
            + registry.how_to_get(model_id, revision, error, weights="")
        ) from error
    module = model._module.eval().requires_grad_(False)
    with suppress(OSError):  # not every model has these settings; its end tokens are among them
        module.generation_config = GenerationConfig.from_pretrained(model_id, revision=revision)
    served, weights = _served(model)
    if served != dtype:
        raise ModelError(f"NDIF serves {model_id} in {served}, asked for {dtype}; set dtype to {served!r}")
    snapshot = registry.snapshot(model_id, revision)
    module._provenance = {
        "model_id": model_id,
        # Of the config and tokenizer here; NDIF has loaded the same branch at a time of its own.
        "revision": snapshot.name if snapshot else revision,
        "weights_sha256": f"{weights} (of one row a matrix)",
        "dtype": dtype,
        "device": "NDIF",
        "n_parameters": sum(p.numel() for p in module.parameters()),
    }
    return model


def _served(model: RemoteModel) -> tuple[str, str]:
    """Dtype of the weights that NDIF serves, and the sha256 of a row of the main matrices."""
    try:
        with model.trace(torch.tensor([[bos_id(model)]]), use_cache=False) as tracer:
            matrices = [model.embed_tokens, model.lm_head]
            matrices += [block.self_attn.o_proj for block in model.layers]
            rows = [matrix._module.weight[0].detach().cpu() for matrix in matrices]
            rows = nnsight.save(rows)
            tracer.stop()
    except (RemoteError, WebSocketException, OSError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"NDIF does not run {model.repo_id}: {reason}. The models that it runs: "
            "python -c 'import nnsight; print(nnsight.status())'"
        ) from error
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.contiguous().view(torch.uint8).numpy())
    return str(rows[0].dtype).removeprefix("torch."), digest.hexdigest()
