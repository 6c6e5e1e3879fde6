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


def test_sign_is_seen_without_hue(ax):
    values = np.array([-1, 0, 2, -1e-12, 3, -2.0])
    plots.draw_graph(ax, GRID.positions, GRID, values=values, labels=())
    _, circles, squares = ax.collections
    assert np.array_equal(circles.get_offsets(), GRID.positions[[1, 2, 3, 4]]), "rounding is no sign"
    assert np.array_equal(squares.get_offsets(), GRID.positions[[0, 5]])
    assert len(circles.get_paths()[0].vertices) > len(squares.get_paths()[0].vertices)


@pytest.mark.parametrize("seed", range(6))
def test_words_cover_neither_each_other_nor_a_point(ax, seed):
    rng = np.random.default_rng(seed)
    graph = grid_graph(4, 4, tuple(f"word-{i}" for i in range(16)))
    heap = rng.standard_normal((16, 2)) * np.where(np.arange(16) < 6, 0.1, 1.0)[:, None]  # six at one place
    plots.draw_graph(ax, heap, graph)
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


def test_word_with_room_stands_beside_its_point_without_a_line(ax):
    plots.draw_graph(ax, GRID.positions, GRID)
    assert not any(text.arrow_patch for text in ax.texts)
    plots.place_labels(ax, [], np.zeros((0, 2)))


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


def test_series_is_drawn_as_points_on_a_line_with_its_name_at_the_end(ax):
    x, y = np.array([0, 200, 300]), np.array([0.1, 0.7, 0.4])
    assert plots.draw_series(ax, x, y, "prev.", plots.ORANGE) is ax
    [line], [name] = ax.lines, ax.texts
    assert np.array_equal(line.get_xydata(), np.column_stack([x, y]))
    assert (line.get_marker(), line.get_linestyle(), line.get_color()) == ("o", "-", plots.ORANGE)
    assert (name.get_text(), name.xy, name.get_color()) == ("prev.", (300, 0.4), plots.ORANGE)


@pytest.mark.parametrize("heights", [
    [0.5], [0.2, 0.9], [0.5, 0.5, 0.5], [0.9, 0.1, 0.11, 0.12, 0.89], [1, 0, 1, 0], [-3, -3.01, 8, -2.99],
], ids=str)  # fmt: skip
def test_heights_are_moved_apart_in_their_order_and_about_their_mean(heights):
    heights, gap = np.array(heights), 0.2
    moved = plots.spread(heights, gap)
    order = np.argsort(heights, kind="stable")
    assert (np.diff(moved[order]) > gap - 1e-9).all(), "in order, and nowhere nearer than the gap"
    assert moved.mean() == pytest.approx(heights.mean())
    if (np.diff(heights[order]) > gap).all():
        assert np.allclose(moved, heights), "what is apart stays where it is"


def test_labels_of_curves_that_end_together_do_not_overlap(ax):
    ax.set(xlim=(0, 10), ylim=(0, 1))
    ends = {
        "intact": (0.9, plots.BLACK), "random": (0.89, plots.GREY), "induction": (0.4, plots.BLUE),
        "matched": (0.9, plots.SKY), "previous token": (0.41, plots.VERMILLION),
    }  # fmt: skip
    assert plots.label_ends(ax, 10, ends) is ax
    labels = {text.get_text(): text for text in ax.texts}
    assert {name: text.get_color() for name, text in labels.items()} == {n: c for n, (_, c) in ends.items()}
    assert {text.xy[0] for text in labels.values()} == {10}
    by_height = sorted(labels, key=lambda name: labels[name].xy[1])
    assert by_height == ["induction", "previous token", "random", "intact", "matched"]
    ax.figure.canvas.draw()
    boxes = [labels[name].get_window_extent() for name in by_height]
    assert all(lower.y1 <= upper.y0 for lower, upper in zip(boxes, boxes[1:], strict=False))


def test_bands_are_labelled_at_their_ends_without_overlap(ax):
    ax.set(ylim=(0, 1))
    x, middle = np.array([0.0, 5.0, 9.0]), np.array([0.1, 0.3, 0.5])
    bands = {"intact": (middle, middle - 0.1, middle + 0.2), "random": (middle, middle, middle)}
    assert plots.draw_bands(ax, x, bands, [plots.BLACK, plots.GREY], marker="s") is ax
    assert [line.get_color() for line in ax.lines] == [plots.BLACK, plots.GREY]
    assert all(np.array_equal(line.get_xydata(), np.column_stack([x, middle])) for line in ax.lines)
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(0) and heights.max() == pytest.approx(0.7)
    low, high = ax.texts
    assert (low.get_text(), low.get_color(), low.xy[0]) == ("intact", plots.BLACK, 9)
    assert (high.get_text(), high.get_color(), high.xy[0]) == ("random", plots.GREY, 9)
    assert high.xy[1] - low.xy[1] == pytest.approx(0.07) and high.xy[1] + low.xy[1] == pytest.approx(1.0)


