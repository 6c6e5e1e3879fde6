"""House style and the figures that studies share.

Every function takes an axes, draws on it and returns it; none knows a study.
Hues are Okabe & Ito's, told apart by all common kinds of colour vision; what
has more kinds than hues is told apart by position and label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.image import AxesImage

from lib.walks import Graph

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, GREY, BLACK = "#CC79A7", "#56B4E9", "#7F7F7F", "#000000"
DIVERGING = "RdBu_r"  # always symmetric about 0
SEQUENTIAL = "cividis"
PAGE = 7.0  # figure width in inches, 700 px on a page


def use_house_style() -> None:
    """Set matplotlib's defaults: opaque, legible at 700 px, and equal bytes for an equal figure."""
    mpl.rcParams.update({
        "figure.figsize": (PAGE, 3.2),
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "figure.facecolor": "white",
        "axes.facecolor": "white",
        "savefig.facecolor": "white",
        "savefig.transparent": False,
        "savefig.dpi": 200,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same figure everywhere
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": mpl.cycler(color=[BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK]),
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
        "image.cmap": SEQUENTIAL,
        "svg.hashsalt": "latent-geometry",
        "svg.fonttype": "path",
    })


def draw_graph(
    ax: Axes,
    positions: np.ndarray,
    graph: Graph,
    *,
    labels: Sequence[str] | None = None,
    values: np.ndarray | None = None,
    limit: float | None = None,
    colour: str = BLUE,
) -> Axes:
    """Draw points with the graph's edges between them, such as class means in their PCA plane.

    Args:
        positions: [node, 2]; rows of NaN (words not seen) are left out and named below the axes.
        labels: text at the nodes; None for the graph's words, () for none. Words are told apart by
            place and label, not by hue.
        values: [node], colours the nodes on a diverging map symmetric about 0.
        limit: value at the ends of that map, None for the largest |value|. Give one to panels that
            are compared.
        colour: of all nodes, without values.
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
        ax.scatter(*positions[seen].T, s=22, color=colour, zorder=2)
    else:
        limit = np.abs(values).max() if limit is None else limit
        ax.scatter(*positions[seen].T, s=90, c=np.asarray(values)[seen], cmap=DIVERGING, vmin=-limit,
                   vmax=limit, edgecolors="0.3", linewidths=0.6, zorder=2)
    # One scale for both axes in a square frame, so that panels side by side are of one size.
    low, high = positions[seen].min(axis=0), positions[seen].max(axis=0)
    centre, half = (low + high) / 2, 0.65 * (high - low).max()
    ax.set(xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] - half, centre[1] + half))
    ax.set(aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    for node in np.flatnonzero(seen):
        _label_outwards(ax, labels[node], positions[node], centre, distance=5 if values is None else 7)
    if not seen.all():
        absent = ", ".join(label or str(node) for node, label in enumerate(labels) if not seen[node])
        ax.set_xlabel(f"not seen: {absent}", fontsize=7.5, color=VERMILLION)
    return ax


def draw_band(
    ax: Axes,
    x: np.ndarray,
    middle: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    colour: str = BLUE,
    label: str = "",
    marker: str = "o",
) -> Axes:
    """A line with a band from low to high; the caption says which interval the band is.

    The label stands at the line's right end, in its colour.
    """
    ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    ax.plot(x, middle, color=colour, marker=marker)
    return label_end(ax, x, middle, label, colour=colour)


def draw_samples(
    ax: Axes, x: np.ndarray, samples: np.ndarray, *, colour: str = BLUE, label: str = ""
) -> Axes:
    """Mean of samples [point, sample] at each x, with a band that holds the central 95% of them."""
    low, high = np.quantile(samples, [0.025, 0.975], axis=1)
    return draw_band(ax, x, np.mean(samples, axis=1), low, high, colour=colour, label=label)


def draw_ranges(
    ax: Axes, y: np.ndarray, middle: np.ndarray, low: np.ndarray, high: np.ndarray, *, colour: str, label: str
) -> Axes:
    """Points with horizontal bars from low to high, one a row; the caption says which interval they are."""
    ax.hlines(y, low, high, color=colour, linewidth=1.4)
    ax.plot(middle, y, "o", color=colour, label=label)
    return ax


def draw_bands(
    ax: Axes, x: np.ndarray, bands: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    colours: Sequence[str], *, marker: str = "",
) -> Axes:
    """Several lines with bands: label -> (middle, low, high), labelled at their right ends without overlap.

    Points that were not measured are NaN; a line with fewer than two others is left out. Set the limits of
    the y axis first: the labels are spread over it.
    """
    ends = {}
    for (name, (middle, low, high)), colour in zip(bands.items(), colours, strict=True):
        seen = np.isfinite(middle)
        if seen.sum() > 1:
            draw_band(ax, x[seen], middle[seen], low[seen], high[seen], colour=colour, marker=marker)
            ends[name] = (middle[seen][-1], colour)
    return label_ends(ax, x[-1], ends)


def draw_series(ax: Axes, x: np.ndarray, y: np.ndarray, label: str, colour: str = BLUE) -> Axes:
    """Points joined by a line, labelled at the right end, for values without an interval."""
    ax.plot(x, y, "o-", color=colour)
    return label_end(ax, x, y, label, colour=colour)


def draw_prediction(ax: Axes, x: np.ndarray, y: np.ndarray, *, label: str = "", colour: str = BLACK) -> Axes:
    """A line that comes from theory: dashed, thin, above what was measured."""
    ax.plot(x, y, color=colour, linestyle=(0, (4, 2)), linewidth=1.2, zorder=4)
    return label_end(ax, x, y, label, colour=colour)


def draw_level(ax: Axes, y: float, label: str, *, colour: str = GREY, side: str = "right") -> Axes:
    """A horizontal line across the axes, labelled at one end: chance, a null, a published value."""
    ax.axhline(y, color=colour, linewidth=1.0, linestyle=":", zorder=0)
    x, shift = (1, -2) if side == "right" else (0, 4)
    ax.annotate(label, (x, y), xycoords=("axes fraction", "data"), xytext=(shift, 2), ha=side, va="bottom",
                textcoords="offset points", fontsize=7.5, color=colour)
    return ax


def label_end(ax: Axes, x: np.ndarray, y: np.ndarray, label: str, *, colour: str) -> Axes:
    """Write a curve's label right of its last point, in its colour."""
    ax.annotate(label, (x[-1], y[-1]), xytext=(6, 0), textcoords="offset points", va="center",
                fontsize=8, color=colour, annotation_clip=False)
    return ax


