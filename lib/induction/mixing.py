"""Theory of neighbour mixing, and maps fitted to it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lib.induction.walks import Graph


def neighbour_mean(graph: Graph) -> np.ndarray:
    """[node, node]: the matrix A that takes each node to the mean over its neighbours."""
    return graph.adjacency / graph.degrees[:, None]


def mixing_matrix(graph: Graph, self_weight: float = 1.0, steps: int = 1) -> np.ndarray:
    """[node, node] M = (self_weight I + A)^steps, A the mean over neighbours; mixed = M @ vectors.

    One step takes e_i to self_weight e_i + mean of e_j over the neighbours j. Self-weight 1 is the
    toy of Arditi (2026); 0 keeps the neighbours alone.
    """
    one_step = self_weight * np.eye(graph.n_nodes) + neighbour_mean(graph)
    return np.linalg.matrix_power(one_step, steps)


def simulate_mixing(
    graph: Graph,
    d: int,
    *,
    self_weight: float = 1.0,
    steps: int = 1,
    rank: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Random node vectors after mixing, [node, d].

    Args:
        d: number of dimensions of the iid N(0, 1) vectors.
        self_weight, steps: as in `mixing_matrix`.
        rank: neighbours are seen through an orthogonal projection onto this many dimensions, None
            for all. Gaussian vectors look alike from every side, so the first coordinates do.
        noise: standard deviation of the noise added to every coordinate at the end.
    """
    rank = d if rank is None else rank
    if not 0 <= rank <= d:
        raise ValueError(f"rank must be between 0 and d = {d}, not {rank}")
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((graph.n_nodes, d))
    mixed = np.hstack(
        [
            mixing_matrix(graph, self_weight, steps) @ vectors[:, :rank],
            self_weight**steps * vectors[:, rank:],
        ]
    )
    return mixed + noise * rng.standard_normal(mixed.shape) if noise else mixed


def mixing_gram(
    graph: Graph, *, self_weight: float = 1.0, steps: int = 1, rank_share: float = 1.0, noise: float = 0.0
) -> np.ndarray:
    """Expected Gram matrix / d of `simulate_mixing`, [node, node]; rank_share is rank / d.

    G = (r/d) M M^T + (1 - r/d) s^(2 steps) I + noise^2 I.
    """
    mixing = mixing_matrix(graph, self_weight, steps)
    unmixed = (1 - rank_share) * self_weight ** (2 * steps) + noise**2
    return rank_share * mixing @ mixing.T + unmixed * np.eye(graph.n_nodes)


def map_gram(graph: Graph, trace: float, squared_norm: float, self_weight: float = 1.0) -> np.ndarray:
    """Expected Gram matrix / d of self_weight e_i + mean over neighbours of W e_j, for any W [d, d].

    G = s^2 I + s t (A + A^T) + f A A^T with t = tr(W) / d and f = |W|_F^2 / d: of the map only its
    trace and its norm matter. W = I has t = f = 1 and gives M M^T; an orthogonal projection onto r
    dimensions has t = f = r / d. The rank of W rules how far one draw of the vectors strays from
    this expectation, not the expectation.

    Args:
        trace: tr(W) / d.
        squared_norm: |W|_F^2 / d.

    Returns:
        [node, node].
    """
    mean = neighbour_mean(graph)
    return (
        self_weight**2 * np.eye(graph.n_nodes)
        + self_weight * trace * (mean + mean.T)
        + squared_norm * mean @ mean.T
    )


class WordVectors(NamedTuple):
    """What a stream holds of each word, by where the word stands [layer, word, d]; centred over the words.

    A word that was never read is NaN in `own`, and 0 in the others.
    """

    own: np.ndarray  # at the token itself
    before: np.ndarray  # at the token before
    neighbours: np.ndarray  # at the nodes beside that of the token, whichever of them came before

    def mixing(self) -> tuple[np.ndarray, np.ndarray]:
        """c and f of `map_gram`, relative to the words' own share, [layer] each.

        The mean activation of a word holds its neighbours twice: as those which were just before, and as the
        nodes beside it. For o their sum and e the own vectors, c = sum e . o / sum e . e over the words, and
        f = sum o . o / sum e . e.
        """
        other, size = self.before + self.neighbours, np.nansum(self.own**2, axis=(-2, -1))
        aligned = np.nansum(self.own * other, axis=(-2, -1))
        return aligned / size, (other**2).sum((-2, -1)) / size

    def means(self, layout: np.ndarray, graph: Graph) -> np.ndarray:
        """Word means that the vectors make on a layout int [node] of the words, [layer, node, d]."""
        other = self.before + self.neighbours
        return self.own[:, layout] + neighbour_mean(graph) @ other[:, layout]


