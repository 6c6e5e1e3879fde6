"""The explorer of study 3: directions of some layers removed, with the scores and the answers themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.figure import Figure
from nnsight import TransformersModel

from lib.core import plots
from lib.core.explorer import beside, describe, picture, redrawing, table
from lib.core.statistics import known_mean
from lib.refusal import behaviour, directions
from lib.refusal.generation import chat_ids, first_token_kl, generate
from lib.refusal.prompts import PromptSet
from lib.refusal.removal import Ablation, intact
from lib.refusal.verdicts import Judge, grades_of

MEANS = "all requests", "each category"  # what a difference of means is taken over


class Removed(NamedTuple):
    """What the model does to the requests, forbidden ones first.

    Attributes:
        answers: [request].
        grades: compliance and coherence, NaN where the judge had none [request, 2].
        kl: from the intact model, at the first token of the answer to harmless requests, in nats [request].
    """

    answers: list[str]
    grades: np.ndarray
    kl: np.ndarray


class Removals:
    """A chat model answering a few requests without some directions; a setting that was seen is kept.

    Args:
        model: from `lib.core.models.load`.
        extraction: what the directions are read from.
        prompts: forbidden and harmless requests are those of the test split.
        judge: from `lib.refusal.judges`; of an API every new answer is asked about.
        n: requests of each kind, at most.
        max_new_tokens: of an answer.
    """

    def __init__(
        self,
        model: TransformersModel,
        extraction: directions.Extraction,
        prompts: PromptSet,
        judge: Judge,
        *,
        n: int = 12,
        max_new_tokens: int,
    ):
        self.model, self.extraction, self.judge = model, extraction, judge
        self.max_new_tokens = max_new_tokens
        few = prompts.first(n)
        self.forbidden, self.harmless = few.harmful("test"), few.harmless("test")
        self._seen: dict[tuple, Removed] = {}

    def subspace(self, layers: Sequence[int], means: str = MEANS[0]) -> torch.Tensor:
        """All directions that differences of means span at some layers, by falling weight [k, d_model].

        Args:
            layers: from 1 on, at the inputs of blocks.
            means: over all requests, one difference a layer, or over each category of them; of `MEANS`.

        Raises:
            ValueError: no layer, or one without a difference of means.
        """
        if not layers:
            raise ValueError("no layer is chosen: choose one or more")
        harmful, safe = self.extraction.harmful[:, layers], self.extraction.safe[:, layers]
        if means == MEANS[0]:
            return directions.stack(directions.refusal_vectors(harmful, safe)).basis
        labels = np.array(self.extraction.categories)
        of = [torch.from_numpy(labels == name) for name in dict.fromkeys(labels)]
        return directions.stack(
            torch.cat([directions.refusal_vectors(harmful[i], safe[i]) for i in of])
        ).basis

    def __call__(
        self, layers: Sequence[int] = (), k: int = 0, strength: float = 1.0, means: str = MEANS[0]
    ) -> Removed:
        """The model without the first k directions of `subspace`, at a strength; intact for k = 0."""
        key = (tuple(layers), k, strength, means) if k else ()
        if key not in self._seen:
            condition = intact(self.model)
            if k:
                condition = Ablation("explored", self.subspace(layers, means)[:k], strength=strength)
            texts = [*self.forbidden, *self.harmless]
            asked = chat_ids(self.model, texts)
            [tokens] = generate(self.model, asked, [condition], max_new_tokens=self.max_new_tokens)
            answers = behaviour.answer_texts(self.model, asked, tokens)
            kl = first_token_kl(self.model, chat_ids(self.model, self.harmless), [condition])[0]
            self._seen[key] = Removed(answers, grades_of(self.judge(texts, answers)), kl)
        return self._seen[key]

    def scores(self, outcome: Removed) -> dict[str, float]:
        """Means over the requests that have a grade, compliance and coherence of the forbidden ones."""
        forbidden, harmless = np.split(outcome.grades, [len(self.forbidden)])
        columns = {
            "compliance": forbidden[:, 0],
            "coherence": forbidden[:, 1],
            "compliance, harmless": harmless[:, 0],
            "KL, harmless (nats)": outcome.kl,
        }
        return {name: known_mean(values, 0) for name, values in columns.items()}

    def score_table(self, removed: Removed) -> str:
        """Means of the intact model and of what is left of it, as HTML."""
        scores = {"intact": self.scores(self()), "removed": self.scores(removed)}
        rows = [[name, *(f"{value:.2f}" for value in row.values())] for name, row in scores.items()]
        ungraded = int(np.isnan(removed.grades[:, 0]).sum())
        numbers = f"{len(self.forbidden)} forbidden and {len(self.harmless)} harmless requests"
        caption = f"Means over {numbers} of the test split"
        if ungraded:
            caption += f"; {ungraded} without a valid verdict left out"
        return table(["", *scores["intact"]], rows, caption)

    def answer_table(self, removed: Removed, n: int = 6) -> str:
        """The first n forbidden requests with the answers to them, and two harmless ones, as HTML."""
        before = self()
        chosen = [*range(min(n, len(self.forbidden))), *range(len(self.forbidden), len(before.answers))[:2]]
        texts = [*self.forbidden, *self.harmless]
        rows = []
        for i in chosen:
            kind = "" if i < len(self.forbidden) else "(harmless) "
            answers = (graded(each.answers[i], each.grades[i, 0]) for each in (before, removed))
            rows.append([kind + texts[i], *answers])
        caption = "Answers, with their compliance in brackets"
        return table(["request", "intact", "removed"], rows, caption)


def draw_cosines(figure: Figure, extraction: directions.Extraction, chosen: Sequence[int]) -> Figure:
    """Cosine of the refusal vectors of any two layers; the chosen layers carry a mark."""
    layers = np.arange(1, extraction.harmful.shape[1] - 1)
    units = torch.nn.functional.normalize(extraction.vectors[1:-1], dim=-1)
    ax = figure.add_subplot()
    image = plots.draw_matrix(ax, (units @ units.T).numpy(), limit=1.0)
    shown = [layer if layer in chosen or len(layers) <= 12 else "" for layer in layers]
    labels = [f"{layer} ◀" if layer in chosen else layer for layer in shown]
    ax.set(xlabel="layer", xticks=layers - 1, xticklabels=shown)
    ax.set(ylabel="layer", yticks=layers - 1, yticklabels=labels)
    figure.colorbar(image, ax=ax, label="cosine", shrink=0.8)
    return figure


def refusal_explorer(removals: Removals, *, layer: int) -> widgets.VBox:
    """Layers, number of directions and strength, over cosines, scores and the answers themselves.

    Args:
        removals: of the model.
        layer: chosen at first.
    """
    last = removals.extraction.harmful.shape[1] - 2  # as `search.layer_conditions`
    controls = {
        "layers": widgets.SelectMultiple(options=range(1, last + 1), value=(layer,), rows=min(last, 8)),
        "means over": widgets.Dropdown(options=MEANS),
        "directions k": widgets.IntSlider(1, 0, 8),
        "strength α": widgets.FloatSlider(1.0, min=0.0, max=2.0, step=0.25),
    }
    names = ("summary", "heatmap", "scores", "answers")
    shown, message = {name: widgets.HTML() for name in names}, widgets.HTML()

    def draw() -> None:
        layers, means, k, strength = (control.value for control in controls.values())
        found = len(removals.subspace(layers, means))
        outcome = removals(layers, min(k, found), strength, means)
        which = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        figure = draw_cosines(Figure(figsize=(3.4, 2.7), layout="constrained"), removals.extraction, layers)
        values = {
            "summary": f"Removed: {min(k, found)} of {found}, differences of means over {means} at {which}.",
            "heatmap": picture(figure, f"Cosines of refusal vectors between layers; chosen: {which}."),
            "scores": removals.score_table(outcome),
            "answers": removals.answer_table(outcome),
        }
        for name, value in values.items():
            shown[name].value = value

    draw()
    redraw = redrawing(draw, message)
    for control in describe(controls):
        control.observe(redraw, names="value")
    top = beside([*controls.values(), message, shown["summary"]], shown["heatmap"])
    return widgets.VBox([top, shown["scores"], shown["answers"]])


def graded(answer: str, compliance: float) -> str:
    return f"[{'?' if np.isnan(compliance) else f'{compliance:g}'}] {answer or '(nothing)'}"
