"""Figures of study 3: compliance against the number of directions removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from lib import plots
from lib.generation import Ablation
from lib.refusal import MAX_KL, MIN_COHERENCE, Outcome
from lib.statistics import Band


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
        key: name in `lib.plots.draw_key`.
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
