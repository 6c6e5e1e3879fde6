"""Figures and tables of appendices 1b and 2a. Each takes numbers that a notebook has computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure, SubFigure

from lib import plots
from lib.geometry import dirichlet_energy
from lib.walks import Graph

Curve = tuple[np.ndarray, np.ndarray]  # x [point] and y [point], or y [point, draw]
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
        plots.draw_graph(ax, points, graph, labels=None if graph.n_nodes <= 16 else ())
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
        plots.draw_graph(ax, graph.positions, graph, labels=(), values=pattern - pattern.mean())
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
            plots.draw_graph(ax, graph.positions, graph, labels=(), values=pattern)
            ax.set_xlabel(f"variance {found.variance[number]:.2f}\nE = {energy:.2f}")
            ax.set_title(("1st pattern", "2nd pattern")[number], fontweight="normal", fontsize=8.5)
        plots.draw_graph(beside, found.plane, graph, labels=(), values=found.patterns[:, 0])
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
    plots.label_ends(ax, end, labels, gap=0.08)
    return fig


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "-"
    return value if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:z.2f}"
