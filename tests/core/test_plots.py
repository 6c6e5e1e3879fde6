from __future__ import annotations

import io

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from lib.core import plots
from lib.core.labels import label_ends
from lib.induction import graph_figures
from lib.induction.walks import grid_graph

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
        graph_figures.draw_graph(axes, GRID.positions, GRID)
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
    assert graph_figures.draw_graph(ax, GRID.positions, GRID) is ax
    edges, nodes = ax.collections
    drawn = {tuple(map(tuple, segment)) for segment in edges.get_segments()}
    assert drawn == {tuple(map(tuple, GRID.positions[edge])) for edge in GRID.edges}
    assert np.array_equal(nodes.get_offsets(), GRID.positions)
    assert texts(ax) == list("abcdef")
    absent = GRID.positions.copy()
    absent[[1, 4]] = np.nan
    ax.clear()
    graph_figures.draw_graph(ax, absent, GRID)
    edges, nodes = ax.collections
    assert len(nodes.get_offsets()) == 4 and len(edges.get_segments()) == 2  # a-d and c-f
    assert texts(ax) == ["a", "c", "d", "f"] and ax.get_xlabel() == "not seen: b, e"


def test_values_are_coloured_symmetrically_about_zero(ax):
    graph_figures.draw_graph(ax, GRID.positions, GRID, values=np.array([-1, 0, 0, 0, 0, 3.0]), labels=())
    nodes = ax.collections[1]
    assert nodes.get_clim() == (-3, 3) and not any(texts(ax))
    image = plots.draw_matrix(ax, np.array([[1.0, -4.0]]), labels=["row"])
    assert image.get_clim() == (-4, 4)


def test_sign_is_seen_without_hue(ax):
    values = np.array([-1, 0, 2, -1e-12, 3, -2.0])
    graph_figures.draw_graph(ax, GRID.positions, GRID, values=values, labels=())
    _, circles, squares = ax.collections
    assert np.array_equal(circles.get_offsets(), GRID.positions[[1, 2, 3, 4]]), "rounding is no sign"
    assert np.array_equal(squares.get_offsets(), GRID.positions[[0, 5]])
    assert len(circles.get_paths()[0].vertices) > len(squares.get_paths()[0].vertices)


@pytest.mark.parametrize("seed", range(2))
def test_words_cover_neither_each_other_nor_a_point(ax, seed):
    rng = np.random.default_rng(seed)
    graph = grid_graph(4, 4, tuple(f"word-{i}" for i in range(16)))
    heap = rng.standard_normal((16, 2)) * np.where(np.arange(16) < 6, 0.1, 1.0)[:, None]  # six at one place
    graph_figures.draw_graph(ax, heap, graph)
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]  # with the thin line, where there is one
    words = [mpl.text.Text.get_window_extent(text) for text in ax.texts]
    assert texts(ax) == list(graph.words) and len(boxes) == 16
    for i, one in enumerate(words):
        for other in words[i + 1 :]:
            width, height = np.minimum(one.max, other.max) - np.maximum(one.min, other.min)
            assert min(width, height) < 1.5, "no pair of words overlaps"
        inside = one.padded(-1.5)
        assert not any(inside.contains(*point) for point in ax.transData.transform(heap)), "nor hides a point"
    for text, point in zip(ax.texts, heap, strict=True):
        near = np.hypot(*text.get_position()) < 8 + max(len(text.get_text()) * 2.5, 4)
        assert text.xy == pytest.approx(point) and (near or text.arrow_patch is not None)


def test_key_names_what_has_a_name_above_all_panels(ax):
    x = np.arange(3.0)
    plots.draw_prediction(ax, x, x, label="theory")
    plots.draw_series(ax, x, x, "at its end", plots.GREY, style="^--", key="number")
    [key] = plots.draw_key(ax.figure, ax).legends
    assert [text.get_text() for text in key.get_texts()] == ["number"]
    ax.figure.canvas.draw()
    assert key.get_window_extent().y0 >= ax.get_window_extent().y1