class WordRegression:
    """Least-squares fit of activations to the words read: own, before, and at the neighbouring nodes.

    An activation at node i behind node j is modelled as own[w_i] + before[w_j] + the mean over i's
    neighbours k of neighbours[w_k]. With one layout of the words this has no single solution, because a word
    always has the same neighbours; over several layouts it has.

    Args:
        own: activations summed by node, [layout, layer, node, d].
        before: the same activations summed by the node before.
        pairs: their number by node and node before, int [layout, node, node].
        layouts: the word at each node, int [layout, node].
        graph: of the walks.
    """

    def __init__(
        self, own: np.ndarray, before: np.ndarray, pairs: np.ndarray, layouts: np.ndarray, graph: Graph
    ):
        n = graph.n_nodes
        node, previous = np.divmod(np.arange(n * n), n)
        words = np.eye(n)[layouts]  # [layout, node, word]
        beside = neighbour_mean(graph) @ words
        columns = [words[:, node], words[:, previous], beside[:, node]]
        rows = np.concatenate(columns, axis=-1)  # [layout, pair, 3n]
        weights = np.asarray(pairs, dtype=np.float64).reshape(len(layouts), -1, 1)
        self._gram = rows.transpose(0, 2, 1) @ (weights * rows)  # [layout, 3n, 3n]
        parts = [(words, own), (words, before), (beside, own)]
        turned = [each.transpose(0, 2, 1)[:, None] @ sums for each, sums in parts]
        self._cross = np.concatenate(turned, axis=2)  # [layout, layer, 3n, d]
        self._unread = [np.einsum("lij,liw->lw", pairs, words), np.einsum("lij,ljw->lw", pairs, words)]

    def fit(self, layouts: np.ndarray | slice = slice(None)) -> WordVectors:
        """The vectors from the layouts with these indices, with repetitions for a bootstrap."""
        inverse = np.linalg.pinv(self._gram[layouts].sum(0), hermitian=True)
        solved = inverse @ self._cross[layouts].sum(0)  # [layer, 3n, d]
        read = [counts[layouts].sum(0) > 0 for counts in self._unread]  # [word]
        own, before, neighbours = np.split(solved, 3, axis=1)
        own[:, ~read[0]] = np.nan
        before[:, ~read[1]] = neighbours[:, ~read[1]] = np.nan
        centred = (part - np.nanmean(part, axis=1, keepdims=True) for part in (own, before, neighbours))
        own, *others = centred
        return WordVectors(own, *map(np.nan_to_num, others))


