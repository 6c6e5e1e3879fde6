"""The map in a residual stream, taken apart by the harmonics of its graph.

Word means [node, d_model] are a pattern over the nodes in every direction of the stream. The eigenvectors of
the graph's Laplacian are such patterns, from smooth (two ramps across a grid: its coordinates) to rough (a
checkerboard). So a set of harmonics names a subspace of the stream: the directions in which the word means
vary like them. What is done to it here is done by edits of `lib.interventions`: taken out, turned, put back.
"""

from __future__ import annotations

from itertools import islice

import networkx as nx
import numpy as np

from lib.interventions import Projection, Shift
from lib.walks import Graph


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
    """Orthonormal directions in which word means [..., node, d] vary like patterns [node, k]: [..., k, d].

    Raises:
        ValueError: a word without a mean.
    """
    if np.isnan(means).any():
        raise ValueError("a word has no mean to take a map from: take a longer window")
    centred = means - means.mean(-2, keepdims=True)
    return np.linalg.svd(patterns.T @ centred, full_matrices=False)[2]


def variance_share(means: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Share of the variance of word means [..., node, d] that lies in a subspace [..., k, d]: [...]."""
    centred = means - means.mean(-2, keepdims=True)
    inside = centred @ np.swapaxes(basis, -1, -2)
    return (inside**2).sum((-2, -1)) / (centred**2).sum((-2, -1))


def removal(means: np.ndarray, patterns: np.ndarray, share: float | np.ndarray | None = None) -> Projection:
    """Takes out the directions of some patterns, wholly or as much of them as holds a share of the variance.

    A subspace that holds the share v is scaled by 1 - s, which takes (2 s - s^2) v of the variance away.

    Args:
        means: word means of each text, of other walks than those that are edited [text, node, d].
        patterns: [node, k].
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
        patterns: [node, k].
        image: of each node, int [node], see `opposite_nodes`.
        nodes: of the texts that are edited [text, token].
    """
    basis = pattern_basis(means, patterns)
    moved = (means[:, image] - means) @ np.swapaxes(basis, -1, -2) @ basis
    return Shift(moved, nodes)


def restored(missing: np.ndarray, patterns: np.ndarray | None, nodes: np.ndarray) -> Shift:
    """Adds what word means lack, or that part of it which varies over the nodes like some patterns.

    Args:
        missing: intact minus ablated word means of each text, of other walks [text, node, d].
        patterns: orthonormal [node, k]; None is everything, the mean over the words included.
        nodes: of the texts that are edited [text, token].
    """
    return Shift(missing if patterns is None else patterns @ (patterns.T @ missing), nodes)
