"""House style and the figures that studies share.

Every function takes an axes, draws on it and returns it; none knows a study.
Hues are Okabe & Ito's, told apart by all common kinds of colour vision; what
has more kinds than hues is told apart by position and label. In greyscale hues
are lost: what differs by hue differs by marker, line or a label beside it, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.textpath import text_to_path

from lib import kernel
from lib.walks import Graph

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, GREY, BLACK = "#CC79A7", "#56B4E9", "#7F7F7F", "#000000"
DIVERGING = "RdBu_r"  # always symmetric about 0
SEQUENTIAL = "cividis"
MARKERS = ("o", "s", "^", "D")  # one a line of a panel, so that greyscale tells lines apart
_WORD = 7.5  # size of the words of a graph
_WIDER = (1.0, 1.3)  # the frames that words are placed for, as shares of that of a bare grid of axes
_PAPER = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "boxstyle": "square,pad=0.06"}  # behind labels
PAGE = 7.0  # figure width in inches, 700 px on a page


def use_house_style() -> None:
    """Set matplotlib's defaults: opaque, legible at 700 px, and equal bytes for an equal figure.

    In a notebook, figures are twice as fine as a page of 700 px, for screens of high resolution.
    """
    mpl.rcParams.update(
        {
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
        }
    )
    if kernel.is_running():
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")


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


def shades(hue: str, n: int) -> list[tuple[float, float, float]]:
    """`n` shades of a hue, from light to the hue itself, for a family of lines that are in order."""
    full, white = np.array(mpl.colors.to_rgb(hue)), np.ones(3)
    return [tuple(full * (1 - w) + white * w) for w in np.linspace(0.65, 0, n)]


def draw_band(
    ax: Axes,
    x: np.ndarray,
    middle: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    colour: str = BLUE,
    label: str = "",
    key: str = "",
    marker: str = "o",
) -> Axes:
    """A line with a band from low to high; the caption says which interval the band is.

    The label stands at the line's right end, in its colour; `key` is its name in `draw_key`.
    """
    ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    ax.plot(x, middle, color=colour, marker=marker, label=key)
    return label_end(ax, x, middle, label, colour=colour)


def draw_samples(
    ax: Axes, x: np.ndarray, samples: np.ndarray, *, colour: str = BLUE, label: str = "", marker: str = "o"
) -> Axes:
    """Mean of samples [point, sample] at each x, with a band that holds the central 95% of them."""
    low, high = np.quantile(samples, [0.025, 0.975], axis=1)
    return draw_band(ax, x, np.mean(samples, axis=1), low, high, colour=colour, label=label, marker=marker)


def draw_ranges(
    ax: Axes, y: np.ndarray, middle: np.ndarray, low: np.ndarray, high: np.ndarray,
    *, colour: str, label: str, marker: str = "o",
) -> Axes:  # fmt: skip
    """Points with horizontal bars from low to high, one a row; the caption says which interval they are."""
    ax.hlines(y, low, high, color=colour, linewidth=1.4)
    ax.plot(middle, y, marker, color=colour, label=label)
    return ax


def draw_bands(
    ax: Axes,
    x: np.ndarray,
    bands: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    colours: Sequence[str],
    *,
    marker: str = "",
    levels: Mapping[str, float] | None = None,
) -> Axes:
    """Several lines with bands: label -> (middle, low, high), labelled at their right ends without overlap.

    Points that were not measured are NaN; a line with fewer than two others is left out. Set the limits of
    the y axis first: the labels are spread over it.

    Args:
        levels: label -> height of a dotted line across the axes, such as chance, labelled among the others.
    """
    ends: dict[float, dict[str, tuple[float, str]]] = {x[-1]: {}}
    for (name, (middle, low, high)), colour in zip(bands.items(), colours, strict=True):
        seen = np.isfinite(middle)
        if seen.sum() > 1:
            draw_band(ax, x[seen], middle[seen], low[seen], high[seen], colour=colour, marker=marker)
            ends.setdefault(x[seen][-1], {})[name] = (middle[seen][-1], colour)
    for name, height in (levels or {}).items():
        draw_level(ax, height)
        ends[x[-1]][name] = (height, GREY)
    for end, labels in ends.items():
        label_ends(ax, end, labels)
    return ax


def draw_series(
    ax: Axes, x: np.ndarray, y: np.ndarray, label: str, colour: str = BLUE,
    *, style: str = "o-", key: str = "",
) -> Axes:  # fmt: skip
    """Points joined by a line, labelled at the right end, for values without an interval.

    `key` is its name in `draw_key`.
    """
    ax.plot(x, y, style, color=colour, label=key)
    return label_end(ax, x, y, label, colour=colour)


def draw_key(fig: Figure, ax: Axes) -> Figure:
    """One key above all panels, of the lines and bars of one of them that have a name."""
    handles, names = ax.get_legend_handles_labels()
    fig.legend(handles, names, loc="outside upper center", ncols=len(names), columnspacing=1.6)
    return fig


def draw_shares(ax: Axes, effects: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Axes:
    """Groups of bars at 0, 1, ...: name -> (share, low, high) of each group; four names at most.

    Bars differ by hatching as well as by hue; name them by `draw_key`.
    """
    looks = (BLUE, ""), (GREEN, "//////"), ("0.85", ""), (ORANGE, "......")
    width = 0.8 / len(effects)
    for i, (name, (share, low, high)) in enumerate(effects.items()):
        at, (colour, hatch) = np.arange(len(share)) + (i - (len(effects) - 1) / 2) * width, looks[i]
        ax.bar(at, share, 0.95 * width, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=name)
        ax.vlines(at, low, high, color=BLACK, linewidth=0.8)
    return ax


def draw_prediction(ax: Axes, x: np.ndarray, y: np.ndarray, *, label: str = "", colour: str = BLACK) -> Axes:
    """A line that comes from theory: dashed, thin, above what was measured."""
    ax.plot(x, y, color=colour, linestyle=(0, (4, 2)), linewidth=1.2, zorder=4)
    return label_end(ax, x, y, label, colour=colour)


def draw_level(
    ax: Axes, y: float, label: str = "", *, colour: str = GREY, side: str = "right", key: str = ""
) -> Axes:
    """A horizontal line across the axes, labelled at one end: chance, a null, a published value.

    `key` is its name in `draw_key`.
    """
    ax.axhline(y, color=colour, linewidth=1.0, linestyle=":", zorder=0, label=key)
    x, shift = (1, -2) if side == "right" else (0, 4)
    if label:
        ax.annotate(
            label,
            (x, y),
            xycoords=("axes fraction", "data"),
            xytext=(shift, 2),
            ha=side,
            va="bottom",
            textcoords="offset points",
            fontsize=7.5,
            color=colour,
        )
    return ax


def label_end(ax: Axes, x: np.ndarray, y: np.ndarray, label: str, *, colour: str) -> Axes:
    """Write a curve's label right of its last point, in its colour."""
    return label_ends(ax, x[-1], {label: (y[-1], colour)} if label else {})


