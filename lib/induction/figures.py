"""Figures of studies 1 and 2. Each takes numbers, draws them and returns the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.linalg import orthogonal_procrustes

from lib.core import plots
from lib.core.labels import label_ends
from lib.core.statistics import Band, Estimate
from lib.induction import graph_figures
from lib.induction.geometry import dirichlet_energy, pca
from lib.induction.walks import Graph

LISTS = {"induction": plots.BLUE, "previous token": plots.VERMILLION}


def plane_axes(means: np.ndarray, graph: Graph) -> np.ndarray:
    """The PCA plane of word means [node, d], rotated or mirrored to match the drawn graph: axes [d, 2].

    Distances in it, and so the energy, are those of the plane.
    """
    plane, components, _ = pca(means)
    seen = np.isfinite(plane).all(1)
    drawn = graph.positions[seen] - graph.positions[seen].mean(0)
    return components.T @ orthogonal_procrustes(plane[seen], drawn)[0]


def on_axes(points: np.ndarray, means: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Points [..., d] on the axes [d, 2] of a plane of word means [node, d]: [..., 2]."""
    return (points - np.nanmean(means, axis=0)) @ axes


def draw_planes(axes: Sequence[Axes], planes: Mapping[str, np.ndarray], graph: Graph, words: bool) -> None:
    """Planes [node, 2] side by side with the graph's edges, titled by name and energy."""
    for ax, (name, plane) in zip(axes, planes.items(), strict=True):
        labels = None if words else ()
        graph_figures.draw_graph(ax, plane, graph, labels=labels, colour=graph_figures.node_colours(graph))
        title = f"{name}\nE = {dirichlet_energy(plane, graph):.2f}"
        ax.set_title(title, fontsize=8.5, fontweight="normal", loc="center")


def answer(
    length: int, intact: np.ndarray, curves: Mapping[str, Mapping[int, np.ndarray]],
    draws: np.ndarray, planes: Mapping[str, np.ndarray], graph: Graph, *, titles: Sequence[str],
) -> Figure:  # fmt: skip
    """Accuracy against context without the top heads of two lists, above three planes of word means.

    Args:
        length: of a walk (tokens).
        intact: accuracy in equal stretches of it [point].
        curves: name of the list -> number of heads -> accuracy [point].
        draws: accuracy of each random set [draw, point].
        planes: name -> [node, 2].
        titles: of the two panels, and of the planes together.
    """
    context = (np.arange(len(intact)) + 0.5) * length / len(intact)
    fig = plt.figure(figsize=(plots.PAGE, 5.6))
    top, bottom = fig.subfigures(2, 1, height_ratios=[1, 0.95])
    axes = top.subplots(1, 2, sharey=True)
    for ax, (name, of_list), title in zip(axes, curves.items(), titles, strict=False):
        ax.set(ylim=(0, 1), xlabel="context (tokens)")
        ax.plot(context, draws.T, color="0.75", linewidth=0.8)
        ax.plot(context, intact, color=plots.BLACK)
        ends = {"intact": (intact[-1], plots.BLACK)}
        for (k, curve), shade in zip(of_list.items(), plots.shades(LISTS[name], len(of_list)), strict=True):
            ax.plot(context, curve, color=shade)
            ends[f"{k}"] = curve[-1], LISTS[name]
        ends["random"] = draws[:, -1].mean(), "0.5"
        label_ends(ax, context[-1], ends, gap=0.065)
        ax.set_title(title, fontsize=8.5)
    axes[0].set_ylabel("rule-following accuracy")
    draw_planes(bottom.subplots(1, len(planes)), planes, graph, words=True)
    bottom.suptitle(titles[-1], x=0.01, ha="left", fontsize=8.5, fontweight="bold")
    return fig


def head_scores(scores: Mapping[str, np.ndarray], top: int) -> Figure:
    """Scores of every head [layer, head], on one scale; the `top` heads of each kind are ringed."""
    fig, axes = plt.subplots(1, len(scores), figsize=(plots.PAGE, 3.0), sharey=True)
    for ax, (name, values) in zip(axes, scores.items(), strict=True):
        image = plots.draw_head_scores(ax, values, top=0)
        layer, head = np.unravel_index(np.argsort(-values, axis=None)[:top], values.shape)
        ax.scatter(head, layer, s=9, facecolors="none", edgecolors=plots.VERMILLION, linewidths=0.7)
        ax.set(title=name, ylabel="layer" if ax is axes[0] else "")
        ax.invert_yaxis()
    fig.colorbar(image, ax=axes, label="mean attention")
    return fig


