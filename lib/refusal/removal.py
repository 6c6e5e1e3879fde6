"""A subspace taken out of a model's stream: which, where and how strongly."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from nnsight import TransformersModel

from lib.core.families import shape

SITES = ("block_input", "attention", "mlp")


@dataclass(frozen=True, eq=False)
class Ablation:
    """One condition: a subspace taken out of the residual stream.

    x -> x - strength * P (x - center) at block inputs, x -> x - strength * P x of what attention and MLP add:
    at strength 1 the stream's projection is that of the center throughout.

    Attributes:
        name: what the subspace is.
        basis: orthonormal rows [k, d_model]; k = 0 leaves the model intact.
        strength: 1 removes the projection, less weakens it, 2 reflects it.
        center: where the stream's projection goes instead of zero [d_model]; None is zero.
        sites: where, of "block_input", "attention" and "mlp" (what these add to the stream).
        layers: at which blocks; None is all.
        shift: (layer, vector [d_model]), added to that block's input at every token, after the removal there.

    Raises:
        ValueError: rows that are not orthonormal, an unknown site, an endless strength, or a center without
            block inputs to move there.
    """

    name: str
    basis: torch.Tensor
    strength: float = 1.0
    center: torch.Tensor | None = None
    sites: tuple[str, ...] = SITES
    layers: range | None = None
    shift: tuple[int, torch.Tensor] | None = None

    def __post_init__(self):
        if self.basis.ndim != 2:
            raise ValueError(
                f"condition {self.name!r}: basis must be [k, d_model], not {[*self.basis.shape]}"
            )
        rows = self.basis.double()
        error = (rows @ rows.T - torch.eye(len(rows), dtype=torch.float64, device=rows.device)).abs()
        if error.numel() and not error.max() < 1e-4:
            raise ValueError(
                f"condition {self.name!r}: the rows of basis are not orthonormal (off by {error.max():.1e}); "
                "make them so with lib.refusal.directions.stack"
            )
        unknown = set(self.sites) - set(SITES)
        if unknown:
            raise ValueError(
                f"condition {self.name!r}: no site {min(unknown)!r}; sites are {', '.join(SITES)}"
            )
        if not np.isfinite(self.strength):
            raise ValueError(f"condition {self.name!r}: strength {self.strength} is no number")
        if self.center is not None and "block_input" not in self.sites:
            raise ValueError(
                f"condition {self.name!r}: center moves block inputs; add 'block_input' to sites or drop it"
            )

    @property
    def removes(self) -> bool:
        """Whether any projection is removed."""
        return bool(len(self.basis) and self.strength and self.sites and self.layers != range(0))


def intact(model: TransformersModel) -> Ablation:
    """The condition that changes nothing."""
    return Ablation("intact", torch.zeros(0, shape(model).d_model))


def signature_of(condition: Ablation, n_layers: int) -> str:
    """Equal for conditions that do the same to the model."""
    digest = hashlib.sha256()
    if condition.removes:
        center = condition.center if condition.center is not None and condition.center.any() else None
        layers = range(n_layers) if condition.layers is None else condition.layers
        digest.update(repr((float(condition.strength), sorted(set(condition.sites)), [*layers])).encode())
        digest.update(_bytes(condition.basis) + b"center" + (b"" if center is None else _bytes(center)))
    if condition.shift and condition.shift[1].any():
        digest.update(b"shift %d" % condition.shift[0] + _bytes(condition.shift[1]))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()


def check_condition(condition: Ablation, n_layers: int, d_model: int) -> None:
    vectors = {"basis": condition.basis, "center": condition.center}
    layers = [*(condition.layers or ())]
    if condition.shift:
        vectors["shift"] = condition.shift[1]
        layers.append(condition.shift[0])
    for name, vector in vectors.items():
        if vector is not None and vector.shape[-1] != d_model:
            raise ValueError(
                f"condition {condition.name!r}: {name} has {vector.shape[-1]} dimensions, and the model's "
                f"residual stream has {d_model}; was it taken from another model?"
            )
        if vector is not None and not vector.isfinite().all():
            raise ValueError(f"condition {condition.name!r}: {name} is NaN or infinite somewhere")
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise ValueError(
                f"condition {condition.name!r}: layer {layer}; the model has layers 0 to {n_layers - 1}"
            )
