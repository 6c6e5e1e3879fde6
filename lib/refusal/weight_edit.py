"""A subspace taken out of a model's weights, in memory alone: no edited model is ever saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from nnsight import TransformersModel

from lib.core.downloads import ModelError
from lib.core.families import is_remote, shape
from lib.refusal.generation import (
    first_token_log_probabilities,
)
from lib.refusal.removal import SITES, Ablation, intact


# -- the weight edit -------------------------------------------------------------------------------
@contextmanager
def orthogonalized(model: TransformersModel, basis: torch.Tensor, strength: float = 1.0) -> Iterator[None]:
    """Within the block nothing in the model writes to a subspace of the stream; afterwards it is as before.

    Edits embeddings, attention outputs and MLP outputs with their biases: W -> W - strength * P W. At
    strength 1 this equals an `Ablation` at all sites. A tied unembedding reads the stream and stays as it is.

    Args:
        basis: orthonormal rows [k, d_model].
        strength: other than 1 it differs from hooks, which act on every block's input again.

    Raises:
        ValueError: see `lib.refusal.removal.Ablation`; a basis of another width.
        ModelError: a remote model, whose weights are on NDIF and not for us to edit; a mixture of experts.
    """
    if is_remote(model):
        raise ModelError(
            "weights of a remote model are on NDIF and cannot be edited; use an Ablation, or load it here"
        )
    Ablation("orthogonalized", basis)
    if basis.shape[-1] != shape(model).d_model:
        raise ValueError(f"basis has {basis.shape[-1]} dimensions, the model's stream {shape(model).d_model}")
    module, originals = model._module, []
    before = getattr(module, "_provenance", None)
    try:
        for writer, name in _writers(model):
            parameter = getattr(writer, name)
            edited = _without(parameter, basis, strength, rows_are_written=_writes_rows(writer, name))
            # Another parameter in its place: the original stays, also as the unembedding that it may be.
            setattr(writer, name, torch.nn.Parameter(edited, requires_grad=False))
            originals.append((writer, name, parameter))
        if before is not None:  # cached results of the edited model are not those of the original
            module._provenance = before | {"orthogonalized": [basis.cpu().numpy(), strength]}
        yield
    finally:
        for writer, name, parameter in originals:
            setattr(writer, name, parameter)
        if before is not None:
            module._provenance = before


def edit_divergence(
    model: TransformersModel,
    prompts: Sequence[Sequence[int]],
    basis: torch.Tensor,
    strength: float = 1.0,
    sites: Sequence[str] = SITES,
) -> np.ndarray:
    """How far removal by hooks is from removal by the weight edit of the same strength.

    Args:
        prompts: token ids.
        basis, strength, sites: of `lib.refusal.removal.Ablation`; the edit knows no sites.

    Returns:
        KL(edited || hooked) of the first token of the answer, in nats [prompt].
    """
    hooks = [Ablation("hooks", basis, strength=strength, sites=tuple(sites))]
    hooked = first_token_log_probabilities(model, prompts, hooks)[0]
    with orthogonalized(model, basis, strength):
        edited = first_token_log_probabilities(model, prompts, [intact(model)])[0]
    return np.maximum((np.exp(edited) * (edited - hooked)).sum(-1), 0)


def _writers(model: TransformersModel) -> list[tuple[torch.nn.Module, str]]:
    """(module, parameter's name) of all that writes to the stream."""
    found = [(model.embed_tokens._module, "weight")]
    backbone = model._module.base_model
    if hasattr(backbone, "wpe"):  # GPT-2 adds its positions to the stream
        found.append((backbone.wpe, "weight"))
    for block in model.layers:
        mlp = dict(block.mlp._module.named_children())
        last = next((mlp[name] for name in ("down_proj", "c_proj", "dense_4h_to_h") if name in mlp), None)
        if last is None:
            raise ModelError(
                f"the MLPs of this {model._module.config.model_type!r} model are not written by one matrix "
                "(a mixture of experts): they cannot be edited; use an Ablation"
            )
        for projection in (block.self_attn.o_proj._module, last):
            found.append((projection, "weight"))
            if projection.bias is not None:
                found.append((projection, "bias"))
    return found


def _writes_rows(writer: torch.nn.Module, name: str) -> bool:
    """Whether a parameter's rows are vectors of the stream, not its columns (as in a Linear)."""
    return name == "bias" or not isinstance(writer, torch.nn.Linear)


def _without(
    parameter: torch.Tensor, basis: torch.Tensor, strength: float, rows_are_written: bool
) -> torch.Tensor:
    rows = parameter if rows_are_written else parameter.T  # [..., d_model]
    basis = basis.to(rows.device).float()
    removed = (rows.float() - strength * (rows.float() @ basis.T) @ basis).to(rows.dtype)
    return removed if rows_are_written else removed.T.contiguous()
