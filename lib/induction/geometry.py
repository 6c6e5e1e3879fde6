"""Geometry of class means on a graph, and the theory of neighbour mixing.

Measurement. A class mean is the mean activation of one word. A word that was
not seen has a row of NaN, and every function leaves such rows out together
with their edges (`absent_nodes` names them); none becomes a zero vector.

Theory. Node vectors e_i, iid N(0, I) in d dimensions, mixed to X = M E, have
expected Gram matrix X X^T / d = M M^T. Principal components and Dirichlet
energy depend on the centred Gram matrix alone, so as d grows both are known in
closed form from the graph.

Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.spatial

from lib.core.statistics import means_of
from lib.induction.walks import Graph


class PCA(NamedTuple):
    """Principal components of points [node, d]; rows of absent nodes are NaN."""

    projection: np.ndarray  # [node, k]
    components: np.ndarray  # [k, d], orthonormal rows
    explained: np.ndarray  # [k], share of the variance


class ClassSums:
    """Class means of activations that arrive in batches.

    Args:
        n_nodes: number of classes.

    Attributes:
        sums: [..., node, d] after the first batch.
        counts: activations in them, int [node].

    `add` any number of batches, then `means()`; the result equals `class_means` of all of them.
    """

    def __init__(self, n_nodes: int):
        self.counts = np.zeros(n_nodes, dtype=np.int64)
        self.sums: np.ndarray | float = 0.0

    def add(self, stream: np.ndarray, nodes: np.ndarray) -> ClassSums:
        """Accumulate activations [..., walk, token, d] at nodes int [walk, token]; -1 is counted nowhere.

        Raises:
            ValueError: shapes that disagree, another node, activations that are not finite. One would make
                every sum NaN, as 0 * NaN is.
        """
        stream, nodes = np.asarray(stream), np.asarray(nodes)
        if stream.shape[-3:-1] != nodes.shape:
            raise ValueError(
                f"stream must be [..., walk, token, d] with [walk, token] = {nodes.shape}, not {stream.shape}"
            )
        strange = nodes[(nodes < -1) | (nodes >= len(self.counts))]
        if len(strange):
            raise ValueError(f"node {strange[0]} is none of the {len(self.counts)} nodes, nor -1 for none")
        if not np.isfinite(stream).all():
            raise ValueError(
                f"activations overflowed: some of these {stream.dtype} values are NaN or "
                "infinite; load the model with dtype 'bfloat16' or 'float32'"
            )
        one_hot = np.arange(len(self.counts))[:, None] == nodes.reshape(1, -1)  # [node, walk * token]
        flat = stream.reshape(*stream.shape[:-3], -1, stream.shape[-1]).astype(np.float64)
        self.sums = self.sums + one_hot.astype(np.float64) @ flat
        self.counts += one_hot.sum(axis=1)
        return self

    def means(self) -> np.ndarray:
        """[..., node, d]; NaN for a word that was never seen."""
        return means_of(self.sums, self.counts)


def class_means(stream: np.ndarray, nodes: np.ndarray, n_nodes: int) -> np.ndarray:
    """Mean activation of each word.

    Args:
        stream: [..., walk, token, d] activations, such as the residual stream at one layer. Leading
            axes (layers, conditions) are kept.
        nodes: int [walk, token], the word at each position, -1 for none.

    Returns:
        [..., node, d] float64; a word that never occurs is a row of NaN, not of zeros.

    Raises:
        ValueError: see `ClassSums.add`.
    """
    return ClassSums(n_nodes).add(stream, nodes).means()


def absent_nodes(points: np.ndarray) -> np.ndarray:
    """int [absent]: the nodes that the statistics of points [node, d] leave out."""
    return np.flatnonzero(~_present(np.asarray(points)))


def pca(points: np.ndarray, k: int = 2) -> PCA:
    """Top k principal components of points [node, d], by SVD of the centred present rows.

    The sign of each component is fixed: its largest entry in the projection is positive.
    """
    points = np.asarray(points, dtype=np.float64)
    present = _present(points, at_least=k + 1)
    centred = points[present] - points[present].mean(axis=0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    if k > len(s):
        raise ValueError(f"k={k} components asked of points with {points.shape[1]} dimensions; lower k")
    if s[0] <= 1e-9 * np.linalg.norm(points[present]):  # rounding leaves 1e-16 of equal points
        raise ValueError("all class means coincide: there is no direction of variance to show")
    scores = u[:, :k] * s[:k]
    sign = np.sign(scores[np.abs(scores).argmax(axis=0), np.arange(k)])
    sign[sign == 0] = 1
    projection = np.full((len(points), k), np.nan)
    projection[present] = scores * sign
    return PCA(projection, vt[:k] * sign[:, None], s[:k] ** 2 / (s**2).sum())


def dirichlet_energy(points: np.ndarray, graph: Graph) -> float:
    """Normalised Dirichlet energy: sum over edges |x_i - x_j|^2 / sum over nodes |x_i - mean|^2.

    Low when neighbours lie together. Permuting the words gives 2 n_edges / (n_nodes - 1) on
    average, whatever the points: 3.2 on the 4x4 grid. Arditi (2026) takes it of the 2-D PCA
    projection: pass `pca(means).projection` for that, the means themselves for the full space.
    Absent nodes are left out with their edges.
    """
    points, adjacency, _ = _present_part(points, graph)
    centred = points - points.mean(axis=0)
    variance = (centred**2).sum()
    if variance <= (1e-9 * np.linalg.norm(points)) ** 2:
        raise ValueError("all points coincide: the Dirichlet energy is not defined")
    i, j = np.nonzero(np.triu(adjacency))
    return float(((points[i] - points[j]) ** 2).sum() / variance)


def plane_energy(points: np.ndarray, graph: Graph) -> float:
    """Dirichlet energy of the projection of points [node, d] on their first two principal components."""
    return dirichlet_energy(pca(points).projection, graph)


def plane_energies(points: np.ndarray, graph: Graph) -> np.ndarray:
    """`plane_energy` of many clouds [..., node, d], [...]; NaN where fewer than three words are present."""
    points = np.asarray(points)
    found = np.empty(points.shape[:-2])
    for place in np.ndindex(found.shape):
        enough = len(points[place]) - len(absent_nodes(points[place])) > 2
        found[place] = plane_energy(points[place], graph) if enough else np.nan
    return found


def procrustes_distance(points2d: np.ndarray, graph: Graph) -> float:
    """Procrustes distance between points [node, 2] and the drawn graph: 0 (same up to similarity) to 1.

    Share of the graph positions' variance that no shift, scaling, rotation or reflection of the
    points explains.
    """
    points, _, positions = _present_part(points2d, graph, at_least=3)
    if points.shape[1] != 2:
        raise ValueError(f"points2d must be [node, 2], not {np.shape(points2d)}; project by pca first")
    return float(scipy.spatial.procrustes(positions, points)[2])


def neighbour_separation(points: np.ndarray, graph: Graph) -> float:
    """Probability that a pair of neighbours lies closer than a pair of non-neighbours.

    The area under the ROC curve of distance as a test for "is an edge" (ties count half): .5 for
    chance, 1 for every edge shorter than every non-edge, as on the drawn grid, below .5 for a
    checkerboard. Unlike a ratio of mean distances it has a fixed chance level, does not depend on
    scale and is not ruled by one outlying word.
    """
    points, adjacency, _ = _present_part(points, graph)
    distances = scipy.spatial.distance.pdist(points)
    is_edge = adjacency[np.triu_indices(len(points), 1)]
    if is_edge.all() or not is_edge.any():
        raise ValueError(f"{graph.name}: the present words need an edge and a non-edge to compare")
    edge, other = distances[is_edge][:, None], distances[~is_edge]
    return float(((edge < other) + 0.5 * (edge == other)).mean())


def in_betweenness(
    activations: np.ndarray, nodes: np.ndarray, targets: np.ndarray, means: np.ndarray
) -> np.ndarray:
    """Where each activation lies on the line from its own word's mean (0) to another word's mean (1).

    Args:
        activations: [..., d].
        nodes: int [...], the word of each activation.
        targets: int [...], the other word, such as the previous one; -1 for none.
        means: [node, d] class means, best of other sequences than the activations.

    Returns:
        [...]: (x - m_own) . (m_target - m_own) / |m_target - m_own|^2; NaN where there is no target or
        a mean is absent.
    """
    own = means[nodes]
    line = np.where(np.asarray(targets)[..., None] >= 0, means[targets] - own, np.nan)
    return ((activations - own) * line).sum(-1) / (line**2).sum(-1)


def half_way(x: np.ndarray, y: np.ndarray) -> float:
    """Where a curve has first made half of its way from its first value up to its maximum.

    Linear between points; NaN when the curve never exceeds its first value, or holds a NaN.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if not y.max() > y[0]:  # false for NaN, too
        return float("nan")
    level = (y[0] + y.max()) / 2
    after = int(np.argmax(y >= level))
    return float(np.interp(level, y[after - 1 : after + 1], x[after - 1 : after + 1]))


