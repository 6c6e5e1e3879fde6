"""Figures and tables of the appendices 1b and 2a. Each function draws numbers that a notebook has computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from lib import plots
from lib.geometry import PCA, dirichlet_energy
from lib.walks import Graph

Curve = tuple[np.ndarray, np.ndarray]  # x [point] and y [point], or y [point, draw]
HUES = (plots.BLUE, plots.VERMILLION, plots.GREEN)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns of text and of numbers with two digits; NaN is a dash."""
    cells = [list(header)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
    return "\n".join(lines)


# -- 2a: mixing ------------------------------------------------------------------------------------


def planes_figure(
    clouds: Mapping[str, np.ndarray], graphs: Graph | Sequence[Graph], *, title: str = "", most_labels: int = 16
) -> Figure:
    """A row of planes with the edges of their graph, the energy below each.

    Args:
        clouds: panel title -> points in their plane [node, 2].
        graphs: one for all planes, or one each.
        title: of the figure.
        most_labels: graphs with more nodes are drawn without words.
    """
    graphs = [graphs] * len(clouds) if isinstance(graphs, Graph) else graphs
    fig, axes = plt.subplots(1, len(clouds), figsize=(plots.PAGE, 1.1 * plots.PAGE / len(clouds) + 0.4))
    for ax, (name, points), graph in zip(axes, clouds.items(), graphs, strict=True):
        plots.draw_graph(ax, points, graph, labels=None if graph.n_nodes <= most_labels else ())
        ax.set_title(name, fontweight="normal" if title else "bold")
        ax.set_xlabel(f"E = {dirichlet_energy(points, graph):.2f}")
    if title:
        _set_title(fig, title)
    return fig


def gram_figure(simulated: np.ndarray, closed_form: np.ndarray, words: Sequence[str]) -> Figure:
    """Inner products [node, node] of one draw beside those of the closed form, on one scale."""
    fig, axes = plt.subplots(1, 2, figsize=(plots.PAGE, 3.1))
    limit = np.abs(closed_form).max()
    for ax, name, matrix in zip(axes, ("one draw", "closed form"), (simulated, closed_form), strict=True):
        image = plots.draw_matrix(ax, matrix, limit=limit, labels=words if ax is axes[0] else ())
        ax.set_title(name, fontweight="normal")
    fig.colorbar(image, ax=axes, shrink=0.9, label="inner product / d")
    _set_title(fig, "The inner products of a draw are those of the closed form")
    return fig


def harmonics_figure(
    patterns: np.ndarray, variance: np.ndarray, energy: np.ndarray, graph: Graph, *, title: str
) -> Figure:
    """Patterns [node, pattern] on the drawn graph, with the variance and the energy [pattern] of each."""
    fig, axes = plt.subplots(1, patterns.shape[1], figsize=(plots.PAGE, 2.0))
    for ax, pattern, v, e in zip(axes, patterns.T, variance, energy, strict=True):
        plots.draw_graph(ax, graph.positions, graph, labels=(), values=pattern - pattern.mean())
        ax.set_xlabel(f"variance {v:.2f}\nE = {e:.2f}")
    _set_title(fig, title)
    return fig


def spectrum_figure(simulated: np.ndarray, closed_form: np.ndarray, *, title: str) -> Figure:
    """Variance of each component, simulated [draw, component] and in closed form [component]."""
    order = np.arange(1, len(closed_form) + 1)
    fig, ax = plt.subplots(figsize=(plots.PAGE, 2.4))
    plots.draw_samples(ax, order, simulated.T, colour=plots.BLUE)
    ax.plot(order, closed_form, "x", color=plots.BLACK, zorder=4)
    ends = {"simulated": (simulated[:, -1].mean(), plots.BLUE), "× closed form": (closed_form[-1], plots.BLACK)}
    plots.label_ends(ax, order[-1], ends, gap=0.1)
    ax.set(title=title, xlabel="component", ylabel="variance / d", xticks=order)
    return fig


def competition_figure(
    graph: Graph, energy: Sequence[np.ndarray], variance: Sequence[np.ndarray], planes: Sequence[np.ndarray]
) -> Figure:
    """Which patterns PCA shows, with the word itself and without: their weights, and the plane they make.

    Args:
        graph: of the words; its two sides differ by marker and hue.
        energy: of the patterns by falling variance, with the word and without, [pattern] each.
        variance: of the same patterns.
        planes: [node, 2] each.
    """
    fig = plt.figure(figsize=(plots.PAGE, 2.5))
    titles = "Word and neighbours: smooth patterns win", "Neighbours alone: the checkerboard wins"
    sides = graph.parity if graph.is_bipartite else None
    for part, title, x, y, plane in zip(
        fig.subfigures(1, 2, wspace=0.04), titles, energy, variance, planes, strict=True
    ):
        ax, beside = part.subplots(1, 2)
        ax.plot(x[2:], y[2:], "o", color=plots.GREY)
        ax.plot(x[:2], y[:2], "s", color=plots.VERMILLION, markersize=6)
        ax.annotate("shown", (x[:2].mean(), y[:2].mean()), (0, -15), textcoords="offset points",
                    ha="center", fontsize=8, color=plots.VERMILLION)  # fmt: skip
        ax.set(xlabel="smooth  ←  pattern's E  →  rough", ylabel="variance / d")
        ax.set(xlim=(0, 7), ylim=(-0.05 * y[0], 1.1 * y[0]))
        plots.draw_graph(beside, plane, graph, labels=(), values=sides, limit=1.6)
        beside.set_xlabel(f"plane: E = {dirichlet_energy(plane, graph):.2f}")
        _set_title(part, title)
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
    if log:
        ax.set_xscale("log")
    plots.label_ends(ax, end, labels, gap=0.08)
    return fig


def _set_title(fig: Figure, title: str) -> None:
    fig.suptitle(title, x=0.01, ha="left", fontsize=9.5, fontweight="bold")


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "-"
    return value if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:.2f}"
