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

from lib.walks import Graph


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


def means_of(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Class means [..., class, d] of sums [..., class, d] and counts [..., class]; NaN where a count is 0."""
    return sums / np.where(counts > 0, counts, np.nan)[..., None]


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


def participation_ratio(singular_values: np.ndarray) -> float:
    """(sum s^2)^2 / sum s^4: how many directions share the variance, 1 to their number."""
    variance = _singular_values(singular_values) ** 2
    return float(variance.sum() ** 2 / (variance**2).sum())


def effective_rank(singular_values: np.ndarray) -> float:
    """exp of the entropy of s / sum s (Roy & Vetterli 2007), 1 to their number."""
    share = _singular_values(singular_values)
    share = share[share > 0] / share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


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


def _singular_values(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        raise ValueError(f"singular values must be finite, none negative and not all 0, not {values}")
    return values


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
