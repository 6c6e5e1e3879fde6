"""How well a linear map copies (study 2), against draws, optimisation and cases known by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ortho_group

from lib.induction.mixing import ideal_copier, map_alignment, map_gram, neighbour_mean
from lib.induction.walks import grid_graph

GRID = grid_graph(3, 3)


def low_rank(d: int, rank: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((d, rank)) @ rng.standard_normal((rank, d))


def words(d: int, seed: int) -> np.ndarray:
    """[node, d] with a mean and few leading directions, as the words of a trained model have."""
    rng = np.random.default_rng(seed)
    return 3 + rng.standard_normal((GRID.n_nodes, d)) * np.logspace(0.5, -1, d)


def test_known_maps():
    assert map_alignment(np.eye(7)) == pytest.approx((1, 1, 1 / 7))
    assert map_alignment(-2 * np.eye(7)) == pytest.approx((2, -1, 1 / 7))
    assert map_alignment(-2 * np.eye(7), words(7, 0))[:2] == pytest.approx((2, -1))
    with pytest.raises(ValueError, match="returns 0 for all"):
        map_alignment(np.zeros((7, 7)))


@pytest.mark.parametrize("points", [None, words(24, 1)], ids=["isotropic", "words"])
def test_alignment_of_a_map_that_is_turned_at_random_has_the_stated_spread(points):
    ov = low_rank(24, 4, seed=2)
    size, _, chance = map_alignment(ov, points)
    turned = [map_alignment(ortho_group.rvs(24, random_state=i) @ ov, points) for i in range(800)]
    found = np.array([each.alignment for each in turned])
    assert found.std() == pytest.approx(chance, rel=0.1)
    assert abs(found.mean()) < 4 * chance / np.sqrt(len(found))
    assert np.allclose([each.size for each in turned], size)


@pytest.mark.parametrize("points", [None, words(24, 1)], ids=["isotropic", "words"])
def test_no_map_of_that_rank_and_size_copies_better_than_the_ideal_copier(points):
    ov = low_rank(24, 4, seed=3)
    copier = ideal_copier(ov, points)
    best = map_alignment(copier, points)
    assert np.linalg.matrix_rank(copier) == 4
    assert best.size == pytest.approx(map_alignment(ov, points).size)
    rng = np.random.default_rng(4)
    for _ in range(200):
        near = (copier + 0.1 * rng.standard_normal((24, 24))) @ np.linalg.qr(rng.standard_normal((24, 4)))[0]
        some = near @ np.linalg.pinv(near) * best.size
        assert map_alignment(some, points).alignment <= best.alignment + 1e-12
    centred = np.eye(24) if points is None else points - points.mean(axis=0)
    variance = np.linalg.svd(centred, compute_uv=False) ** 2
    assert best.alignment == pytest.approx(np.sqrt(variance[:4].sum() / variance.sum()))


def test_words_that_are_dealt_at_random_have_the_gram_matrix_of_their_size_and_alignment():
    points, ov = words(24, 5), low_rank(24, 4, seed=6) / 30
    points = points - points.mean(axis=0)
    rng, mean = np.random.default_rng(7), neighbour_mean(GRID)
    grams = []
    for _ in range(20_000):
        mixed = (dealt := rng.permutation(points)) + mean @ dealt @ ov.T
        grams.append(mixed @ mixed.T)
    size, alignment, _ = map_alignment(ov, points)
    centring = np.eye(GRID.n_nodes) - 1 / GRID.n_nodes
    expected = map_gram(GRID, size * alignment, size**2) * (points**2).sum() / (GRID.n_nodes - 1)
    found, expected = (centring @ gram @ centring for gram in (np.mean(grams, axis=0), expected))
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