def label_ends(ax: Axes, x: float, ends: Mapping[str, tuple[float, str]], *, gap: float = 0.07) -> Axes:
    """Label several curves right of their last points without overlap: name -> (last y, colour).

    Args:
        gap: least distance of two labels, as a share of the axes' height; call it when the limits are set.
    """
    if not ends:
        return ax
    low, high = ax.get_ylim()
    heights = spread(np.array([y for y, _ in ends.values()]), gap * (high - low))
    for (name, (_, colour)), height in zip(ends.items(), heights, strict=True):
        ax.annotate(
            name,
            (x, height),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
            annotation_clip=False,
            linespacing=0.9,
            bbox=_PAPER,
        )
    return ax


def place_labels(
    ax: Axes, words: Sequence[str], points: np.ndarray, edges: np.ndarray = (), *, radius: float = 2.4
) -> Axes:
    """Write each word beside its point so that no word covers another one or a point.

    Of places all around a point, near and farther away, each word in turn takes the cheapest until none
    moves: it costs to cover a word, a point or an edge, to go far, to turn inwards, and to leave the frame.
    A word that had to go far is joined to its point by a thin line. Set limits and aspect of the axes first.

    Args:
        points: [word, 2], in data coordinates.
        edges: [edge, 2, 2], ends of lines that are better not covered.
        radius: of the points' markers (typographic points, as all lengths below).
    """
    if not len(words):
        return ax
    box, (x0, x1), (y0, y1) = ax.get_window_extent(), ax.get_xlim(), ax.get_ylim()
    # The layout is not made yet, so this is the frame of a bare grid of axes; the final one is up to _WIDER.
    unit = 72 / ax.figure.dpi * min(box.width / (x1 - x0), box.height / (y1 - y0))
    centre, reach = np.array([x0 + x1, y0 + y1]) / 2, unit * (x1 - x0) / 2
    at, lines = unit * (points - centre), unit * (np.asarray(edges).reshape(-1, 2, 2) - centre)
    font = FontProperties(family=mpl.rcParams["font.family"], size=_WORD)
    line = text_to_path.get_text_width_height_descent("lp", font, False)[1]  # as high as any word
    widths = [text_to_path.get_text_width_height_descent(word, font, False)[0] for word in words]
    half = np.array([(width, line) for width in widths]) / 2 + 1
    offset, near, cost = _places(at, half, lines, radius, reach)

    chosen = cost.argmin(axis=1)
    place = np.multiply.outer(_WIDER, at)[:, :, None] + offset  # [frame, word, place, 2]
    for _ in range(20):
        before = chosen.copy()
        for i in range(len(words)):
            others = np.arange(len(words)) != i
            taken = place[:, others, chosen[others]]
            over = _overlap(place[:, i, :, None], half[i], taken[:, None], half[others]).sum((0, -1))
            chosen[i] = (cost[i] + 2 * over + 20 * (over > 0)).argmin()
        if (chosen == before).all():
            break
    leader = {"arrowstyle": "-", "color": "0.45", "linewidth": 0.5, "shrinkA": 0, "shrinkB": radius}
    for i, word in enumerate(words):
        ax.annotate(
            word,
            points[i],
            xytext=offset[i, chosen[i]],
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_WORD,
            bbox=_PAPER,
            arrowprops=None if chosen[i] in near else leader,
            zorder=1.5,  # above edges, below nodes: a label hides no node
            annotation_clip=False,
        )
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
        top: how many heads are labelled (more if they tie with the last).
        high: value at the end of the map. Panels that are compared share it and one colour bar.

    Returns:
        The image, for the colour bar.
    """
    image = ax.imshow(scores, vmin=0, vmax=high, aspect="auto", interpolation="nearest")
    n_layers, n_heads = scores.shape
    step = max(1, n_layers // 8), max(1, n_heads // 8)
    ax.set(xlabel="head", xticks=range(0, n_heads, step[1]))
    ax.set(ylabel="layer", yticks=range(0, n_layers, step[0]))
    label_cells(image, least=np.sort(scores, axis=None)[-min(top, scores.size)] if top else np.inf)
    return image


def label_cells(image: AxesImage, *, least: float = 0.0) -> AxesImage:
    """Write the values of a heatmap into its cells, those of at least `least` (in absolute value).

    Black or white, whichever is legible on the cell.
    """
    values = np.asarray(image.get_array())
    shades = image.cmap(image.norm(values))[..., :3] @ (0.299, 0.587, 0.114)  # luma, as greyscale has it
    for row, column in zip(*np.nonzero(np.abs(values) >= least), strict=True):
        value = values[row, column]
        text = f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.0f}"
        image.axes.text(
            column,
            row,
            text.replace("-", "\N{MINUS SIGN}"),
            ha="center",
            va="center",
            fontsize=7,
            color="black" if shades[row, column] > 0.5 else "white",
        )
    return image


def draw_distributions(
    ax: Axes, values: Mapping[str, np.ndarray], *, low: float = -0.5, high: float = 1.5
) -> Axes:
    """Distributions one above the other, each named at its left, with its mean as a bar.

    Values outside low to high are counted in the outermost bins.
    """
    bins = np.linspace(low, high, 61)
    for row, sample in enumerate(values.values()):
        heights, _ = np.histogram(np.clip(sample, low, high), bins, density=True)
        base = -1.0 * row
        ax.fill_between(
            (bins[1:] + bins[:-1]) / 2,
            base,
            base + 0.8 * heights / heights.max(),
            color=(VERMILLION, BLUE, GREY)[row % 3],
            alpha=0.6,
            linewidth=0,
            step="mid",
        )
        ax.plot([np.mean(sample)] * 2, [base, base + 0.85], color=BLACK, linewidth=1.4)
    ax.set(yticks=[0.35 - row for row in range(len(values))], yticklabels=values, xlim=(low, high))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    return ax


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


def _places(
    at: np.ndarray, half: np.ndarray, lines: np.ndarray, radius: float, reach: float
) -> tuple[np.ndarray, range, np.ndarray]:
    """Places of a word beside its point: offsets [word, place, 2], those right beside it, cost [word, place].

    Args:
        at: [word, 2], the points, from the middle of the frame.
        half: [word, 2], half sizes of the words.
        lines: [line, 2, 2], ends of lines that are better not covered.
        reach: from the middle to the side of the frame.
    """
    angle = np.arange(16) * np.pi / 8
    turn = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # [direction, 2]
    away = radius + 2 + np.array([0, 6, 13, 21])
    shift = (away[:, None, None] * turn).reshape(-1, 2)  # [place, 2]
    offset = shift + np.tile(np.clip(2 * turn, -1, 1), (len(away), 1)) * half[:, None]

    distance = np.linalg.norm(at, axis=1, keepdims=True)
    outer = np.minimum(1, distance / reach)  # well inside, a word rather stands above its point
    inwards = 4 * outer * (1 - (at / np.maximum(distance, 1e-9)) @ turn.T) + (1 - outer) * (1 - turn[:, 1])
    cost = np.tile(inwards, (1, len(away))) + np.repeat(0.8 * (away - away[0]), len(turn))
    cost += 0.2 * np.maximum(0, np.abs(at[:, None] + offset) + half[:, None] - reach).sum(-1)
    for wider in _WIDER:
        boxes = (wider * at[:, None] + offset)[:, :, None], half[:, None, None]  # [word, place, 1, 2]
        cost += 30 * (_overlap(*boxes, wider * at, np.full(2, radius + 1)) > 0).sum(-1)
    for start, end in wider * lines:
        covered = _overlap(*boxes, np.linspace(start, end, 40), np.full(2, 2)) > 0
        cost += 0.15 * covered.mean(-1) * np.linalg.norm(end - start)
    return offset, range(len(turn)), cost


def _overlap(middle: np.ndarray, half: np.ndarray, others: np.ndarray, other_half: np.ndarray) -> np.ndarray:
    """Area that boxes share, from their middles and half sizes [..., 2], broadcast."""
    shared = np.minimum(middle + half, others + other_half) - np.maximum(middle - half, others - other_half)
    return np.maximum(shared, 0).prod(-1)
