from __future__ import annotations

import numpy as np
import pytest

from lib.induction.walks import (
    Graph,
    graph_from_edges,
    grid_graph,
    hexagonal_graph,
    layouts,
    other_nodes,
    random_walks,
    ring_graph,
)
from lib.induction.walks import rule_following_accuracy as accuracy

WORDS = "apple bird car egg house milk plane opera box sand sun mango rock math code phone".split()


def test_grid_joins_words_that_stand_next_to_each_other():
    grid = grid_graph(4, 4, WORDS)
    rows = np.array(WORDS).reshape(4, 4)
    beside = {frozenset(pair) for r in range(4) for pair in zip(rows[r, :-1], rows[r, 1:], strict=True)}
    below = {frozenset(pair) for r in range(3) for pair in zip(rows[r], rows[r + 1], strict=True)}
    assert {frozenset((WORDS[i], WORDS[j])) for i, j in grid.edges} == beside | below
    assert len(grid.edges) == 24 and grid.is_bipartite
    # Drawn as it is written: one unit to the right is the next column, one down the next row.
    assert (grid.positions[1] - grid.positions[0]).tolist() == [1, 0]
    assert (grid.positions[4] - grid.positions[0]).tolist() == [0, -1]
    assert all(grid.parity[i] == -grid.parity[j] for i, j in grid.edges)


def test_ring_and_honeycomb_have_the_degrees_and_edge_lengths_of_their_lattice():
    ring = ring_graph(7)
    assert set(ring.degrees) == {2} and len(ring.edges) == 7 and not ring.is_bipartite
    with pytest.raises(ValueError, match="ring of 7"):
        ring.parity  # noqa: B018
    honeycomb = hexagonal_graph(2, 3)
    assert set(honeycomb.degrees) == {2, 3} and honeycomb.is_bipartite
    assert honeycomb.n_nodes == 22 and len(honeycomb.edges) == 22 + 6 - 1  # Euler: E = V + faces - 1
    heights = honeycomb.positions[:, 1]
    assert (np.diff(heights) <= 1e-6).all(), "nodes are numbered from the top line down"
    same_line = np.abs(np.diff(heights)) < 1e-6
    assert (np.diff(honeycomb.positions[:, 0])[same_line] > 0).all(), "and from left to right"
    for graph in (ring, honeycomb):
        i, j = graph.edges.T
        lengths = np.linalg.norm(graph.positions[i] - graph.positions[j], axis=1)
        assert np.allclose(lengths, lengths[0])


def test_edge_list_takes_strings_and_pairs_and_numbers_words_by_appearance():
    graph = graph_from_edges(["sun-moon", ("moon", "star"), "star - sun", "moon-sun"])
    assert graph.words == ("sun", "moon", "star") and len(graph.edges) == 3
    ordered = graph_from_edges(["sun-moon", "moon-star"], words=("star", "moon", "sun"))
    assert ordered.edges.tolist() == [[0, 1], [1, 2]] and np.isfinite(ordered.positions).all()


@pytest.mark.parametrize("edges, words, message", [
    (["aple-bird"], ("apple", "bird"), "did you mean 'apple'"),
    (["zzz-bird"], ("apple", "bird"), "zzz"),
    (["apple-bird-car"], (), "apple-bird-car"),
    (["apple-apple", "apple-bird"], (), "apple"),
    (["apple-bird", "car-egg"], (), r"apple bird \| car egg"),
    (["apple-bird"], ("apple", "bird", "apple"), "apple"),
    ([], (), "empty"),
])  # fmt: skip
def test_a_bad_edge_list_names_its_culprit(edges, words, message):
    with pytest.raises(ValueError, match=message):
        graph_from_edges(edges, words)


