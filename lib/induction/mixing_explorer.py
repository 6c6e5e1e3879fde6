"""The explorer of study 2: how a graph, its mixing and the dimension of its vectors shape their PCA plane."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as widgets
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.core import plots
from lib.core.explorer import beside, describe, picture, redrawing
from lib.induction import graph_figures
from lib.induction.geometry import dirichlet_energy, pca
from lib.induction.mixing import mixing_gram, predicted_energy, simulate_mixing
from lib.induction.walks import Graph


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
    labels: Sequence[str] | None = None,
) -> Axes:
    """Draw one cloud after mixing in its PCA plane, titled with its energy and the predicted one.

    Arguments as in `geometry.simulate_mixing` and `graph_figures.draw_graph`.
    """
    settings = {"self_weight": self_weight, "steps": steps, "noise": noise}
    plane = pca(simulate_mixing(graph, d, rank=rank, seed=seed, **settings)).projection
    gram = mixing_gram(graph, rank_share=1.0 if rank is None else rank / d, **settings)
    energy, predicted = dirichlet_energy(plane, graph), predicted_energy(gram, graph, k=2)
    graph_figures.draw_graph(ax, plane, graph, labels=labels)
    ax.set_title(f"E = {energy:.2f} (theory {predicted:.2f})", fontsize=8.5, fontweight="normal")
    return ax


def mixing_stills(
    graph: Graph, *, d: int, self_weights: Sequence[float], steps: Sequence[int], seed: int = 0
) -> Figure:
    """The explorer as one figure: rows are self-weights, columns numbers of steps.

    The words stand in the first row alone: a checkerboard has no room for them.
    """
    size = (plots.PAGE, 0.3 + len(self_weights) * plots.PAGE / max(len(steps), 3) * 0.8)
    figure, axes = plt.subplots(len(self_weights), len(steps), figsize=size, squeeze=False)
    for i, (row, self_weight) in enumerate(zip(axes, self_weights, strict=True)):
        labels = () if i else None
        for ax, n_steps in zip(row, steps, strict=True):
            draw_mixing(ax, graph, d=d, self_weight=self_weight, steps=n_steps, seed=seed, labels=labels)
        row[0].set_ylabel(f"self-weight {self_weight:g}", labelpad=16)
    for ax, n_steps in zip(axes[-1], steps, strict=True):
        ax.set_xlabel(f"{n_steps} step" + "s" * (n_steps > 1))
    return figure


def mixing_explorer(graphs: Sequence[Graph], *, seed: int = 0) -> widgets.Box:
    """Sliders for graph, steps, self-weight, dimension, rank and noise over a live PCA picture.

    Args:
        graphs: what the menu offers.
        seed: of the node vectors, the same for every setting so that only the setting changes.
    """
    controls = {
        "graph": widgets.Dropdown(options={graph.name: graph for graph in graphs}),
        "steps": widgets.IntSlider(1, 0, 10),
        "self-weight": widgets.FloatSlider(1.0, min=0.0, max=2.0, step=0.1),
        "log2 dimension": widgets.IntSlider(12, 4, 12),
        "rank / dimension": widgets.FloatSlider(1.0, min=0.05, max=1.0, step=0.05),
        "noise (SD)": widgets.FloatSlider(0.0, min=0.0, max=3.0, step=0.1),
    }
    plane, message = widgets.HTML(), widgets.HTML()

    def draw() -> None:
        graph, steps, self_weight, log2_d, rank_share, noise = (each.value for each in controls.values())
        d = 2**log2_d
        figure = Figure(figsize=(3.7, 3.7), layout="constrained")
        draw_mixing(
            figure.add_subplot(),
            graph,
            d=d,
            self_weight=self_weight,
            steps=steps,
            rank=max(1, round(rank_share * d)),
            noise=noise,
            seed=seed,
        )
        settings = (f"{name} {each.value:g}" for name, each in controls.items() if name != "graph")
        alt = f"The words of the {graph.name} in their PCA plane with its edges: {', '.join(settings)}."
        plane.value = picture(figure, alt)

    draw()
    redraw = redrawing(draw, message)
    for control in describe(controls):
        control.observe(redraw, names="value")
    return beside([*controls.values(), message], plane)