def nearest(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Index of the centroid [class, d] that each point [..., d] is nearest to, int [...]; NaN is none."""
    known = np.nan_to_num(centroids)
    distance = (known**2).sum(-1) - 2 * points @ known.T  # but for the point's own length
    return np.where(np.isnan(centroids).any(-1), np.inf, distance).argmin(-1)


def harmonics(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal components that a Gram matrix implies: eigenvalues [node] falling, vectors [node, node].

    Column k is what PCA gives, up to sign and scale, as the k-th coordinate of the nodes. Of equal
    eigenvalues only the span is meaningful.
    """
    centring = np.eye(len(gram)) - 1 / len(gram)
    values, vectors = np.linalg.eigh(centring @ gram @ centring)
    return np.clip(values[::-1], 0, None), vectors[:, ::-1]  # a variance that rounds to -1e-16 is 0


def predicted_energy(gram: np.ndarray, graph: Graph, k: int | None = None, d: float | None = None) -> float:
    """Dirichlet energy of a cloud with this Gram matrix, of all of it or of its top k components.

    With eigenvalues l_i and eigenvectors v_i of the centred Gram matrix and the graph Laplacian L,
    E = sum l_i v_i^T L v_i / sum l_i. Exact for the Gram matrix of given points; the limit of many
    dimensions for an expected one. Where the cut falls among equal eigenvalues, their mean
    v^T L v is taken.

    Args:
        gram: [node, node], of given points or expected (`mixing_gram`, `map_gram`).
        k: number of components, None for the full space.
        d: number of dimensions of a Gaussian cloud, for its mean energy to first order in 1 / d:
            sampling noise mixes each component with those of nearby variance (Anderson 1963,
            Lawley 1956). None for the limit.

    Returns:
        The energy; NaN where sampling noise takes over half of a component, which is no small
        correction.
    """
    laplacian = np.diag(graph.degrees) - graph.adjacency
    values, vectors = harmonics(gram)
    roughness = np.einsum("ik,ij,jk->k", vectors, laplacian, vectors)  # v^T L v
    group = np.cumsum(np.abs(np.diff(values, prepend=values[0])) > 1e-9 * values[0])
    same = group[:, None] == group
    roughness = (same @ roughness) / same.sum(axis=1)
    k = len(values) if k is None else k
    if d is None:
        return float(values[:k] @ roughness[:k] / values[:k].sum())
    return _first_order_energy(values, roughness, same, k, d)


class MapAlignment(NamedTuple):
    """What a linear map W does to vectors x, on average over a cloud of them (`map_alignment`)."""

    size: float  # |W x| / |x|, root mean square
    alignment: float  # cosine of W x and x: 1 copies, 0 writes elsewhere, -1 returns the negative
    chance: float  # standard deviation of the alignment of Q W, Q a random rotation; its mean is 0


def map_alignment(ov: np.ndarray, points: np.ndarray | None = None) -> MapAlignment:
    """Size and alignment of a map W [d, d] on points [node, d], or on isotropic vectors (None).

    With C the covariance of the points (I for None), size^2 = tr(W C W^T) / tr C and
    alignment = tr(W C) / sqrt(tr(W C W^T) tr C). Of points that are dealt to the nodes of a graph at
    random, `map_gram` with trace = size * alignment and squared_norm = size^2 is the expected Gram
    matrix, in units of their variance. QW reads as W does and writes as much, in other directions;
    tr(Q W C) has variance |W C|_F^2 / d, which makes `chance` 1 / d for isotropic vectors.
    """
    root = _covariance_root(ov, points)
    through, norm = ov @ root, np.linalg.norm(ov @ root) * np.linalg.norm(root)
    chance = np.linalg.norm(through @ root.T) / np.sqrt(len(ov))
    size = np.linalg.norm(through) / np.linalg.norm(root)
    return MapAlignment(float(size), float((through * root).sum() / norm), float(chance / norm))


def ideal_copier(ov: np.ndarray, points: np.ndarray | None = None) -> np.ndarray:
    """The map of this one's rank and size that copies best: none of that rank has a higher alignment.

    A multiple of the projection onto the leading principal directions of the points [node, d], as many as
    ov [d, d] has ranks (Eckart and Young 1936); for isotropic vectors (None) any directions serve, and the
    first coordinates are taken. Its alignment is the root of the share of variance in those directions.
    """
    root, rank = _covariance_root(ov, points), np.linalg.matrix_rank(ov)
    directions = root if points is None else np.linalg.svd(root, full_matrices=False)[0]
    copier = directions[:, :rank] @ directions[:, :rank].T
    return copier * (np.linalg.norm(ov @ root) / np.linalg.norm(copier @ root))


def _covariance_root(ov: np.ndarray, points: np.ndarray | None) -> np.ndarray:
    """[d, d] or [d, node] R with R R^T the covariance, up to a factor."""
    root = np.eye(len(ov)) if points is None else (points - points.mean(axis=0)).T
    if not np.any(ov @ root):
        raise ValueError("the map returns 0 for all of these vectors: its alignment is not defined")
    return root


def _first_order_energy(
    values: np.ndarray, roughness: np.ndarray, same: np.ndarray, k: int, d: float
) -> float:
    """Mean energy of the top k components of d-dimensional Gaussian samples, to first order in 1 / d."""
    gap = np.where(same, np.inf, values[:, None] - values)
    overlap = np.outer(values, values) / (d * gap**2)  # expected square of <sample v_i, v_j>
    if overlap[:k].sum(axis=1).max() > 0.5:
        return float("nan")
    rough = (roughness + (overlap * (roughness - roughness[:, None])).sum(axis=1))[:k]
    top = (values * (1 + (values / gap).sum(axis=1) / d))[:k]
    energy = top @ rough / top.sum()
    # A sample variance has variance 2 l^2 / d, which shifts the mean of the ratio.
    return float(energy + 2 / d * (top**2 @ (energy - rough)) / top.sum() ** 2)