@pytest.mark.parametrize("build, message", [
    (lambda: grid_graph(4, 4, WORDS[:15]), "15 words"),
    (lambda: grid_graph(0, 4), "rows"),
    (lambda: grid_graph(1, 1), "adjacency"),
    (lambda: Graph("g", np.array([[0, 1], [0, 0]]), np.zeros((2, 2))), "'0' -> '1'"),
    (lambda: Graph("g", 1 - np.eye(3), np.zeros((2, 2))), "positions"),
])  # fmt: skip
def test_a_bad_graph_names_its_culprit(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_walks_follow_edges_from_every_start():
    grid = grid_graph(4, 4)
    walks = random_walks(grid, n_walks=20, length=50, seed=3)
    assert walks.dtype == np.int64 and walks[:, 0].tolist() == [*range(16), 0, 1, 2, 3]
    assert grid.adjacency[walks[:, :-1], walks[:, 1:]].all()


def test_next_node_is_uniform_over_the_neighbours():
    grid = grid_graph(3, 3)
    walks = random_walks(grid, n_walks=200, length=500, seed=0)
    counts = np.zeros((9, 9))
    np.add.at(counts, (walks[:, :-1], walks[:, 1:]), 1)
    share = counts / counts.sum(1, keepdims=True)
    expected = grid.adjacency / grid.degrees[:, None]
    standard_error = np.sqrt(expected * (1 - expected) / counts.sum(1, keepdims=True))
    assert (np.abs(share - expected) <= 4.5 * standard_error + 1e-12).all()


def test_walk_is_a_function_of_seed_and_number_alone():
    grid = grid_graph(3, 4)
    walks = random_walks(grid, n_walks=8, length=30, seed=1)
    np.random.seed(5)  # the global generator plays no part
    longer = random_walks(grid, n_walks=12, length=60, seed=1)
    assert (longer[:8, :30] == walks).all()
    assert (random_walks(grid, n_walks=8, length=30, seed=2) != walks).any()
    assert not (longer[0] == longer[-1]).all(), "walks from different starts differ"
    assert len({tuple(walk[1:]) for walk in random_walks(ring_graph(3), 30, 60, seed=0)}) == 30


def test_layouts_deal_every_word_once_and_begin_with_the_given_order():
    dealt = layouts(16, 20, seed=3)
    assert dealt[0].tolist() == list(range(16)) and (np.sort(dealt) == np.arange(16)).all()
    assert len(np.unique(dealt, axis=0)) == 20
    assert (layouts(16, 7, seed=3) == dealt[:7]).all() and (layouts(16, 7, seed=4) != dealt[:7]).any()


@pytest.mark.parametrize("neighbours", [True, False])
def test_other_node_is_uniform_among_those_that_are_neither_here_nor_before(neighbours):
    grid = grid_graph(3, 3)
    walks = random_walks(grid, n_walks=9, length=2000, seed=0)
    now, before = walks[:, 1:], walks[:, :-1]
    drawn = other_nodes(now, before, grid, neighbours=neighbours, seed=1)
    assert drawn.shape == now.shape
    assert np.array_equal(drawn, other_nodes(now, before, grid, neighbours=neighbours, seed=1))
    assert (drawn != other_nodes(now, before, grid, neighbours=neighbours, seed=2)).any()
    for here in range(9):
        for last in np.flatnonzero(grid.adjacency[here]):
            found = drawn[(now == here) & (before == last)]
            meant = [i for i in range(9) if grid.adjacency[here, i] == neighbours and i not in (here, last)]
            shares = np.bincount(found, minlength=9)[meant] / len(found)
            assert set(found) == set(meant)
            assert np.abs(shares - 1 / len(meant)).max() < 5 * 0.5 / np.sqrt(len(found))


def test_other_node_is_none_where_there_is_none():
    path = graph_from_edges(["a-b", "b-c"])  # the ends have no other neighbour, the middle no non-neighbour
    now, before = np.array([0, 1, 2, 1]), np.array([1, 0, 1, 2])
    assert other_nodes(now, before, path, neighbours=True, seed=0).tolist() == [-1, 2, -1, 0]
    assert other_nodes(now, before, path, neighbours=False, seed=0).tolist() == [2, -1, 0, -1]


def test_accuracy_equals_the_naive_sum_over_neighbours():
    grid = grid_graph(2, 3)
    walks = random_walks(grid, n_walks=4, length=7, seed=0)
    probabilities = np.random.default_rng(0).dirichlet(np.ones(10), size=(2, 4, 7))[..., :6]
    naive = np.zeros((2, 4, 7))
    for c in range(2):
        for w in range(4):
            for t in range(7):
                for node in range(6):
                    if grid.adjacency[walks[w, t], node]:
                        naive[c, w, t] += probabilities[c, w, t, node]
    assert np.allclose(accuracy(probabilities, walks, grid), naive)
    with pytest.raises(ValueError, match="4, 6, 6"):
        accuracy(probabilities[..., 1:, :], walks, grid)
