"""OV circuits of heads in place of the toy's identity: does a step through them draw the graph?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from nnsight import TransformersModel

from lib.core.families import ov_matrix
from lib.core.interventions import Head
from lib.core.statistics import Estimate, bootstrap
from lib.induction import geometry, mixing
from lib.induction.walks import Graph


class Circuit(NamedTuple):
    """What the OV circuit of a head does to the vectors that the stream holds of some words.

    Attributes:
        alignment: cosine of what the head writes with the word's own vector.
        size: of what it writes, relative to the vector.
        way: where the energy after one mixing step through the circuit lies on the way from the same circuit
            turned at random (0) to an ideal copier of its rank and size (1), with its interval over draws.
    """

    alignment: float
    size: float
    way: Estimate


def read_words(model: TransformersModel, ids: torch.Tensor, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The last token of each text in the stream, and what the layer's norm makes of it [text, d_model]."""
    with torch.no_grad(), model.trace(ids.to(model.device), use_cache=False) as tracer:
        stream = model.layers[layer].input[:, -1].double().cpu().save()
        normed = model.layers[layer].self_attn.input[:, -1].double().cpu().save()
        tracer.stop()
    return stream.numpy(), normed.numpy()


def circuit(
    model: TransformersModel,
    head: Head,
    ids: torch.Tensor,
    graph: Graph,
    turns: Sequence[np.ndarray],
    seed: int,
) -> Circuit:
    """Measure the OV circuit of one head.

    The norm before the head is folded into the circuit as one gain per dimension, fitted over the words. In
    every draw the words are dealt to the nodes at random, so that no graph is in the vectors.

    Args:
        head: (layer, head).
        ids: a text for each node, which ends in its word [node, token].
        turns: random rotations [d_model, d_model], one a draw.
        seed: of the dealings.
    """
    stream, normed = read_words(model, ids, head[0])
    gain = (normed * stream).sum(0) / (stream**2).sum(0)  # [d_model]
    ov = ov_matrix(model, *head).cpu().numpy() * gain
    copier, mean = mixing.ideal_copier(ov, stream), mixing.neighbour_mean(graph)

    def energies(draw: int) -> list[float]:
        vectors = np.random.default_rng(seed + draw).permutation(stream)
        maps = (ov, copier, turns[draw] @ ov)
        return [geometry.plane_energy(vectors + mean @ vectors @ each.T, graph) for each in maps]

    own, ideal, turned = np.array([energies(draw) for draw in range(len(turns))]).T  # [draw] each
    way = bootstrap(
        lambda rows: (turned - own)[rows].mean() / (turned - ideal)[rows].mean(), len(turns), seed=seed
    )
    aligned = mixing.map_alignment(ov, stream)
    return Circuit(aligned.alignment, aligned.size, Estimate(*map(float, way)))
