"""Word graphs, random walks on them, and rule-following accuracy.

A graph's nodes carry words; a random walk on it is the text that the model
reads. Nothing here knows a model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import networkx as nx
import numpy as np


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected connected graph with a picture and, optionally, a word a node.

    Args:
        name: what figures and records call it, such as "4x4 grid".
        adjacency: bool [node, node], symmetric, no self-loops, connected.
        positions: float [node, 2], where to draw the nodes (x, y).
        words: one distinct word a node, or () for numbered nodes.

    Raises:
        ValueError: when any of this does not hold, naming the culprit.
    """

    name: str
    adjacency: np.ndarray = field(repr=False)
    positions: np.ndarray = field(repr=False)
    words: tuple[str, ...] = ()

    def __post_init__(self):
        adjacency = np.array(self.adjacency, dtype=bool)
        positions = np.array(self.positions, dtype=np.float64)
        object.__setattr__(self, "adjacency", adjacency)
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "words", tuple(self.words))
        n = len(adjacency)
        if adjacency.shape != (n, n) or n < 2:
            raise ValueError(f"{self.name}: adjacency must be [node, node], n >= 2, not {adjacency.shape}")
        if positions.shape != (n, 2):
            raise ValueError(f"{self.name}: positions must be [{n}, 2], not {positions.shape}")
        _check_words(self.words, n, self.name)
        loops = np.flatnonzero(adjacency.diagonal())
        if len(loops):
            raise ValueError(f"{self.name}: {self.labels[loops[0]]!r} is joined to itself; remove that edge")
        one_way = np.argwhere(adjacency & ~adjacency.T)
        if len(one_way):
            i, j = one_way[0]
            raise ValueError(
                f"{self.name}: {self.labels[i]!r} -> {self.labels[j]!r} has no way back; "
                "adjacency must be symmetric"
            )
        components = sorted(nx.connected_components(self._networkx), key=min)
        if len(components) > 1:
            parts = " | ".join(" ".join(self.labels[i] for i in sorted(part)) for part in components)
            raise ValueError(
                f"{self.name} is disconnected, so no walk sees all of it; join its "
                f"{len(components)} components by an edge: {parts}"
            )
        # Cached properties depend on the arrays: a frozen graph stays as it was checked.
        adjacency.setflags(write=False)
        positions.setflags(write=False)

    @property
    def n_nodes(self) -> int:
        return len(self.adjacency)

    @cached_property
    def edges(self) -> np.ndarray:
        """int [edge, 2]: every edge once, lower node first."""
        return np.argwhere(np.triu(self.adjacency))

    @cached_property
    def degrees(self) -> np.ndarray:
        """int [node]: number of neighbours."""
        return self.adjacency.sum(axis=1)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The words, or the node numbers where there are none."""
        return self.words or tuple(str(i) for i in range(len(self.adjacency)))

    @property
    def is_bipartite(self) -> bool:
        """Whether the nodes split into two sides with every edge between them, as a checkerboard's do."""
        return nx.is_bipartite(self._networkx)

    @cached_property
    def parity(self) -> np.ndarray:
        """float [node]: +1 on the side of node 0 and -1 on the other, of a bipartite graph.

        Raises:
            ValueError: when the graph is not bipartite.
        """
        if not self.is_bipartite:
            raise ValueError(f"{self.name} is not bipartite: it has no two sides")
        side = nx.bipartite.color(self._networkx)
        return np.array([1.0 if side[i] == side[0] else -1.0 for i in range(self.n_nodes)])

    @cached_property
    def _networkx(self) -> nx.Graph:
        return nx.from_numpy_array(self.adjacency)


def grid_graph(rows: int, cols: int, words: Sequence[str] = ()) -> Graph:
    """Square lattice; nodes and words row by row from the top left."""
    _check_sizes("a grid", rows=(rows, 1), cols=(cols, 1))
    lattice = nx.grid_2d_graph(rows, cols)
    return _from_networkx(f"{rows}x{cols} grid", lattice, {(r, c): (c, -r) for r, c in lattice}, words)


def ring_graph(n: int, words: Sequence[str] = ()) -> Graph:
    """Cycle of n nodes, clockwise from the top."""
    _check_sizes("a ring", n=(n, 3))
    angle = 2 * np.pi * np.arange(n) / n
    positions = dict(enumerate(np.column_stack([np.sin(angle), np.cos(angle)])))
    return _from_networkx(f"ring of {n}", nx.cycle_graph(n), positions, words)


def hexagonal_graph(rows: int, cols: int, words: Sequence[str] = ()) -> Graph:
    """Honeycomb of rows x cols hexagons; nodes and words line by line from the top left."""
    _check_sizes("a honeycomb", rows=(rows, 1), cols=(cols, 1))
    lattice = nx.hexagonal_lattice_graph(rows, cols)
    reading_order = sorted(lattice.nodes(data="pos"), key=lambda node: (-round(node[1][1], 6), node[1][0]))
    positions = dict(reading_order)
    return _from_networkx(f"{rows}x{cols} honeycomb", lattice, positions, words)


