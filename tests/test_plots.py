from __future__ import annotations

import io

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from lib import plots
from lib.walks import grid_graph, ring_graph

GRID = grid_graph(2, 3, ("a", "b", "c", "d", "e", "f"))


@pytest.fixture
def ax():
    with mpl.rc_context():
        mpl.use("agg")
        plots.use_house_style()
        figure, axes = plt.subplots()
        yield axes
        plt.close(figure)


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def rendered(figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def test_house_style_is_opaque_and_an_equal_figure_has_equal_bytes(ax):
    def draw():
        figure, axes = plt.subplots()
        plots.draw_graph(axes, GRID.positions, GRID)
        plt.close(figure)
        return figure

    assert rendered(draw(), "svg") == rendered(draw(), "svg")
    pixels = plt.imread(io.BytesIO(rendered(draw(), "png")))
    assert (pixels[..., 3] == 1).all() and (pixels[0, 0] == 1).all(), "opaque and white"
    assert pixels.shape[1] >= 1400  # 700 px on a page, twice over


def test_hues_are_okabe_and_ito_and_at_most_eight(ax):
    cycle = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    okabe_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert len(set(cycle)) == len(cycle) <= 8 and set(cycle) <= okabe_ito


def test_graph_is_drawn_with_its_edges_and_words(ax):
    assert plots.draw_graph(ax, GRID.positions, GRID) is ax
    edges, nodes = ax.collections
    drawn = {tuple(map(tuple, segment)) for segment in edges.get_segments()}
    assert drawn == {tuple(map(tuple, GRID.positions[edge])) for edge in GRID.edges}
    assert np.array_equal(nodes.get_offsets(), GRID.positions)
    assert texts(ax) == list("abcdef")
    # Every node and the centre of every word's anchor lies within the frame.
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    assert x1 - x0 == pytest.approx(y1 - y0)
    assert ((GRID.positions > [x0, y0]) & (GRID.positions < [x1, y1])).all()


def test_absent_word_is_left_out_and_named(ax):
    positions = GRID.positions.copy()
    positions[[1, 4]] = np.nan
    plots.draw_graph(ax, positions, GRID)
    edges, nodes = ax.collections
    assert len(nodes.get_offsets()) == 4 and len(edges.get_segments()) == 2  # a-d and c-f
    assert texts(ax) == ["a", "c", "d", "f"]
    assert ax.get_xlabel() == "not seen: b, e"


def test_values_are_coloured_symmetrically_about_zero(ax):
    plots.draw_graph(ax, GRID.positions, GRID, values=np.array([-1, 0, 0, 0, 0, 3.0]), labels=())
    nodes = ax.collections[1]
    assert nodes.get_clim() == (-3, 3) and not any(texts(ax))
    image = plots.draw_matrix(ax, np.array([[1.0, -4.0]]), labels=["row"])
    assert image.get_clim() == (-4, 4)
    assert plots.draw_matrix(ax, np.eye(2), limit=7).get_clim() == (-7, 7)


def test_curves_are_labelled_at_their_ends_in_their_colour(ax):
    x, y = np.array([1.0, 2.0, 4.0]), np.array([3.0, 5.0, 6.0])
    plots.draw_band(ax, x, y, y - 1, y + 2, colour=plots.GREEN, label="measured")
    plots.draw_prediction(ax, x, y + 1, label="theory")
    plots.draw_level(ax, 2.5, "chance")
    plots.draw_level(ax, 3.5, "limit", side="left")
    measured, theory, chance, limit = ax.texts
    assert measured.xy == (4, 6) and measured.get_color() == plots.GREEN
    assert theory.xy == (4, 7) and chance.xy == (1, 2.5) and limit.xy == (0, 3.5)
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 2 and band[:, 1].max() == 8


def test_ranges_are_one_bar_a_row(ax):
    middle, low, high = np.array([2.0, 5.0]), np.array([1.0, 4.0]), np.array([4.0, 7.0])
    plots.draw_ranges(ax, np.array([0.0, 1.0]), middle, low, high, colour=plots.GREEN, label="null")
    bars = [segment.tolist() for segment in ax.collections[0].get_segments()]
    assert bars == [[[1, 0], [4, 0]], [[4, 1], [7, 1]]]
    assert ax.lines[0].get_xydata().tolist() == [[2, 0], [5, 1]] and ax.lines[0].get_label() == "null"


def test_samples_are_drawn_as_mean_and_central_95_percent(ax):
    samples = np.stack([np.arange(201.0), 10 + np.arange(201.0)])
    plots.draw_samples(ax, np.array([0, 1]), samples)
    assert ax.lines[0].get_ydata().tolist() == [100, 110]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(5) and band.max() == pytest.approx(205)


@pytest.mark.parametrize("arguments, message", [
    ({"positions": np.zeros((6, 3))}, r"positions must be \[6, 2\] for 2x3 grid, not \(6, 3\)"),
    ({"positions": GRID.positions, "labels": ["a"]}, "1 labels for 2x3 grid of 6 nodes"),
])  # fmt: skip
def test_a_drawing_that_does_not_fit_its_graph_is_an_error(ax, arguments, message):
    with pytest.raises(ValueError, match=message):
        plots.draw_graph(ax, graph=GRID, **arguments)


def test_graph_without_words_is_drawn_bare(ax):
    plots.draw_graph(ax, ring_graph(5).positions, ring_graph(5))
    assert not any(texts(ax)) and len(ax.collections[0].get_segments()) == 5
