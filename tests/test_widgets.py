from __future__ import annotations

import ipywidgets
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from lib import widgets
from lib.geometry import predicted_energy
from lib.walks import grid_graph, ring_graph

GRID, RING = grid_graph(3, 3), ring_graph(8)


@pytest.fixture(autouse=True)
def closed_figures():
    mpl.use("agg")
    yield
    plt.close("all")


@pytest.fixture
def drawn(monkeypatch):
    """Settings of every picture that the explorer asks for."""
    calls = []
    monkeypatch.setattr(widgets, "draw_mixing", lambda ax, graph, **settings: calls.append((graph, settings)))
    return calls


def find(box: ipywidgets.Box, description: str) -> ipywidgets.Widget:
    for child in box.children:
        if getattr(child, "description", None) == description:
            return child
        if isinstance(child, ipywidgets.Box) and (found := find(child, description)):
            return found


def test_picture_shows_the_cloud_and_titles_its_energy():
    _, ax = plt.subplots()
    assert widgets.draw_mixing(ax, GRID, d=300, self_weight=0.5, steps=2, rank=200, noise=0.3, seed=4) is ax
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


def test_picture_compares_with_the_theory_of_its_own_settings():
    graph = grid_graph(2, 5)  # no equal variances at the top, which would hide the share of the rank
    _, ax = plt.subplots()
    widgets.draw_mixing(ax, graph, d=400, self_weight=0.5, steps=2, rank=100, noise=0.3)
    unmixed = 0.75 * 0.5**4 + 0.3**2
    mixing = np.linalg.matrix_power(0.5 * np.eye(10) + graph.adjacency / graph.adjacency.sum(1)[:, None], 2)
    gram = 0.25 * mixing @ mixing.T + unmixed * np.eye(10)
    assert f"(theory {predicted_energy(gram, graph, k=2):.2f})" in ax.get_title(loc="left") + ax.get_title()
    whole = predicted_energy(mixing @ mixing.T, graph, k=2)
    assert f"{whole:.2f}" != f"{predicted_energy(gram, graph, k=2):.2f}", "the share must matter here"


def test_sliders_redraw_with_what_they_say(drawn):
    explorer = widgets.mixing_explorer([GRID, RING], seed=7)
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


def test_picture_is_an_image_that_follows_the_sliders():
    explorer = widgets.mixing_explorer([GRID])
    (picture,) = (child for child in explorer.children if isinstance(child, ipywidgets.Image))
    before = bytes(picture.value)
    assert before.startswith(b"\x89PNG")
    find(explorer, "self-weight").value = 0.0
    assert bytes(picture.value).startswith(b"\x89PNG") and bytes(picture.value) != before
    find(explorer, "self-weight").value = 1.0
    assert bytes(picture.value) == before, "the same settings show the same picture"
    assert not plt.get_fignums(), "no figure is left open"


def test_every_corner_of_the_sliders_can_be_drawn():
    explorer = widgets.mixing_explorer([GRID])
    for end in ("min", "max"):
        for name in ("steps", "self-weight", "log2 dimension", "rank / dimension", "noise (SD)"):
            slider = find(explorer, name)
            slider.value = getattr(slider, end)  # raises if the picture fails


def test_stills_are_the_explorer_row_by_column(drawn):
    figure = widgets.mixing_stills(GRID, d=64, self_weights=(1.0, 0.0), steps=(1, 2, 4), seed=3)
    panels = [(settings["self_weight"], settings["steps"]) for _, settings in drawn]
    assert panels == [(1.0, 1), (1.0, 2), (1.0, 4), (0.0, 1), (0.0, 2), (0.0, 4)]
    axes = np.array(figure.axes).reshape(2, 3)
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["self-weight 1", "self-weight 0"]
    assert [ax.get_xlabel() for ax in axes[1]] == ["1 step", "2 steps", "4 steps"]
