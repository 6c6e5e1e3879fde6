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
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lib.core import kernel
from lib.core.labels import label_end, label_ends

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, GREY, BLACK = "#CC79A7", "#56B4E9", "#7F7F7F", "#000000"
DIVERGING = "RdBu_r"  # always symmetric about 0
SEQUENTIAL = "cividis"
MARKERS = ("o", "s", "^", "D")  # one a line of a panel, so that greyscale tells lines apart
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
