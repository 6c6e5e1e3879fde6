"""Interventions on attention heads and on the residual stream, and sweeps with the conditions in the batch.

The unit of work is a batch of (condition, sequence) rows: every row carries its own ablated heads and edits,
so that a sweep is a few large forwards. Nothing is computed twice: conditions that do the same run once, and
a condition starts at the first layer in which it differs from one that has run, from that one's stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import numpy as np
import torch

from lib.batches import Batches, auto_batch_size
from lib.generation import remove_subspace
from lib.geometry import means_of
from lib.models import ModelShape, TransformersModel, check_head, check_length, is_remote, provenance, shape
from lib.progress import counting
from lib.record import Cache

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


@dataclass(frozen=True)
class Sweep:
    """What `ablation_sweep` measured.

    Attributes:
        conditions: in the order asked.
        positions: tokens behind the prefix at which words were read, int [position].
        word_probabilities: of each word at the token after, float32 [condition, sequence, position, word].
        layers: where class sums were taken, rising: i is the input of block i, after any edit there; the
            number of blocks is the output of the last one.
        class_sums: residual stream, summed over the tokens of each class, float32
            [condition, sequence, layer, class, d_model].
        class_counts: number of those tokens [sequence, class].
        work: share of the blocks' forwards that was run, the rest was shared between conditions; NaN of a
            selection, which was not run by itself.
    """

    conditions: tuple[Condition, ...]
    positions: np.ndarray
    word_probabilities: np.ndarray
    layers: tuple[int, ...]
    class_sums: np.ndarray
    class_counts: np.ndarray
    work: float

    def find(self, name: str, k: int | None = None) -> list[int]:
        """Indices of the conditions of a name, with k heads or with any number."""
        return [i for i, c in enumerate(self.conditions) if c.name == name and k in (None, len(c.heads))]

    def select(self, conditions: Sequence[int] | None = None, layers: Sequence[int] | None = None) -> Sweep:
        """The sweep of these conditions, by index, and these of its `layers` alone; None is all."""
        rows = list(range(len(self.conditions)) if conditions is None else conditions)
        layers = self.layers if layers is None else tuple(sorted(layers))
        sums = self.class_sums if conditions is None else self.class_sums[rows]
        return replace(
            self,
            conditions=tuple(self.conditions[i] for i in rows),
            word_probabilities=self.word_probabilities[rows],
            layers=layers,
            class_sums=sums[:, :, [self.layers.index(layer) for layer in layers]],
            work=float("nan"),
        )

    def class_means(self, sequences: np.ndarray | None = None, *, per_sequence: bool = False) -> np.ndarray:
        """Class means, float64 [condition, layer, class, d_model]; NaN for a class that never occurs.

        Args:
            sequences: indices to average over, with repetitions for a bootstrap; all by default.
            per_sequence: do not average over sequences: [condition, sequence, layer, class, d_model].
        """
        rows = slice(None) if sequences is None else sequences
        sums, counts = self.class_sums[:, rows], self.class_counts[rows]
        if per_sequence:
            return means_of(sums, counts[:, None])
        return means_of(sums.sum(1, dtype=np.float64), counts.sum(0))


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
        model: from `lib.models.load`.
        ids: reference sequences, apart from those that are ablated [sequence, token].
        n_prefix: leading tokens (BOS) left out of the mean.
        batch_size: sequences a forward; 0 chooses by memory.

    Returns:
        [layer, head, d_head], float32.

    Raises:
        ValueError: no sequence, no token behind the prefix, or more tokens than the model has positions.
    """
    n_heads = shape(model).n_heads
    _check_sequences(model, ids, n_prefix)

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
    total = sum(batches.map(run, ids))
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


