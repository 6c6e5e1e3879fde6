"""Interventions on attention heads, and sweeps over them with the conditions in the batch.

The unit of work is a batch of (condition, sequence) rows: every row carries its
own mask of ablated heads, so that a sweep is a few large forwards. Nothing is
computed twice: conditions that ablate the same heads run once, and a condition
starts at the first layer in which it differs from one that has run, from that
one's residual stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np
import torch

from lib.batches import Batches, auto_batch_size
from lib.geometry import means_of
from lib.models import ModelShape, TransformersModel, check_head, check_length, is_remote, provenance, shape
from lib.progress import counting
from lib.record import Cache

Head = tuple[int, int]  # (layer, head)


@dataclass(frozen=True)
class Condition:
    """A set of heads to ablate; none is the baseline.

    Attributes:
        name: what the set is, such as "induction".
        heads: (layer, head) pairs.
        draw: number of the random draw.
    """

    name: str
    heads: frozenset[Head]
    draw: int

    def __init__(self, name: str, heads: Iterable[Head] = (), draw: int = 0):
        heads = frozenset((int(layer), int(head)) for layer, head in heads)
        for field, value in {"name": name, "heads": heads, "draw": draw}.items():
            object.__setattr__(self, field, value)


@dataclass(frozen=True)
class Sweep:
    """What `ablation_sweep` measured.

    Attributes:
        conditions: in the order asked.
        word_probabilities: of each word at the next token, float32 [condition, sequence, token, word].
        class_sums: residual stream at the input of the read layer, summed over the window's
            tokens of each class, float32 [condition, sequence, class, d_model].
        class_counts: number of those tokens [sequence, class].
        work: share of the blocks' forwards that was run, the rest was shared between conditions; NaN of a
            selection, which was not run by itself.
    """

    conditions: tuple[Condition, ...]
    word_probabilities: np.ndarray
    class_sums: np.ndarray
    class_counts: np.ndarray
    work: float

    def find(self, name: str, k: int | None = None) -> list[int]:
        """Indices of the conditions of a name, with k heads or with any number."""
        return [i for i, c in enumerate(self.conditions) if c.name == name and k in (None, len(c.heads))]

    def select(self, conditions: Sequence[int]) -> Sweep:
        """The sweep of these conditions alone, by index."""
        rows = list(conditions)
        return replace(
            self,
            conditions=tuple(self.conditions[i] for i in rows),
            word_probabilities=self.word_probabilities[rows],
            class_sums=self.class_sums[rows],
            work=float("nan"),
        )

    def class_means(self, sequences: np.ndarray | None = None) -> np.ndarray:
        """Class means [condition, class, d_model], NaN for a class that never occurs.

        Args:
            sequences: indices to average over, with repetitions for a bootstrap; all by default.
        """
        rows = slice(None) if sequences is None else sequences
        sums = self.class_sums[:, rows].astype(np.float64).sum(1)
        return means_of(sums, self.class_counts[rows].sum(0))


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
    replacement = 0.0 if fill is None else fill.to(heads)
    heads.copy_(torch.where(mask, replacement, heads))


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


def layer_class_sums(
    model: TransformersModel,
    ids: torch.Tensor,
    labels: np.ndarray,
    n_classes: int,
    *,
    conditions: Sequence[Condition] = (Condition("baseline"),),
    fill: torch.Tensor | None = None,
    n_prefix: int = 1,
    batch_size: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Class sums of the residual stream at every layer, over all sequences, under every condition.

    Args:
        model: from `lib.models.load`.
        ids: token ids [sequence, prefix + token].
        labels: class of each token after the prefix, -1 for none [sequence, token]; or several groupings of
            the tokens at once [grouping, sequence, token], with classes of their own each.
        n_classes: number of classes, of all groupings together.
        conditions: which heads to ablate in each; the model as it is by default.
        fill: what the outputs of ablated heads become [layer, head, d_head]; zero by default.
        n_prefix: leading tokens that are not measured.
        batch_size: sequences a forward; 0 chooses by memory.

    Returns:
        The sums, float32 [condition, layer, class, d_model]: layer i is the input of block i, the last entry
        the output of the last block. And the number of tokens in them, int [class]. Means:
        `lib.geometry.means_of`.

    Raises:
        ValueError: labels that do not fit the sequences or the classes, sequences or heads that the model
            does not have, activations that are not finite.
    """
    sizes, groupings = shape(model), labels.reshape(-1, *labels.shape[-2:])
    _check_sequences(model, ids, n_prefix)
    for grouping in groupings:
        _check_labels(grouping, ids, n_prefix, n_classes)
    for head in sorted(frozenset().union(*(condition.heads for condition in conditions))):
        check_head(sizes, *head)
    unique, masks = distinct_heads(conditions, sizes)
    plan = SweepPlan(masks, shared=not is_remote(model))
    groups = torch.from_numpy(groupings)

    def run(rows: range) -> torch.Tensor:
        batch, of = ids[rows.start : rows.stop].to(model.device), groups[:, rows.start : rows.stop]
        sums = torch.empty(len(unique), sizes.n_layers + 1, n_classes, sizes.d_model)
        streams = {}  # condition, layer: where others go on from
        for i, ablated in enumerate(masks):
            layers = {layer for layer, _ in unique[i]}
            parent, first = plan.parents[i], plan.starts[i]
            entry, wanted = streams.get((parent, first)), plan.wanted[i]
            fills = None if fill is None else fill.to(model.device)
            with torch.no_grad(), model.trace(batch, use_cache=False) as tracer:
                kept, read = {}, []
                for index, block in enumerate(model.layers):
                    if index < first:
                        block.skip(entry)
                        continue
                    stream = block.input
                    if index in wanted:
                        kept[index] = stream.detach().clone()
                    read.append(class_sums(stream[:, n_prefix:], of, n_classes).sum(0).cpu())
                    if index in layers:
                        ablate_heads(block, ablated[index], None if fills is None else fills[index])
                read.append(class_sums(model.layers[-1].output[:, n_prefix:], of, n_classes).sum(0).cpu())
                measured = {"kept": kept, "sums": torch.stack(read)}.save()
                tracer.stop()
            streams |= {(i, index): stream for index, stream in measured["kept"].items()}
            sums[i, :first] = sums[parent, :first]
            sums[i, first:] = measured["sums"]
        return sums

    sums = sum(Batches(batch_size or auto_batch_size(model, ids.shape[1])).map(run, range(len(ids)))).numpy()
    places = [unique.index(condition.heads) for condition in conditions]
    return sums[places], sum(_class_counts(grouping, n_classes).sum(0) for grouping in groupings)


