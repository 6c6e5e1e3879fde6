"""Figures of appendix 1a. Each takes numbers, draws them and returns the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from lib.core import plots
from lib.core.statistics import Band, Estimate


def checks(panels: Mapping[str, Mapping[str, Mapping[str, Estimate]]], titles: Sequence[str]) -> Figure:
    """The same measures in several ways: quantity -> way -> set of heads -> estimate, a panel a quantity."""
    fig, axes = plt.subplots(1, len(panels), figsize=(plots.PAGE, 3.1), sharey=True)
    looks = ((plots.BLACK, "o"), (plots.VERMILLION, "s"), (plots.BLUE, "^"))
    names = list(next(iter(next(iter(panels.values())).values())))
    for ax, (quantity, ways), title in zip(axes, panels.items(), titles, strict=True):
        for i, ((way, of_way), (colour, marker)) in enumerate(zip(ways.items(), looks, strict=False)):
            rows = np.array([names.index(name) for name in of_way]) + 0.22 * (i - 1)
            value, low, high = np.array(list(of_way.values())).T
            plots.draw_ranges(ax, rows, value, low, high, colour=colour, label=way, marker=marker)
        ends = [x for of_way in ways.values() for estimate in of_way.values() for x in estimate]
        low, high = min(0, *ends), max(0, *ends)
        ax.set(xlabel=quantity, xlim=(low - 0.05 * (high - low) * (low < 0), high + 0.05 * (high - low)))
        ax.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        ax.set_title(title, fontsize=8.5)
    axes[0].set(yticks=range(len(names)), yticklabels=names)
    axes[0].invert_yaxis()
    return plots.draw_key(fig, axes[0])


def offsets(highest: np.ndarray, strongest: np.ndarray, titles: Sequence[str]) -> Figure:
    """The highest mean attention of any head by offset, and how many heads peak there.

    Args:
        highest: from offset 1 on [offset].
        strongest: offset of each head that has one, int [head].
        titles: of the two panels.
    """
    fig, (ax, right) = plt.subplots(1, 2, figsize=(plots.PAGE, 2.6))
    x = np.arange(1, len(highest) + 1)
    ax.plot(x, highest, color=plots.BLUE)
    ax.set(ylim=(0, 1.08), ylabel="highest mean attention of a head")
    counts = np.bincount(strongest, minlength=len(highest) + 1)[1 : len(highest) + 1]
    right.bar(x, counts, 0.9, color=plots.BLUE)
    right.set_ylabel("heads that peak here")
    high = max(counts.max(), 1)
    right.set_ylim(0, 1.15 * high)
    labelled: list[int] = []
    for offset in sorted(x[counts > 0], key=lambda offset: -counts[offset - 1]):
        if all(abs(offset - other) > 3 for other in labelled):
            labelled.append(offset)
            right.text(offset, counts[offset - 1] + 0.02 * high, str(offset), ha="center", fontsize=8)
    for axis, title in ((ax, titles[0]), (right, titles[1])):
        axis.set_xlabel("offset (tokens back)")
        axis.set_title(title, fontsize=8.5)
    return fig


def mixing(
    layers: Sequence[int], energies: Mapping[str, Band], decoded: Band, *, chance: float, guess: float,
    titles: Sequence[str],
) -> Figure:  # fmt: skip
    """Energies measured and predicted, and decoding of the previous word, at some layers.

    Args:
        energies: label -> value and interval [layer].
        decoded: share of activations [layer].
        chance: energy of shuffled words.
        guess: share that a guess among the neighbours gets.
        titles: of the two panels.
    """
    fig, (ax, right) = plt.subplots(1, 2, figsize=(plots.PAGE, 2.9))
    x = np.array(layers)
    ax.set(ylim=(0, 5.2), ylabel="energy E")
    hues = (plots.BLACK, plots.VERMILLION, plots.BLUE)
    plots.draw_bands(ax, x, energies, hues[: len(energies)], marker="o", levels={"shuffled": chance})
    right.set(ylim=(0, 1.05), ylabel="previous word decoded (share)")
    plots.draw_bands(right, x, {"decoded": decoded}, [plots.BLACK], marker="o", levels={"guess": guess})
    for axis, title in ((ax, titles[0]), (right, titles[1])):
        axis.set(xlabel="input of layer", xticks=layers)
        axis.set_title(title, fontsize=8.5)
    return fig


def length(context: np.ndarray, accuracy: Band, shorter: int, title: str) -> Figure:
    """Accuracy against context, with the length of the other walks as a line."""
    fig, ax = plt.subplots(figsize=(plots.PAGE, 2.4))
    plots.draw_band(ax, context, *accuracy, colour=plots.BLACK)
    ax.axvline(shorter, color=plots.GREY, linestyle=":", linewidth=1)
    ax.annotate("length of the other walks", (shorter, 0.06), (5, 0), textcoords="offset points",
                fontsize=8, color=plots.GREY)  # fmt: skip
    ax.set(
        ylim=(0, 1), xlim=(0, None), xlabel="context (tokens)", ylabel="rule-following accuracy", title=title
    )
    return fig
