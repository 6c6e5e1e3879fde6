"""Who writes the map: the residual stream as the sum of what each part of a model has added to it.

The stream at the input of a block is the embedding plus the outputs of all heads and MLPs before it. Means
over the tokens of a word are sums of the same parts, so each part has a share in a pattern of the word means,
and the shares add up to 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from nnsight import TransformersModel

from lib.core.downloads import ModelError
from lib.core.families import output_matrices, shape
from lib.core.interventions import Head, ablate_heads
from lib.core.progress import counting
from lib.core.statistics import means_of
from lib.core.sweeps import class_sums
from lib.induction.texts import Texts


class Parts(NamedTuple):
    """Word means of each part of the stream at the input of a block, in each text.

    Attributes:
        stream: what they add up to [text, node, d_model].
        embedding: [text, node, d_model].
        heads: outputs of the heads below, projected [text, layer, head, node, d_model].
        mlps: [text, layer, node, d_model].
    """

    stream: np.ndarray
    embedding: np.ndarray
    heads: np.ndarray
    mlps: np.ndarray

    def shares(self, patterns: np.ndarray) -> dict[str, np.ndarray]:
        """Share of each part in the variation of the stream's word means along patterns [node, k].

        With u_k the patterns, S the means of the stream and C those of a part, its share is
        sum_k <u_k C, u_k S> / sum_k |u_k S|^2; all shares of a text add up to 1.

        Returns:
            "embedding" [text], "heads" [text, layer, head], "mlps" [text, layer].
        """

        def along(means: np.ndarray) -> np.ndarray:
            # A word that a text never reads is left out: it lies at the mean of the others.
            centred = means - np.nanmean(means, axis=-2, keepdims=True)
            return patterns.T @ np.nan_to_num(centred)  # [..., k, d_model]

        whole = along(self.stream)
        size = (whole**2).sum((-2, -1))

        def share(means: np.ndarray) -> np.ndarray:
            wide = whole.reshape(len(whole), *[1] * (means.ndim - 3), *whole.shape[1:])
            inner = (along(means) * wide).sum((-2, -1))
            return inner / size.reshape(-1, *[1] * (inner.ndim - 1))

        return {name: share(getattr(self, name)) for name in ("embedding", "heads", "mlps")}


def shares_by_kind(
    parts: Parts, patterns: np.ndarray, lists: Mapping[str, Iterable[Head]]
) -> dict[str, np.ndarray]:
    """Shares of lists of heads, of the other heads, of all MLPs and of the embedding: kind -> [text].

    Args:
        patterns: [node, k], see `Parts.shares`.
        lists: name -> heads; those that are not below the layer count nowhere, one of two lists in the first.
    """
    shares = parts.shares(patterns)
    of_heads, counted, found = shares["heads"], set(), {}
    for name, heads in lists.items():
        own = {head for head in heads if head[0] < of_heads.shape[1]} - counted
        found[name] = sum((of_heads[:, layer, head] for layer, head in own), np.zeros(len(of_heads)))
        counted |= own
    found["other heads"] = of_heads.sum((1, 2)) - sum(found.values())
    return found | {"MLPs": shares["mlps"].sum(1), "embedding": shares["embedding"]}


def parts_of_stream(
    model: TransformersModel, texts: Texts, labels: np.ndarray, layer: int, heads: Iterable[Head] = ()
) -> Parts:
    """Word means of every part of the stream at the input of a block, one forward a text.

    Args:
        model: from `lib.core.models.load`, in which a block adds its attention and its MLP to the stream.
        texts: to read.
        labels: node of each token, -1 where it is not counted [text, token].
        layer: block whose input is taken apart.
        heads: (layer, head) pairs that are ablated meanwhile.

    Raises:
        ModelError: a layer that the model does not have.
    """
    sizes, ablated = shape(model), frozenset(heads)
    if not 0 < layer < sizes.n_layers:
        raise ModelError(f"layer {layer}: the model has blocks 1 to {sizes.n_layers - 1} to look below")
    n_nodes, n_prefix = texts.words.shape[1], texts.n_prefix
    masks = torch.zeros(layer, sizes.n_heads, dtype=torch.bool)
    for at, head in ablated:
        if at < layer:
            masks[at, head] = True
    weights = torch.stack(
        [output_matrices(model, at) for at in range(layer)]
    )  # [layer, head, d_head, d_model]
    found: dict[str, list[np.ndarray]] = {name: [] for name in Parts._fields}
    with counting("parts of the stream", len(texts.ids)) as count:
        for ids, of_text in zip(texts.ids, torch.from_numpy(labels), strict=True):
            with torch.no_grad(), model.trace(ids[None].to(model.device), use_cache=False) as tracer:
                outputs, mlps, embedding = [], [], None
                for at in range(layer):
                    block = model.layers[at]
                    if at == 0:
                        embedding = class_sums(block.input[:, n_prefix:], of_text[None], n_nodes).cpu()
                    if masks[at].any():
                        ablate_heads(block, masks[at])
                    read = block.self_attn.o_proj.input[:, n_prefix:]
                    outputs.append(class_sums(read, of_text[None], n_nodes).cpu())
                    mlps.append(class_sums(block.mlp.output[:, n_prefix:], of_text[None], n_nodes).cpu())
                stream = class_sums(model.layers[layer].input[:, n_prefix:], of_text[None], n_nodes).cpu()
                sums = {"stream": stream[0], "embedding": embedding[0], "mlps": torch.cat(mlps),
                        "heads": torch.cat(outputs)}.save()  # fmt: skip
                tracer.stop()
            counts = (labels[len(found["stream"])][None] == np.arange(n_nodes)[:, None]).sum(1)
            by_head = sums["heads"].unflatten(-1, (sizes.n_heads, -1))  # [layer, node, head, d_head]
            sums["heads"] = torch.einsum("lnhk,lhkd->lhnd", by_head, weights)
            for name in found:
                found[name].append(means_of(sums[name].double().numpy(), counts))
            count(1)
    return Parts(**{name: np.stack(each) for name, each in found.items()})
