"""The explorer of study 4: the dashboard, one problem at a time."""

from __future__ import annotations

from html import escape

import ipywidgets as widgets

from lib.codi.dashboard import page
from lib.core.explorer import describe, redrawing


def codi_explorer(data: dict) -> widgets.VBox:
    """Menus of problems, by answer and by number of steps, over the dashboard of the chosen one and its twin.

    The dashboard stands in a frame of its own, sandboxed: what it shows can not reach the notebook.

    Args:
        data: of `lib.codi.dashboard.dashboard_data`.
    """
    numbers = sorted({len(problem["results"]) for problem in data["problems"]})
    kinds = {problem["correct"] for problem in data["problems"]}
    named = {"correct": True, "incorrect": False}
    answers = widgets.Dropdown(options={"all": None} | {k: v for k, v in named.items() if v in kinds})
    steps = widgets.Dropdown(options={"all": None} | {str(n): n for n in numbers})
    menu = widgets.Dropdown(layout={"width": "40em"})
    frame, message = widgets.HTML(), widgets.HTML()

    def draw() -> None:
        if menu.value is None:
            frame.value = "No problem has this number of steps and this kind of answer."
        else:
            frame.value = (
                '<iframe title="Dashboard of one problem" style="width: 100%; height: 50rem; border: 0" '
                f'sandbox="allow-scripts" srcdoc="{escape(page(data, only=menu.value))}"></iframe>'
            )

    redraw = redrawing(draw, message)

    def fill() -> None:
        chosen = menu.value
        found = [
            (problem["label"], i)
            for i, problem in enumerate(data["problems"])
            if answers.value in (None, problem["correct"]) and steps.value in (None, len(problem["results"]))
        ]
        places = [i for _, i in found]
        menu.unobserve(redraw, names="value")  # new options choose the first one for a moment
        menu.options = found
        menu.value = chosen if chosen in places else next(iter(places), None)
        menu.observe(redraw, names="value")

    def refill(_=None) -> None:
        fill()
        redraw()

    menu.observe(redraw, names="value")
    fill()
    draw()
    answers.observe(refill, names="value")
    steps.observe(refill, names="value")
    controls = {"answers": answers, "steps": steps, "problem": menu}
    if len(kinds) < 2:
        del controls["answers"]  # nothing to choose
    return widgets.VBox([*describe(controls), message, frame])
