"""Interventions on attention heads and on the residual stream, and sweeps with the conditions in the batch.

The unit of work is a batch of (condition, sequence) rows: every row carries its own ablated heads and edits,
so that a sweep is a few large forwards. Nothing is computed twice: conditions that do the same run once, and
a condition starts at the first layer in which it differs from one that has run, from that one's stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from nnsight import TransformersModel

from lib.core.batches import Batches, auto_batch_size
from lib.core.families import check_length, shape

Head = tuple[int, int]  # (layer, head)


@dataclass(frozen=True, eq=False)
class Projection:
    """Takes a subspace out of the stream of each sequence: x - scale * B^T B (x - centre).

    Attributes:
        basis: orthonormal rows [sequence, k, d_model].
        centre: what the stream is moved to within the subspace [sequence, d_model].
        scale: of the removal, a number or one a sequence; 1 removes all.
    """

    basis: np.ndarray
    centre: np.ndarray
    scale: float | np.ndarray = 1.0

    def of(self, sequence: int) -> Callable[[torch.Tensor], None]:
        """Edits the stream of a sequence behind its prefix in place [token, d_model]."""
        basis, centre = (torch.tensor(x[sequence], dtype=torch.float32) for x in (self.basis, self.centre))
        scale = float(np.broadcast_to(self.scale, len(self.basis))[sequence])
        return partial(remove_subspace, basis=basis, strength=scale, center=centre)

    def shapes(self, n_sequences: int, n_tokens: int, d_model: int) -> dict[str, tuple[int, ...]]:
        """What the arrays must be."""
        scale = (n_sequences,) * np.ndim(self.scale)
        basis = (n_sequences, *np.shape(self.basis)[1:2], d_model)
        return {"basis": basis, "centre": (n_sequences, d_model), "scale": scale}


@dataclass(frozen=True, eq=False)
class Shift:
    """Adds to the stream of each token the vector of its class.

    Attributes:
        table: vector of each class [sequence, class, d_model].
        nodes: class of each token behind the prefix, -1 where nothing is added, int [sequence, token].
    """

    table: np.ndarray
    nodes: np.ndarray

    def of(self, sequence: int) -> Callable[[torch.Tensor], None]:
        """Edits the stream of a sequence behind its prefix in place [token, d_model]."""
        nodes = self.nodes[sequence]
        added = np.where(nodes[:, None] >= 0, self.table[sequence, nodes], 0)  # [token, d_model]
        return partial(_add, added=torch.tensor(added, dtype=torch.float32))

    def shapes(self, n_sequences: int, n_tokens: int, d_model: int) -> dict[str, tuple[int, ...]]:
        """What the arrays must be."""
        n_classes = max(int(np.max(self.nodes, initial=-1)) + 1, *np.shape(self.table)[1:2])
        return {"table": (n_sequences, n_classes, d_model), "nodes": (n_sequences, n_tokens)}


Edit = Projection | Shift


@dataclass(frozen=True)
class Condition:
    """What is done to the model: heads that are ablated, and edits of the stream; nothing is the baseline.

    Attributes:
        name: what it is, such as "induction".
        heads: (layer, head) pairs to ablate.
        draw: number of the random draw.
        edits: layer -> edit of the stream at the input of that block, behind the prefix.
    """

    name: str
    heads: frozenset[Head]
    draw: int
    edits: Mapping[int, Edit] = field(hash=False)

    def __init__(
        self, name: str, heads: Iterable[Head] = (), draw: int = 0, edits: Mapping[int, Edit] | None = None
    ):
        heads = frozenset((int(layer), int(head)) for layer, head in heads)
        edits = {int(layer): edit for layer, edit in (edits or {}).items()}
        for name_, value in {"name": name, "heads": heads, "draw": draw, "edits": edits}.items():
            object.__setattr__(self, name_, value)

    def first_difference(self, other: Condition) -> float:
        """The first layer in which this condition does something else than another; infinity if none."""
        layers = {layer for layer, _ in self.heads ^ other.heads}
        # The same edit is the same object: arrays are not compared.
        layers |= {
            layer
            for layer in self.edits.keys() | other.edits.keys()
            if self.edits.get(layer) is not other.edits.get(layer)
        }
        return min(layers, default=float("inf"))


def ablate_heads(block, ablated: torch.Tensor, fill: torch.Tensor | None = None) -> None:
    """Inside a trace: replace the outputs of heads at one block, before its output projection.

    Args:
        block: `model.layers[i]`.
        ablated: bool [batch, head], or [head] for the whole batch.
        fill: what they become [head, d_head], such as their mean; zero by default.
    """
    outputs = block.self_attn.o_proj.input
    heads = outputs.unflatten(-1, (ablated.shape[-1], -1))  # [batch, token, head, d_head]
    mask = ablated.to(heads.device).expand(len(heads), -1)[:, None, :, None]
    if fill is None:
        heads.masked_fill_(mask, 0.0)
    else:
        heads.copy_(torch.where(mask, fill.to(heads), heads))


def mean_head_outputs(
    model: TransformersModel, ids: torch.Tensor, *, n_prefix: int = 1, batch_size: int = 0
) -> torch.Tensor:
    """Mean output of every head over sequences and positions, for mean ablation.

    Args:
        model: from `lib.core.models.load`.
        ids: reference sequences, apart from those that are ablated [sequence, token].
        n_prefix: leading tokens (BOS) left out of the mean.
        batch_size: sequences a forward; 0 chooses by memory.

    Returns:
        [layer, head, d_head], float32.

    Raises:
        ValueError: no sequence, no token behind the prefix, or more tokens than the model has positions.
    """
    n_heads = shape(model).n_heads
    check_sequences(model, ids, n_prefix)

    def run(rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), model.trace(rows.to(model.device), use_cache=False) as tracer:
            sums = [
                block.self_attn.o_proj.input[:, n_prefix:]
                .unflatten(-1, (n_heads, -1))
                .float()
                .sum((0, 1))
                .detach()
                .cpu()
                for block in model.layers
            ]
            part = torch.stack(sums).double().save()
            tracer.stop()
        return part

    batches = Batches(batch_size or auto_batch_size(model, ids.shape[1]))
    total = sum(batches.map(run, ids, what="mean head outputs"))
    return (total / (len(ids) * (ids.shape[1] - n_prefix))).float()


def ablation_conditions(
    ranked: Mapping[str, Sequence[Head]],
    k_values: Sequence[int],
    n_draws: int,
    *,
    n_layers: int,
    n_heads: int,
    seed: int = 0,
) -> list[Condition]:
    """Baseline, the top k heads of each list, and random controls of the same size.

    Controls are drawn outside the top max(k) of every list. "random" draws from the whole model;
    "random like NAME" draws as many heads in every layer as the list NAME has there, and is missing for
    sizes at which a layer has too few left. Within a draw the sets of the plain control are nested, as
    those of the lists are.

    Args:
        ranked: heads by falling score, by name of the list.
        k_values: sizes of the sets.
        n_draws: random draws a control and size.
        n_layers, n_heads: of the model.
        seed: of the draws.

    Raises:
        ValueError: no size, more heads than the model or a list has, or than are left for a control.
    """
    if not len(k_values):
        raise ValueError("k_values is empty: give at least one number of heads to ablate")
    k_max = max(k_values)
    if k_max > n_layers * n_heads:
        raise ValueError(
            f"k_values: {k_max} heads to ablate, and the model has {n_layers * n_heads}; lower k_values"
        )
    for name, heads in ranked.items():
        if len(heads) < k_max:
            raise ValueError(f"k_values: {k_max} heads to ablate, and the list {name!r} ranks {len(heads)}")
    listed = {head for heads in ranked.values() for head in heads[:k_max]}
    pool = [
        (layer, head) for layer in range(n_layers) for head in range(n_heads) if (layer, head) not in listed
    ]
    if len(pool) < k_max:
        raise ValueError(
            f"k_values: a random control of {k_max} heads needs as many outside the top {k_max} of "
            f"{' and '.join(ranked)}; {len(pool)} are left: lower k_values"
        )
    conditions = [Condition("baseline")]
    conditions += [Condition(name, heads[:k]) for name, heads in ranked.items() for k in k_values]
    for draw in range(n_draws):
        order = [pool[i] for i in np.random.default_rng([seed, draw]).permutation(len(pool))]
        conditions += [Condition("random", order[:k], draw) for k in k_values]
        for name, heads in ranked.items():
            for k in k_values:
                layers = [layer for layer, _ in heads[:k]]
                matched = [
                    head for layer in set(layers) for head in _of_layer(order, layer)[: layers.count(layer)]
                ]
                if len(matched) == k:
                    conditions.append(Condition(f"random like {name}", matched, draw))
    return conditions


def layer_controls(
    ranked: Mapping[str, Sequence[Head]],
    k_values: Sequence[int],
    n_draws: int,
    *,
    n_layers: int,
    n_heads: int,
    seed: int = 0,
) -> list[Condition]:
    """Controls beside those of `ablation_conditions`, for a model of few heads: by layer.

    "layer i" ablates a whole layer. "random above 0" draws max(k) heads of layers above the first, outside
    the top max(k) of every list. "rest like NAME" draws as many heads in every layer as the top k of the list
    NAME has there, outside the top k of every list, for the sizes that have no "random like NAME".

    Args:
        ranked, k_values, n_draws, n_layers, n_heads, seed: of `ablation_conditions`.

    Returns:
        The conditions; controls for which too few heads are left are missing.
    """
    every = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    conditions = [Condition(f"layer {layer}", _of_layer(every, layer)) for layer in range(n_layers)]
    for draw in range(n_draws):
        order = [every[i] for i in np.random.default_rng([seed, draw]).permutation(len(every))]

        def outside(k: int, order: list[Head] = order) -> list[Head]:
            return [head for head in order if not any(head in heads[:k] for heads in ranked.values())]

        above = [head for head in outside(max(k_values)) if head[0]][: max(k_values)]
        if len(above) == max(k_values):
            conditions.append(Condition("random above 0", above, draw))
        for name, heads in ranked.items():
            for k in sorted(set(k_values)):
                layers = Counter(layer for layer, _ in heads[:k])
                rest, published = (
                    [head for layer, n in layers.items() for head in _of_layer(pool, layer)[:n]]
                    for pool in (outside(k), outside(max(k_values)))
                )
                if len(published) < k == len(rest):
                    conditions.append(Condition(f"rest like {name}", rest, draw))
    return conditions


def check_sequences(model: TransformersModel, ids: torch.Tensor, n_prefix: int) -> None:
    if ids.ndim != 2 or not len(ids):
        raise ValueError(f"ids must be [sequence, token] with a sequence at least, not {tuple(ids.shape)}")
    if not 0 <= n_prefix < ids.shape[1]:
        raise ValueError(f"n_prefix {n_prefix} leaves nothing of sequences of {ids.shape[1]} tokens")
    check_length(model, ids.shape[1])


def _add(stream: torch.Tensor, added: torch.Tensor) -> None:
    stream += added.to(stream.device)


def _of_layer(heads: list[Head], layer: int) -> list[Head]:
    return [head for head in heads if head[0] == layer]


def remove_subspace(
    stream: torch.Tensor,
    basis: torch.Tensor,
    strength: torch.Tensor | float = 1.0,
    center: torch.Tensor | None = None,
) -> None:
    """Take a subspace out of activations, in place: x - strength * P (x - center). Works inside a trace.

    Args:
        stream: [row, token, d_model], such as `model.layers[i].input`.
        basis: orthonormal rows [k, d_model], or those of each row of the batch [row, k, d_model], where rows
            of zeros fill up smaller subspaces.
        strength: a number, or one a row [row, 1, 1].
        center: [d_model], or one a row [row, 1, d_model]; None is zero.
    """
    basis = basis.to(stream.device)
    strength = strength.to(stream.device) if isinstance(strength, torch.Tensor) else strength
    # In the basis' float32: in half precision the coordinates would be rounded before they are subtracted.
    with torch.autocast(stream.device.type, enabled=False):  # NDIF's would do so
        centred = stream.to(basis.dtype) if center is None else stream - center.to(stream.device)
        coordinates = centred @ basis.mT  # [row, token, k]
        stream -= (strength * coordinates) @ basis