def test_band_that_ends_early_is_labelled_where_it_ends_and_a_level_among_the_others(ax):
    ax.set(ylim=(0, 1))
    x, short = np.array([0.0, 5.0, 9.0]), np.array([0.8, 0.9, np.nan])
    bands = {"whole": (x / 10, x / 10, x / 10), "short": (short, short, short), "none": (x * np.nan,) * 3}
    plots.draw_bands(ax, x, bands, [plots.BLUE, plots.ORANGE, plots.GREEN], levels={"chance": 0.88})
    labels = {text.get_text(): text for text in ax.texts}
    assert set(labels) == {"whole", "short", "chance"} and labels["short"].xy == (5, 0.9)
    assert labels["chance"].xy[0] == 9 and labels["chance"].get_color() == plots.GREY
    assert labels["whole"].xy[1] - labels["chance"].xy[1] == pytest.approx(0.07), "and not over each other"
    assert any(line.get_linestyle() == ":" and line.get_ydata()[0] == 0.88 for line in ax.lines)


def test_key_names_what_has_a_name_once_above_all_panels(ax):
    x = np.arange(3.0)
    plots.draw_band(ax, x, x, x, x, key="result", marker="s")
    plots.draw_series(ax, x, x, "", plots.GREY, style="^--", key="number")
    plots.draw_level(ax, 1.0, key="allowed")
    plots.draw_series(ax, x, x, "at its end")
    assert plots.draw_key(ax.figure, ax) is ax.figure
    [key] = ax.figure.legends
    assert [text.get_text() for text in key.get_texts()] == ["result", "number", "allowed"]
    assert [line.get_marker() for line in key.get_lines()] == ["s", "^", "None"]
    ax.figure.canvas.draw()
    assert key.get_window_extent().y0 >= ax.get_window_extent().y1, "above, not on the panel"


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
    plots.draw_shares(ax, {"none": np.zeros((3, 0))})  # nothing to tell, nothing drawn


def test_values_are_written_into_cells_in_legible_ink(ax):
    image = plots.draw_matrix(ax, np.array([[0.5, -0.04], [-1.0, 0.004]]), limit=1.0)
    assert plots.label_cells(image, least=0.03) is image
    numbers = {text.get_position(): (text.get_text(), text.get_color()) for text in ax.texts}
    assert numbers == {(0, 0): (".50", "black"), (1, 0): ("\N{MINUS SIGN}.04", "black"),
                       (0, 1): ("\N{MINUS SIGN}1", "white")}  # fmt: skip


def test_head_scores_are_a_map_with_the_highest_heads_in_numbers(ax):
    scores = np.array([[0.1, 0.95, 0.0], [0.4, 0.2, 1.0]])
    image = plots.draw_head_scores(ax, scores, top=3)
    assert np.array_equal(image.get_array(), scores) and image.get_clim() == (0, 1)
    assert ax.get_xlabel() == "head" and ax.get_ylabel() == "layer"
    # The place of a number is (head, layer); what is bright carries dark text.
    numbers = {text.get_position(): (text.get_text(), text.get_color()) for text in ax.texts}
    assert numbers == {(2, 1): ("1", "black"), (1, 0): (".95", "black"), (0, 1): (".40", "white")}
    assert plots.draw_head_scores(ax, scores, high=2.0).get_clim() == (0, 2)
    ax.clear()
    plots.draw_head_scores(ax, scores[:1, :2], top=3)
    assert [text.get_text() for text in ax.texts] == [".10", ".95"], "fewer heads than are asked for"


def test_head_scores_of_a_large_model_have_few_ticks(ax):
    plots.draw_head_scores(ax, np.zeros((32, 32)), top=0)
    assert ax.get_yticks().tolist() == ax.get_xticks().tolist() == list(range(0, 32, 4)) and not ax.texts


def test_distributions_stand_one_above_the_other_with_mean_and_name(ax):
    values = {
        "previous word": np.array([0.2, 0.21, 0.9]),
        "another": np.zeros(5),
        "none": np.array([-7.0, 1.95, 40.0]),  # beyond the ends
    }
    assert plots.draw_distributions(ax, values) is ax
    assert [label.get_text() for label in ax.get_yticklabels()] == list(values)
    assert ax.get_xlim() == (-0.5, 1.5)
    assert [-row < tick < -row + 0.8 for row, tick in enumerate(ax.get_yticks())] == [True] * 3
    for row, (sample, mean, shape) in enumerate(zip(values.values(), ax.lines, ax.collections, strict=True)):
        assert mean.get_xdata().tolist() == [np.mean(sample)] * 2
        (x0, y0), (x1, y1) = shape.get_datalim(ax.transData).get_points()
        assert y0 == -row and y1 == pytest.approx(-row + 0.8), "each fills a row of its own"
        vertices = shape.get_paths()[0].vertices
        outline = vertices[vertices[:, 1] > -row + 1e-6, 0]  # where there is something
        assert (outline > np.clip(sample.min(), -0.5, 1.5) - 0.06).all()
        assert (outline < np.clip(sample.max(), -0.5, 1.5) + 0.06).all()
