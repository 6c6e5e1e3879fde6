"""The map in a residual stream, taken apart by the harmonics of its graph.

Word means [node, d_model] are a pattern over the nodes in every direction of the stream. The eigenvectors of
the graph's Laplacian are such patterns, from smooth (two ramps across a grid: its coordinates) to rough (a
checkerboard). So a set of harmonics names a subspace of the stream: the directions in which the word means
vary like them. What is done to it here is done by edits of `lib.core.interventions`: taken out, turned, put
back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import networkx as nx
import numpy as np

from lib.core.interventions import Condition, Head, Projection, Shift
from lib.core.sweeps import Sweep
from lib.induction.texts import Texts
from lib.induction.walks import Graph, rule_following_accuracy


def graph_harmonics(graph: Graph) -> np.ndarray:
    """Eigenvectors of the Laplacian by rising eigenvalue, without the constant one [node, node - 1]."""
    laplacian = np.diag(graph.degrees) - graph.adjacency
    return np.linalg.eigh(laplacian)[1][:, 1:]


def shuffled_patterns(patterns: np.ndarray, seed: int) -> np.ndarray:
    """The same patterns with their nodes dealt anew: a map that is not the graph's [node, k]."""
    return patterns[np.random.default_rng(seed).permutation(len(patterns))]


def opposite_nodes(graph: Graph) -> np.ndarray | None:
    """A turn of the graph onto itself that takes nodes far away and leaves none in place, int [node].

    Of its symmetries (the first thousand that are found) that with the largest mean distance between a node
    and its image: half a turn, on a grid. None for a graph that has no such symmetry.
    """
    net = nx.from_numpy_array(graph.adjacency)
    distance = np.array(nx.floyd_warshall_numpy(net))
    every = np.arange(graph.n_nodes)
    best, furthest = None, 0.0
    for mapping in islice(nx.isomorphism.GraphMatcher(net, net).isomorphisms_iter(), 1000):
        image = np.array([mapping[node] for node in every])
        reach = distance[every, image]
        if reach.min() > 0 and reach.mean() > furthest:
            best, furthest = image, reach.mean()
    return best


def pattern_basis(means: np.ndarray, patterns: np.ndarray) -> np.ndarray:
    """Orthonormal directions in which word means vary like patterns [..., k, d].

    Args:
        means: [..., node, d].
        patterns: [node, k], or of each text [..., node, k].

    Raises:
        ValueError: a word without a mean.
    """
    if np.isnan(means).any():
        raise ValueError("a word has no mean to take a map from: take a longer window")
    centred = means - means.mean(-2, keepdims=True)
    return np.linalg.svd(np.swapaxes(patterns, -1, -2) @ centred, full_matrices=False)[2]


