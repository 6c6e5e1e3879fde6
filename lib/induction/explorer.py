"""The explorer of study 1: a board of heads to ablate, with the accuracy and the word means that are left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from nnsight import TransformersModel

from lib.core import plots, sweeps, tokens
from lib.core.attention import top_heads
from lib.core.explorer import WIDTH, describe, picture, redrawing
from lib.core.interventions import Condition, Head
from lib.induction import graph_figures
from lib.induction.geometry import dirichlet_energy, pca
from lib.induction.walks import Graph, rule_following_accuracy

_HUES = plots.BLUE, plots.VERMILLION  # of the lists of heads, in their order
_LEVELS = 5  # shades of a hue
_MOST_BUTTONS = 256  # a browser takes long over more


class WithoutHeads(NamedTuple):
    """What is left of the model.

    Attributes:
        accuracy: rule-following [walk, token].
        means: of the words at the read layer over the window [word, d_model].
    """

    accuracy: np.ndarray
    means: np.ndarray


class HeadAblations:
    """The model of a study on a few of its walks, without any set of heads; a set that was seen is kept.

    Args:
        model: from `lib.core.models.load`.
        graph: with its words.
        nodes: walks [walk, token]; the time of a picture grows with their number.
        layer: word means are taken at the input of this block.
        window: last tokens that the means are over.
        fill: what the outputs of ablated heads become [layer, head, d_head]; zero by default.
    """

    def __init__(
        self,
        model: TransformersModel,
        graph: Graph,
        nodes: np.ndarray,
        *,
        layer: int,
        window: int,
        fill: torch.Tensor | None = None,
    ):
        self.model, self.graph, self.nodes, self.layer, self.window = model, graph, nodes, layer, window
        self._fill, self._seen = fill, {}

    def __call__(self, heads: Iterable[Head] = ()) -> WithoutHeads:
        heads = frozenset(heads)
        if heads not in self._seen:
            n_tokens = self.nodes.shape[1]
            word_ids = tokens.word_ids(self.model, self.graph.words)
            sweep = sweeps.ablation_sweep(
                self.model,
                tokens.with_bos(self.model, np.array(word_ids)[self.nodes]),
                [Condition("intact"), Condition("ablated", heads)],
                word_ids=word_ids,
                labels=np.where(np.arange(n_tokens) >= n_tokens - self.window, self.nodes, -1),
                n_classes=self.graph.n_nodes,
                layers=[self.layer],
                fill=self._fill,
            )
            accuracy = rule_following_accuracy(sweep.word_probabilities, self.nodes, self.graph)
            for i, condition in enumerate(sweep.conditions):
                self._seen[condition.heads] = WithoutHeads(accuracy[i], sweep.class_means()[i, 0])
        return self._seen[heads]

    def score(self, heads: Iterable[Head] = ()) -> tuple[float, float]:
        """Accuracy over the window, and energy of the word means in their plane."""
        outcome = self(heads)
        plane = pca(outcome.means).projection
        return outcome.accuracy[:, -self.window :].mean(), dirichlet_energy(plane, self.graph)


def draw_accuracy(ax: Axes, ablations: HeadAblations, heads: Iterable[Head]) -> Axes:
    """Accuracy against context, intact and without some heads: mean and range over the walks."""
    n_tokens = ablations.nodes.shape[1]
    marks = np.linspace(0, n_tokens, min(20, n_tokens // 5) + 1).astype(int)
    ax.set(xlabel="context (tokens)", ylabel="rule-following accuracy", ylim=(0, 1))
    plots.draw_level(ax, ablations.graph.degrees.mean() / ablations.graph.n_nodes, "chance")
    bands = {}
    for name, ablated in (("intact", ()), ("ablated", heads)):
        accuracy = np.add.reduceat(ablations(ablated).accuracy, marks[:-1], axis=-1) / np.diff(marks)
        bands[name] = accuracy.mean(0), accuracy.min(0), accuracy.max(0)
    plots.draw_bands(ax, (marks[1:] + marks[:-1]) / 2, bands, [plots.BLACK, plots.VERMILLION])
    return ax


def draw_plane(ax: Axes, ablations: HeadAblations, heads: Iterable[Head], name: str) -> Axes:
    """Word means in their PCA plane without some heads, titled with their energy."""
    graph_figures.draw_graph(ax, pca(ablations(heads).means).projection, ablations.graph)
    ax.set_title(f"{name}: E = {ablations.score(heads)[1]:.2f}", fontsize=8.5, fontweight="normal")
    return ax


class HeadBoard:
    """Layers x heads as toggle buttons, in the hue of a head's higher score and the darker the higher.

    Of a model with many heads a few layers are shown at a time.

    Attributes:
        heads: (layer, head) pairs that are pressed.
        box: the widget.

    Args:
        scores: of every head [layer, head], between 0 and 1, by name of the list; two at most.
        changed: called when the pressed heads have changed.
    """

    def __init__(self, scores: Mapping[str, np.ndarray], changed: Callable[[], None]):
        self.heads: frozenset[Head] = frozenset()
        self._scores, self._changed = dict(scores), changed
        self._n_layers, n_heads = next(iter(scores.values())).shape
        n_rows = min(self._n_layers, max(1, _MOST_BUTTONS // n_heads))
        # One layout and one style for all: with their own, a stored notebook would triple in size.
        layout, style = widgets.Layout(width="auto", margin="1px", padding="0"), widgets.ToggleButton().style
        self._buttons = {
            (row, head): widgets.ToggleButton(layout=layout, style=style)
            for row in range(n_rows)
            for head in range(n_heads)
        }
        self._first = widgets.IntSlider(0, 0, self._n_layers - n_rows)
        describe({"first layer": self._first})
        self._first.observe(self._show, names="value")
        for place, button in self._buttons.items():
            button.observe(lambda change, place=place: self._toggle(place, change.new), names="value")
        grid = widgets.GridBox([*self._buttons.values()])
        grid.layout.grid_template_columns = f"repeat({n_heads}, minmax(48px, 1fr))"
        grid.layout.width, grid.layout.max_width = "100%", f"{min(WIDTH, 72 * n_heads)}px"
        grid.layout.overflow = "auto hidden"
        self._showing = False
        self._show()
        legend = widgets.HTML(_board_style() + self._legend())
        self.box = widgets.VBox([legend, *([self._first] if self._first.max else []), grid])

    def press(self, heads: Iterable[Head]) -> None:
        """Press these heads and no other."""
        self.heads = frozenset(heads)
        self._show()
        self._changed()

    def _toggle(self, place: Head, pressed: bool) -> None:
        if not self._showing:
            head = {self._head(place)}
            self.heads = self.heads | head if pressed else self.heads - head
            self._show()
            self._changed()

    def _head(self, place: Head) -> Head:
        return place[0] + self._first.value, place[1]

    def _show(self, _=None) -> None:
        self._showing = True
        for place, button in self._buttons.items():
            layer, head = self._head(place)
            values = {name: float(score[layer, head]) for name, score in self._scores.items()}
            hue = max(range(len(values)), key=[*values.values()].__getitem__)
            level = min(_LEVELS - 1, int(_LEVELS * max(values.values())))
            button.value = (layer, head) in self.heads
            # In words as well: the page does not tell a screen reader that a button is pressed.
            button.description = "✕ " * button.value + f"{layer}.{head}"
            scores = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
            button.tooltip = f"layer {layer}, head {head}{', ablated' * button.value}: {scores}"
            button._dom_classes = ("head", f"head-{hue}-{level}")
        self._showing = False

    def _legend(self) -> str:
        names = " and ".join(
            f'<span class="head head-{i}-{_LEVELS - 1}" style="padding: 0 0.4em">{name}</span>'
            for i, name in enumerate(self._scores)
        )
        return (
            f'<div style="max-width: {WIDTH}px; line-height: 1.5">Heads as layer.head, a row a layer, '
            f"the darker the higher the score ({names}). Click one, or press the space bar on it, to ablate "
            "it (✕) or to bring it back.</div>"
        )


def induction_explorer(
    ablations: HeadAblations, scores: Mapping[str, np.ndarray], *, seed: int = 0
) -> widgets.VBox:
    """A board of heads to switch off, and presets, over accuracy and word means, intact and ablated.

    Args:
        ablations: of the model.
        scores: of every head [layer, head], between 0 and 1, by name of the list; two at most.
        seed: of the random heads; every press draws others.
    """
    n_heads = next(iter(scores.values())).size
    k = widgets.IntSlider(min(2, n_heads), 1, max(1, min(64, n_heads // 3)))
    describe({"k": k})
    rng = np.random.default_rng(seed)
    shown, summary, message = widgets.HTML(), widgets.HTML(), widgets.HTML()

    def draw() -> None:
        heads = sorted(board.heads)
        figure = Figure(figsize=(plots.PAGE, 2.7), layout="constrained")
        axes = figure.subplots(1, 3)
        draw_accuracy(axes[0], ablations, heads)
        draw_plane(axes[1], ablations, (), "intact")
        draw_plane(axes[2], ablations, heads, "ablated")
        (before, energy), (after, energy_after) = ablations.score(), ablations.score(heads)
        names = ", ".join(f"{layer}.{head}" for layer, head in heads) or "none"
        text = (
            f"ablated: {names} ({len(heads)} of {n_heads}). "
            f"Accuracy over the last {ablations.window} tokens {before:.2f} intact, {after:.2f} ablated; "
            f"energy {energy:.2f} and {energy_after:.2f} "
            f"(n = {len(ablations.nodes)} walks; bands are their range)."
        )
        summary.value = f'<div style="max-width: {WIDTH}px; line-height: 1.4">{text}</div>'
        shown.value = picture(figure, f"Accuracy against context, and word means in their PCA plane; {text}")

    board = HeadBoard(scores, redrawing(draw, message))

    def random_heads() -> list[Head]:
        listed = {head for values in scores.values() for head in top_heads(values, k.value)}
        pool = [head for head in top_heads(next(iter(scores.values()))) if head not in listed]
        return [pool[i] for i in rng.permutation(len(pool))[: k.value]]

    presets = {
        f"top k {name}": lambda values=values: top_heads(values, k.value) for name, values in scores.items()
    }
    presets |= {"k random others": random_heads, "clear": lambda: []}
    buttons = [widgets.Button(description=name, layout={"width": "auto"}) for name in presets]
    for button, heads in zip(buttons, presets.values(), strict=True):
        button.on_click(lambda _, heads=heads: board.press(heads()))
    draw()
    row = widgets.HBox([k, *buttons], layout={"flex_flow": "row wrap", "max_width": f"{WIDTH}px"})
    return widgets.VBox([board.box, row, message, summary, shown])


def _board_style() -> str:
    """Colours of the buttons: shades of each list's hue under the text that can be read on them."""
    rules = []
    for i, hue in enumerate(_HUES):
        for level in range(_LEVELS):
            red, green, blue = (1 - level / (_LEVELS - 1) * (1 - part) for part in mpl.colors.to_rgb(hue))
            bright = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18
            colours = (
                f"background: {mpl.colors.to_hex((red, green, blue))}; color: {'#000' if bright else '#fff'}"
            )
            rules.append(f".head.head-{i}-{level} {{{colours}}}")
    return (
        "<style>.jupyter-button.head {min-width: 0; border: 1px solid #767676}\n" + "\n".join(rules) + "\n"
        ".jupyter-button.head.mod-active {background: #000; color: #fff}\n"
        ".jupyter-button.head:focus-visible {outline: 2px solid #fff; box-shadow: 0 0 0 4px #000}</style>"
    )