def label_ends(ax: Axes, x: float, ends: Mapping[str, tuple[float, str]], *, gap: float = 0.07) -> Axes:
    """Label several curves right of their last points without overlap: name -> (last y, colour).

    Args:
        gap: least distance of two labels, as a share of the axes' height; call it when the limits are set.
    """
    low, high = ax.get_ylim()
    heights = spread(np.array([y for y, _ in ends.values()]), gap * (high - low))
    for (name, (_, colour)), height in zip(ends.items(), heights, strict=True):
        ax.annotate(name, (x, height), xytext=(6, 0), textcoords="offset points", va="center",
                    fontsize=8, color=colour, annotation_clip=False, linespacing=0.9)
    return ax


def draw_matrix(
    ax: Axes, matrix: np.ndarray, *, limit: float | None = None, labels: Sequence[str] = ()
) -> AxesImage:
    """Show a signed matrix on the diverging map, symmetric about 0; returns the image for a colour bar.

    Args:
        limit: value at the ends of the map, None for the largest |entry|. Give one to panels that
            are compared, and one colour bar to all of them.
        labels: names of rows and columns, written at the rows.
    """
    limit = np.abs(matrix).max() if limit is None else limit
    image = ax.imshow(matrix, cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest")
    ax.set(xticks=[], yticks=range(len(labels)), yticklabels=labels)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return image


def draw_head_scores(ax: Axes, scores: np.ndarray, *, top: int = 3, high: float = 1.0) -> AxesImage:
    """Heatmap of a score for every head [layer, head]; the `top` heads carry their value.

    Args:
        scores: between 0 and `high`, such as mean attention probabilities.
        top: how many heads are labelled; with few heads label them all.
        high: value at the end of the map. Panels that are compared share it and one colour bar.

    Returns:
        The image, for the colour bar.
    """
    image = ax.imshow(scores, vmin=0, vmax=high, aspect="auto", interpolation="nearest")
    n_layers, n_heads = scores.shape
    step = max(1, n_layers // 8), max(1, n_heads // 8)
    ax.set(xlabel="head", xticks=range(0, n_heads, step[1]))
    ax.set(ylabel="layer", yticks=range(0, n_layers, step[0]))
    for index in np.argsort(-scores, axis=None)[:top]:
        layer, head = np.unravel_index(index, scores.shape)
        value = scores[layer, head]
        text = f"{value:.2f}".lstrip("0") if value < 0.995 else f"{value:.0f}"
        ax.text(head, layer, text, ha="center", va="center", fontsize=7,
                color="black" if value > 0.6 * high else "white")
    return image


def draw_spectrum(ax: Axes, spectrum: np.ndarray, labels: Sequence[str], *, high: float = 1.0) -> AxesImage:
    """Mean attention on every offset [head, offset], one labelled row a head; returns the image."""
    image = ax.imshow(spectrum, vmin=0, vmax=high, aspect="auto", interpolation="nearest")
    ax.set(xlabel="tokens back", yticks=range(len(labels)), yticklabels=labels)
    ax.tick_params(axis="y", labelsize=6.5, length=0)
    return image


def draw_directed_means(
    ax: Axes, means: np.ndarray, pair_means: np.ndarray, *, colour: str = VERMILLION
) -> Axes:
    """Join the mean of each pair (a node after a node) to the mean of its later node.

    Args:
        means: [node, 2].
        pair_means: [node * node, 2], row now * n_nodes + before; NaN for pairs that do not occur.
    """
    seen = np.flatnonzero(np.isfinite(pair_means).all(axis=1))
    ends = np.stack([means[seen // len(means)], pair_means[seen]], axis=1)  # [pair, 2, 2]
    ax.add_collection(LineCollection(ends, colors=colour, linewidths=0.8, zorder=1.5))
    ax.scatter(*pair_means[seen].T, s=7, color=colour, zorder=1.6)
    return ax


def draw_distributions(
    ax: Axes, values: Mapping[str, np.ndarray], *, low: float = -0.5, high: float = 1.5
) -> Axes:
    """Distributions one above the other, each named at its left, with its mean as a bar.

    Values outside low to high are counted in the outermost bins.
    """
    bins = np.linspace(low, high, 61)
    for row, (name, sample) in enumerate(values.items()):
        heights, _ = np.histogram(np.clip(sample, low, high), bins, density=True)
        base = -1.0 * row
        ax.fill_between((bins[1:] + bins[:-1]) / 2, base, base + 0.8 * heights / heights.max(),
                        color=(VERMILLION, BLUE, GREY)[row % 3], alpha=0.6, linewidth=0, step="mid")
        ax.plot([np.mean(sample)] * 2, [base, base + 0.85], color=BLACK, linewidth=1.4)
        ax.text(low, base + 0.45, name, fontsize=8, va="bottom")
    ax.set(yticks=[], xlim=(low, high))
    ax.spines["left"].set_visible(False)
    return ax


def draw_layers(ax: Axes, x: np.ndarray, values: np.ndarray, *, highlight: int) -> Axes:
    """One line a layer [layer, point], labelled by number at its end; one layer stands out.

    Depth is shown by shade, which is ordered as layers are; with many layers every few are labelled. Set
    the limits of the y axis first: the labels are spread over it.
    """
    shades = mpl.colormaps[SEQUENTIAL](np.linspace(0.0, 0.85, len(values)))
    every = max(1, len(values) // 8)
    for layer, (row, shade) in enumerate(zip(values, shades, strict=True)):
        chosen = layer == highlight
        ax.plot(x, row, color=shade, linewidth=2.6 if chosen else 1.2, zorder=3 if chosen else 2)
    named = [layer for layer in range(len(values)) if layer % every == 0 or layer == highlight]
    ends = {f"{n}" + (" (read)" if n == highlight else ""): (values[n][-1], shades[n]) for n in named}
    return label_ends(ax, x[-1], ends, gap=0.055)


def spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """Heights moved apart by at least `gap`, in their order, as little as a sweep up and down needs."""
    order = np.argsort(heights, kind="stable")
    moved = np.asarray(heights, dtype=float)[order].copy()
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    moved -= (moved - np.asarray(heights)[order]).mean()
    out = np.empty_like(moved)
    out[order] = moved
    return out


def _label_outwards(ax: Axes, text: str, point: np.ndarray, centre: np.ndarray, distance: float) -> None:
    """Write the text `distance` points from the node: on its outer side, or above it well inside."""
    x, y = point - centre
    radius = np.hypot(x, y)
    x, y = (x / radius, y / radius) if radius > 0.3 * np.ptp(ax.get_xlim()) else (0, 1)
    ax.annotate(
        text,
        point,
        xytext=(distance * x, distance * y),
        textcoords="offset points",
        ha="left" if x > 0.5 else "right" if x < -0.5 else "center",
        va="bottom" if y > 0.3 else "top" if y < -0.3 else "center",
        fontsize=7.5,
        bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "boxstyle": "square,pad=0.06"},
        zorder=1.5,  # above edges, below nodes: a label hides no node
        annotation_clip=False,
    )
