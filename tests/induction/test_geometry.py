from __future__ import annotations

from itertools import combinations

import networkx as nx
import numpy as np
import pytest
from scipy.stats import mannwhitneyu, ortho_group, wishart

from lib.core.statistics import effective_rank, means_of, participation_ratio
from lib.induction.geometry import (
    ClassSums,
    absent_nodes,
    class_means,
    dirichlet_energy,
    half_way,
    in_betweenness,
    neighbour_separation,
    pca,
    permutation_p_value,
    plane_energies,
    plane_energy,
    procrustes_distance,
    shuffled_label_null,
)
from lib.induction.mixing import (
    WordRegression,
    harmonics,
    map_gram,
    mixing_gram,
    mixing_matrix,
    nearest,
    neighbour_mean,
    predicted_energy,
    simulate_mixing,
)
from lib.induction.walks import graph_from_edges, grid_graph, layouts, random_walks, ring_graph

GRID = grid_graph(4, 4)
GRAPHS = [GRID, graph_from_edges(["a-b", "b-c", "c-d", "c-e", "e-a"])]


def cloud(n: int = 16, d: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def with_absent(points: np.ndarray, *nodes: int) -> np.ndarray:
    points = points.copy()
    points[list(nodes)] = np.nan
    return points


# Class means


def test_class_means_equal_the_naive_loop_at_once_and_in_parts():
    stream = np.random.default_rng(0).normal(size=(2, 3, 11, 4)).astype(np.float32)
    nodes = np.random.default_rng(1).integers(0, 5, size=(3, 11))
    means, sums = class_means(stream, nodes, 5), ClassSums(5)
    assert means.shape == (2, 5, 4) and means.dtype == np.float64
    for part in (slice(1), slice(1, 3)):
        sums.add(stream[0, part], nodes[part])
    assert np.allclose(sums.means(), means[0])
    for c in range(2):
        for node in range(5):
            members = [stream[c, w, t] for w in range(3) for t in range(11) if nodes[w, t] == node]
            assert np.allclose(means[c, node], np.mean(members, axis=0, dtype=np.float64))


def test_absent_word_is_nan_and_never_zero():
    means = class_means(np.ones((1, 4, 3)), np.array([[0, 2, 2, 0]]), 4)
    assert absent_nodes(means).tolist() == [1, 3]
    assert np.isnan(means[[1, 3]]).all() and (means[[0, 2]] == 1).all()


def test_nodes_of_minus_one_are_counted_nowhere_and_others_are_errors():
    stream, nodes = cloud(6, 4).reshape(1, 6, 4), np.array([[0, 1, -1, 1, 0, -1]])
    sums = ClassSums(3).add(stream, nodes)
    assert sums.counts.tolist() == [2, 2, 0] and np.allclose(sums.means()[1], stream[0, [1, 3]].mean(0))
    for strange in (3, -2):
        with pytest.raises(ValueError, match=f"node {strange}"):
            class_means(stream, np.where(nodes == 1, strange, nodes), 3)
    with pytest.raises(ValueError, match="1, 5"):
        class_means(stream, nodes[:, 1:], 3)
    stream[0, 2, 1] = np.inf
    with pytest.raises(ValueError, match="float16"):
        class_means(stream.astype(np.float16), nodes, 3)


# PCA


def test_pca_finds_a_planted_plane_and_leaves_absent_words_out():
    plane = GRID.positions * [3.0, 1.0]
    basis = ortho_group.rvs(20, random_state=0)[:2]
    result = pca(plane @ basis + 7.0)
    assert np.allclose(result.explained, [0.9, 0.1])  # variances 9 : 1
    assert np.allclose(result.projection @ result.components, plane @ basis - (plane @ basis).mean(axis=0))
    assert np.allclose(result.components @ result.components.T, np.eye(2))
    top = np.abs(result.projection).argmax(axis=0)
    assert (result.projection[top, range(2)] > 0).all(), "signs are fixed"

    points = with_absent(cloud(16, 6), 4, 9)
    result = pca(points)
    present = np.delete(np.arange(16), [4, 9])
    assert np.isnan(result.projection[[4, 9]]).all()
    assert np.allclose(result.projection[present], pca(points[present]).projection)
    assert plane_energy(points, GRID) == pytest.approx(naive_energy(result.projection, GRID))


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


def test_procrustes_sees_through_similarities_and_nothing_else():
    angle = 0.7
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = 3 * GRID.positions * [1, -1] @ rotation + [5, -2]
    assert procrustes_distance(moved, GRID) == pytest.approx(0, abs=1e-12)
    assert procrustes_distance(with_absent(moved, 0, 7), GRID) == pytest.approx(0, abs=1e-12)
    # Stretched by a: with c = 1/sqrt(2), 1 - (trace of the aligned product)^2 = (a - 1)^2 / (2 (a^2 + 1)).
    assert procrustes_distance(GRID.positions * [3, 1], GRID) == pytest.approx(4 / 20)
    with pytest.raises(ValueError, match="points2d"):
        procrustes_distance(cloud(16, 3), GRID)


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
def test_neighbour_separation_is_the_area_under_the_curve(graph):
    points = with_absent(cloud(graph.n_nodes, 2, seed=3), 2)
    near, far = [], []
    for i, j in combinations([i for i in range(graph.n_nodes) if i != 2], 2):
        (near if graph.adjacency[i, j] else far).append(np.linalg.norm(points[i] - points[j]))
    expected = mannwhitneyu(far, near).statistic / (len(far) * len(near))
    assert neighbour_separation(points, graph) == pytest.approx(expected)
    with pytest.raises(ValueError, match="ring of 3"):
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
    with pytest.raises(ValueError, match="'less'"):
        permutation_p_value(2.0, null, "less")
    for observed, values in ((np.nan, null), (2.0, np.full(9, np.nan))):  # no NaN is rare for being a NaN
        with pytest.raises(ValueError, match="NaN"):
            permutation_p_value(observed, values, "lower")
    seen = []
    shuffled_label_null(lambda points, graph: seen.append(points) or 0.0, with_absent(cloud(), 3), GRID, 5, 0)
    assert all(absent_nodes(points).tolist() == [3] for points in seen)


def test_ranks_of_flat_and_planted_spectra():
    assert participation_ratio(np.ones(7)) == pytest.approx(7) == effective_rank(np.ones(7))
    assert participation_ratio([3, 0, 0]) == pytest.approx(1) == effective_rank([3, 0, 0])
    assert participation_ratio([2, 1]) == pytest.approx(25 / 17)
    assert effective_rank([2, 1]) == pytest.approx(3 / 4 ** (1 / 3))
    for values in (np.zeros(5), [1, np.nan], [1, -1, 2]):
        with pytest.raises(ValueError, match="singular values"):
            participation_ratio(values)


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
    with np.errstate(all="raise"):  # a notebook would show a warning
        assert np.isnan(in_betweenness(means[[1, 2]], np.array([1, 2]), np.array([-1, -1]), means)).all()


@pytest.mark.parametrize("y, expected", [
    ([1, 1, 4, 3, 1], 1.5),  # a half of the way to 4, which lies between two points; the fall does not count
    ([0, 6, 0, 10, 0], 5 / 6),  # the first time, not the last
    ([3, 1, 0, 3, 2], np.nan),  # never above its first value
])  # fmt: skip
def test_half_way_of_known_curves(y, expected):
    assert half_way(np.arange(5), np.array(y)) == pytest.approx(expected, nan_ok=True)
    assert half_way(100 + 20 * np.arange(5), np.array(y)) == pytest.approx(100 + 20 * expected, nan_ok=True)
    # The scale and zero of the curve do not matter, so that an energy can be passed as -energy.
    assert half_way(np.arange(5), 3.0 * np.array(y) - 40) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("call, message", [
    (lambda: dirichlet_energy(cloud(15), GRID), "15 points"),
    # Their mean is rounded, so that the differences from it are 1e-17 and not 0.
    (lambda: pca(np.full((16, 512), 0.3)), "coincide"),
    (lambda: dirichlet_energy(np.full((16, 512), 0.3), GRID), "coincide"),
    (lambda: pca(cloud(16, 2), k=3), "k=3"),
    (lambda: pca(with_absent(cloud(), *range(14))), "2 of 16"),
    (lambda: dirichlet_energy(np.where(np.eye(16, 2), np.inf, 1.0), GRID), "node 0"),
    (lambda: pca(np.ones(16)), "points"),
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


def test_harmonics_of_a_ring_are_its_fourier_modes():
    # Eigenvalues of A are cos(2 pi k / n), their energies 2 - 2 cos(2 pi k / n), in pairs.
    ring, turn = ring_graph(9), 2 * np.pi / 9
    grams = {weight: (mixing := mixing_matrix(ring, weight)) @ mixing.T for weight in (1, 0)}
    assert harmonics(grams[1])[0][:2] == pytest.approx((1 + np.cos(turn)) ** 2)
    assert predicted_energy(grams[1], ring, k=2) == pytest.approx(2 - 2 * np.cos(turn))
    # Odd, so not bipartite: neighbours alone come as near to alternating as nine nodes can.
    assert predicted_energy(grams[0], ring, k=2) == pytest.approx(2 - 2 * np.cos(4 * turn))
    assert predicted_energy(mixing_gram(GRID, self_weight=0), GRID, k=1) > 5.5  # a checkerboard has 6


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


@pytest.mark.parametrize("settings", [
    {}, {"self_weight": 0.5, "steps": 2, "rank": 10, "noise": 0.8}, {"rank": 0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("graph", GRAPHS[:1], ids=lambda graph: graph.name)
def test_simulated_gram_averages_to_the_expected_one(graph, settings):
    d = 40
    clouds = [simulate_mixing(graph, d, seed=seed, **settings) for seed in range(2000)]
    theory = dict(settings)
    if "rank" in theory:
        theory["rank_share"] = theory.pop("rank") / d
    expected = mixing_gram(graph, **theory)
    simulated = np.mean([points @ points.T / d for points in clouds], axis=0)
    assert np.abs(simulated - expected).max() < 0.03 * np.abs(expected).max()
    with pytest.raises(ValueError, match="rank .* 21"):
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
