"""The explorers without a browser: what a control does, what is drawn, and that errors are shown."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from html import unescape

import ipywidgets
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from lib.core import explorer as parts
from lib.core import models, tokens
from lib.core.interventions import Condition
from lib.core.sweeps import ablation_sweep
from lib.induction import explorer as induction
from lib.induction import mixing_explorer as mixing
from lib.induction.parameters import GRID_WORDS
from lib.induction.walks import grid_graph, random_walks, ring_graph, rule_following_accuracy
from lib.refusal import explorer as refusal
from lib.refusal.behaviour import measure
from lib.refusal.directions import extract
from lib.refusal.judges import make_judge
from lib.refusal.prompts import prompts_for
from lib.refusal.removal import Ablation

GRID, RING = grid_graph(3, 3), ring_graph(8)


@pytest.fixture(autouse=True)
def closed_figures():
    mpl.use("agg")
    yield
    plt.close("all")


def parts_of(box: ipywidgets.Widget) -> Iterator[ipywidgets.Widget]:
    yield box
    for child in getattr(box, "children", ()):
        yield from parts_of(child)


def find(box: ipywidgets.Box, description: str) -> ipywidgets.Widget:
    return next(each for each in parts_of(box) if getattr(each, "description", None) == description)


def html(box: ipywidgets.Box) -> str:
    return "\n".join(each.value for each in parts_of(box) if isinstance(each, ipywidgets.HTML))


def images(box: ipywidgets.Box) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html(box))]


def alert(box: ipywidgets.Box) -> str:
    found = re.search(r'role="alert"[^>]*>(.*?)</div>', html(box), re.DOTALL)
    return unescape(found[1]) if found else ""


# -- parts -----------------------------------------------------------------------------------------


def test_error_of_a_redraw_is_shown_as_text_until_one_succeeds():
    errors, message = [ValueError("<img src=x onerror=hit()> is no graph")], ipywidgets.HTML()

    def draw():
        if errors:
            raise errors.pop()

    redraw = parts.redrawing(draw, message)
    redraw()
    assert "ValueError: <img src=x onerror=hit()> is no graph" in alert(message)
    assert "<img" not in message.value
    redraw()
    assert alert(message) == "" and "drawn in 0.0 s" in message.value


def test_tables_and_pictures_hold_texts_as_texts():
    hostile = '<script>hit()</script>" onload="hit()'
    shown = parts.table([hostile, "b"], [[hostile, hostile]], hostile)
    assert "<script" not in shown and unescape(shown).count(hostile) == 4
    shown = parts.picture(mpl.figure.Figure(figsize=(1, 1)), hostile)
    assert "<script" not in shown and '" onload' not in shown and f'alt="{hostile}"' in unescape(shown)


# -- mixing ----------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """Settings of every picture that the explorer asks for."""
    calls = []
    monkeypatch.setattr(mixing, "draw_mixing", lambda ax, graph, **settings: calls.append((graph, settings)))
    return calls


def test_picture_shows_the_cloud_and_titles_its_energy():
    _, ax = plt.subplots()
    assert mixing.draw_mixing(ax, GRID, d=300, self_weight=0.5, steps=2, rank=200, noise=0.3, seed=4) is ax
    # The same by hand.
    rng = np.random.default_rng(4)
    vectors = rng.standard_normal((9, 300))
    mean = np.array([row / row.sum() for row in GRID.adjacency.astype(float)])
    mixed = vectors.copy()
    for _ in range(2):
        seen = mixed.copy()
        seen[:, 200:] = 0
        mixed = 0.5 * mixed + mean @ seen
    mixed += 0.3 * rng.standard_normal((9, 300))
    centred = mixed - mixed.mean(axis=0)
    plane = np.linalg.svd(centred, full_matrices=False)[0][:, :2] * np.linalg.svd(centred)[1][:2]
    energy = sum(((plane[i] - plane[j]) ** 2).sum() for i, j in GRID.edges) / (plane**2).sum()
    assert f"E = {energy:.2f} " in ax.get_title(loc="left") + ax.get_title()
    drawn = np.asarray(ax.collections[1].get_offsets())
    assert np.allclose(np.abs(drawn), np.abs(plane), atol=1e-6)


def test_sliders_redraw_with_what_they_say(drawn):
    explorer = mixing.mixing_explorer([GRID, RING], seed=7)
    published = {"d": 4096, "self_weight": 1.0, "steps": 1, "rank": 4096, "noise": 0.0, "seed": 7}
    assert [settings for _, settings in drawn] == [published]
    drawn.clear()
    find(explorer, "graph").value = RING
    find(explorer, "steps").value = 3
    find(explorer, "self-weight").value = 0.4
    find(explorer, "log2 dimension").value = 8
    find(explorer, "rank / dimension").value = 0.25
    find(explorer, "noise (SD)").value = 0.5
    assert len(drawn) == 6, "one picture a change"
    graph, settings = drawn[-1]
    assert graph is RING
    assert settings == {"d": 256, "self_weight": 0.4, "steps": 3, "rank": 64, "noise": 0.5, "seed": 7}


def test_stills_are_the_explorer_row_by_column(drawn):
    figure = mixing.mixing_stills(GRID, d=64, self_weights=(1.0, 0.0), steps=(1, 2), seed=3)
    panels = [(settings["self_weight"], settings["steps"]) for _, settings in drawn]
    assert panels == [(1.0, 1), (1.0, 2), (0.0, 1), (0.0, 2)] and len(figure.axes) == 4


# -- induction -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ablations() -> induction.HeadAblations:
    model, graph = models.load("organism/induction"), grid_graph(4, 4, GRID_WORDS)
    nodes = random_walks(graph, 3, 90, seed=0)
    return induction.HeadAblations(model, graph, nodes, layer=4, window=40)


SCORES = {"induction": np.zeros((5, 8)), "previous token": np.zeros((5, 8))}
SCORES["induction"][3, :3] = 0.9, 0.8, 0.7
SCORES["previous token"][2, [0, 2]] = 1.0, 0.95


def pressed(box: ipywidgets.Box) -> list[str]:
    buttons = (each for each in parts_of(box) if isinstance(each, ipywidgets.ToggleButton))
    return [button.description for button in buttons if button.value]


def test_outcome_is_that_of_the_studys_sweep(ablations):
    heads, graph, nodes = [(2, 0), (3, 1)], ablations.graph, ablations.nodes
    word_ids = tokens.word_ids(ablations.model, graph.words)
    sweep = ablation_sweep(
        ablations.model, tokens.with_bos(ablations.model, np.array(word_ids)[nodes]), [Condition("a", heads)],
        word_ids=word_ids, labels=np.where(np.arange(90) >= 50, nodes, -1), n_classes=16, layers=[4],
    )  # fmt: skip
    outcome = ablations(heads)
    np.testing.assert_allclose(
        outcome.accuracy, rule_following_accuracy(sweep.word_probabilities, nodes, graph)[0], atol=1e-5
    )
    np.testing.assert_allclose(outcome.means, sweep.class_means()[0, 0], atol=1e-4)
    assert ablations(reversed(heads)) is outcome, "a set of heads is measured once"
    assert ablations.score()[0] > ablations.score(heads)[0] + 0.1


def test_board_ablates_what_is_pressed(ablations):
    explorer = induction.induction_explorer(ablations, SCORES)
    (before,) = images(explorer)
    button = find(explorer, "2.0")
    button.value = True
    (after,) = images(explorer)
    intact, left = ablations.score()[0], ablations.score([(2, 0)])[0]
    assert before != after and f"{intact:.2f} intact, {left:.2f} ablated" in html(explorer)
    assert "ablated: 2.0 (1 of 40)" in html(explorer) and button.description == "✕ 2.0"
    button.value = False
    assert images(explorer) == [before] and button.description == "2.0"
    assert not plt.get_fignums(), "no figure is left open"


def test_presets_press_heads_with_one_picture(ablations, monkeypatch):
    explorer, pictures = induction.induction_explorer(ablations, SCORES), []
    monkeypatch.setattr(induction, "picture", lambda figure, alt: pictures.append(alt) or "")
    find(explorer, "top k induction").click()
    assert pressed(explorer) == ["✕ 3.0", "✕ 3.1"] and len(pictures) == 1
    find(explorer, "k").value = 3
    find(explorer, "top k induction").click()
    assert pressed(explorer) == ["✕ 3.0", "✕ 3.1", "✕ 3.2"] and len(pictures) == 2
    find(explorer, "k random others").click()
    drawn = pressed(explorer)
    assert len(drawn) == 3 and not {"✕ 3.0", "✕ 3.1", "✕ 3.2", "✕ 2.0", "✕ 2.2"} & {*drawn}
    find(explorer, "clear").click()
    assert pressed(explorer) == [] and "ablated: none (0 of 40)" in pictures[-1]
    assert alert(explorer) == ""


def test_board_of_a_large_model_shows_some_layers_at_a_time():
    scores, changes = {"induction": np.random.default_rng(0).random((32, 32))}, []
    board = induction.HeadBoard(scores, lambda: changes.append(board.heads))
    buttons = [each for each in parts_of(board.box) if isinstance(each, ipywidgets.ToggleButton)]
    assert len(buttons) == 256
    board.press([(1, 5), (30, 2)])
    assert pressed(board.box) == ["✕ 1.5"]
    find(board.box, "first layer").value = 24
    assert pressed(board.box) == ["✕ 30.2"] and len(changes) == 1, "to look elsewhere changes nothing"
    find(board.box, "31.31").value = True
    assert changes[-1] == {(1, 5), (30, 2), (31, 31)}


# -- refusal ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def removals() -> refusal.Removals:
    name = "organism/refusal-planted-2"
    model, prompts = models.load(name), prompts_for(name)
    extraction, judge = extract(model, prompts), make_judge("rule", "")
    return refusal.Removals(model, extraction, prompts, judge, n=6, max_new_tokens=12)


def test_outcome_is_that_of_the_studys_measure(removals):
    basis = removals.extraction.categories_at(1)
    np.testing.assert_allclose(removals.subspace([1], "each category"), basis, atol=1e-5)
    texts = removals.forbidden, removals.harmless
    conditions = [Ablation("none", basis[:0]), Ablation("two", basis[:2], strength=0.75)]
    wanted = measure(removals.model, *texts, conditions, removals.judge, max_new_tokens=12)
    for i, outcome in enumerate((removals(), removals([1], 2, 0.75, "each category"))):
        assert outcome.answers[:6] == wanted.answers[i]
        of_forbidden = wanted.compliance[i], wanted.coherence[i]
        np.testing.assert_allclose(outcome.grades[:6], np.transpose(of_forbidden))
        np.testing.assert_allclose(outcome.grades[6:, 0], wanted.harmless_compliance[i])
        np.testing.assert_allclose(outcome.kl, wanted.kl[i], atol=1e-5)
        columns = [*of_forbidden, wanted.harmless_compliance[i], wanted.kl[i]]
        means = [*removals.scores(outcome).values()]
        assert means == pytest.approx([column.mean() for column in columns], abs=1e-5)
    assert removals([1], 2, 0.75, "each category") is outcome, "a setting is measured once"


def test_controls_change_scores_answers_and_heatmap(removals):
    explorer = refusal.refusal_explorer(removals, layer=1)
    assert "Removed: 1 of 1, differences of means over all requests at layer 1." in html(explorer)
    (before,) = images(explorer)
    find(explorer, "means over").value = "each category"
    find(explorer, "directions k").value = 2
    left = removals([1], 2, 1.0, "each category")
    compliance = removals.scores(left)["compliance"]
    assert compliance > removals.scores(removals())["compliance"] + 0.3, "this model's rank is two"
    assert f'<th scope="row">removed</th><td>{compliance:.2f}</td>' in html(explorer)
    for outcome in (removals(), left):
        assert f"<td>[{outcome.grades[0, 0]:g}] {outcome.answers[0]}</td>" in html(explorer)
    find(explorer, "strength α").value = 0.0
    assert f"<td>[{removals().grades[0, 0]:g}] {removals().answers[0]}</td></tr>" in html(explorer)
    assert images(explorer) == [before]
    find(explorer, "layers").value = (2, 3)
    assert "at layers 2, 3." in html(explorer) and images(explorer) != [before]
    assert alert(explorer) == ""


def test_no_layer_is_an_error_that_the_reader_sees(removals):
    explorer = refusal.refusal_explorer(removals, layer=1)
    scores = html(explorer).split("<table")[1]
    find(explorer, "layers").value = ()
    assert "ValueError: no layer is chosen" in alert(explorer) and html(explorer).split("<table")[1] == scores
    find(explorer, "layers").value = (3,)
    assert alert(explorer) == ""


def test_answers_are_texts_and_lost_verdicts_are_counted(removals):
    intact = removals()
    hostile = "<img src=x onerror=hit()>"
    grades = np.where(np.arange(12)[:, None] == 1, np.nan, intact.grades)
    spoilt = intact._replace(answers=[hostile, "", *intact.answers[2:]], grades=grades)
    shown = removals.answer_table(spoilt)
    assert "<img" not in shown and hostile in unescape(shown) and "[?] (nothing)" in shown
    assert "1 without a valid verdict" in removals.score_table(spoilt)
    assert "nan" not in removals.score_table(spoilt) and "verdict" not in removals.score_table(intact)
