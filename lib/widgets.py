"""Explorers with sliders, and the still figures that say the same where no kernel runs."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as widgets
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import plots
from lib.geometry import dirichlet_energy, mixing_gram, pca, predicted_energy, simulate_mixing
from lib.walks import Graph


def draw_mixing(
    ax: Axes,
    graph: Graph,
    *,
    d: int,
    self_weight: float = 1.0,
    steps: int = 1,
    rank: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> Axes:
    """Draw one cloud after mixing in its PCA plane, titled with its energy and the predicted one.

    Arguments as in `geometry.simulate_mixing`.
    """
    settings = {"self_weight": self_weight, "steps": steps, "noise": noise}
    plane = pca(simulate_mixing(graph, d, rank=rank, seed=seed, **settings)).projection
    gram = mixing_gram(graph, rank_share=1.0 if rank is None else rank / d, **settings)
    energy, predicted = dirichlet_energy(plane, graph), predicted_energy(gram, graph, k=2)
    plots.draw_graph(ax, plane, graph)
    ax.set_title(f"E = {energy:.2f} (theory {predicted:.2f})", fontsize=8.5, fontweight="normal")
    return ax


def mixing_stills(
    graph: Graph, *, d: int, self_weights: Sequence[float], steps: Sequence[int], seed: int = 0
) -> Figure:
    """The explorer as one figure: rows are self-weights, columns numbers of steps."""
    size = (plots.PAGE, 0.3 + len(self_weights) * plots.PAGE / max(len(steps), 3) * 0.92)
    figure, axes = plt.subplots(len(self_weights), len(steps), figsize=size, squeeze=False)
    for row, self_weight in zip(axes, self_weights, strict=True):
        for ax, n_steps in zip(row, steps, strict=True):
            draw_mixing(ax, graph, d=d, self_weight=self_weight, steps=n_steps, seed=seed)
        row[0].set_ylabel(f"self-weight {self_weight:g}", labelpad=16)
    for ax, n_steps in zip(axes[-1], steps, strict=True):
        ax.set_xlabel(f"{n_steps} step" + "s" * (n_steps > 1))
    return figure


def mixing_explorer(graphs: Sequence[Graph], *, seed: int = 0) -> widgets.VBox:
    """Sliders for graph, steps, self-weight, dimension, rank and noise over a live PCA picture.

    Args:
        graphs: what the menu offers.
        seed: of the node vectors, the same for every setting so that only the setting changes.
    """
    style = {"description_width": "7em"}
    controls = {
        "graph": widgets.Dropdown(options={graph.name: graph for graph in graphs}),
        "steps": widgets.IntSlider(1, 0, 10),
        "self_weight": widgets.FloatSlider(1.0, min=0.0, max=2.0, step=0.1),
        "log2_d": widgets.IntSlider(12, 4, 12),
        "rank_share": widgets.FloatSlider(1.0, min=0.05, max=1.0, step=0.05),
        "noise": widgets.FloatSlider(0.0, min=0.0, max=3.0, step=0.1),
    }
    names = ("graph", "steps", "self-weight", "log2 dimension", "rank / dimension", "noise (SD)")
    for control, name in zip(controls.values(), names, strict=True):
        control.description, control.style, control.continuous_update = name, style, False

    def redraw(graph: Graph, steps: int, self_weight: float, log2_d: int, rank_share: float, noise: float):
        d = 2**log2_d
        _, ax = plt.subplots(figsize=(4.2, 4.0))
        draw_mixing(ax, graph, d=d, self_weight=self_weight, steps=steps, rank=round(rank_share * d),
                    noise=noise, seed=seed)
        plt.show()

    picture = widgets.interactive_output(redraw, controls)
    return widgets.VBox([widgets.VBox(list(controls.values())), picture])
