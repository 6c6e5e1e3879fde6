from __future__ import annotations

from itertools import combinations

import networkx as nx
import numpy as np
import pytest
from scipy.stats import mannwhitneyu, ortho_group, wishart

from lib.geometry import (
    ClassSums,
    WordRegression,
    absent_nodes,
    class_means,
    dirichlet_energy,
    effective_rank,
    half_way,
    harmonics,
    in_betweenness,
    map_gram,
    means_of,
    mixing_gram,
    mixing_matrix,
    nearest,
    neighbour_mean,
    neighbour_separation,
    participation_ratio,
    pca,
    permutation_p_value,
    plane_energies,
    plane_energy,
    predicted_energy,
    procrustes_distance,
    shuffled_label_null,
    simulate_mixing,
)
from lib.walks import graph_from_edges, grid_graph, hexagonal_graph, layouts, random_walks, ring_graph

GRID = grid_graph(4, 4)
GRAPHS = [GRID, ring_graph(9), hexagonal_graph(2, 2), graph_from_edges(["a-b", "b-c", "c-d", "c-e", "e-a"])]


def cloud(n: int = 16, d: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def with_absent(points: np.ndarray, *nodes: int) -> np.ndarray:
    points = points.copy()
    points[list(nodes)] = np.nan
    return points


# Class means


def test_class_means_equal_the_naive_loop_and_keep_leading_axes():
    stream = np.random.default_rng(0).normal(size=(2, 3, 11, 4)).astype(np.float32)
    nodes = np.random.default_rng(1).integers(0, 5, size=(3, 11))
    means = class_means(stream, nodes, 5)
    assert means.shape == (2, 5, 4) and means.dtype == np.float64
    for c in range(2):
        for node in range(5):
            members = [stream[c, w, t] for w in range(3) for t in range(11) if nodes[w, t] == node]
            assert np.allclose(means[c, node], np.mean(members, axis=0, dtype=np.float64))


def test_absent_word_is_nan_and_never_zero():
    means = class_means(np.ones((1, 4, 3)), np.array([[0, 2, 2, 0]]), 4)
    assert absent_nodes(means).tolist() == [1, 3]
    assert np.isnan(means[[1, 3]]).all() and (means[[0, 2]] == 1).all()


def test_streamed_sums_equal_one_pass():
    stream, nodes = cloud(60, 4).reshape(6, 10, 4), np.random.default_rng(1).integers(0, 5, size=(6, 10))
    sums = ClassSums(5)
    for start in (0, 1, 4):
        stop = {0: 1, 1: 4, 4: 6}[start]
        sums.add(stream[start:stop], nodes[start:stop])
    assert np.allclose(sums.means(), class_means(stream, nodes, 5))
    assert sums.counts.sum() == 60


def test_nodes_of_minus_one_are_counted_nowhere_and_others_are_errors():
    stream, nodes = cloud(6, 4).reshape(1, 6, 4), np.array([[0, 1, -1, 1, 0, -1]])
    sums = ClassSums(3).add(stream, nodes)
    assert sums.counts.tolist() == [2, 2, 0] and np.allclose(sums.means()[1], stream[0, [1, 3]].mean(0))
    for strange in (3, -2):
        with pytest.raises(ValueError, match=f"node {strange} is none of the 3 nodes, nor -1 for none"):
            class_means(stream, np.where(nodes == 1, strange, nodes), 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_activation_that_is_not_finite_is_named_and_does_not_wipe_all_means(value):
    stream = cloud(6, 4).reshape(1, 6, 4).astype(np.float16)
    stream[0, 2, 1] = value
    with pytest.raises(ValueError, match="overflowed: some of these float16 values .*'bfloat16'"):
        class_means(stream, np.zeros((1, 6), dtype=int), 2)


def test_stream_and_nodes_must_agree():
    with pytest.raises(ValueError, match=r"\[walk, token\] = \(2, 5\), not \(2, 4, 3\)"):
        class_means(np.zeros((2, 4, 3)), np.zeros((2, 5), dtype=int), 5)


# PCA


def test_pca_finds_a_planted_plane_and_reconstructs_it():
    plane = GRID.positions * [3.0, 1.0]
    basis = ortho_group.rvs(20, random_state=0)[:2]
    result = pca(plane @ basis + 7.0)
    assert np.allclose(result.explained, [0.9, 0.1])  # variances 9 : 1
    assert np.allclose(result.projection @ result.components, plane @ basis - (plane @ basis).mean(axis=0))
    assert np.allclose(result.components @ result.components.T, np.eye(2))


def test_pca_agrees_with_the_eigenvectors_of_the_covariance():
    points = cloud(16, 6)
    result = pca(points, k=3)
    values, vectors = np.linalg.eigh(np.cov(points.T))
    assert np.allclose(result.explained, values[::-1][:3] / values.sum())
    assert np.allclose(np.abs(result.components @ vectors[:, ::-1][:, :3]), np.eye(3), atol=1e-8)
    top = np.abs(result.projection).argmax(axis=0)
    assert (result.projection[top, range(3)] > 0).all(), "signs are fixed"


def test_pca_leaves_absent_words_out():
    points = with_absent(cloud(16, 6), 4, 9)
    result = pca(points)
    present = np.delete(np.arange(16), [4, 9])
    assert np.isnan(result.projection[[4, 9]]).all()
    assert np.allclose(result.projection[present], pca(points[present]).projection)


# Statistics of the drawn graph


def naive_energy(points, graph):
    seen = [i for i in range(graph.n_nodes) if not np.isnan(points[i]).any()]
    mean = sum(points[i] for i in seen) / len(seen)
    edges = sum(
        ((points[i] - points[j]) ** 2).sum() for i, j in combinations(seen, 2) if graph.adjacency[i, j]
    )
    return edges / sum(((points[i] - mean) ** 2).sum() for i in seen)


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
def test_dirichlet_energy_equals_the_naive_loop_with_and_without_absent_words(graph):
    points = cloud(graph.n_nodes, 3)
    assert np.isclose(dirichlet_energy(points, graph), naive_energy(points, graph))
    absent = with_absent(points, 1)
    assert np.isclose(dirichlet_energy(absent, graph), naive_energy(absent, graph))
    # A zero vector in its place would be another number.
    assert not np.isclose(dirichlet_energy(np.nan_to_num(absent), graph), naive_energy(absent, graph))


def test_dirichlet_energy_of_known_clouds():
    assert dirichlet_energy(GRID.positions, GRID) == pytest.approx(24 / 40)  # 24 unit edges
    assert dirichlet_energy(GRID.parity[:, None], GRID) == pytest.approx(24 * 4 / 16)  # checkerboard: 6
    shifted = 5 * cloud() + 100
    assert dirichlet_energy(shifted, GRID) == pytest.approx(dirichlet_energy(cloud(), GRID))


def test_words_shuffled_energy_averages_twice_edges_over_nodes_less_one():
    null = shuffled_label_null(dirichlet_energy, cloud(), GRID, n=4000, seed=0)
    standard_error = null.std() / np.sqrt(len(null))
    assert abs(null.mean() - 2 * 24 / 15) < 4 * standard_error < 0.05


def test_procrustes_sees_through_similarities_and_nothing_else():
    angle = 0.7
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = 3 * GRID.positions * [1, -1] @ rotation + [5, -2]
    assert procrustes_distance(moved, GRID) == pytest.approx(0, abs=1e-12)
    assert procrustes_distance(with_absent(moved, 0, 7), GRID) == pytest.approx(0, abs=1e-12)
    # Stretched by a: with c = 1/sqrt(2), 1 - (trace of the aligned product)^2 = (a - 1)^2 / (2 (a^2 + 1)).
    assert procrustes_distance(GRID.positions * [3, 1], GRID) == pytest.approx(4 / 20)
    with pytest.raises(ValueError, match="project by pca first"):
        procrustes_distance(cloud(16, 3), GRID)


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
def test_neighbour_separation_is_the_area_under_the_curve(graph):
    points = with_absent(cloud(graph.n_nodes, 2, seed=3), 2)
    near, far = [], []
    for i, j in combinations([i for i in range(graph.n_nodes) if i != 2], 2):
        (near if graph.adjacency[i, j] else far).append(np.linalg.norm(points[i] - points[j]))
    expected = mannwhitneyu(far, near).statistic / (len(far) * len(near))
    assert neighbour_separation(points, graph) == pytest.approx(expected)


def test_neighbour_separation_of_grid_checkerboard_and_no_structure():
    assert neighbour_separation(GRID.positions, GRID) == 1
    # No pair of neighbours beats a non-neighbour; same-side pairs win, opposite non-edges tie.
    assert neighbour_separation(GRID.parity[:, None], GRID) == pytest.approx(0.5 * (64 - 24) / 96)
    null = shuffled_label_null(neighbour_separation, cloud(), GRID, n=500, seed=0)
    assert abs(null.mean() - 0.5) < 0.02
    with pytest.raises(ValueError, match="an edge and a non-edge"):
        neighbour_separation(cloud(3), ring_graph(3))


def test_shuffled_null_is_exact_for_noise_and_finds_a_planted_grid():
    null = shuffled_label_null(dirichlet_energy, GRID.positions, GRID, n=499, seed=0)
    assert permutation_p_value(dirichlet_energy(GRID.positions, GRID), null, "lower") == 1 / 500
    p = [
        permutation_p_value(
            dirichlet_energy(cloud(seed=s), GRID),
            shuffled_label_null(dirichlet_energy, cloud(seed=s), GRID, 99, seed=s),
            "lower",
        )
        for s in range(200)
    ]
    assert 0.02 < np.mean(np.array(p) <= 0.1) < 0.19  # 10% within four standard errors
    assert permutation_p_value(2.0, np.array([1.0, 2.0, 3.0]), "upper") == 3 / 4
    with pytest.raises(ValueError, match="'lower' or 'upper', not 'less'"):
        permutation_p_value(2.0, null, "less")
    for observed, values in ((np.nan, null), (2.0, np.full(9, np.nan))):  # no NaN is rare for being a NaN
        with pytest.raises(ValueError, match="a NaN has no p-value"):
            permutation_p_value(observed, values, "lower")


def test_shuffled_null_keeps_absent_words_absent():
    seen = []
    shuffled_label_null(lambda points, graph: seen.append(points) or 0.0, with_absent(cloud(), 3), GRID, 5, 0)
    assert all(absent_nodes(points).tolist() == [3] for points in seen)
    assert not np.array_equal(seen[0], seen[1], equal_nan=True)
    assert np.allclose(np.nansum(seen[0], axis=0), np.nansum(cloud()[np.arange(16) != 3], axis=0))


def test_ranks_of_flat_and_planted_spectra():
    assert participation_ratio(np.ones(7)) == pytest.approx(7) == effective_rank(np.ones(7))
    assert participation_ratio([3, 0, 0]) == pytest.approx(1) == effective_rank([3, 0, 0])
    assert participation_ratio([2, 1]) == pytest.approx(25 / 17)
    assert effective_rank([2, 1]) == pytest.approx(3 / 4 ** (1 / 3))
    for values in (np.zeros(5), [1, np.nan], [1, np.inf], [1, -1, 2]):
        for rank in (participation_ratio, effective_rank):
            with pytest.raises(ValueError, match="finite, none negative and not all 0"):
                rank(values)


# Single activations, and curves against context


def test_in_betweenness_is_the_place_along_the_line_between_two_means():
    means = with_absent(cloud(5, 6), 4)
    own, target = np.array([[0, 1, 2], [3, 0, 4]]), np.array([[1, 2, 3], [2, 4, 0]])
    share = np.array([[0.0, 1.0, 0.3], [-0.5, 0.2, 0.2]])[..., None]
    points = means[own] + share * (means[target] - means[own])
    expected = [[0, 1, 0.3], [-0.5, np.nan, np.nan]]  # the mean of node 4 is absent
    assert np.allclose(in_betweenness(points, own, target, means), expected, equal_nan=True)

    line = means[1] - means[0]
    beside = np.random.default_rng(2).normal(size=6)
    beside -= (beside @ line) / (line @ line) * line  # what is not on the line does not count
    point = means[0] + 0.4 * line + 7 * beside
    assert in_betweenness(point, np.array(0), np.array(1), means) == pytest.approx(0.4)
    assert in_betweenness(point, np.array(1), np.array(0), means) == pytest.approx(0.6)


def test_in_betweenness_without_a_target_is_nan():
    means, own = cloud(3, 6), np.array([[0, 1], [2, 2]])
    with np.errstate(all="raise"):  # a notebook would show a warning
        found = in_betweenness(means[own], own, np.array([[1, -1], [-1, 0]]), means)
    assert np.isnan(found[[0, 1], [1, 0]]).all() and np.allclose(found[[0, 1], [0, 1]], 0)


def test_energy_in_the_plane_is_that_of_the_two_first_components():
    points = with_absent(cloud(16, 9), 3)
    assert plane_energy(points, GRID) == pytest.approx(naive_energy(pca(points).projection, GRID))
    assert plane_energy(points, GRID) != pytest.approx(dirichlet_energy(points, GRID))


@pytest.mark.parametrize("y, expected", [
    ([0, 1, 2, 3, 4], 2.0),  # half of the maximum is met at a point
    ([1, 1, 4, 3, 1], 1.5),  # a half of the way to 4, which lies between two points; the fall does not count
    ([-6, -2, -2, -2, -2], 0.5),
    ([0, 6, 0, 10, 0], 5 / 6),  # the first time, not the last
    ([3, 1, 0, 3, 2], np.nan),  # never above its first value
    ([2, 2, 2, 2, 2], np.nan),
])  # fmt: skip
def test_half_way_of_known_curves(y, expected):
    assert half_way(np.arange(5), np.array(y)) == pytest.approx(expected, nan_ok=True)
    assert half_way(100 + 20 * np.arange(5), np.array(y)) == pytest.approx(100 + 20 * expected, nan_ok=True)
    # The scale and zero of the curve do not matter, so that an energy can be passed as -energy.
    assert half_way(np.arange(5), 3.0 * np.array(y) - 40) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("call, message", [
    (lambda: dirichlet_energy(cloud(15), GRID), "15 points for 4x4 grid of 16 nodes"),
    (lambda: dirichlet_energy(np.ones((16, 2)), GRID), "all points coincide"),
    (lambda: pca(np.ones((16, 2))), "coincide"),
    # Their mean is rounded, so that the differences from it are 1e-17 and not 0.
    (lambda: pca(np.full((16, 512), 0.3)), "coincide"),
    (lambda: dirichlet_energy(np.full((16, 512), 0.3), GRID), "coincide"),
    (lambda: pca(cloud(16, 2), k=3), "k=3 components asked of points with 2 dimensions"),
    (lambda: pca(with_absent(cloud(), *range(14))), "only 2 of 16 words are present, 3 needed"),
    (lambda: pca(np.where(np.eye(16), np.nan, 1.0)), "node 0 is NaN or infinite in part"),
    (lambda: dirichlet_energy(np.where(np.eye(16, 2), np.inf, 1.0), GRID), "node 0 is NaN or infinite"),
    (lambda: pca(np.ones(16)), r"must be \[node, d\], not \(16,\)"),
])  # fmt: skip
def test_a_bad_cloud_names_its_culprit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Theory of mixing


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
def test_mixing_equals_the_naive_step_repeated(graph):
    expected = vectors = cloud(graph.n_nodes, 3)
    neighbours = nx.from_numpy_array(graph.adjacency)
    for _ in range(3):
        expected = np.array(
            [
                0.5 * expected[i] + np.mean([expected[j] for j in neighbours[i]], axis=0)
                for i in range(graph.n_nodes)
            ]
        )
    assert np.allclose(mixing_matrix(graph, 0.5, steps=3) @ vectors, expected)


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
@pytest.mark.parametrize("k", [2, None])
def test_predicted_energy_is_exact_for_the_gram_matrix_of_given_points(graph, k):
    points = cloud(graph.n_nodes, 8)
    measured = dirichlet_energy(points if k is None else pca(points, k).projection, graph)
    assert predicted_energy(points @ points.T, graph, k) == pytest.approx(measured)


def test_limit_of_the_published_toy():
    gram = mixing_matrix(GRID) @ mixing_matrix(GRID).T
    assert predicted_energy(np.eye(16), GRID, k=2) == pytest.approx(3.2)
    assert predicted_energy(gram, GRID, k=2) == pytest.approx(0.625, abs=5e-4)
    before, after = [], []
    for seed in range(20):
        vectors = cloud(16, 4096, seed)
        before.append(dirichlet_energy(pca(vectors).projection, GRID))
        after.append(dirichlet_energy(pca(mixing_matrix(GRID) @ vectors).projection, GRID))
    # Published, one seed: 3.266 before and .636 after.
    assert abs(np.mean(before) - 3.266) < 0.3 and min(before) < 3.266 < max(before)
    assert abs(np.mean(after) - 0.636) < 0.01 and min(after) < 0.636 < max(after)


@pytest.mark.parametrize("d", [256, 1024])
def test_finite_dimension_correction_is_much_closer_than_the_limit(d):
    mixing = mixing_matrix(GRID)
    simulated = [predicted_energy((x := mixing @ cloud(16, d, seed)) @ x.T, GRID, k=2) for seed in range(300)]
    limit, corrected = (predicted_energy(mixing @ mixing.T, GRID, k=2, d=size) for size in (None, d))
    mean, standard_error = np.mean(simulated), np.std(simulated) / np.sqrt(300)
    assert abs(mean - corrected) < 4 * standard_error < 0.2 * (mean - limit)


def test_finite_dimension_correction_weighs_unequal_variances():
    graph, d = grid_graph(3, 4), 1024  # on the square grid the top two are equal and weights do not matter
    mixing = mixing_matrix(graph)
    draws = wishart(df=d, scale=np.eye(12)).rvs(8000, random_state=0)  # Gram matrices of Gaussian vectors
    simulated = [predicted_energy(mixing @ draw @ mixing.T, graph, k=2) for draw in draws]
    corrected = predicted_energy(mixing @ mixing.T, graph, k=2, d=d)
    standard_error = np.std(simulated) / np.sqrt(8000)
    assert abs(np.mean(simulated) - corrected) < 4 * standard_error < 0.001


def test_finite_dimension_correction_counts_the_variance_of_the_variances():
    """On a short path the two components are unequal in variance and roughness: the shift of their ratio,
    (2 / d) sum l^2 (E - r) / (sum l)^2, is five standard errors."""
    path, d, n = grid_graph(1, 5), 128, 20_000
    mixing = mixing_matrix(path, 0.5)
    draws = wishart(df=d, scale=np.eye(5)).rvs(n, random_state=0)
    simulated = [predicted_energy(mixing @ draw @ mixing.T, path, k=2) for draw in draws]
    corrected = predicted_energy(mixing @ mixing.T, path, k=2, d=d)
    standard_error = np.std(simulated) / np.sqrt(n)
    assert abs(np.mean(simulated) - corrected) < 2.5 * standard_error
    values, vectors = harmonics(mixing @ mixing.T)
    rough = np.einsum("ik,ij,jk->k", vectors, np.diag(path.degrees) - path.adjacency, vectors)[:2]
    energy = values[:2] @ rough / values[:2].sum()
    assert 2 / d * (values[:2] ** 2 @ (energy - rough)) / values[:2].sum() ** 2 > 5 * standard_error


def test_finite_dimension_correction_says_when_it_is_none():
    few, many = mixing_gram(GRID, rank_share=1 / 64), mixing_gram(GRID, rank_share=1 / 16)
    assert np.isnan(predicted_energy(few, GRID, k=2, d=4096))  # measured: 2.6
    assert predicted_energy(many, GRID, k=2, d=4096) == pytest.approx(1.12, abs=0.05)  # measured: 1.12
    # A cloud without structure has one group of equal variances, which noise does not leave.
    assert predicted_energy(np.eye(16), GRID, k=2, d=16) == pytest.approx(3.2)


def test_neighbours_alone_show_the_two_sides_of_a_bipartite_graph():
    alone = mixing_matrix(GRID, self_weight=0)
    _, vectors = harmonics(alone @ alone.T)
    assert abs(np.corrcoef(vectors[:, 0], GRID.parity)[0, 1]) > 0.98
    assert predicted_energy(alone @ alone.T, GRID, k=1) > 5.5  # the pure checkerboard has 6


def test_harmonics_of_a_ring_are_its_fourier_modes():
    # Eigenvalues of A are cos(2 pi k / n), their energies 2 - 2 cos(2 pi k / n), in pairs.
    ring, turn = ring_graph(9), 2 * np.pi / 9
    grams = {weight: (mixing := mixing_matrix(ring, weight)) @ mixing.T for weight in (1, 0)}
    assert harmonics(grams[1])[0][:2] == pytest.approx((1 + np.cos(turn)) ** 2)
    assert predicted_energy(grams[1], ring, k=2) == pytest.approx(2 - 2 * np.cos(turn))
    # Odd, so not bipartite: neighbours alone come as near to alternating as nine nodes can.
    assert predicted_energy(grams[0], ring, k=2) == pytest.approx(2 - 2 * np.cos(4 * turn))


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
def test_gram_of_any_map_is_known_from_its_trace_and_norm(graph):
    d, rng = 40, np.random.default_rng(0)
    some_map = rng.normal(size=(d, d)) / 8 + 0.4 * np.eye(d)
    expected = map_gram(graph, some_map.trace() / d, (some_map**2).sum() / d, self_weight=0.7)
    n_draws, total = 4000, 0
    for _ in range(n_draws):
        vectors = rng.normal(size=(graph.n_nodes, d))
        mixed = 0.7 * vectors + neighbour_mean(graph) @ vectors @ some_map.T
        total = total + mixed @ mixed.T / d
    assert np.abs(total / n_draws - expected).max() < 0.02 * np.abs(expected).max()


def test_gram_of_the_identity_and_of_a_projection():
    assert np.allclose(map_gram(GRID, 1, 1), mixing_gram(GRID))
    shared = mixing_gram(GRID, self_weight=2, rank_share=0.3)
    assert np.allclose(map_gram(GRID, 0.3, 0.3, self_weight=2), shared)
    assert predicted_energy(mixing_gram(GRID, noise=1e3), GRID) == pytest.approx(3.2, abs=1e-3)


@pytest.mark.parametrize("settings", [
    {}, {"steps": 3}, {"self_weight": 0.0}, {"self_weight": 0.5, "steps": 2, "rank": 10, "noise": 0.8},
    {"rank": 0}, {"noise": 2.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
def test_simulated_gram_averages_to_the_expected_one(graph, settings):
    d = 40
    clouds = [simulate_mixing(graph, d, seed=seed, **settings) for seed in range(2000)]
    theory = dict(settings)
    if "rank" in theory:
        theory["rank_share"] = theory.pop("rank") / d
    expected = mixing_gram(graph, **theory)
    simulated = np.mean([points @ points.T / d for points in clouds], axis=0)
    assert np.abs(simulated - expected).max() < 0.03 * np.abs(expected).max()


def test_coordinate_projection_stands_for_any_projection():
    # The step with a random orthogonal projection in a rotated basis is the one on coordinates.
    rotation = ortho_group.rvs(20, random_state=1)
    vectors = np.random.default_rng(0).standard_normal((16, 20))
    projection = rotation.T @ np.diag(np.arange(20) < 6) @ rotation
    turned = vectors @ rotation  # so that the first coordinates of `vectors` are the projection's range
    mixed = turned + neighbour_mean(GRID) @ turned @ projection.T
    assert np.allclose(mixed @ rotation.T, simulate_mixing(GRID, 20, rank=6, seed=0))
    with pytest.raises(ValueError, match="rank must be between 0 and d = 20, not 21"):
        simulate_mixing(GRID, 20, rank=21)


def test_energies_of_many_clouds_and_of_too_few_words():
    clouds = np.stack([cloud(seed=seed) for seed in range(6)]).reshape(2, 3, 16, 5)
    clouds[1, 2, 2:] = np.nan
    clouds[0, 1, 4] = np.nan
    found = plane_energies(clouds, GRID)
    assert np.argwhere(np.isnan(found)).tolist() == [[1, 2]]
    assert found[0, 1] == plane_energy(clouds[0, 1], GRID) and found[1, 0] == plane_energy(clouds[1, 0], GRID)


def planted(n_layouts: int, d: int = 64, graph=GRID, seed: int = 0):
    """Activations of random walks that hold own, before and neighbours' vectors of the words, no noise."""
    rng = np.random.default_rng(seed)
    own, before, beside = (rng.normal(size=(2, graph.n_nodes, d)) for _ in range(3))  # [layer, word, d]
    dealt, nodes = layouts(graph.n_nodes, n_layouts, seed), random_walks(graph, 6, 200, seed)
    now, previous = nodes[:, 1:].ravel(), nodes[:, :-1].ravel()
    pairs = np.zeros((n_layouts, graph.n_nodes, graph.n_nodes), dtype=int)
    np.add.at(pairs, (slice(None), now, previous), 1)
    sums = np.zeros((2, n_layouts, 2, graph.n_nodes, d))
    for i, words in enumerate(dealt):
        mean = (neighbour_mean(graph) @ beside[:, words])[:, now]
        stream = own[:, words[now]] + before[:, words[previous]] + mean
        np.add.at(sums[0, i], (slice(None), now), stream)
        np.add.at(sums[1, i], (slice(None), previous), stream)
    means = means_of(sums[0], pairs.sum(-1)[:, None])
    return (own, before, beside), WordRegression(*sums, pairs, dealt, graph), means


def test_regression_over_layouts_recovers_planted_vectors():
    vectors, regression, means = planted(n_layouts=6)
    found = regression.fit()
    centred = [each - each.mean(1, keepdims=True) for each in vectors]
    for name, mine in zip(found._fields, centred, strict=True):
        np.testing.assert_allclose(getattr(found, name), mine, atol=1e-6, err_msg=name)
    own, other = centred[0], centred[1] + centred[2]
    aligned, neighbours = found.mixing()
    for layer in range(2):
        assert aligned[layer] == pytest.approx((own[layer] * other[layer]).sum() / (own[layer] ** 2).sum())
        assert neighbours[layer] == pytest.approx((other[layer] ** 2).sum() / (own[layer] ** 2).sum())
    # The vectors of some layouts make the means of another one, but for the draws of the walks.
    some, layout = regression.fit(np.arange(5)), layouts(16, 6, 0)[5]
    np.testing.assert_allclose(some.own, centred[0], atol=1e-6)
    for layer in range(2):
        made, real = some.means(layout, GRID)[layer], means[5, layer]
        assert plane_energy(made, GRID) == pytest.approx(plane_energy(real, GRID), abs=0.3)


def test_one_layout_can_not_tell_a_word_from_its_neighbours():
    vectors, regression, _ = planted(n_layouts=1)
    assert np.abs(regression.fit().own - (vectors[0] - vectors[0].mean(1, keepdims=True))).max() > 0.1


def test_word_that_was_never_read_has_no_vector():
    dealt = layouts(4, 5, 0)
    ring = ring_graph(4)
    pairs = np.zeros((5, 4, 4), dtype=int)
    pairs[:, ring.adjacency] = 3
    pairs[np.arange(5), (dealt == 2).argmax(1)] = 0  # the node at which word 2 stands is never reached
    sums = np.random.default_rng(0).normal(size=(2, 5, 1, 4, 7)) * (pairs.sum(-1) > 0)[None, :, None, :, None]
    found = WordRegression(*sums, pairs, dealt, ring).fit()
    assert np.isnan(found.own[0, 2]).all() and np.isfinite(np.delete(found.own, 2, axis=1)).all()
    assert all(np.isfinite(each).all() for each in found.mixing())
    assert absent_nodes(found.means(dealt[0], ring)[0]).tolist() == [2]


def test_nearest_centroid():
    points = np.random.default_rng(0).normal(size=(5, 6, 3))
    centroids = np.random.default_rng(1).normal(size=(4, 3))
    centroids[2] = np.nan
    distance = np.linalg.norm(points[..., None, :] - centroids, axis=-1)
    assert (nearest(points, centroids) == np.nanargmin(distance, axis=-1)).all()