def test_samples_are_drawn_as_mean_and_central_95_percent(ax):
    samples = np.stack([np.arange(201.0), 10 + np.arange(201.0)])
    plots.draw_samples(ax, np.array([0, 1]), samples)
    assert ax.lines[0].get_ydata().tolist() == [100, 110]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(5) and band.max() == pytest.approx(205)


@pytest.mark.parametrize("arguments, message", [
    ({"positions": np.zeros((6, 3))}, "positions"),
    ({"positions": GRID.positions, "labels": ["a"]}, "1 labels"),
])  # fmt: skip
def test_a_drawing_that_does_not_fit_its_graph_is_an_error(ax, arguments, message):
    with pytest.raises(ValueError, match=message):
        graph_figures.draw_graph(ax, graph=GRID, **arguments)


def test_labels_of_curves_that_end_together_do_not_overlap(ax):
    ax.set(xlim=(0, 10), ylim=(0, 1))
    ends = {
        "intact": (0.9, plots.BLACK), "random": (0.89, plots.GREY), "induction": (0.4, plots.BLUE),
        "matched": (0.9, plots.SKY), "previous token": (0.41, plots.VERMILLION),
    }  # fmt: skip
    assert label_ends(ax, 10, ends) is ax
    labels = {text.get_text(): text for text in ax.texts}
    assert {name: text.get_color() for name, text in labels.items()} == {n: c for n, (_, c) in ends.items()}
    assert {text.xy[0] for text in labels.values()} == {10}
    by_height = sorted(labels, key=lambda name: labels[name].xy[1])
    assert by_height == ["induction", "previous token", "random", "intact", "matched"]
    ax.figure.canvas.draw()
    boxes = [labels[name].get_window_extent() for name in by_height]
    assert all(lower.y1 <= upper.y0 for lower, upper in zip(boxes, boxes[1:], strict=False))


def test_bars_stand_in_groups_with_intervals_and_differ_without_hue(ax):
    effects = {name: np.array([[0.2, 0.6], [0.1, 0.5], [0.3, 0.7]]) + i / 10 for i, name in enumerate("abcd")}
    assert plots.draw_shares(ax, effects) is ax
    bars = ax.containers
    assert [bar.get_label() for bar in bars] == list("abcd")
    middles = np.array([[patch.get_x() + patch.get_width() / 2 for patch in bar] for bar in bars])
    assert np.allclose(middles.mean(axis=0), [0, 1]) and (np.diff(middles[:, 0]) > 0).all()
    looks = {(bar[0].get_hatch(), bar[0].get_facecolor() > (0.8, 0.8, 0.8)) for bar in bars}
    assert len(looks) == 4, "by hatching or by being light"
    for bar, interval, (share, low, high) in zip(bars, ax.collections, effects.values(), strict=True):
        assert np.allclose([patch.get_height() for patch in bar], share)
        ends = np.array(interval.get_segments())  # [group, end, 2]
        assert np.allclose(ends[:, 0, 1], low) and np.allclose(ends[:, 1, 1], high)


def test_head_scores_are_a_map_with_the_highest_heads_in_numbers(ax):
    scores = np.array([[0.1, 0.95, 0.0], [0.4, 0.2, 1.0]])
    image = plots.draw_head_scores(ax, scores, top=3)
    assert np.array_equal(image.get_array(), scores) and image.get_clim() == (0, 1)
    assert ax.get_xlabel() == "head" and ax.get_ylabel() == "layer"
    # The place of a number is (head, layer); what is bright carries dark text.
    numbers = {text.get_position(): (text.get_text(), text.get_color()) for text in ax.texts}
    assert numbers == {(2, 1): ("1", "black"), (1, 0): (".95", "black"), (0, 1): (".40", "white")}
