"""A graph of words, drawn at its places or at those that a model gives its words."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from lib.core.labels import place_labels
from lib.core.plots import BLUE, DIVERGING, GREEN, ORANGE, VERMILLION
from lib.induction.walks import Graph


def draw_graph(
    ax: Axes,
    positions: np.ndarray,
    graph: Graph,
    *,
    labels: Sequence[str] | None = None,
    values: np.ndarray | None = None,
    limit: float | None = None,
    colour: str | np.ndarray = BLUE,
) -> Axes:
    """Draw points with the graph's edges between them, such as class means in their PCA plane.

    Args:
        positions: [node, 2]; rows of NaN (words not seen) are left out and named below the axes.
        labels: text at the nodes; None for the graph's words, () for none. Words are told apart by
            place and label, not by hue.
        values: [node], colours the nodes on a diverging map symmetric about 0; negative ones are squares.
        limit: value at the ends of that map, None for the largest |value|. Give one to panels that
            are compared.
        colour: of all nodes, or of each [node, 3] (`node_colours`), without values.
    """
    positions = np.asarray(positions, dtype=np.float64)
    if positions.shape != (graph.n_nodes, 2):
        raise ValueError(f"positions must be [{graph.n_nodes}, 2] for {graph.name}, not {positions.shape}")
    labels = (graph.words if labels is None else labels) or [""] * graph.n_nodes
    if len(labels) != graph.n_nodes:
        raise ValueError(f"{len(labels)} labels for {graph.name} of {graph.n_nodes} nodes")
    seen = np.isfinite(positions).all(axis=1)
    edges = graph.edges[seen[graph.edges].all(axis=1)]
    ax.add_collection(LineCollection(positions[edges], colors="0.72", linewidths=1.0, zorder=1))
    if values is None:
        ax.scatter(
            *positions[seen].T, s=22, color=colour if isinstance(colour, str) else colour[seen], zorder=2
        )
    else:
        values, limit = np.asarray(values), np.abs(values).max() if limit is None else limit
        negative = values < -1e-6 * limit  # what is 0 but for rounding has no sign
        for marker, size, part in (("o", 90, seen & ~negative), ("s", 74, seen & negative)):
            ax.scatter(
                *positions[part].T,
                s=size,
                marker=marker,
                c=values[part],
                cmap=DIVERGING,
                vmin=-limit,
                vmax=limit,
                edgecolors="0.3",
                linewidths=0.6,
                zorder=2,
            )
    # One scale for both axes in a square frame, so that panels side by side are of one size.
    low, high = positions[seen].min(axis=0), positions[seen].max(axis=0)
    centre, half = (low + high) / 2, 0.65 * (high - low).max()
    ax.set(xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] - half, centre[1] + half))
    ax.set(aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    named = np.flatnonzero(seen & np.array([bool(label) for label in labels]))
    place_labels(ax, [labels[node] for node in named], positions[named], positions[edges],
                 radius=2.4 if values is None else 4.8)  # fmt: skip
    if not seen.all():
        absent = ", ".join(label or str(node) for node, label in enumerate(labels) if not seen[node])
        ax.set_xlabel(f"not seen: {absent}", fontsize=7.5, color=VERMILLION)
    return ax


def node_colours(graph: Graph) -> np.ndarray:
    """A colour for each node by where it is drawn, so that neighbours have like ones: RGB [node, 3].

    A mixture of four, one for each corner of the drawing.
    """
    low, high = graph.positions.min(0), graph.positions.max(0)
    x, y = ((graph.positions - low) / np.maximum(high - low, 1e-9)).T[..., None]
    blue, vermillion, green, orange = (
        np.array(mpl.colors.to_rgb(c)) for c in (BLUE, VERMILLION, GREEN, ORANGE)
    )
    return (1 - y) * ((1 - x) * blue + x * green) + y * ((1 - x) * vermillion + x * orange)