def class_sums(stream: torch.Tensor, labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Sums of activations by class [batch, class, d] of stream [batch, token, d] and labels [batch, token].

    A label of -1 is counted nowhere. Labels [grouping, batch, token] count a token in a class of each of
    several groupings, which have no class in common. Works inside a trace.

    Raises:
        ValueError: activations that are not finite. One would make every sum NaN, as 0 * NaN is.
    """
    classes = torch.arange(n_classes, device=stream.device)[:, None]
    one_hot = labels.to(stream.device)[..., None, :] == classes  # [..., batch, class, token]
    if labels.ndim == 3:
        one_hot = one_hot.any(0)
    with torch.autocast(stream.device.type, enabled=False):  # NDIF's would sum in bfloat16
        sums = one_hot.float() @ stream.detach().float()
    if not sums.isfinite().all():
        raise _overflow(stream.dtype)
    return sums


def word_probabilities(
    model: TransformersModel, final_stream: torch.Tensor, word_ids: torch.Tensor, max_logits: int = 0
) -> torch.Tensor:
    """Inside a trace: next-token probabilities of a few words, without keeping the other logits.

    Args:
        final_stream: `model.norm.output`, or some of its positions [batch, token, d_model].
        word_ids: [word], or those of each row [batch, word].
        max_logits: logits that may exist at a time, taken by slices of the vocabulary; 0 is 2 million on a
            CPU (8 MB in float32: with less, threads wait for each other) and 64 million elsewhere.

    Returns:
        [batch, token, word], float32: exp of the word's logit minus the log-sum-exp over the vocabulary.
    """
    unembedding = model.lm_head._module
    weight, bias = unembedding.weight.detach(), unembedding.bias
    stream = final_stream.detach().flatten(0, 1).to(weight)
    max_logits = max_logits or (2**21 if stream.device.type == "cpu" else 2**26)
    size = min(len(weight), max(1, max_logits // len(stream)))
    starts = range(0, len(weight), size)
    sums = torch.empty(len(stream), len(starts), dtype=torch.float32, device=stream.device)  # [token, slice]
    # The same buffers for all slices: to touch fresh memory takes longer than what is computed in it.
    buffer = stream.new_empty(len(stream) * size)
    exact, scaled = (torch.empty_like(buffer, dtype=torch.float32) for _ in range(2))
    for i, start in enumerate(starts):
        rows = slice(start, min(start + size, len(weight)))
        part = len(stream), rows.stop - start
        out, logits, log_shares = (x[: part[0] * part[1]].view(part) for x in (buffer, exact, scaled))
        torch.mm(stream, weight[rows].T, out=out)
        logits.copy_(out if bias is None else out.add_(bias[rows]))
        # One fused kernel instead of a maximum, a difference, an exponential and a sum.
        torch.log_softmax(logits, -1, out=log_shares)
        sums[:, i] = logits[:, 0] - log_shares[:, 0]
    words = word_ids.to(weight.device).expand(len(final_stream), -1)  # [batch, word]
    with torch.autocast(stream.device.type, enabled=False):  # NDIF's would round to bfloat16
        of_words = stream.view(*final_stream.shape[:2], -1) @ weight[words].mT
    if bias is not None:
        of_words += bias[words][:, None]
    return (of_words.float() - sums.logsumexp(-1).view(*final_stream.shape[:2], 1)).exp()


def ablation_sweep(
    model: TransformersModel,
    ids: torch.Tensor,
    conditions: Sequence[Condition],
    *,
    word_ids: Sequence[int] | np.ndarray = (),
    positions: Sequence[int] | np.ndarray | None = None,
    labels: np.ndarray | None = None,
    n_classes: int = 0,
    layers: Sequence[int] | None = None,
    fill: torch.Tensor | None = None,
    n_prefix: int = 1,
    batch_size: int = 0,
    cache: Cache | None = None,
) -> Sweep:
    """Run every sequence under every condition; read predictions and class sums of the stream on the way.

    Args:
        model: from `lib.models.load`.
        ids: token ids, equal lengths, no padding [sequence, prefix + token].
        conditions: which heads to ablate and which edits to make in each condition.
        word_ids: vocabulary ids whose probability is wanted [word], or those of each sequence
            [sequence, word]; none by default.
        positions: tokens behind the prefix at which it is wanted; all by default. No other logit is computed.
        labels: class of each token behind the prefix, -1 for none [sequence, token]; or several groupings of
            the tokens at once [grouping, sequence, token], with classes of their own each. Without labels no
            class sums are taken.
        n_classes: number of classes, of all groupings together.
        layers: at the input of which blocks class sums are taken, `n_layers` for the output of the last one;
            all of these by default.
        fill: outputs that replace those of ablated heads [layer, head, d_head]; zero by default.
        n_prefix: leading tokens (BOS) that are read by the model and neither measured nor edited.
        batch_size: rows a forward; 0 chooses by memory. Halved when memory runs out.
        cache: keeps every finished batch, so that an interrupted sweep goes on where it was.

    Returns:
        Sweep.

    Raises:
        ValueError: a head, layer, word, position or sequence that the model does not have, labels, a fill or
            an edit of another shape, no condition, nothing to read, activations that are not finite; naming
            it.
    """
    sizes, n_tokens = shape(model), ids.shape[-1] - n_prefix
    _check_sequences(model, ids, n_prefix)
    words = np.asarray(word_ids, dtype=int)
    words = np.broadcast_to(words, (len(ids), words.shape[-1])) if words.ndim < 2 else words
    positions = np.arange(n_tokens) if positions is None else np.asarray(positions, dtype=int)
    positions = positions if words.size else positions[:0]
    if labels is None:
        labels, layers = np.full((len(ids), n_tokens), -1), ()
    layers = tuple(range(sizes.n_layers + 1) if layers is None else sorted({int(i) for i in layers}))
    groupings = labels.reshape(-1, *labels.shape[-2:])  # [grouping, sequence, token]
    _check_sweep(sizes, ids, conditions, words, positions, groupings, n_classes, layers, fill, n_prefix)
    reach = sizes.n_layers if len(positions) else layers[-1]  # nothing is read further up
    # Streams that one trace of a remote model keeps for another would travel twice.
    plan = _Plan(conditions, reach, shared=not is_remote(model))
    rows_per_batch = batch_size or auto_batch_size(model, ids.shape[1])
    reader = _Reader(
        model, ids, torch.from_numpy(words.copy()), torch.from_numpy(n_prefix + positions),
        torch.from_numpy(groupings), n_classes, layers, fill, n_prefix, plan, Batches(rows_per_batch),
    )  # fmt: skip
    key = {
        "model": provenance(model),
        "ids": ids.numpy(),
        "word_ids": words,
        "positions": positions,
        "labels": labels,
        "n_classes": n_classes,
        "layers": layers,
        "fill": "zero" if fill is None else fill.numpy(),
        "n_prefix": n_prefix,
        "rows_per_batch": rows_per_batch,
    }

    probabilities = np.empty((len(conditions), len(ids), len(positions), words.shape[1]), dtype=np.float32)
    sums = np.empty((len(conditions), len(ids), len(layers), n_classes, sizes.d_model), dtype=np.float32)
    with counting("ablation sweep", len(plan.conditions) * len(ids)) as count:
        # Few sequences at a time, because the streams that other rows start from are kept for all of them.
        for sequences in _chunks(range(len(ids)), min(rows_per_batch, 16)):
            batches = plan.batches(sequences, rows_per_batch)
            reader.begin(batches)
            for batch in batches:
                first = plan.starts[batch[0][0]]
                rows = [(_described(plan.conditions[i]), sequence) for i, sequence in batch]
                run = partial(reader.run, batch)
                measured = (
                    cache.get("ablation_sweep", key | {"rows": rows, "first": first}, run) if cache else run()
                )
                for row, (i, sequence) in enumerate(batch):
                    probabilities[plan.places[i], sequence] = measured["probabilities"][row]
                    # Below the layer at which a row starts, its stream is that of its parent.
                    below = sums[plan.places[plan.parents[i]][0], sequence, : np.searchsorted(layers, first)]
                    sums[plan.places[i], sequence] = np.concatenate([below, measured["class_sums"][row]])
                reader.release(batch)
                count(len(batch))

    work = sum(reach - start for start in plan.starts) / (sizes.n_layers * len(conditions))
    counts = sum(_class_counts(grouping, n_classes) for grouping in groupings)
    return Sweep(tuple(conditions), positions, probabilities, layers, sums, counts, work)


# -- how a sweep is run ----------------------------------------------------------------------------


class _Plan:
    """Which condition goes on from which.

    Each starts from the earlier one that it shares most layers with. The layers that two conditions share are
    a common prefix, so the layers run are the nodes of a prefix tree, whatever the order: no plan runs fewer.

    Attributes:
        conditions: those that differ.
        places: indices of each among all conditions.
        parents: the condition whose stream each one starts from; the first one's is itself.
        starts: the first layer in which a condition differs from its parent; 0 runs whole.
        wanted: layers at whose input the stream of each condition is needed by others.

    Args:
        reach: the last layer that is read: conditions that differ above it are the same.
        shared: whether conditions go on from others at all.
    """

    def __init__(self, conditions: Sequence[Condition], reach: int, shared: bool = True):
        self.conditions: list[Condition] = []
        self.places: list[list[int]] = []
        self.parents: list[int] = []
        self.starts: list[int] = []
        for place, condition in enumerate(conditions):
            shared_layers = [condition.first_difference(other) for other in self.conditions] or [0]
            most = max(shared_layers)
            parent = shared_layers.index(most)  # of equals the earliest, which itself starts further down
            if most > reach:
                self.places[parent].append(place)
                continue
            self.conditions.append(condition)
            self.places.append([place])
            self.parents.append(parent)
            self.starts.append(int(most) if shared else 0)
        self.wanted: list[set[int]] = [set() for _ in self.conditions]
        for parent, start in zip(self.parents, self.starts, strict=True):
            if start:
                self.wanted[parent].add(start)

    def batches(self, sequences: Sequence[int], size: int) -> list[list[tuple[int, int]]]:
        """(condition, sequence) rows in batches that start at one layer, parents before children."""
        order = sorted(range(len(self.conditions)), key=lambda i: self.starts[i])
        return [
            batch
            for _, members in groupby(order, key=lambda i: self.starts[i])
            for batch in _chunks([(i, sequence) for i in members for sequence in sequences], size)
        ]


@dataclass
class _Reader:
    """Runs batches of (condition, sequence) rows, and keeps the streams that later rows start from.

    Attributes: see `ablation_sweep`; word_ids of each sequence, positions counted with the prefix, labels
    with their grouping.
    """

    model: TransformersModel
    ids: torch.Tensor
    word_ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    n_classes: int
    layers: tuple[int, ...]
    fill: torch.Tensor | None
    n_prefix: int
    plan: _Plan
    batches: Batches

    def begin(self, batches: list[list[tuple[int, int]]]) -> None:
        """Take up another group of sequences, which these batches hold."""
        self.batch_of = {row: batch for batch in batches for row in batch}
        self.streams: dict[tuple[int, int, int], torch.Tensor] = {}  # condition, sequence, layer: [token, d]
        self.users = Counter(self._origin(row) for row in self.batch_of)

    def release(self, batch: list[tuple[int, int]]) -> None:
        """Let go of the streams that only these rows still had to start from."""
        for row in batch:
            origin = self._origin(row)
            self.users[origin] -= 1
            if not self.users[origin]:
                self.streams.pop(origin, None)

    def run(self, batch: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        """Measure rows that all start at one block: probabilities, and class sums from there on."""
        done = list(self.batches.map(self._forward, batch))
        return {name: np.concatenate([part[name] for part in done]) for name in done[0]}

    def _forward(self, rows: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        # Names of their own, for a remote model is sent what the block below names.
        model, device, n_prefix, plan = self.model, self.model.device, self.n_prefix, self.plan
        layers, n_classes, positions = self.layers, self.n_classes, self.positions.to(device)
        indices, sequences = (list(column) for column in zip(*rows, strict=True))
        n_layers, n_heads = len(model.layers), shape(model).n_heads
        ids, word_ids = self.ids[sequences].to(device), self.word_ids[sequences]
        # No class is summed where no token has one.
        labelled = (self.labels[:, sequences] >= 0).any(0).any(0).nonzero().flatten().tolist() or [0]
        start, end = labelled[0], labelled[-1] + 1
        labels, summed = (
            self.labels[:, sequences, start:end].to(device),
            slice(n_prefix + start, n_prefix + end),
        )
        read = set(range(summed.start, summed.stop)) if n_layers in layers else set()
        read = torch.tensor(sorted(read.union(self.positions.tolist())), dtype=torch.long, device=device)
        fills = None if self.fill is None else self.fill.to(device)
        first, last = plan.starts[indices[0]], n_layers if len(positions) else layers[-1]
        entry = torch.stack([self._entry(row) for row in rows]).to(device) if first else None
        # What happens to which rows, by layer.
        ablated, edits, kept = {}, {}, {}
        for row, (i, sequence) in enumerate(rows):
            for layer, head in plan.conditions[i].heads:
                mask = ablated.setdefault(layer, torch.zeros(len(rows), n_heads, dtype=torch.bool))
                mask[row, head] = True
            for layer, edit in plan.conditions[i].edits.items():
                edits.setdefault(layer, []).append((row, edit.of(sequence)))
            for layer in plan.wanted[i]:
                kept.setdefault(layer, []).append(row)

        with torch.no_grad(), model.trace(ids, use_cache=False) as tracer:
            streams, sums, words = {}, [], torch.empty(len(rows), 0, word_ids.shape[1])
            for index, block in enumerate(model.layers):
                if index < first:
                    block.skip(entry)
                    continue
                if index in kept:
                    streams[index] = block.input[kept[index]].detach().cpu()
                for row, apply in edits.get(index, ()):
                    apply(block.input[row, n_prefix:])
                if index in layers:
                    sums.append(class_sums(block.input[:, summed], labels, n_classes).cpu())
                if index == last:
                    break
                if index in ablated:
                    ablate_heads(block, ablated[index], None if fills is None else fills[index])
                if index == n_layers - 1:  # nothing above attends: its MLP runs where it is read
                    block.mlp.input = block.mlp.input[:, read]
                    added = block.mlp.output
                    spread = added.new_zeros(len(rows), ids.shape[1], added.shape[-1])
                    spread[:, read] = added
                    block.mlp.output = spread
            if n_layers in layers:
                sums.append(class_sums(model.layers[-1].output[:, summed], labels, n_classes).cpu())
            if len(positions):
                words = word_probabilities(model, model.norm.output[:, positions], word_ids).cpu()
            measured = {"streams": streams, "class_sums": sums, "probabilities": words}.save()
            tracer.stop()

        for index, stream in measured["streams"].items():
            for row, kept_stream in zip(kept[index], stream, strict=True):
                self.streams[*rows[row], index] = kept_stream
        empty = torch.empty(len(rows), 0, n_classes, shape(model).d_model)
        sums = torch.stack(measured["class_sums"], 1) if measured["class_sums"] else empty
        if not measured["probabilities"].isfinite().all():
            raise _overflow(next(model._module.parameters()).dtype)
        return {"probabilities": measured["probabilities"].numpy(), "class_sums": sums.numpy()}

    def _origin(self, row: tuple[int, int]) -> tuple[int, int, int]:
        """Whose stream a row starts from, and where: (condition, sequence, layer)."""
        return self.plan.parents[row[0]], row[1], self.plan.starts[row[0]]

    def _entry(self, row: tuple[int, int]) -> torch.Tensor:
        """The stream that a row starts from [prefix + token, d_model]; run again if its row was cached."""
        origin = self._origin(row)
        if origin not in self.streams:
            self.run(self.batch_of[origin[:2]])
        return self.streams[origin]


# -- checks ----------------------------------------------------------------------------------------


def _check_sweep(
    sizes: ModelShape,
    ids: torch.Tensor,
    conditions: Sequence[Condition],
    words: np.ndarray,
    positions: np.ndarray,
    groupings: np.ndarray,
    n_classes: int,
    layers: tuple[int, ...],
    fill: torch.Tensor | None,
    n_prefix: int,
) -> None:
    """Everything about a sweep that can be wrong before its first forward."""
    n_tokens = ids.shape[1] - n_prefix
    if not len(conditions):
        raise ValueError("no condition to run; give at least Condition('baseline')")
    if not len(positions) and not layers:
        raise ValueError("nothing to read: give word_ids, or labels and layers")
    for condition in conditions:
        for head in sorted(condition.heads):
            check_head(sizes, *head, f"condition {condition.name!r} ablates ")
        for layer, edit in condition.edits.items():
            subject = f"condition {condition.name!r}, edit at layer {layer}: "
            if not 0 <= layer < sizes.n_layers:
                raise ValueError(f"{subject}the model has layers 0 to {sizes.n_layers - 1}")
            for name, expected in edit.shapes(len(ids), n_tokens, sizes.d_model).items():
                if np.shape(getattr(edit, name)) != expected:
                    found = np.shape(getattr(edit, name))
                    raise ValueError(f"{subject}{name} must be of shape {expected}, not {found}")
                if not np.isfinite(getattr(edit, name)).all():
                    raise ValueError(f"{subject}{name} is not finite")
    for layer in layers:
        if not 0 <= layer <= sizes.n_layers:
            raise ValueError(
                f"layer {layer}: the model has layers 0 to {sizes.n_layers - 1}, and {sizes.n_layers} for "
                "the output of the last one"
            )
    for grouping in groupings:
        _check_labels(grouping, len(ids), n_tokens, n_classes)
    if len(words) != len(ids):
        raise ValueError(
            f"word_ids must be [word] or [sequence, word] with {len(ids)} rows, not {words.shape}"
        )
    for name, numbers, limit, unit in (
        ("word_ids", words, sizes.n_vocabulary, "tokens of this model"),
        ("ids", ids.numpy(), sizes.n_vocabulary, "tokens of this model"),
        ("positions", positions, n_tokens, "tokens behind the prefix"),
    ):
        strange = numbers[(numbers < 0) | (numbers >= limit)]
        if len(strange):
            raise ValueError(f"{name}: {strange[0]} is none of the {limit} {unit}")
    of_heads = (sizes.n_layers, sizes.n_heads, sizes.d_head)
    if fill is not None and tuple(fill.shape) != of_heads:
        raise ValueError(f"fill must be [layer, head, d_head] = {of_heads}, not {tuple(fill.shape)}")


def _check_sequences(model: TransformersModel, ids: torch.Tensor, n_prefix: int) -> None:
    if ids.ndim != 2 or not len(ids):
        raise ValueError(f"ids must be [sequence, token] with a sequence at least, not {tuple(ids.shape)}")
    if not 0 <= n_prefix < ids.shape[1]:
        raise ValueError(f"n_prefix {n_prefix} leaves nothing of sequences of {ids.shape[1]} tokens")
    check_length(model, ids.shape[1])


def _check_labels(labels: np.ndarray, n_sequences: int, n_tokens: int, n_classes: int) -> None:
    expected = (n_sequences, n_tokens)
    if labels.shape != expected:
        raise ValueError(f"labels must be [sequence, token behind prefix] = {expected}, not {labels.shape}")
    strange = labels[(labels < -1) | (labels >= n_classes)]
    if len(strange):
        raise ValueError(f"labels: {strange[0]} is none of the {n_classes} classes, nor -1 for none")


def _overflow(dtype: torch.dtype) -> ValueError:
    return ValueError(
        f"activations overflowed in {str(dtype).removeprefix('torch.')}: some are NaN or infinite; load the "
        "model with dtype 'bfloat16' or 'float32'"
    )


def _described(condition: Condition) -> dict:
    """What a condition does, as part of a key."""
    edits = {
        str(layer): vars(edit) | {"kind": type(edit).__name__} for layer, edit in condition.edits.items()
    }
    return {"heads": sorted(condition.heads), "edits": edits}


def _add(stream: torch.Tensor, added: torch.Tensor) -> None:
    stream += added.to(stream.device)


def _class_counts(labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Number of tokens of each class [sequence, class]."""
    return (labels[..., None] == np.arange(n_classes)).sum(1)


def _of_layer(heads: list[Head], layer: int) -> list[Head]:
    return [head for head in heads if head[0] == layer]


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    for i in range(0, len(items), size):
        yield items[i : i + size]
