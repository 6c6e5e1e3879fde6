"""Labels that stand where there is room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

_WORD = 7.5  # size of the words of a graph
_WIDER = (1.0, 1.3)  # the frames that words are placed for, as shares of that of a bare grid of axes
_PAPER = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "boxstyle": "square,pad=0.06"}  # behind labels


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