def energy_by_layer(
    energies: Mapping[str, Band], singles: np.ndarray, *, chance: float, layer: int, title: str
) -> Figure:  # fmt: skip
    """Energy in the plane at the input of every layer: bands over layouts, and the intact ones one by one.

    Args:
        energies: condition -> mean and interval over layouts [layer].
        singles: of the intact model [layout, layer].
        chance: mean of shuffled words.
        layer: that is shown elsewhere.
    """
    fig, ax = plt.subplots(figsize=(plots.PAGE, 3.2))
    x = np.arange(singles.shape[1])
    ax.set(title=title, xlabel="input of layer (the last: output of the last one)", ylabel="energy E")
    ax.set(ylim=(0, 1.05 * max(np.nanmax(singles), max(np.nanmax(band.high) for band in energies.values()))))
    ax.plot(x, singles.T, ".", color=plots.BLACK, markersize=2.5, alpha=0.35)
    ax.axvline(layer, color="0.85", linewidth=5, zorder=0)
    colours = (plots.BLACK, plots.BLUE, plots.VERMILLION, plots.GREY, plots.GREEN)
    plots.draw_bands(ax, x, energies, colours[: len(energies)], levels={"shuffled words": chance})
    return fig


def bigrams(
    plane: np.ndarray, pairs: np.ndarray, graph: Graph, lean: Mapping[str, np.ndarray], title: str
) -> Figure:
    """Mean activation of every word after every predecessor: fill is the word, border the word before.

    Args:
        plane: word means [node, 2], drawn large.
        pairs: means of a node after a node, row now * n_nodes + before [node * node, 2].
        lean: name -> in-betweenness of activations, drawn as distributions.
    """
    colours = graph_figures.node_colours(graph)
    fig, (ax, right) = plt.subplots(1, 2, figsize=(plots.PAGE, 3.5))
    graph_figures.draw_graph(ax, plane, graph, labels=(), colour=colours)
    seen = np.flatnonzero(np.isfinite(pairs).all(1))
    now, before = np.divmod(seen, graph.n_nodes)
    ax.scatter(*plane.T, s=110, c=colours, marker="s", zorder=2)
    ax.scatter(*pairs[seen].T, s=30, c=colours[now], edgecolors=colours[before], linewidths=1.6, zorder=3)
    low, high = np.nanmin(pairs, axis=0), np.nanmax(pairs, axis=0)
    centre, half = (low + high) / 2, 0.55 * (high - low).max()
    ax.set(xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] - half, centre[1] + half))
    ax.set_title("Words (squares), by the word before (dots)", fontsize=8.5)
    plots.draw_distributions(right, {name: values[np.isfinite(values)] for name, values in lean.items()})
    right.set(xticks=(-0.5, 0, 0.5, 1, 1.5), xlabel="in-betweenness (0 own mean, 1 the other's)")
    right.set_title(title, fontsize=8.5)
    return fig


def over_context(
    context: np.ndarray, energies: Mapping[int, np.ndarray], accuracy: Band, *, headless: np.ndarray,
    chance: float, titles: Sequence[str],
) -> Figure:  # fmt: skip
    """Energy at some layers, and accuracy, against context.

    Args:
        energies: layer -> mean over layouts [stretch].
        headless: the same at the last of these layers, without previous-token heads.
    """
    fig, (ax, right) = plt.subplots(1, 2, figsize=(plots.PAGE, 2.8))
    high = max(chance, *(np.nanmax(curve) for curve in (*energies.values(), headless)))
    ax.set(ylim=(0, 1.1 * high), ylabel="energy E")
    ends = {}
    for (layer, curve), shade in zip(energies.items(), plots.shades(plots.BLUE, len(energies)), strict=True):
        ax.plot(context, curve, "o-", color=shade)
        ends[f"layer {layer}"] = curve[-1], plots.BLUE
    ax.plot(context, headless, "s--", color=plots.VERMILLION)
    ends["no prev. heads"] = headless[-1], plots.VERMILLION
    plots.draw_level(ax, chance)
    label_ends(ax, context[-1], ends | {"shuffled": (chance, plots.GREY)})
    plots.draw_band(right, context, *accuracy, colour=plots.BLACK)
    right.set(ylim=(0, 1))
    right.set_ylabel("rule-following accuracy", labelpad=12)
    for axis, title in zip((ax, right), titles, strict=True):
        axis.set(xlabel="context (tokens)")
        axis.set_title(title, fontsize=8.5)
    return fig


