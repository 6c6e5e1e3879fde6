"""The dashboard of study 4: what a CODI model attends to and decodes, problem by problem.

`dashboard_data` gathers plain values, `page` makes one HTML file of them that needs no server and no network.
Texts reach the page as JSON, and its script puts them in place as text, never as markup; a policy in the
page lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import numpy as np

from lib.codi.checkpoint import CodiModel
from lib.codi.decoding import attended
from lib.codi.latents import ThoughtIndex, Thoughts
from lib.codi.problems import Problem
from lib.codi.readings import Reading, number_positions
from lib.core import plots
from lib.core.families import shape
from lib.core.models import provenance

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # a category is one of them
_FILES = {suffix: Path(__file__).with_suffix(suffix) for suffix in (".html", ".css", ".js")}


def dashboard_data(
    codi: CodiModel, problems: Sequence[Problem], thoughts: Thoughts, reading: Reading
) -> dict:
    """Everything that the dashboard shows, as plain values that JSON keeps.

    Masses and probabilities are whole thousandths, so that a rerun gives the same bytes.

    Args:
        codi: that all was measured on.
        problems: to show, twins among them for the comparison.
        thoughts: of these problems, from `think`.
        reading: of these problems, from `read_thoughts`; its k is how many tokens a state shows, its layers
        are
            those of the lens, the last one last.

    Returns:
        "model"; "rows", the states in order; "categories" of tokens; "layers" of the lens; "words", texts of
        the tokens that the lens shows; "problems", each with
            "label" for menus, "twin", index among the problems, "correct", "answer", "wrote" by the model,
            "tokens" [token], "kinds" [row] a digit a token, "attention" [row][token] in thousandths, and
            "top" [row], tokens in order of attention; rows end at their own token,
            "lens" [layer][row], pairs of a word and its probability in thousandths,
            "results" of the steps, and "tree" (see `expression_trees`).

    Raises:
        ValueError: problems, thoughts and reading are not of one another; a reading without thoughts or
            without the lens at the last layer.
    """
    sizes = {len(problems), len(thoughts.z), len(reading.texts)}
    if len(sizes) > 1:
        raise ValueError(
            f"{len(problems)} problems, thoughts of {len(thoughts.z)} and a reading of {len(reading.texts)}; "
            "pass those of the same problems"
        )
    last = shape(codi.model).n_layers - 1
    if not reading.thought_rows or reading.layers[-1] != last:
        raise ValueError(
            f"a reading with rows {reading.rows} and the lens at layers {reading.layers}: the dashboard "
            f"needs one of `read_thoughts`, with z_0, z_1, ... and layers that end in {last}"
        )
    k = reading.tokens.shape[-1]
    top = attended(reading, k + 1).positions  # one more, for who leaves the sink out
    used = np.unique(reading.tokens)
    words = np.searchsorted(used, reading.tokens)  # [problem, layer, row, k]
    pairs = np.stack([words, _thousandths(reading.probabilities)], axis=-1)
    place = {problem.id: i for i, problem in enumerate(problems)}
    correct = thoughts.answers.equal([problem.answer for problem in problems])[0]

    shown = []
    for i, problem in enumerate(problems):
        lengths = (reading.kinds[i] >= 0).sum(-1)  # of what each row sees
        attention = _thousandths(reading.attention[i])
        mark = "✓" if correct[i] else "✗"
        shown.append({
            "id": problem.id,
            "label": f"{mark} {problem.id}: {shorten(problem.question, 60, placeholder='…')}",
            "twin": place.get(problem.twin),
            "correct": bool(correct[i]),
            "answer": _number(problem.answer),
            "wrote": thoughts.answers.texts[0][i],
            "tokens": reading.texts[i],
            "kinds": [
                "".join(_DIGITS[kind] for kind in row[:n])
                for row, n in zip(reading.kinds[i], lengths, strict=True)
            ],
            "attention": [row[:n].tolist() for row, n in zip(attention, lengths, strict=True)],
            "top": top[i].tolist(),
            "lens": pairs[i].reshape(*pairs.shape[1:3], -1).tolist(),
            "results": [_number(equation.result) for equation in problem.equations],
            "tree": expression_trees(problem, number_positions(codi, problem)),
        })  # fmt: skip
    return {
        "model": "/".join(Path(provenance(codi.model)["model_id"]).parts[-2:]),
        "rows": [_row(name) for name in reading.rows],
        "categories": list(reading.categories),
        "layers": list(reading.layers),
        "words": [codi.token_texts[token] for token in used],
        "problems": shown,
    }


def expression_trees(problem: Problem, positions: Sequence[Sequence[int]]) -> list[dict]:
    """The solution from its result down to the question's numbers.

    Args:
        problem: with its steps.
        positions: tokens of each number in the question.

    Returns:
        One tree for each step whose result no later step takes. A step is {"step", "text", "value", "of"},
        with its operands under "of"; a number is {"value", "at"}, with its tokens in the question, none for
        one that does not stand there. A result that is taken again is {"step", "value"} alone.
    """
    latest: dict[float, int] = {}  # step of each result so far
    steps, taken = [], set()
    for step, equation in enumerate(problem.equations):
        operands = []
        for operand in equation.operands:
            source = latest.get(operand)
            if source is None:
                at = [
                    int(token)
                    for number, tokens in zip(problem.numbers, positions, strict=True)
                    if number.value == operand
                    for token in tokens
                ]
                operands.append({"value": _number(operand), "at": at})
            elif source in taken:
                operands.append({"value": _number(operand), "step": source})
            else:
                operands.append(steps[source])
                taken.add(source)
        value = _number(equation.result)
        steps.append({"step": step, "text": equation.left, "value": value, "of": operands})
        latest[equation.result] = step
    return [tree for step, tree in enumerate(steps) if step not in taken]


def page(data: dict, only: int | None = None) -> str:
    """One HTML page with style, script and data in it.

    Args:
        data: of `dashboard_data`.
        only: show this problem and its twin alone, without the choice of problems.
    """
    if only is not None:
        data = _alone(data, only)
    style, script = (_FILES[suffix].read_text(encoding="utf-8") for suffix in (".css", ".js"))
    hues = {name: getattr(plots, name) for name in ("BLUE", "SKY", "GREEN", "VERMILLION", "ORANGE", "PURPLE")}
    style = ":root {" + "".join(f" --{name.lower()}: {hue};" for name, hue in hues.items()) + " }\n" + style
    text = json.dumps(data, separators=(",", ":"), sort_keys=True, allow_nan=False)
    # Inside a script element only < can end it or open a comment.
    parts = {"STYLE": style, "SCRIPT": script, "DATA": text.replace("<", "\\u003c")}
    parts |= {f"{name}_HASH": _source_hash(parts[name]) for name in ("STYLE", "SCRIPT")}
    template = _FILES[".html"].read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # once: data is no template


def _alone(data: dict, index: int) -> dict:
    problem = data["problems"][index]
    chosen = [{**problem, "twin": None if problem["twin"] is None else 1}]
    if problem["twin"] is not None:
        chosen.append({**data["problems"][problem["twin"]], "twin": 0})
    return {**data, "problems": chosen, "alone": True}


def _row(name: str) -> dict:
    """A state, and what others call it."""
    if not name.startswith("z_"):
        return {"name": name}
    index = ThoughtIndex(int(name.removeprefix("z_")))
    return {"name": name, "neverix": index.neverix, "goyal": index.goyal}


def _thousandths(shares: np.ndarray) -> np.ndarray:
    return np.rint(1000 * np.nan_to_num(shares)).astype(int)


def _number(value: float) -> str:
    """16.0 is 16, as tokens have it."""
    return str(int(value)) if value == int(value) else repr(float(value))


def _source_hash(text: str) -> str:
    """As a content security policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
