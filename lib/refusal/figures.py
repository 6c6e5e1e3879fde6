"""Figures of study 3. Each takes numbers, and draws them on axes or returns a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lib.core import plots
from lib.core.statistics import Band, Estimate
from lib.refusal.behaviour import MAX_KL, MIN_COHERENCE, Outcome
from lib.refusal.removal import Ablation

_COLOURS = plots.VERMILLION, plots.BLUE, plots.GREEN


def draw_way(
    ax: Axes,
    conditions: Sequence[Ablation],
    outcome: Outcome,
    band: Band,
    *,
    colour: str,
    marker: str,
    key: str,
    shift: float = 0.0,
) -> Axes:
    """Compliance against the sizes of subspaces, hollow where coherence or KL keeps one from passing.

    Args:
        band: of compliance, over the conditions.
        key: name in `lib.core.plots.draw_key`.
        shift: to the right, which keeps lines apart that coincide.
    """
    k = np.array([len(condition.basis) for condition in conditions]) + shift
    plots.draw_band(ax, k, *band, colour=colour, marker=marker, key=key)
    _, coherence, kl = outcome.means
    failed = (coherence < MIN_COHERENCE) | (kl > MAX_KL)
    hollow = {"markerfacecolor": "white", "markeredgecolor": colour, "zorder": 5}
    ax.plot(k[failed], band.middle[failed], marker, **hollow)
    return ax


def draw_kinds(ax: Axes, rates: Mapping[str, np.ndarray], ks: Sequence[int]) -> AxesImage:
    """Heatmap of rates: kind of request -> rate at each number of directions; returns the image."""
    image = ax.imshow(np.stack([*rates.values()]), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ax.set(xticks=range(len(ks)), xticklabels=ks, yticks=range(len(rates)), yticklabels=[*rates])
    return plots.label_cells(image)


def answer(
    rates: Mapping[str, Mapping[str, float]],
    published: Mapping[str, float],
    measured: Mapping[str, Estimate | float],
    titles: Sequence[str],
) -> Figure:
    """Which requests stay shut, beside the compliance that one direction brings in other models.

    Args:
        rates: intervention -> category -> compliance; "all" is written below the others.
        published: model -> compliance without its best direction.
        measured: the same here, with its interval or without.
        titles: of the two panels.
    """
    names = list(next(iter(rates.values())))
    cells = np.array([[of_name[name] for of_name in rates.values()] for name in names])
    size = plots.PAGE, 1.6 + 0.23 * len(names)
    fig, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=[5, 4])
    image = left.imshow(cells, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    plots.label_cells(image)
    slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor", "fontsize": 7.5}
    left.set_xticks(range(len(rates)), [*rates], **slanted)
    left.set_yticks(range(len(names)), names, fontsize=7.5)
    left.axhline(len(names) - 1.5, color="white", linewidth=2)
    left.set_title(titles[0], fontsize=8.5)
    dots = {name: Estimate(value, value, value) for name, value in published.items()}
    ours = {n: v if isinstance(v, Estimate) else Estimate(v, v, v) for n, v in measured.items()}
    order = sorted([*dots, *ours], key=lambda name: (dots | ours)[name].value)
    for y, name in enumerate(order):
        mean, low, high = (dots | ours)[name]
        colour, marker = (plots.VERMILLION, "D") if name in ours else (plots.GREY, "o")
        right.plot([low, high], [y, y], color=colour, linewidth=1.4)
        right.plot(mean, y, marker, color=colour)
        right.annotate(f"{mean:.2f}", (high, y), (5, 0), textcoords="offset points", va="center", fontsize=7)
    right.set_yticks(range(len(order)), order, fontsize=7.5)
    right.axvline(0.8, color=plots.GREY, linestyle=":", linewidth=1)
    right.set(xlim=(-0.03, 1.18), xlabel="compliance without one direction")
    right.set_title(titles[1], fontsize=8.5)
    return fig


def layers(
    score: Band, kl: np.ndarray, twins: np.ndarray, alike: np.ndarray, generated: Mapping[int, float],
    chosen: int, titles: Sequence[str],
) -> Figure:  # fmt: skip
    """Refusal score and KL by the layer whose direction is removed, beside how alike the directions are.

    Args:
        score: refusal score without the direction of layers 1, 2, ... over requests.
        kl: on everyday requests, in nats, of the same layers.
        twins: refusal score on safe twins, of the same layers.
        alike: mean cosine of each layer's vector with those of the other layers.
        generated: layer -> share of whole answers that refuse.
        chosen: layer.
        titles: of the two panels.
    """
    at = np.arange(1, 1 + len(kl))
    fig, (left, right) = plt.subplots(1, 2, figsize=(plots.PAGE, 2.6))
    plots.draw_band(left, at, *score, marker="", key="refusal score")
    left.plot(at, np.minimum(kl, 1), color=plots.ORANGE, linestyle="--", label="KL, everyday (nats)")
    left.plot(at, twins, color=plots.BLUE, linestyle=":", label="refusal score, safe twins")
    refusing = zip(*sorted(generated.items()), strict=True)
    left.plot(*refusing, "D", color=plots.BLACK, label="answers that refuse")
    right.plot(at, alike, color=plots.GREEN)
    for ax, title in zip((left, right), titles, strict=True):
        ax.axvline(chosen, color=plots.GREY, linestyle=":", linewidth=1)
        ax.set(xlabel="layer", xlim=(0.5, len(kl) + 0.5), xticks=at[:: max(1, len(at) // 8)])
        ax.set_title(title, fontsize=8.5)
    left.set(ylim=(-0.03, 1.03), ylabel="refusal score, KL (nats)")
    plots.draw_key(fig, left)
    right.set(ylabel="mean cosine with other layers")
    return fig


def cosines(maps: Mapping[str, np.ndarray]) -> Figure:
    """Cosines of the vectors of any two layers, from layer 1: title -> [layer, layer]."""
    fig, axes = plt.subplots(1, len(maps), figsize=(plots.PAGE, 3.2), sharey=True, squeeze=False)
    for ax, (title, matrix) in zip(axes[0], maps.items(), strict=True):
        image = plots.draw_matrix(ax, matrix, limit=1.0)
        ticks = range(0, len(matrix), max(1, len(matrix) // 6))
        ax.set_xticks(ticks, [i + 1 for i in ticks])
        ax.set_yticks(ticks, [i + 1 for i in ticks])
        ax.set_xlabel("layer")
        ax.set_title(title, fontsize=8.5)
    axes[0, 0].set_ylabel("layer")
    fig.colorbar(image, ax=axes, label="cosine", shrink=0.8)
    return fig


def strengths(alphas: Sequence[float], scores: Mapping[str, Band], intact: float, title: str) -> Figure:
    """Refusal score against the strength of the removal, by where it acts; of the intact model as a level."""
    fig, ax = plt.subplots(figsize=(plots.PAGE * 0.7, 2.5))
    ax.set(ylim=(-0.03, 1.03), xlabel="strength of the removal", ylabel="refusal score", xticks=alphas)
    levels = {"intact": intact}
    plots.draw_bands(ax, np.array(alphas), scores, _COLOURS[: len(scores)], marker="o", levels=levels)
    ax.set_title(title, fontsize=8.5)
    return fig


def along_prompt(tokens: Sequence[str], bands: Mapping[str, Band], title: str) -> Figure:
    """Projection on the direction at the last tokens of the prompt, for kinds of requests."""
    fig, ax = plt.subplots(figsize=(plots.PAGE, 2.7))
    middles = np.concatenate([np.concatenate(band) for band in bands.values()])
    edge = 0.1 * (middles.max() - middles.min())
    ax.set(ylim=(middles.min() - edge, middles.max() + edge), ylabel="projection")
    at = np.arange(len(tokens))
    plots.draw_bands(ax, at, bands, _COLOURS[: len(bands)], marker="o")
    ax.set_xticks(at, tokens, rotation=30, ha="right", rotation_mode="anchor", fontsize=7.5)
    ax.set_title(title, fontsize=8.5)
    return fig


def descent(
    steps: np.ndarray,
    scores: Mapping[str, np.ndarray],
    points: Mapping[str, tuple[float, Estimate]],
    titles: Sequence[str],
) -> Figure:
    """Refusal score on the way of gradient descent, and what each direction opens at which side effect.

    Args:
        steps: of the snapshots.
        scores: arm -> refusal score of each snapshot.
        points: direction -> (KL on everyday requests in nats, compliance); the last of an arm is hollow.
        titles: of the two panels.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(plots.PAGE, 3.0))

    def look(name: str) -> tuple[str, str]:
        if name.startswith("apart"):
            return plots.BLUE, "s"
        if name.startswith("from random"):
            return plots.VERMILLION, "o"
        return (plots.GREY, "x") if name.startswith("random") else (plots.BLACK, "D")

    for name, values in scores.items():
        colour, marker = look(name)
        kind = name.split(", from random")[0].rstrip(" 0123456789")
        known = left.get_legend_handles_labels()[1]
        label = "_" if kind in known else kind
        left.plot(steps, values, color=colour, marker=marker, markersize=4, label=label)
    left.set(ylim=(-0.03, 1.03), xlabel="gradient steps", ylabel="refusal score")
    left.legend(fontsize=7.5)
    for name, (kl, rate) in points.items():
        colour, marker = look(name.removeprefix("last of "))
        fill = "white" if name.startswith("last of ") else colour
        right.plot([kl, kl], [rate.low, rate.high], color=colour, linewidth=1.4)
        right.plot(kl, rate.value, marker, color=colour, markerfacecolor=fill)
    right.set(xlim=(0, None), ylim=(-0.03, 1.08), ylabel="compliance")
    right.set_xlabel("KL on everyday requests (nats)")
    for axis, title in zip((left, right), titles, strict=True):
        axis.set_title(title, fontsize=8.5)
    return fig
