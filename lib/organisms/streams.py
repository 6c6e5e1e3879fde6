"""Synthetic token streams on which `organism/induction` is trained; none is a walk on an undirected graph.

All functions return token ids [batch, length] and draw from the generator that they are given, so that a
batch is a function of (seed, step) alone.
"""

from __future__ import annotations

import numpy as np


def repeats(rng: np.random.Generator, batch: int, length: int, words: np.ndarray) -> np.ndarray:
    """Random sequences repeated with a period of 4 to length / 2 tokens.

    Two whole copies at least: otherwise a model can guess the offset from the
    length alone and needs no induction.
    """
    periods = rng.integers(4, length // 2 + 1, size=batch)
    tokens = rng.choice(words, size=(batch, length))
    positions = np.arange(length)[None] % periods[:, None]
    return np.take_along_axis(tokens, positions, axis=1)


def chains(
    rng: np.random.Generator, batch: int, length: int, words: np.ndarray, n_states: tuple[int, int] = (8, 28)
) -> np.ndarray:
    """Walks on sparse random directed graphs over random words, one graph a row.

    Every pair of states is oriented by a coin, every state keeps at most two to
    four of its outgoing edges, and each is equally likely. A state that is left
    without a successor (rare) is followed by a random state.
    """
    n_max = n_states[1]
    n = rng.integers(n_states[0], n_max + 1, size=batch)
    coin = np.triu(rng.random((batch, n_max, n_max)) < 0.5, 1)
    upper = np.triu(np.ones((n_max, n_max), dtype=bool), 1)
    edges = coin | (upper & ~coin).transpose(0, 2, 1)
    exists = np.arange(n_max)[None] < n[:, None]
    edges &= exists[:, :, None] & exists[:, None, :]
    # Keep the `degree` best of the outgoing edges under random scores.
    scores = np.where(edges, rng.random(edges.shape), -1.0)
    order = np.argsort(-scores, axis=2)
    degree = np.minimum(rng.integers(2, 5, size=(batch, n_max)), edges.sum(2))

    labels = rng.permuted(np.broadcast_to(words, (batch, len(words))), axis=1)[:, :n_max]
    rows = np.arange(batch)
    draws = rng.random((length, batch))
    state = rng.integers(0, n)
    out = np.empty((batch, length), dtype=np.int64)
    for t in range(length):
        out[:, t] = labels[rows, state]
        d = degree[rows, state]
        successor = order[rows, state, (draws[t] * np.maximum(d, 1)).astype(np.int64)]
        state = np.where(d > 0, successor, (draws[t] * n).astype(np.int64))
    return out


class TrigramLanguage:
    """Fixed language over word classes: class_t depends on class_{t-1}, class_{t-2}.

    Each pair of classes allows two next classes (probability .85 and .15); the
    word is uniform within its class. The rules are drawn once, from `seed`, and
    are the same for every model.
    """

    def __init__(self, words: np.ndarray, n_classes: int = 8, seed: int = 2026):
        assert len(words) % n_classes == 0, f"{len(words)} words do not divide into {n_classes} classes"
        rng = np.random.default_rng(seed)
        self.members = rng.permutation(words).reshape(n_classes, -1)  # [class, word]
        self.next = np.stack(
            [[rng.permutation(n_classes)[:2] for _ in range(n_classes)] for _ in range(n_classes)]
        )  # [class_{t-2}, class_{t-1}, 2]

    def sample(self, rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
        n_classes, size = self.members.shape
        classes = np.empty((batch, length), dtype=np.int64)
        classes[:, :2] = rng.integers(0, n_classes, size=(batch, 2))
        unlikely = (rng.random((batch, length)) < 0.15).astype(np.int64)
        for t in range(2, length):
            classes[:, t] = self.next[classes[:, t - 2], classes[:, t - 1], unlikely[:, t]]
        return self.members[classes, rng.integers(0, size, size=(batch, length))]
