"""Walks as texts that a model reads, a placing of the words on the graph for each."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from nnsight import TransformersModel

from lib.core.families import check_length
from lib.core.tokens import with_bos, word_ids
from lib.induction.walks import Graph, layouts, random_walks


class Texts(NamedTuple):
    """Walks on one graph, each with its words dealt to the nodes in its own way (its layout).

    Attributes:
        layouts: the word at each node, int [text, node].
        nodes: where the walk is at each token, int [text, token].
        words: token id of the word at each node, int [text, node].
        ids: what the model reads, int64 [text, prefix + token].
        n_prefix: tokens that open the text and are not measured, 0 or 1.
    """

    layouts: np.ndarray
    nodes: np.ndarray
    words: np.ndarray
    ids: torch.Tensor
    n_prefix: int

    def placed(self, graph: Graph, text: int) -> Graph:
        """The graph with the words of a text at its nodes."""
        return replace(graph, words=tuple(graph.words[word] for word in self.layouts[text]))

    def within(self, first: int, last: int | None = None) -> np.ndarray:
        """`nodes` between two tokens, and -1 elsewhere: labels that count a stretch alone [text, token]."""
        inside = np.zeros(self.nodes.shape[1], dtype=bool)
        inside[first:last] = True
        return np.where(inside, self.nodes, -1)


def deal(
    model: TransformersModel, graph: Graph, length: int, *, first: int, n: int, seed: int, walk_seed: int,
    bos: str = "auto", per_layout: int = 1, window: int = 0,
) -> Texts:  # fmt: skip
    """Texts of the layouts `first` to `first + n`, with fresh walks.

    Args:
        model: its tokenizer decides.
        graph: with its words; layout 0 is their given order.
        length: tokens of a walk.
        seed: of the layouts (`lib.induction.walks.layouts`), so that two calls mean the same layouts.
        walk_seed: of the walks.
        bos: what opens a text, see `lib.core.tokens.bos_id`.
        per_layout: walks of each layout, one after the other.
        window: last tokens, in which the walks of a layout together must meet every word; 0 asks for nothing.

    Raises:
        ModelError: words that are no single tokens. ValueError: texts longer than the model's positions, a
            window without one of the words.
    """
    placed = np.repeat(layouts(graph.n_nodes, first + n, seed)[first:], per_layout, axis=0)
    nodes = random_walks(graph, len(placed), length, walk_seed)
    for i, met in enumerate(nodes[:, length - window :].reshape(n, -1) if window else ()):
        if missing := sorted(set(range(graph.n_nodes)) - set(met.tolist())):
            raise ValueError(
                f"window: the last {window} tokens of layout {first + i} miss {len(missing)} of "
                f"{graph.n_nodes} words, which then have no mean; take a longer window"
            )
    words = np.array(word_ids(model, graph.words))[placed]
    ids = with_bos(model, np.take_along_axis(words, nodes, axis=1), bos)
    check_length(model, ids.shape[1])
    return Texts(placed, nodes, words, ids, ids.shape[1] - length)
