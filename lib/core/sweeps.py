"""Many conditions over the same texts: what they share is computed once, what is read, summed on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np
import torch
from nnsight import TransformersModel

from lib.core.batches import Batches, auto_batch_size
from lib.core.cache import Cache
from lib.core.families import ModelShape, check_head, is_remote, shape
from lib.core.interventions import Condition, ablate_heads, check_sequences
from lib.core.models import provenance
from lib.core.progress import counting
from lib.core.statistics import means_of


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
        model: from `lib.core.models.load`.
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
    check_sequences(model, ids, n_prefix)
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
            streams, sums, words = {}, [], torch.empty(len(rows), 0, word_ids.shape[1], dtype=torch.float32)
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


def _class_counts(labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Number of tokens of each class [sequence, class]."""
    return (labels[..., None] == np.arange(n_classes)).sum(1)


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    for i in range(0, len(items), size):
        yield items[i : i + size]