def variance_share(means: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Share of the variance of word means [..., node, d] that lies in a subspace [..., k, d]: [...]."""
    centred = means - means.mean(-2, keepdims=True)
    inside = centred @ np.swapaxes(basis, -1, -2)
    return (inside**2).sum((-2, -1)) / (centred**2).sum((-2, -1))


def pattern_share(means: np.ndarray, patterns: np.ndarray) -> np.ndarray:
    """Share of the variance of word means [..., node, d] that varies over the nodes like patterns: [...].

    Unlike the energy of the leading plane it counts every direction of the stream. Words in no order have k
    of n - 1 parts of it. A word without a mean lies at the mean of the others.

    Args:
        patterns: orthonormal [node, k].
    """
    centred = np.nan_to_num(means - np.nanmean(means, -2, keepdims=True))
    return ((patterns.T @ centred) ** 2).sum((-2, -1)) / (centred**2).sum((-2, -1))


def removal(means: np.ndarray, patterns: np.ndarray, share: float | np.ndarray | None = None) -> Projection:
    """Takes out the directions of some patterns, wholly or as much of them as holds a share of the variance.

    A subspace that holds the share v is scaled by 1 - s, which takes (2 s - s^2) v of the variance away.

    Args:
        means: word means of each text, of other walks than those that are edited [text, node, d].
        patterns: [node, k], or of each text [text, node, k].
        share: of the variance of the means that is to go, the same for subspaces that are compared; one that
            holds less is taken out whole. None takes out everything.
    """
    basis = pattern_basis(means, patterns)
    scale = np.ones(len(means))
    if share is not None:
        scale = 1 - np.sqrt(1 - np.minimum(1, share / variance_share(means, basis)))
    return Projection(basis, means.mean(1), scale)


def turned(means: np.ndarray, patterns: np.ndarray, image: np.ndarray, nodes: np.ndarray) -> Shift:
    """Moves every word, in the directions of some patterns alone, to where the word at its image is.

    Args:
        means: word means of each text, of other walks than those that are edited [text, node, d].
        patterns: [node, k], or of each text [text, node, k].
        image: of each node, int [node], see `opposite_nodes`.
        nodes: of the texts that are edited [text, token].
    """
    basis = pattern_basis(means, patterns)
    moved = (means[:, image] - means) @ np.swapaxes(basis, -1, -2) @ basis
    return Shift(moved, nodes)


def restored(missing: np.ndarray, patterns: np.ndarray, nodes: np.ndarray) -> Shift:
    """Adds that part of what word means lack which varies over the nodes like some patterns.

    Args:
        missing: intact minus ablated word means of each text, of other walks [text, node, d].
        patterns: orthonormal [node, k]; all harmonics are everything but the mean over the words.
        nodes: of the texts that are edited [text, token].
    """
    return Shift(patterns @ (patterns.T @ missing), nodes)


# -- the experiment of study 1: is the map used? ---------------------------------------------------


class MapParts(NamedTuple):
    """Patterns over the nodes of a graph, two each, by what they are."""

    grid: np.ndarray  # the two smoothest harmonics: its coordinates [node, 2]
    checkerboard: np.ndarray  # the two roughest [node, 2]
    shuffled: np.ndarray  # grids with their nodes dealt anew, for each text [text, node, 2]

    @classmethod
    def of(cls, graph: Graph, *, n_texts: int = 1, seed: int = 0) -> MapParts:
        """The parts of a graph of five nodes or more."""
        waves = graph_harmonics(graph)
        ramps = waves[:, :2]
        false = [shuffled_patterns(ramps, seed + i) for i in range(n_texts)]
        return cls(ramps, waves[:, -2:], np.stack(false))


class MapUse(NamedTuple):
    """What edits of the word means did, by the part that was edited.

    Attributes:
        cost: accuracy lost when a part is removed at one layer, at equal variance [layout, layer].
        everywhere: the same when it is removed at all of the layers at once [layout].
        moved: probability that moves to the opposite node's neighbours when a part is turned
            [layout, layer]; empty for a graph without such a turn.
        restored: accuracy without some heads, plus a part that is missing there [layout, layer].
    """

    cost: dict[str, np.ndarray]
    everywhere: dict[str, np.ndarray]
    moved: dict[str, np.ndarray]
    restored: dict[str, np.ndarray]


def map_edits(
    graph: Graph, known: dict[int, np.ndarray], lacking: dict[int, np.ndarray], texts: Texts, *,
    removed_at: Sequence[int], turned_at: Sequence[int], heads: Iterable[Head], share: float, seed: int,
) -> list[Condition]:  # fmt: skip
    """Conditions that remove, turn and add parts of the map; `map_use` reads what they did.

    Args:
        known: layer -> word means of each text, of other walks of its layout [text, node, d_model].
        lacking: layer -> the same minus those without `heads`.
        texts: that are edited.
        removed_at, turned_at: layers; parts are turned and added at the latter.
        heads: that are ablated where parts are added.
        share: of the variance of the word means that a removal takes away.
        seed: of shuffled nodes.
    """
    parts, image = MapParts.of(graph, n_texts=len(texts.nodes), seed=seed), opposite_nodes(graph)
    heads, every_word = frozenset(heads), graph_harmonics(graph)
    dealt = [np.random.default_rng(seed + i).permutation(graph.n_nodes) for i in range(len(texts.nodes))]
    named = {"grid": parts.grid, "shuffled grids": parts.shuffled, "checkerboard": parts.checkerboard}
    edits = [
        Condition(f"remove {name} {layer}", edits={layer: removal(known[layer], part, share)})
        for layer in removed_at
        for name, part in named.items()
    ]
    for name, part in (("grid", parts.grid), ("shuffled grids", parts.shuffled)):
        everywhere = {layer: removal(means, part, share) for layer, means in known.items()}
        edits.append(Condition(f"remove {name} everywhere", edits=everywhere))
    for layer in turned_at:
        means, gap = known[layer], lacking[layer]
        moves = {"grid": parts.grid, "shuffled grids": parts.shuffled, "everything": every_word}
        for name, part in moves.items() if image is not None else ():
            edit = turned(means, part, image, texts.nodes)
            edits.append(Condition(f"turn {name} {layer}", edits={layer: edit}))
        reassigned = np.stack([missing[nodes] for missing, nodes in zip(gap, dealt, strict=True)])
        added = {"grid": restored(gap, parts.grid, texts.nodes),
                 "shuffled grids": restored(reassigned, parts.grid, texts.nodes),
                 "everything": restored(gap, every_word, texts.nodes)}  # fmt: skip
        for name, edit in added.items():
            edits.append(Condition(f"add {name} {layer}", heads, edits={layer: edit}))
    return edits


def map_use(
    edited: Sweep, graph: Graph, texts: Texts, *, removed_at: Sequence[int], turned_at: Sequence[int],
    intact: np.ndarray,
) -> MapUse:  # fmt: skip
    """Read a sweep over `map_edits`.

    Args:
        edited: the sweep.
        intact: probabilities of the words in the intact model at the same positions [text, position, node].
    """
    nodes = texts.nodes[:, edited.positions]
    left = rule_following_accuracy(edited.word_probabilities, nodes, graph).mean(-1)  # [condition, text]
    whole = rule_following_accuracy(intact, nodes, graph).mean(-1)  # [text]

    def by_layer(values: np.ndarray, kind: str, layers: Sequence) -> np.ndarray:
        return np.stack([values[edited.find(f"{kind} {layer}")].mean(0) for layer in layers], 1)

    parts = ("grid", "shuffled grids", "checkerboard")
    cost = {part: whole[:, None] - by_layer(left, f"remove {part}", removed_at) for part in parts}
    wide = {part: whole - by_layer(left, f"remove {part}", ["everywhere"])[:, 0] for part in parts[:2]}
    added = ("everything", "grid", "shuffled grids")
    back = {part: by_layer(left, f"add {part}", turned_at) for part in added}
    moved, image = {}, opposite_nodes(graph)
    if image is not None:
        away = (graph.adjacency[image] & ~graph.adjacency)[nodes]  # [text, position, node]
        there = (edited.word_probabilities * away).sum(-1).mean(-1)
        before = (intact * away).sum(-1).mean(-1)
        moved = {part: by_layer(there, f"turn {part}", turned_at) - before[:, None] for part in added}
    return MapUse(cost, wide, moved, back)