def class_sums(stream: torch.Tensor, labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Sums of activations by class [batch, class, d] of stream [batch, token, d] and labels [batch, token].

    A label of -1 is counted nowhere. Labels [grouping, batch, token] count a token in a class of each of
    several groupings, which have no class in common. Works inside a trace.

    Raises:
        ValueError: activations that are not finite. One would make every sum NaN, as 0 * NaN is.
    """
    # The extremes are finite only if every entry is: no mask as large as the stream.
    if stream.numel() and not torch.stack(stream.detach().aminmax()).isfinite().all():
        raise ValueError(
            f"activations overflowed in {str(stream.dtype).removeprefix('torch.')}: some are NaN or "
            "infinite; load the model with dtype 'bfloat16' or 'float32'"
        )
    classes = torch.arange(n_classes, device=stream.device)[:, None]
    one_hot = labels.to(stream.device)[..., None, :] == classes  # [..., batch, class, token]
    if labels.ndim == 3:
        one_hot = one_hot.any(0)
    with torch.autocast(stream.device.type, enabled=False):  # NDIF's would sum in bfloat16
        return one_hot.float() @ stream.detach().float()


def word_probabilities(
    model: TransformersModel, final_stream: torch.Tensor, word_ids: torch.Tensor, max_logits: int = 0
) -> torch.Tensor:
    """Inside a trace: next-token probabilities of a few words, without keeping the other logits.

    Args:
        final_stream: `model.norm.output` [batch, token, d_model].
        word_ids: [word].
        max_logits: logits that may exist at a time, taken by slices of the vocabulary; 0 is half a million
            (2 MB in float32) on a CPU and 128 million elsewhere.

    Returns:
        [batch, token, word], float32: exp of the word's logit minus the log-sum-exp over the vocabulary.
    """
    unembedding = model.lm_head._module
    weight, bias = unembedding.weight.detach(), unembedding.bias
    stream, word_ids = final_stream.detach().flatten(0, 1).to(weight), word_ids.to(weight.device)
    max_logits = max_logits or (2**19 if stream.device.type == "cpu" else 2**27)
    size = min(len(weight), max(1, max_logits // len(stream)))
    # One buffer for all slices: to allocate and free each of them scatters the heap, and the process grows.
    buffer = stream.new_empty(len(stream), size)
    n_slices = -(-len(weight) // size)
    sums = torch.empty(len(stream), n_slices, dtype=torch.float32, device=stream.device)  # [token, slice]

    def logits(rows: slice | torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        torch.mm(stream, weight[rows].T, out=out)
        return (out if bias is None else out.add_(bias[rows])).float()

    for i, start in enumerate(range(0, len(weight), size)):
        part = logits(slice(start, start + size), buffer[:, : len(weight) - start])
        highest = part.amax(-1)
        sums[:, i] = part.sub_(highest[:, None]).exp_().sum(-1).log_().add_(highest)
    of_words = logits(word_ids, stream.new_empty(len(stream), len(word_ids)))
    return (of_words - sums.logsumexp(-1, keepdim=True)).exp().unflatten(0, final_stream.shape[:2])


def ablation_sweep(
    model: TransformersModel,
    ids: torch.Tensor,
    conditions: Sequence[Condition],
    *,
    word_ids: Sequence[int],
    labels: np.ndarray,
    n_classes: int,
    layer: int,
    fill: torch.Tensor | None = None,
    n_prefix: int = 1,
    batch_size: int = 0,
    cache: Cache | None = None,
) -> Sweep:
    """Run every sequence under every condition and measure predictions and class sums.

    Args:
        model: from `lib.models.load`.
        ids: token ids, equal lengths, no padding [sequence, prefix + token].
        conditions: which heads to ablate in each condition.
        word_ids: vocabulary ids whose probability is wanted [word].
        labels: class of each token after the prefix, -1 for none [sequence, token].
        n_classes: number of classes.
        layer: class sums are taken at the input of this block.
        fill: outputs that replace those of ablated heads [layer, head, d_head]; zero by default.
        n_prefix: leading tokens (BOS) that are read by the model and not measured.
        batch_size: rows a forward; 0 chooses by memory. Halved when memory runs out.
        cache: keeps every finished batch, so that an interrupted sweep goes on where it was.

    Returns:
        Sweep.

    Raises:
        ValueError: a head, layer, word or sequence that the model does not have, labels or a fill of another
            shape, no condition, activations that are not finite; naming it.
    """
    sizes = shape(model)
    _check_sweep(model, ids, conditions, word_ids, labels, n_classes, layer, fill, n_prefix)
    unique, masks = distinct_heads(conditions, sizes)
    # Streams that one trace of a remote model keeps for another would travel twice.
    plan = SweepPlan(masks, shared=not is_remote(model))
    rows_per_batch = batch_size or auto_batch_size(model, ids.shape[1])
    reader = SweepReader(
        model,
        ids,
        word_ids=torch.as_tensor(list(word_ids)),
        labels=torch.from_numpy(labels),
        n_classes=n_classes,
        layer=layer,
        n_prefix=n_prefix,
        fill=fill,
        plan=plan,
        batch_size=rows_per_batch,
    )
    key = {
        "model": provenance(model),
        "ids": ids.numpy(),
        "labels": labels,
        "n_classes": n_classes,
        "n_prefix": n_prefix,
        "word_ids": [int(word) for word in word_ids],
        "layer": layer,
        "fill": "zero" if fill is None else fill.numpy(),
        "rows_per_batch": rows_per_batch,
    }

    # Where the results of each set of heads go. A baseline that nobody asked for comes last, and is cut off.
    n = len(conditions)
    places = [[i for i in range(n) if conditions[i].heads == heads] or [n] for heads in unique]
    probabilities = np.empty((n + 1, *labels.shape, len(word_ids)), dtype=np.float32)
    sums = np.empty((n + 1, len(ids), n_classes, sizes.d_model), dtype=np.float32)
    with counting("ablation sweep", len(unique) * len(ids)) as count:
        # Few sequences at a time, because the streams that other rows start from are kept for all of them.
        for sequences in _chunks(range(len(ids)), min(rows_per_batch, 16)):
            batches = plan.batches(sequences, rows_per_batch)
            reader.begin(batches)
            for batch in batches:
                rows = {"rows": [(sorted(unique[i]), sequence) for i, sequence in batch]}
                run = partial(reader.run, batch)
                measured = cache.get("ablation_sweep", key | rows, run) if cache else run()
                for row, (i, sequence) in enumerate(batch):
                    probabilities[places[i], sequence] = measured["probabilities"][row]
                    if plan.starts[i] <= layer:
                        sums[places[i], sequence] = measured["class_sums"][row]
                    else:  # the row differs from its parent above the read layer only
                        sums[places[i], sequence] = sums[places[plan.parents[i]][0], sequence]
                reader.release(batch)
                count(len(batch))

    work = sum(sizes.n_layers - start for start in plan.starts) / (sizes.n_layers * n)
    return Sweep(tuple(conditions), probabilities[:n], sums[:n], _class_counts(labels, n_classes), work)


# -- how a sweep is run ----------------------------------------------------------------------------


def distinct_heads(
    conditions: Sequence[Condition], sizes: ModelShape
) -> tuple[list[frozenset[Head]], torch.Tensor]:
    """The sets of heads that differ, the baseline's first, and their masks bool [set, layer, head]."""
    unique = list(dict.fromkeys([frozenset(), *(condition.heads for condition in conditions)]))
    masks = torch.zeros(len(unique), sizes.n_layers, sizes.n_heads, dtype=torch.bool)
    for mask, heads in zip(masks, unique, strict=True):
        for head in heads:
            mask[head] = True
    return unique, masks


class SweepPlan:
    """Which condition goes on from which.

    Attributes:
        masks: bool [condition, layer, head]; condition 0 is the baseline.
        parents: the condition whose stream each one starts from; the baseline's is itself.
        starts: the first layer in which a condition differs from its parent; 0 runs whole.
        wanted: layers at whose input the stream of each condition is needed by others.

    Args:
        shared: whether conditions go on from others at all.
    """

    def __init__(self, masks: torch.Tensor, shared: bool = True):
        self.masks = masks
        self.parents, self.starts, generations = [0], [0], [0]
        if not shared:
            self.parents, self.starts, generations = ([0] * len(masks) for _ in range(3))
        for i in range(len(self.starts), len(masks)):
            differs = (masks[:i] != masks[i]).any(-1)  # [earlier, layer]
            first = differs.float().argmax(-1)  # sets are distinct, so every row differs somewhere
            parent = int(first.argmax())  # of equals the earliest: it runs below its children's start
            self.parents.append(parent)
            self.starts.append(int(first[parent]))
            generations.append(generations[parent] + 1)
        self.wanted: list[set[int]] = [set() for _ in masks]
        for i in range(1, len(masks)):
            if self.starts[i]:
                self.wanted[self.parents[i]].add(self.starts[i])
        self._order = sorted(range(len(masks)), key=lambda i: (generations[i], self.starts[i], i))
        self._level = [(generations[i], self.starts[i]) for i in range(len(masks))]

    def batches(self, sequences: Sequence[int], size: int) -> list[list[tuple[int, int]]]:
        """(condition, sequence) rows in batches that start at one layer, parents before children."""
        return [
            batch
            for _, members in groupby(self._order, key=lambda i: self._level[i])
            for batch in _chunks([(i, sequence) for i in members for sequence in sequences], size)
        ]


class SweepReader:
    """Runs batches of (condition, sequence) rows, and keeps the streams that later rows start from.

    Args:
        model, ids, n_classes, layer, n_prefix, fill: of `ablation_sweep`.
        word_ids: int [word].
        labels: int [sequence, token].
        plan: which condition goes on from which.
        batch_size: rows a forward at most.
    """

    def __init__(
        self,
        model: TransformersModel,
        ids: torch.Tensor,
        *,
        word_ids: torch.Tensor,
        labels: torch.Tensor,
        n_classes: int,
        layer: int,
        n_prefix: int,
        fill: torch.Tensor | None,
        plan: SweepPlan,
        batch_size: int,
    ):
        self.model, self.ids, self.layer, self.n_prefix = model, ids, layer, n_prefix
        self.word_ids, self.labels, self.n_classes = word_ids, labels, n_classes
        self.fill, self.plan, self.batches = fill, plan, Batches(batch_size)

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
        """Measure rows that all start at one block."""
        done = list(self.batches.map(self._forward, batch))
        return {name: np.concatenate([part[name] for part in done]) for name in done[0]}

    def _forward(self, rows: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        # Names of their own, for a remote model is sent what the block below names.
        model, device, n_prefix, plan = self.model, self.model.device, self.n_prefix, self.plan
        read_layer, n_classes = self.layer, self.n_classes
        condition, sequence = (list(column) for column in zip(*rows, strict=True))
        ids, labels = self.ids[sequence].to(device), self.labels[sequence]
        masks, word_ids = plan.masks[condition].to(device), self.word_ids.to(device)  # [batch, layer, head]
        ablated = masks.any(dim=0).any(dim=-1).tolist()  # [layer]
        fills = None if self.fill is None else self.fill.to(device)
        first = plan.starts[condition[0]]
        entry = None
        if first:
            entry = torch.stack([self._entry(row) for row in rows]).to(device)
        # Rows whose stream others start from, by layer.
        kept = {
            index: [row for row, i in enumerate(condition) if index in plan.wanted[i]]
            for index in set().union(*(plan.wanted[i] for i in condition))
        }

        with torch.no_grad(), model.trace(ids, use_cache=False) as tracer:
            streams, sums = {}, None
            for index, block in enumerate(model.layers):
                if index < first:
                    block.skip(entry)
                    continue
                if index in kept:
                    streams[index] = block.input[kept[index]].detach().cpu()
                if index == read_layer:
                    sums = class_sums(block.input[:, n_prefix:], labels, n_classes).cpu()
                if ablated[index]:
                    ablate_heads(block, masks[:, index], None if fills is None else fills[index])
            words = word_probabilities(model, model.norm.output[:, n_prefix:], word_ids).cpu()
            measured = {"streams": streams, "class_sums": sums, "probabilities": words}.save()
            tracer.stop()

        for index, stream in measured["streams"].items():
            for row, kept_stream in zip(kept[index], stream, strict=True):
                self.streams[*rows[row], index] = kept_stream
        sums = measured["class_sums"]
        return {
            "probabilities": measured["probabilities"].numpy(),
            "class_sums": np.empty((len(rows), 0)) if sums is None else sums.numpy(),
        }

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
    model: TransformersModel,
    ids: torch.Tensor,
    conditions: Sequence[Condition],
    word_ids: Sequence[int],
    labels: np.ndarray,
    n_classes: int,
    layer: int,
    fill: torch.Tensor | None,
    n_prefix: int,
) -> None:
    """Everything about a sweep that can be wrong before its first forward."""
    sizes = shape(model)
    if not len(conditions):
        raise ValueError("no condition to run; give at least Condition('baseline')")
    for condition in conditions:
        for head in sorted(condition.heads):
            check_head(sizes, *head, f"condition {condition.name!r} ablates ")
    if not 0 <= layer < sizes.n_layers:
        raise ValueError(f"layer {layer}: the model has layers 0 to {sizes.n_layers - 1}")
    _check_sequences(model, ids, n_prefix)
    _check_labels(labels, ids, n_prefix, n_classes)
    if not len(word_ids):
        raise ValueError("word_ids is empty: give the tokens whose probability is wanted")
    for name, tokens in (("word_ids", torch.as_tensor(list(word_ids))), ("ids", ids)):
        strange = tokens[(tokens < 0) | (tokens >= sizes.n_vocabulary)]
        if len(strange):
            raise ValueError(f"{name}: {strange[0]} is none of the {sizes.n_vocabulary} tokens of this model")
    of_heads = (sizes.n_layers, sizes.n_heads, sizes.d_head)
    if fill is not None and tuple(fill.shape) != of_heads:
        raise ValueError(f"fill must be [layer, head, d_head] = {of_heads}, not {tuple(fill.shape)}")


def _check_sequences(model: TransformersModel, ids: torch.Tensor, n_prefix: int) -> None:
    if ids.ndim != 2 or not len(ids):
        raise ValueError(f"ids must be [sequence, token] with a sequence at least, not {tuple(ids.shape)}")
    if not 0 <= n_prefix < ids.shape[1]:
        raise ValueError(f"n_prefix {n_prefix} leaves nothing of sequences of {ids.shape[1]} tokens")
    check_length(model, ids.shape[1])


def _check_labels(labels: np.ndarray, ids: torch.Tensor, n_prefix: int, n_classes: int) -> None:
    expected = (len(ids), ids.shape[1] - n_prefix)
    if labels.shape != expected:
        raise ValueError(f"labels must be [sequence, token behind prefix] = {expected}, not {labels.shape}")
    strange = labels[(labels < -1) | (labels >= n_classes)]
    if len(strange):
        raise ValueError(f"labels: {strange[0]} is none of the {n_classes} classes, nor -1 for none")


def _class_counts(labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Number of tokens of each class [sequence, class]."""
    return (labels[..., None] == np.arange(n_classes)).sum(1)


def _of_layer(heads: list[Head], layer: int) -> list[Head]:
    return [head for head in heads if head[0] == layer]


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    for i in range(0, len(items), size):
        yield items[i : i + size]
