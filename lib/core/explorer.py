"""What every explorer is made of: named controls, pictures with alt text, and errors that the reader sees.

Pictures and tables are values of HTML widgets, not captured outputs: notebooks also run without a browser,
and there a capture can wait for its client for ever.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

import ipywidgets as widgets
from matplotlib.figure import Figure
from PIL import Image

WIDTH = 700  # px, of a page
_DPI = 100


def describe(controls: Mapping[str, widgets.DOMWidget]) -> list[widgets.DOMWidget]:
    """Give each control its name as description, and have sliders answer when they are let go."""
    for name, control in controls.items():
        control.description, control.style = name, {"description_width": "9em"}
        if hasattr(control, "continuous_update"):
            control.continuous_update = False
    return list(controls.values())


def beside(controls: Sequence[widgets.DOMWidget], shown: widgets.DOMWidget) -> widgets.Box:
    """Controls with what they change at their right, or below where the page is narrow."""
    left = widgets.VBox(controls, layout={"width": "320px"})
    return widgets.HBox([left, shown], layout={"flex_flow": "row wrap"})


def redrawing(draw: Callable[[], None], message: widgets.HTML) -> Callable[..., None]:
    """A callback for `observe` that draws, and says in the message how long it took or what went wrong.

    An error of a callback would otherwise end in a log that nobody reads.
    """

    def redraw(_=None) -> None:
        message.value = _status("running …")
        started = time.monotonic()
        try:
            draw()
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            message.value = (
                '<div role="alert" style="color: #b00020; white-space: pre-wrap; overflow-wrap: anywhere">'
                f"{escape(what)}\nWhat stands below is of earlier settings.</div>"
            )
        else:
            message.value = _status(f"drawn in {time.monotonic() - started:.1f} s")

    return redraw


def picture(figure: Figure, alt: str) -> str:
    """A figure as HTML, in its own size and no wider than the page, of 128 colours: a notebook stores it."""
    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", dpi=_DPI)
    Image.open(whole).convert("RGB").quantize(128).save(small, format="png")
    data = base64.b64encode(small.getvalue()).decode()
    return f'<img alt="{escape(alt)}" style="max-width: 100%" src="data:image/png;base64,{data}">'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table as HTML; all texts are escaped, the first of a row names it."""
    lines = [
        "<style>table.explored {width: 100%; line-height: 1.35}",
        "table.explored :is(th, td, caption) {text-align: left; vertical-align: top; padding: 2px 8px;",
        "    white-space: pre-wrap; overflow-wrap: anywhere}",
        "table.explored th[scope=row] {font-weight: normal}</style>",
        f'<table class="explored" style="max-width: {WIDTH}px"><caption>{escape(caption)}</caption>',
        "<tr>" + "".join(f'<th scope="col">{escape(text)}</th>' for text in head) + "</tr>",
    ]
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(text)}</td>" for text in rest)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return "\n".join([*lines, "</table>"])


def _status(text: str) -> str:
    return f'<div role="status" style="opacity: 0.75">{escape(text)}</div>'