def shuffled_label_null(
    statistic: Callable[[np.ndarray, Graph], float], points: np.ndarray, graph: Graph, n: int, seed: int
) -> np.ndarray:
    """The statistic of the same points with their words shuffled, [n].

    Keeps the cloud and forgets which word is where. Absent words stay absent.
    """
    points = np.asarray(points, dtype=np.float64)
    present = np.flatnonzero(_present(points))
    rng = np.random.default_rng(seed)
    null = np.empty(n)
    for trial in range(n):
        shuffled = points.copy()
        shuffled[present] = points[rng.permutation(present)]
        null[trial] = statistic(shuffled, graph)
    return null


def permutation_p_value(observed: float, null: np.ndarray, tail: str) -> float:
    """One-sided p-value (1 + count) / (1 + n), which is never 0.

    Args:
        tail: "lower" counts null values <= observed (energies, distances), "upper" those >=.

    Raises:
        ValueError: another tail; a NaN, which is neither below nor above anything and would pass for rare.
    """
    if tail not in ("lower", "upper"):
        raise ValueError(f"tail must be 'lower' or 'upper', not {tail!r}")
    null = np.asarray(null)
    if np.isnan(observed) or np.isnan(null).any():
        raise ValueError(
            f"a NaN has no p-value: observed {observed}, {np.isnan(null).sum()} NaN among "
            f"{len(null)} null values"
        )
    count = (null <= observed).sum() if tail == "lower" else (null >= observed).sum()
    return float((1 + count) / (1 + len(null)))


def _present(points: np.ndarray, at_least: int = 2) -> np.ndarray:
    """bool [node]: rows that are seen. A row that is NaN or infinite in part is an error."""
    if points.ndim != 2:
        raise ValueError(f"points must be [node, d], not {points.shape}")
    finite = np.isfinite(points).all(axis=1)
    broken = np.flatnonzero(~finite & ~np.isnan(points).all(axis=1))
    if len(broken):
        raise ValueError(f"node {broken[0]} is NaN or infinite in part; an absent node is NaN throughout")
    if finite.sum() < at_least:
        raise ValueError(
            f"only {finite.sum()} of {len(points)} words are present, {at_least} needed; "
            "take a longer window or more walks"
        )
    return finite


def _present_part(
    points: np.ndarray, graph: Graph, at_least: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, adjacency and drawn positions of the present nodes."""
    points = np.asarray(points, dtype=np.float64)
    if len(points) != graph.n_nodes:
        raise ValueError(f"{len(points)} points for {graph.name} of {graph.n_nodes} nodes")
    present = _present(points, at_least)
    return points[present], graph.adjacency[np.ix_(present, present)], graph.positions[present]
