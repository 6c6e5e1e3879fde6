"""What sets of ablated heads leave of a model on the grid task, by name of the list and number of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from nnsight import TransformersModel

from lib.core import statistics
from lib.core.claims import Table
from lib.core.families import check_layer
from lib.core.families import shape as sizes_of
from lib.core.interventions import Condition
from lib.core.statistics import bootstrap_mean
from lib.core.sweeps import Sweep, ablation_sweep
from lib.induction import geometry
from lib.induction.texts import Texts
from lib.induction.walks import Graph, rule_following_accuracy


@dataclass(frozen=True)
class Ablations:
    """A sweep over sets of heads, read for one study. Every number is by layout, mean over random draws.

    Each method takes the name of a list and a number of heads, and of neither the intact model.

    Attributes:
        sweep: with class sums by node over the window.
        texts: that it read, one a layout.
        graph: of the walks.
        start: first token of the window.
    """

    sweep: Sweep
    texts: Texts
    graph: Graph
    start: int

    @cached_property
    def followed(self) -> np.ndarray:
        """Rule-following accuracy [condition, layout, position]."""
        nodes = self.texts.nodes[:, self.sweep.positions]
        return rule_following_accuracy(self.sweep.word_probabilities, nodes, self.graph)

    @property
    def late(self) -> np.ndarray:
        """Whether a position is in the window, bool [position]."""
        return self.sweep.positions >= self.start

    def members(self, name: str = "", k: int = 0) -> list[int]:
        """Conditions of a list with k heads, the random draws of a control."""
        return self.sweep.find(name, k) if k else self.sweep.find("baseline")

    def accuracy(self, name: str = "", k: int = 0) -> np.ndarray:
        """Accuracy over the window [layout]."""
        return self.followed[self.members(name, k)][..., self.late].mean((0, -1))

    def draws(self, name: str, k: int) -> np.ndarray:
        """Accuracy over the window of each random draw, mean over layouts [draw]."""
        return self.followed[self.members(name, k)][..., self.late].mean((1, -1))

    def within(self, name: str = "", k: int = 0) -> np.ndarray:
        """The neighbours' share of the probability of all words, over the window [layout]."""
        rows = self.members(name, k)
        share = self.followed[rows] / self.sweep.word_probabilities[rows].sum(-1)
        return share[..., self.late].mean((0, -1))

    def rise(self, name: str = "", k: int = 0) -> np.ndarray:
        """Accuracy over the window minus that over the second tenth of the walk [layout]."""
        length, at = self.texts.nodes.shape[1], self.sweep.positions
        early = (at >= length // 10) & (at < length // 5)
        return self.accuracy(name, k) - self.followed[self.members(name, k)][..., early].mean((0, -1))

    def curve(self, name: str = "", k: int = 0, n: int = 8) -> np.ndarray:
        """Accuracy in n equal stretches of the walk, mean over layouts, of each draw [draw, stretch]."""
        marks = np.linspace(0, self.texts.nodes.shape[1], n + 1)
        place = np.digitize(self.sweep.positions, marks) - 1
        rows = self.followed[self.members(name, k)]
        return np.stack([rows[..., place == b].mean((1, -1)) for b in range(n)], axis=1)

    def curve_by(self, cuts: Sequence[int]) -> np.ndarray:
        """Accuracy of the intact model between cuts of the walk [text, stretch]."""
        place = np.digitize(self.sweep.positions, cuts) - 1
        rows = self.followed[self.members()[0]]
        return np.stack([rows[:, place == b].mean(1) for b in range(len(cuts) - 1)], axis=1)

    def means(self, name: str = "", k: int = 0) -> np.ndarray:
        """Word means over the window, of the first draw [layout, layer, node, d_model]."""
        return self.sweep.select(self.members(name, k)[:1]).class_means(per_sequence=True)[0]

    def energies(self, name: str = "", k: int = 0) -> np.ndarray:
        """Energy of the word means in their plane [layout, layer]."""
        sets = self.sweep.select(self.members(name, k)).class_means(per_sequence=True)
        return geometry.plane_energies(sets, self.graph).mean(0)

    def table(
        self, names: Sequence[str], ks: Sequence[int], published: Mapping, n_heads: int, most: int
    ) -> Table:
        """Accuracy with its interval over layouts, within the words, and as published at a like share.

        Args:
            names: of lists.
            ks: numbers of heads.
            published: arditi-26 of data/published.json.
            n_heads: of this model.
            most: number of heads up to which the published shares go.
        """
        shares = np.array(published["ablated_heads"]) / published["n_heads"]
        rows = [["", *(f"k = {k}" for k in ks)]]
        for name in names:
            llama = published[f"accuracy_{name.replace(' ', '_')}_ablated"]
            near = [np.abs(shares - k / n_heads).argmin() for k in ks]
            rows.append([name, *(f"{bootstrap_mean(self.accuracy(name, k)):.2f}" for k in ks)])
            rows.append(["within the words", *(f"{self.within(name, k).mean():.2f}" for k in ks)])
            rows.append(
                [
                    "Llama-3.1-8B",
                    *(f"{llama[i]:.2f}" if k <= most else "" for i, k in zip(near, ks, strict=True)),
                ]
            )
        return Table(rows)


def layer_of_the_map(
    model: TransformersModel, texts: Texts, graph: Graph, start: int, asked: int, **options
) -> int:
    """The layer at whose input word means are shown: the one asked for, or that of the clearest map.

    The clearest map has the lowest energy, in the median over these texts, of the layers from the middle on.

    Args:
        texts: of layouts that nothing else is measured on.
        start: first token of the window.
        asked: a layer, or -1.
        options: of `ablation_sweep`.

    Raises:
        ModelError: a layer that the model does not have.
    """
    if asked >= 0:
        check_layer(model, asked)
        return asked
    sweep = ablation_sweep(
        model, texts.ids, [Condition("baseline")], word_ids=texts.words, labels=texts.within(start),
        positions=[texts.nodes.shape[1] - 1], n_classes=graph.n_nodes, n_prefix=texts.n_prefix, **options,
    )  # fmt: skip
    energies = geometry.plane_energies(sweep.class_means(per_sequence=True)[0], graph)  # [text, layer]
    half = sizes_of(model).n_layers // 2
    return half + int(np.median(energies, axis=0)[half:-1].argmin())


def stretches(texts: Texts, cuts: Sequence[int], start: int, n_nodes: int) -> np.ndarray:
    """Labels that count the window, and each stretch between cuts, apart: [1 + stretch, text, token].

    Node i of group g is class g * n_nodes + i, -1 outside of it.
    """
    groups = [texts.within(start), *(texts.within(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True))]
    return np.stack([np.where(group < 0, -1, group + i * n_nodes) for i, group in enumerate(groups)])


def layout_means(sweep: Sweep, n_layouts: int, n_groups: int) -> np.ndarray:
    """Word means over all walks of a layout [condition, layout, layer, group, node, d_model].

    Args:
        sweep: over texts of which those of a layout stand together, with labels of `stretches`.
        n_groups: of those labels.
    """
    sums, counts = sweep.class_sums, sweep.class_counts
    n_nodes, d_model = sums.shape[-2] // n_groups, sums.shape[-1]
    shape = (len(sums), n_layouts, -1, len(sweep.layers), n_groups, n_nodes, d_model)
    counts = counts.reshape(n_layouts, -1, n_groups, n_nodes).sum(1)
    return statistics.means_of(sums.reshape(shape).sum(2), counts[:, None])


def leaning(stream: np.ndarray, nodes: np.ndarray, targets: np.ndarray, n_nodes: int) -> np.ndarray:
    """In-betweenness of the second half of some activations, between word means of the first half.

    Args:
        stream: activations of each text [text, token, d].
        nodes: word of each [text, token].
        targets: the other word, -1 for none [text, token].

    Returns:
        [text, token of the second half], see `lib.induction.geometry.in_betweenness`.
    """
    half = nodes.shape[1] // 2
    found = []
    for x, own, other in zip(stream, nodes, targets, strict=True):
        means = geometry.class_means(x[None, :half], own[None, :half], n_nodes)
        found.append(geometry.in_betweenness(x[half:], own[half:], other[half:], means))
    return np.stack(found)