def graph_from_edges(edges: Iterable[str | Sequence[str]], words: Sequence[str] = ()) -> Graph:
    """Graph from an edge list, drawn by the Kamada-Kawai layout.

    Args:
        edges: "apple-bird" or ("apple", "bird"), in any order; repeated edges count once.
        words: the nodes in order. Without them, the words in order of appearance.

    Raises:
        ValueError: naming an edge that is no pair, a word that is not among `words` (with the
            nearest that is), a self-loop, or the components of a disconnected graph.
    """
    pairs = [_pair(edge) for edge in edges]
    if not pairs:
        raise ValueError("the edge list is empty; give edges such as 'apple-bird'")
    words = tuple(words) or tuple(dict.fromkeys(word for pair in pairs for word in pair))
    _check_words(words, len(words), "edge list")
    index = {word: i for i, word in enumerate(words)}
    adjacency = np.zeros((len(words), len(words)), dtype=bool)
    for pair in pairs:
        for word in pair:
            if word not in index:
                near = difflib.get_close_matches(word, words, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known words: {' '.join(words)}"
                raise ValueError(f"edge '{pair[0]}-{pair[1]}' names the unknown word {word!r}{hint}")
        i, j = index[pair[0]], index[pair[1]]
        adjacency[i, j] = adjacency[j, i] = True
    graph = Graph(f"edge list of {len(words)} words", adjacency, np.zeros((len(words), 2)), words)
    layout = nx.kamada_kawai_layout(graph._networkx)  # needs a connected graph, which is checked by now
    return replace(graph, positions=np.array([layout[i] for i in range(graph.n_nodes)]))


def random_walks(graph: Graph, n_walks: int, length: int, seed: int) -> np.ndarray:
    """Uniform random walks, int64 [walk, token] of node numbers.

    Walk i starts at node i mod n_nodes and steps to a uniformly random neighbour. It is a
    function of (graph, seed, i): more walks leave the first ones as they were, and longer
    walks continue shorter ones.
    """
    _check_sizes("random walks", n_walks=(n_walks, 1), length=(length, 1))
    # neighbours[i, :degrees[i]] lists the neighbours of node i.
    neighbours = np.argsort(~graph.adjacency, axis=1, kind="stable")[:, : graph.degrees.max()]
    draws = np.stack([np.random.default_rng([seed, i]).random(length) for i in range(n_walks)])
    walks = np.empty((n_walks, length), dtype=np.int64)
    walks[:, 0] = np.arange(n_walks) % graph.n_nodes
    for t in range(1, length):
        here = walks[:, t - 1]
        walks[:, t] = neighbours[here, (draws[:, t] * graph.degrees[here]).astype(np.int64)]
    return walks


def layouts(n_nodes: int, n_layouts: int, seed: int) -> np.ndarray:
    """Words dealt to the nodes of a graph again and again, int [layout, node]: the word at each node.

    The first layout is the given order. More layouts leave the first ones as they were.
    """
    _check_sizes("layouts", n_layouts=(n_layouts, 1))
    dealt = [np.random.default_rng([seed, i]).permutation(n_nodes) for i in range(1, n_layouts)]
    return np.stack([np.arange(n_nodes), *dealt])


def other_nodes(
    now: np.ndarray, before: np.ndarray, graph: Graph, *, neighbours: bool, seed: int
) -> np.ndarray:
    """A random node for each position of a walk, neither the current one nor the one before.

    Args:
        now, before: int [...], current and previous node.
        neighbours: draw among the other neighbours of the current node, or among its non-neighbours.
        seed: of the draw.

    Returns:
        int [...]; -1 where there is no such node.
    """
    allowed = graph.adjacency[now] == neighbours
    own = np.eye(graph.n_nodes, dtype=bool)
    allowed &= ~(own[now] | own[before])
    draws = np.where(allowed, np.random.default_rng(seed).random(allowed.shape), -1)
    return np.where(allowed.any(-1), draws.argmax(-1), -1)


def rule_following_accuracy(word_probabilities: np.ndarray, walks: np.ndarray, graph: Graph) -> np.ndarray:
    """Probability that the model puts on the words which may come next.

    Args:
        word_probabilities: [..., walk, token, node], the model's probability of each word at the
            token after this one. A share of the whole vocabulary, so it may sum to less than 1.
        walks: int [walk, token].

    Returns:
        [..., walk, token]: the mass on the neighbours of the word at each token. A model that
        knows the words and not the graph has mean degree / n_nodes (.19 on the 4x4 grid).

    Source: Park et al., arXiv 2501.00070.
    """
    probabilities, walks = np.asarray(word_probabilities), np.asarray(walks)
    expected = (*walks.shape, graph.n_nodes)
    if probabilities.shape[-3:] != expected:
        raise ValueError(
            f"word_probabilities must end in [walk, token, node] = {expected}, not {probabilities.shape}"
        )
    return np.einsum("...wtn,wtn->...wt", probabilities, graph.adjacency[walks].astype(probabilities.dtype))


def _from_networkx(name: str, lattice: nx.Graph, positions: dict, words: Sequence[str]) -> Graph:
    """Graph whose nodes are numbered in the order of `positions`."""
    adjacency = nx.to_numpy_array(lattice, nodelist=list(positions), dtype=bool)
    return Graph(name, adjacency, np.array(list(positions.values())), tuple(words))


def _pair(edge: str | Sequence[str]) -> tuple[str, str]:
    parts = [part.strip() for part in edge.split("-")] if isinstance(edge, str) else list(edge)
    if len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise ValueError(f"edge {edge!r} is not a pair of words; write 'apple-bird' or ('apple', 'bird')")
    return parts[0], parts[1]


def _check_words(words: Sequence[str], n_nodes: int, name: str) -> None:
    repeated = sorted({word for word in words if list(words).count(word) > 1})
    if repeated:
        raise ValueError(f"{name}: each word may stand once; repeated: {' '.join(repeated)}")
    if words and len(words) != n_nodes:
        raise ValueError(
            f"{name} has {n_nodes} nodes and {len(words)} words were given; "
            "give one word a node, or change the size"
        )


def _check_sizes(what: str, **sizes: tuple[int, int]) -> None:
    for name, (value, least) in sizes.items():
        if value < least:
            raise ValueError(f"{what} needs {name} >= {least}, not {value}")
