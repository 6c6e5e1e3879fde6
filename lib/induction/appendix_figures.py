"""Figures and tables of appendices 1b and 2a. Each takes numbers that a notebook has computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from lib.core import plots
from lib.core.labels import label_ends
from lib.induction import graph_figures
from lib.induction.geometry import dirichlet_energy
from lib.induction.walks import Graph

Curve = tuple[np.ndarray, np.ndarray]  # settings [point], energies [point, draw]
Interval = tuple[np.ndarray, np.ndarray, np.ndarray]  # middle, low and high, each [point]
HUES = (plots.BLUE, plots.VERMILLION, plots.GREEN)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns of text and of numbers with two digits; NaN is a dash."""
    cells = [list(header)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
    return "\n".join(lines)


def set_title(fig: Figure | SubFigure, title: str) -> None:
    """One title for all panels of a figure, at its left as that of a panel."""
    fig.suptitle(title, x=0.01, ha="left", fontsize=9.5, fontweight="bold")


# -- 2a: mixing ------------------------------------------------------------------------------------


def planes_figure(
    clouds: Mapping[str, np.ndarray],
    graphs: Graph | Sequence[Graph],
    *,
    title: str = "",
    most_labels: int = 16,
) -> Figure:
    """A row of planes with the edges of their graph, the energy below each.

    Args:
        clouds: panel title -> points in their plane [node, 2].
        graphs: one for all planes, or one each.
        title: of the figure.
    """
    graphs = [graphs] * len(clouds) if isinstance(graphs, Graph) else graphs
    fig, axes = plt.subplots(1, len(clouds), figsize=(plots.PAGE, 1.1 * plots.PAGE / len(clouds) + 0.4))
    for ax, (name, points), graph in zip(axes, clouds.items(), graphs, strict=True):
        graph_figures.draw_graph(ax, points, graph, labels=None if graph.n_nodes <= 16 else ())
        ax.set_title(name, fontweight="normal" if title else "bold")
        ax.set_xlabel(f"E = {dirichlet_energy(points, graph):.2f}")
    if title:
        set_title(fig, title)
    return fig


def gram_figure(simulated: np.ndarray, closed_form: np.ndarray, words: Sequence[str]) -> Figure:
    """Inner products [node, node] of one draw beside those of the closed form, on one scale."""
    fig, axes = plt.subplots(1, 2, figsize=(plots.PAGE, 3.1))
    limit = np.abs(closed_form).max()
    for ax, name, matrix in zip(axes, ("one draw", "closed form"), (simulated, closed_form), strict=True):
        image = plots.draw_matrix(ax, matrix, limit=limit, labels=words if ax is axes[0] else ())
        ax.set_title(name, fontweight="normal")
    fig.colorbar(image, ax=axes, shrink=0.9, label="inner product / d")
    set_title(fig, "The inner products of a draw are those of the closed form")
    return fig


def harmonics_figure(
    patterns: np.ndarray, variance: np.ndarray, energy: np.ndarray, graph: Graph, *, title: str
) -> Figure:
    """Patterns [node, pattern] on the drawn graph, with the variance and the energy [pattern] of each."""
    fig, axes = plt.subplots(1, patterns.shape[1], figsize=(plots.PAGE, 1.8))
    for ax, pattern, v, e in zip(axes, patterns.T, variance, energy, strict=True):
        graph_figures.draw_graph(ax, graph.positions, graph, labels=(), values=pattern - pattern.mean())
        ax.set_xlabel(f"variance {v:.2f}\nE = {e:.2f}")
    set_title(fig, title)
    return fig


def spectrum_figure(simulated: np.ndarray, closed_form: np.ndarray, *, title: str) -> Figure:
    """Variance of each component, simulated [draw, component] and in closed form [component]."""
    order = np.arange(1, len(closed_form) + 1)
    fig, ax = plt.subplots(figsize=(plots.PAGE, 2.4))
    plots.draw_samples(ax, order, simulated.T, colour=plots.BLUE)
    ax.plot(order, closed_form, "x", color=plots.BLACK, zorder=4)
    for height, text, colour in ((0.9, "line: 20 draws", plots.BLUE), (0.78, "×: closed form", plots.BLACK)):
        ax.text(0.98, height, text, color=colour, transform=ax.transAxes, ha="right", fontsize=8)
    ax.set(title=title, xlabel="component", ylabel="variance / d", xticks=order)
    return fig


class Competition(NamedTuple):
    """The two heaviest patterns of a mixed graph, and the plane that they make."""

    patterns: np.ndarray  # [node, pattern]
    variance: np.ndarray  # [pattern]
    plane: np.ndarray  # of one draw [node, 2]


def competition_figure(graph: Graph, outcomes: Mapping[str, Competition]) -> Figure:
    """For each outcome, two patterns on the drawn graph and the plane, whose nodes the first one colours."""
    fig = plt.figure(figsize=(plots.PAGE, 2.15))
    parts = np.atleast_1d(fig.subfigures(1, len(outcomes), wspace=0.03))
    for part, (title, found) in zip(parts, outcomes.items(), strict=True):
        *axes, beside = part.subplots(1, 3, width_ratios=[1, 1, 1.55])
        for number, ax in enumerate(axes):
            pattern = found.patterns[:, number]
            energy = dirichlet_energy(pattern[:, None], graph)
            graph_figures.draw_graph(ax, graph.positions, graph, labels=(), values=pattern)
            ax.set_xlabel(f"variance {found.variance[number]:.2f}\nE = {energy:.2f}")
            ax.set_title(("1st pattern", "2nd pattern")[number], fontweight="normal", fontsize=8.5)
        graph_figures.draw_graph(beside, found.plane, graph, labels=(), values=found.patterns[:, 0])
        beside.set_title("their plane", fontweight="normal", fontsize=8.5)
        beside.set_xlabel(f"E = {dirichlet_energy(found.plane, graph):.2f}")
        set_title(part, title)
    return fig


def energy_figure(
    simulated: Mapping[str, Curve],
    predicted: Sequence[tuple[str, np.ndarray, np.ndarray]],
    *,
    title: str,
    xlabel: str,
    levels: Mapping[str, float],
    log: bool = False,
) -> Figure:
    """Energy of the plane against one setting of the toy.

    Args:
        simulated: label -> (setting [point], energies [point, draw]).
        predicted: (label, setting [point], energy [point]) of the closed form; a label may be empty.
        title, xlabel: of the axes.
        levels: label -> height of a dotted line.
        log: whether the settings lie on a logarithmic axis.
    """
    fig, ax = plt.subplots(figsize=(plots.PAGE, 2.7))
    end, labels = max(np.max(x) for x, _ in simulated.values()), {}
    for (name, (x, draws)), colour, marker in zip(simulated.items(), HUES, plots.MARKERS, strict=False):
        plots.draw_samples(ax, x, draws, colour=colour, marker=marker)
        labels[name] = draws[-1].mean(), colour
    for name, x, y in predicted:
        plots.draw_prediction(ax, x, y)
        labels |= {name: (y[-1], plots.BLACK)} if name else {}
    for name, height in levels.items():
        plots.draw_level(ax, height)
        labels[name] = height, plots.GREY
    ax.set(title=title, xlabel=xlabel, ylabel="energy E of the plane", ylim=(0, None))
    ax.set_ylim(0, 1.06 * ax.get_ylim()[1])
    if log:
        ax.set_xscale("log")
        ax.set_xlim(right=1.06 * end)
    else:
        ax.set_xlim(right=end + 0.012 * (end - ax.get_xlim()[0]))
    label_ends(ax, end, labels, gap=0.08)
    return fig


# -- 1b: an embedded model -------------------------------------------------------------------------


def heads_figure(previous: np.ndarray, induction: np.ndarray, highest: np.ndarray, *, title: str) -> Figure:
    """Two scores of every head [layer, head], and the strongest head's mean attention by offset [offset]."""
    fig, axes = plt.subplots(1, 3, figsize=(plots.PAGE, 2.4), width_ratios=[1, 1, 1.35])
    for ax, name, scores in zip(axes, ("previous token", "induction"), (previous, induction), strict=False):
        image = plots.draw_head_scores(ax, scores, top=int((scores >= 0.1).sum()))
        ax.set_title(name, fontweight="normal")
    axes[1].set_ylabel("")
    fig.colorbar(image, ax=axes[:2], label="mean attention", aspect=30)
    right, offsets = axes[2], np.arange(1, len(highest))
    right.plot(offsets, highest[1:], color=plots.BLUE)
    peaks = offsets[highest[1:] > 0.3]
    for group in np.split(peaks, np.flatnonzero(np.diff(peaks) > 1) + 1):
        place = group[-1], highest[group].max()
        right.annotate(", ".join(map(str, group)), place, (4, -3), textcoords="offset points", fontsize=8)
    right.set(xlabel="tokens back", ylim=(0, 1.08))
    right.set_title("strongest head at each offset", fontweight="normal")
    set_title(fig, title)
    return fig


def context_figure(context: np.ndarray, curves: Mapping[str, Interval], *, title: str) -> Figure:
    """Accuracy against context: label -> (middle, low, high), each [point]; five lines at most."""
    fig, ax = plt.subplots(figsize=(plots.PAGE, 2.9))
    ax.set(title=title, xlabel="context (tokens)", ylabel="rule-following accuracy", ylim=(0, 1))
    ax.set_xlim(0, 1.01 * context[-1])
    hues = (plots.BLACK, plots.SKY, plots.BLUE, plots.ORANGE, plots.VERMILLION)
    plots.draw_bands(ax, context, curves, hues[: len(curves)])
    return fig


def ablation_figure(
    k: Sequence[int], curves: Mapping[str, np.ndarray], draws: np.ndarray,
    published: Mapping[str, Sequence[float]], *, titles: tuple[str, str],
) -> Figure:  # fmt: skip
    """Accuracy against the number of ablated heads, here and in Llama-3.1-8B.

    Args:
        k: numbers of heads, 0 first.
        curves: list -> accuracy [walk, k].
        draws: accuracy without random heads [k but 0, draw].
        published: of data/published.json.
        titles: of the two panels.
    """
    fig, (ax, right) = plt.subplots(1, 2, figsize=(plots.PAGE, 2.8), sharey=True)
    ax.set(ylim=(0, 1), ylabel="rule-following accuracy", xlabel="heads ablated (of 40)")
    ends: tuple[dict, dict] = {}, {}
    for name, colour, marker in (("induction", plots.BLUE, "o"), ("previous token", plots.VERMILLION, "s")):
        llama = published[f"accuracy_{name.replace(' ', '_')}_ablated"]
        for panel, values, labels in ((ax, curves[name].mean(0), ends[0]), (right, llama, ends[1])):
            plots.draw_series(panel, range(len(values)), values, "", colour, style=f"{marker}-")
            labels[name] = values[-1], colour
    ax.plot(range(1, len(k)), draws, "^", color=plots.GREY, markersize=3.5)
    ax.plot(range(1, len(k)), draws.mean(1), color=plots.GREY, linestyle="--", linewidth=1)
    label_ends(ax, len(k) - 1, ends[0] | {"random": (draws[-1].mean(), plots.GREY)})
    random_32 = published["accuracy_random_32_ablated"]
    right.plot(len(llama) - 1, random_32, "^", color=plots.GREY)
    label_ends(right, len(llama) - 1, ends[1] | {"random": (random_32, plots.GREY)})
    ax.set(title=titles[0], xticks=range(len(k)), xticklabels=k)
    right.set(title=titles[1], xlabel="heads ablated (of 1,024)", xticks=range(len(llama)))
    right.set_xticklabels(published["ablated_heads"])
    return fig


def layers_figure(energy: np.ndarray, bands: Mapping[str, Interval], *, chance: float, title: str) -> Figure:
    """Energy of the plane at every layer: dots of the intact model, lines with bands of each condition.

    Args:
        energy: of the intact model [layout, layer].
        bands: condition -> (middle, low, high), each [layer]; the intact model first.
        chance: energy of words at random positions.
    """
    fig, ax = plt.subplots(figsize=(plots.PAGE, 3.1))
    layers = np.arange(energy.shape[1])
    ax.set(title=title, xlabel="input of layer (the last: output of the model)", xticks=layers)
    ax.set(ylabel="energy E of the plane", ylim=(0, 1.05 * np.nanmax(energy)), xlim=(-0.25, layers[-1] + 0.2))
    jitter = np.linspace(-0.12, 0.12, len(energy))[:, None]
    ax.plot((layers + jitter).T, energy.T, ".", color="0.6", markersize=3)
    hues = (plots.BLACK, plots.BLUE, plots.VERMILLION, plots.GREEN)[: len(bands)]
    plots.draw_bands(ax, layers, bands, hues, marker="o", levels={"chance": chance})
    return fig


def sides_figure(planes: Mapping[str, np.ndarray], graph: Graph, *, title: str) -> Figure:
    """Planes [node, 2] whose nodes show the two sides of a bipartite graph by marker and hue."""
    fig, axes = plt.subplots(1, len(planes), figsize=(plots.PAGE, 2.4))
    for ax, (name, plane) in zip(np.atleast_1d(axes), planes.items(), strict=True):
        _draw_sides(ax, plane, graph)
        ax.set_title(name, fontweight="normal")
    set_title(fig, title)
    return fig


def emergence_figure(
    steps: Sequence[int], curves: Mapping[str, np.ndarray], phases: Mapping[int, str],
    plane: np.ndarray, graph: Graph, *, titles: tuple[str, str],
) -> Figure:  # fmt: skip
    """What is there at each training step, beside the plane of the trained model.

    Args:
        steps: of the checkpoints; the axis is their square root, so that the early ones can be told apart.
        curves: label -> share of what is possible [checkpoint].
        phases: first step -> what the training texts are from there on.
        plane: of the word means [node, 2].
        graph: of the walks.
        titles: of the two panels.
    """
    fig, (ax, right) = plt.subplots(1, 2, figsize=(plots.PAGE, 3.0), width_ratios=[2.3, 1])
    last = max(steps, default=1)
    ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    ax.set(xlim=(0, 1.02 * last), ylim=(0, 1.25), xlabel="training step (square-root axis)", title=titles[0])
    ax.set(ylabel="share of what is possible", yticks=np.linspace(0, 1, 6))
    hues = (plots.VERMILLION, plots.BLUE, plots.SKY, plots.BLACK)
    for (name, values), colour, marker in zip(curves.items(), hues, "so^D", strict=False):
        ax.plot(steps, values, color=colour, marker=marker, label=name)
    if len(steps):
        label_ends(ax, steps[-1], {n: (v[-1], c) for (n, v), c in zip(curves.items(), hues, strict=False)})
    starts = [step for step in phases if step < last]
    for start, end in zip(starts, [*starts[1:], last], strict=True):
        middle = ((np.sqrt(start) + np.sqrt(end)) / 2) ** 2
        ax.axvline(start, color="0.8", linewidth=0.8, zorder=0)
        ax.text(middle, 1.23, phases[start], ha="center", va="top", fontsize=7.5, color="0.35")
    ax.set_xticks([0, *starts[1:], last])
    _draw_sides(right, plane, graph)
    right.set_title(titles[1])
    return fig


def length_figure(context: np.ndarray, band: Interval, trained: int, *, title: str) -> Figure:
    """Accuracy (middle, low, high) [point] against context, with the longest text of the training."""
    fig, ax = plt.subplots(figsize=(plots.PAGE, 2.3))
    plots.draw_band(ax, context, *band, marker="")
    ax.axvline(trained, color=plots.GREY, linestyle=":")
    ax.text(trained + 8, 0.06, "longest training text", color=plots.GREY, fontsize=8)
    ax.set(title=title, xlabel="context (tokens)", ylabel="accuracy", ylim=(0, 1), xlim=(0, None))
    return fig


def _draw_sides(ax: Axes, plane: np.ndarray, graph: Graph) -> None:
    sides = graph.parity if graph.is_bipartite else None
    graph_figures.draw_graph(ax, plane, graph, labels=(), values=sides, limit=1.6)
    ax.set_xlabel(f"E = {dirichlet_energy(plane, graph):.2f}")


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "-"
    return value if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:z.2f}"