def map_use(
    layers: Sequence[int], cost: Mapping[str, Band], turn_layers: Sequence[int], moved: Mapping[str, Band],
    titles: Sequence[str],
) -> Figure:  # fmt: skip
    """What removing parts of the word means costs, and what turning them moves, at some layers.

    Args:
        cost: part -> accuracy lost [layer], at an equal share of the variance.
        moved: part -> probability that moves to the neighbours of the node where the turn leads [layer]; may
            be empty.
        titles: of the two panels.
    """
    fig, (ax, right) = plt.subplots(1, 2, figsize=(plots.PAGE, 3.1))
    hues = {"grid": plots.BLUE, "shuffled grids": plots.GREY, "checkerboard": plots.VERMILLION,
            "everything": plots.BLACK}  # fmt: skip
    top = max(band.high.max() for band in cost.values())
    ax.set(ylim=(min(0, *(band.low.min() for band in cost.values())), 1.1 * top), ylabel="accuracy lost")
    plots.draw_bands(ax, np.array(layers), cost, [hues[name] for name in cost], marker="o")
    if moved:
        right.set(ylim=(0, 1.15 * max(band.high.max() for band in moved.values())))
    right.set_ylabel("probability moved", labelpad=12)
    plots.draw_bands(right, np.array(turn_layers), moved, [hues[name] for name in moved], marker="o")
    for axis, at, title in ((ax, layers, titles[0]), (right, turn_layers, titles[1])):
        axis.set(xlabel="input of layer", xticks=at)
        axis.set_title(title, fontsize=8.5)
    return fig


def writers(
    shares: Mapping[str, Mapping[str, Estimate]], hidden: Mapping[str, Estimate], chance: float,
    titles: Sequence[str],
) -> Figure:  # fmt: skip
    """Shares of the grid by the kind of part that wrote it, and the grid that is left by who reads heads.

    Args:
        shares: condition -> kind of part -> estimate.
        hidden: whom the heads' output is hidden from -> the grid's share of the variance; empty for none.
        chance: that share for words in no order.
        titles: of the two panels.
    """
    fig, (ax, right) = plt.subplots(1, 2, figsize=(plots.PAGE, 3.2), width_ratios=[1.5, 1])
    looks = zip(shares.items(), (plots.BLACK, plots.BLUE, plots.VERMILLION), "os^", strict=True)
    parts = list(next(iter(shares.values())))
    for i, ((condition, of_part), colour, marker) in enumerate(looks):
        value, low, high = np.array([of_part[part] for part in parts]).T
        rows = np.arange(len(parts)) + 0.22 * (i - 1)
        plots.draw_ranges(ax, rows, value, low, high, colour=colour, label=condition, marker=marker)
    ax.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.set(yticks=range(len(parts)), yticklabels=parts, xlabel="share of the grid")
    ax.invert_yaxis()
    ax.legend(fontsize=7.5, loc="lower right")
    if hidden:
        value, low, high = np.array(list(hidden.values())).T
        plots.draw_ranges(right, np.arange(len(hidden)), value, low, high, colour=plots.BLACK, label="")
        names = [f"from {name}" for name in hidden]
        right.set(yticks=range(len(hidden)), yticklabels=names, xlim=(0, 1.1 * max(chance, high.max())))
        right.axvline(chance, color=plots.GREY, linestyle=":", linewidth=1)
        right.set_xlabel("variance that is grid, what heads write hidden\n(dotted: words in no order)")
        right.invert_yaxis()
    for axis, title in ((ax, titles[0]), (right, titles[1])):
        axis.set_title(title, fontsize=8.5)
    return fig
