"""The map in the stream, and who writes it: against naive second routes and planted truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from tiny import FAMILIES, save_tiny

from lib.core import families, models, tokens
from lib.core.interventions import Condition
from lib.core.models import ModelError
from lib.core.statistics import Band, Estimate
from lib.core.sweeps import ablation_sweep
from lib.induction import circuits, figures, geometry, maps, walks
from lib.induction.ablations import Ablations, layer_of_the_map, layout_means, stretches
from lib.induction.circuits import circuit
from lib.induction.parameters import GRID_WORDS
from lib.induction.texts import Texts, deal
from lib.induction.writers import parts_of_stream, shares_by_kind

GRID = walks.grid_graph(4, 4, GRID_WORDS)


@pytest.fixture(scope="module")
def organism():
    return models.load("organism/induction")


@pytest.fixture
def means():
    """Word means of three texts, with a planted grid in two directions [text, node, d]."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((3, 16, 40))
    noise[:, :, :2] = 3 * (GRID.positions - GRID.positions.mean(0))
    return noise


# -- harmonics -------------------------------------------------------------------------------------


def test_harmonics_of_the_grid_are_ramps_first_and_a_checkerboard_last():
    waves = maps.graph_harmonics(GRID)
    assert waves.shape == (16, 15)
    assert np.allclose(waves.T @ waves, np.eye(15)) and np.allclose(waves.sum(0), 0)
    roughness = [geometry.dirichlet_energy(wave[:, None], GRID) for wave in waves.T]
    assert np.all(np.diff(roughness) > -1e-9)
    ramps = np.linalg.lstsq(waves[:, :2], GRID.positions - GRID.positions.mean(0), rcond=None)[0]
    explained = waves[:, :2] @ ramps
    assert np.corrcoef(explained[:, 0], GRID.positions[:, 0])[0, 1] > 0.97
    assert abs(np.corrcoef(waves[:, -1], GRID.parity)[0, 1]) > 0.8


@pytest.mark.parametrize(
    ("graph", "image"),
    [
        (GRID, np.arange(16)[::-1]),
        (walks.ring_graph(6), np.array([3, 4, 5, 0, 1, 2])),
        (walks.grid_graph(3, 3), None),  # the middle stays in place in every symmetry
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_opposite_nodes_are_half_a_turn_away(graph, image):
    found = maps.opposite_nodes(graph)
    if image is None:
        assert found is None
    else:
        assert np.array_equal(found, image)
        assert np.array_equal(graph.adjacency[np.ix_(found, found)], graph.adjacency), "a symmetry"


# -- edits -----------------------------------------------------------------------------------------


def test_share_of_the_variance_is_that_of_a_naive_projection(means):
    basis = maps.pattern_basis(means, maps.graph_harmonics(GRID)[:, :3])
    for text in range(3):
        centred = means[text] - means[text].mean(0)
        inside = sum(((centred @ b) ** 2).sum() for b in basis[text])
        assert maps.variance_share(means, basis)[text] == pytest.approx(inside / (centred**2).sum())


def test_share_of_a_pattern_is_the_variance_that_it_explains(means):
    patterns = maps.graph_harmonics(GRID)
    found = maps.pattern_share(means, patterns[:, :2])
    for text in range(3):
        centred = means[text] - means[text].mean(0)
        left = centred - patterns[:, :2] @ np.linalg.lstsq(patterns[:, :2], centred, rcond=None)[0]
        assert found[text] == pytest.approx(1 - (left**2).sum() / (centred**2).sum())
    lacking = means.copy()
    lacking[:, 3] = np.nan
    filled = np.where(np.isnan(lacking), np.nanmean(lacking, 1, keepdims=True), lacking)
    expected = maps.pattern_share(filled, patterns[:, :2])
    assert maps.pattern_share(lacking, patterns[:, :2]) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.05, None])
def test_removal_takes_away_the_share_that_was_asked_for(means, share):
    patterns = maps.graph_harmonics(GRID)[:, :2]
    edit = maps.removal(means, patterns, share)
    held = maps.variance_share(means, edit.basis)
    for text in range(3):
        stream = torch.tensor(means[text], dtype=torch.float32)
        edit.of(text)(stream)
        left = stream.numpy() - stream.numpy().mean(0)
        before = means[text] - means[text].mean(0)
        gone = 1 - (left**2).sum() / (before**2).sum()
        assert gone == pytest.approx(held[text] if share is None else min(share, held[text]), abs=1e-4)
        assert np.allclose(stream.mean(0), means[text].mean(0), atol=1e-4), "the centre stays"


def test_turn_puts_every_word_where_its_image_was_and_leaves_the_rest(means):
    image, patterns = maps.opposite_nodes(GRID), maps.graph_harmonics(GRID)[:, :2]
    nodes = np.tile(np.arange(16), (3, 1))
    edit = maps.turned(means, patterns, image, nodes)
    basis = maps.pattern_basis(means, patterns)
    for text in range(3):
        stream = torch.tensor(means[text], dtype=torch.float32)
        edit.of(text)(stream)
        coordinates = means[text] @ basis[text].T
        assert np.allclose(stream.numpy() @ basis[text].T, coordinates[image], atol=1e-3)
        rest = np.eye(40) - basis[text].T @ basis[text]
        assert np.allclose(stream.numpy() @ rest, means[text] @ rest, atol=1e-3)


def test_what_is_restored_varies_like_the_patterns(means):
    patterns, nodes = maps.graph_harmonics(GRID)[:, :2], np.tile(np.arange(16), (3, 1))
    whole = maps.restored(means, maps.graph_harmonics(GRID), nodes).table
    assert np.allclose(whole, means - means.mean(1, keepdims=True)), "but for what is common to all words"
    table = maps.restored(means, patterns, nodes).table
    others = maps.graph_harmonics(GRID)[:, 2:]
    assert np.allclose(others.T @ table, 0) and np.allclose(patterns.T @ table, patterns.T @ means)


def test_word_without_a_mean_is_an_error(means):
    means[1, 3] = np.nan
    with pytest.raises(ValueError, match="longer window"):
        maps.removal(means, maps.graph_harmonics(GRID)[:, :2], 0.1)


# -- texts -----------------------------------------------------------------------------------------


def test_texts_say_the_words_of_their_own_layout(organism):
    texts = deal(organism, GRID, 30, first=0, n=3, seed=0, walk_seed=5)
    assert texts.ids.shape == (3, 31) and texts.n_prefix == 1
    assert np.array_equal(texts.layouts[0], np.arange(16)), "the given order first"
    for text in range(3):
        said = organism.tokenizer.decode(texts.ids[text, 1:]).split()
        assert said == [GRID_WORDS[texts.layouts[text, node]] for node in texts.nodes[text]]
        assert said == [texts.placed(GRID, text).words[node] for node in texts.nodes[text]]
    further = deal(organism, GRID, 30, first=2, n=2, seed=0, walk_seed=6)
    assert np.array_equal(further.layouts[0], texts.layouts[2]), "the same layouts, other walks"
    assert not np.array_equal(further.nodes[0], texts.nodes[2])
    labels = texts.within(5, 8)
    assert (labels[0, :5] == -1).all() and (labels[0, 8:] == -1).all()
    assert np.array_equal(labels[0, 5:8], texts.nodes[0, 5:8])
    pair = deal(organism, GRID, 20, first=0, n=2, seed=0, walk_seed=1, per_layout=2, bos="none")
    assert pair.n_prefix == 0 and np.array_equal(pair.layouts[0], pair.layouts[1])
    assert not np.array_equal(pair.nodes[0], pair.nodes[1])


def test_window_in_which_a_word_is_missing_is_named(organism):
    same = dict(first=0, n=3, seed=0, walk_seed=5, per_layout=2)
    nodes = deal(organism, GRID, 40, **same).nodes[:, -15:].reshape(3, -1)
    met = [len(set(row.tolist())) for row in nodes]
    assert min(met) < 16, "fifteen tokens of two walks are too few in some layout"
    first = next(i for i, n in enumerate(met) if n < 16)
    with pytest.raises(ValueError, match=f"window: .* layout {first} miss {16 - met[first]} of 16"):
        deal(organism, GRID, 40, window=15, **same)


# -- who writes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_add_up_to_the_stream_and_shares_to_one(family, tmp_path):
    model = models.load(str(save_tiny(family, tmp_path)))
    sizes = families.shape(model)
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(3, 40, (2, 30)))
    nodes = rng.integers(0, 16, (2, 29))
    nodes[:, :16] = np.arange(16)
    texts = Texts(np.zeros((2, 16)), nodes, np.zeros((2, 16), dtype=int), ids, 1)
    layer = sizes.n_layers - 1
    for heads in ((), [(0, 0)]):
        parts = parts_of_stream(model, texts, nodes, layer, heads)
        total = parts.embedding + parts.heads.sum((1, 2)) + parts.mlps.sum(1)
        # A bias of the projection is the same for every word.
        assert np.allclose(total - total.mean(1, keepdims=True),
                           parts.stream - parts.stream.mean(1, keepdims=True), atol=1e-4)  # fmt: skip
        patterns = maps.graph_harmonics(GRID)[:, :2]
        shares = parts.shares(patterns)
        summed = shares["embedding"] + shares["heads"].sum((1, 2)) + shares["mlps"].sum(1)
        assert np.allclose(summed, 1, atol=1e-3)
    assert np.allclose(parts.heads[:, 0, 0], 0), "what is ablated writes nothing"


def test_parts_are_those_of_plain_hooks(organism):
    texts = deal(organism, GRID, 60, first=0, n=1, seed=0, walk_seed=0)
    parts = parts_of_stream(organism, texts, texts.nodes, 3)
    seen, module = {}, organism._module
    block = module.model.layers[1]
    handles = [
        block.mlp.register_forward_hook(lambda m, a, out: seen.update(mlp=out)),
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.update(heads=a[0])),
    ]
    with torch.no_grad():
        module(texts.ids)
    for handle in handles:
        handle.remove()
    nodes = texts.nodes[0]
    at = seen["heads"][0, 1:].unflatten(-1, (8, -1))[:, 5]
    weight = block.self_attn.o_proj.weight.unflatten(1, (8, -1))[:, 5]
    written = at @ weight.T
    for node in range(16):
        if (nodes == node).any():
            here = torch.from_numpy(nodes == node)
            assert np.allclose(parts.mlps[0, 1, node], seen["mlp"][0, 1:][here].mean(0), atol=1e-4)
            assert np.allclose(parts.heads[0, 1, 5, node], written[here].mean(0), atol=1e-4)


def test_layer_without_parts_below_is_named(organism):
    texts = deal(organism, GRID, 20, first=0, n=1, seed=0, walk_seed=0)
    for layer in (0, 9):
        with pytest.raises(ModelError, match=f"layer {layer}"):
            parts_of_stream(organism, texts, texts.nodes, layer)


# -- figures ---------------------------------------------------------------------------------------


def test_plane_is_turned_to_the_drawn_graph_and_keeps_its_energy(means):
    axes = figures.plane_axes(means[0], GRID)
    plane = figures.on_axes(means[0], means[0], axes)
    energy = geometry.dirichlet_energy(plane, GRID)
    assert energy == pytest.approx(geometry.plane_energy(means[0], GRID))
    for axis in range(2):
        assert np.corrcoef(plane[:, axis], GRID.positions[:, axis])[0, 1] > 0.9
    absent = means[0].copy()
    absent[4] = np.nan
    plane = figures.on_axes(absent, absent, figures.plane_axes(absent, GRID))
    assert np.isnan(plane[4]).all() and np.isfinite(np.delete(plane, 4, axis=0)).all()


@pytest.fixture
def drawn():
    """Numbers of a model of 30 layers, as the figures take them."""
    rng = np.random.default_rng(0)
    band = Band(*(np.sort(rng.random((3, 31)), axis=0)[[1, 0, 2]]))
    return rng, band


def test_figures_of_a_deep_model_label_their_lines_apart(means, drawn):
    rng, band = drawn
    singles = rng.random((8, 31))
    plane = figures.on_axes(means[0], means[0], figures.plane_axes(means[0], GRID))
    ends = Band(*(x[:6] for x in band))
    estimate = Estimate(0.3, 0.2, 0.4)
    made = [
        figures.head_scores({"induction": rng.random((30, 9)), "previous token": rng.random((30, 9))}, 9),
        figures.energy_by_layer(dict.fromkeys("abcd", band), singles, chance=3.2, layer=23, title="t"),
        figures.answer(400, rng.random(8), {"induction": {1: rng.random(8), 32: rng.random(8)},
                                            "previous token": {1: rng.random(8)}}, rng.random((3, 8)),
                       {"a": plane, "b": plane, "c": plane}, GRID, titles=["x", "y", "z"]),
        figures.bigrams(plane, np.repeat(plane, 16, axis=0), GRID, {"previous word": rng.random(50)}, "t"),
        figures.over_context(np.arange(6), {12: rng.random(6), 23: rng.random(6)}, ends,
                             headless=rng.random(6), chance=3.2, titles=("a", "b")),
        figures.map_use(range(6), {"grid": ends, "checkerboard": ends}, [1, 3], {}, ("a", "b")),
        figures.writers({"x": {"MLPs": estimate}, "y": {"MLPs": estimate}, "z": {"MLPs": estimate}},
                        {"nobody": estimate}, 3.2, ("a", "b")),
    ]  # fmt: skip
    for fig in made:
        fig.canvas.draw()
        width = fig.get_size_inches()[0] * fig.dpi
        for ax in fig.findobj(Axes):
            titles = [ax.title, ax._left_title]
            assert all(t.get_window_extent().x1 <= width + 1 for t in titles if t.get_text()), "cut off"
    pyplot.close("all")


# -- ablations -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(organism):
    texts = deal(organism, GRID, 80, first=0, n=3, seed=0, walk_seed=0)
    heads = [(2, 0), (2, 2), (3, 0), (3, 2)]
    random = [[(0, 1), (1, 1)], [(1, 2), (4, 1)]]
    conditions = [Condition("baseline"), Condition("induction", heads[2:])]
    conditions += [Condition("random", pair, draw) for draw, pair in enumerate(random)]
    sweep = ablation_sweep(organism, texts.ids, conditions, word_ids=texts.words, n_classes=16,
                           labels=texts.within(40), positions=np.arange(0, 80, 3))  # fmt: skip
    return Ablations(sweep, texts, GRID, 40)


def naive_accuracy(runs, condition, text, first):
    found = []
    for place, position in enumerate(runs.sweep.positions):
        if position >= first:
            node = runs.texts.nodes[text, position]
            found.append(sum(runs.sweep.word_probabilities[condition, text, place, j]
                             for j in range(16) if GRID.adjacency[node, j]))  # fmt: skip
    return np.mean(found)


def test_accuracy_is_that_of_a_naive_loop(runs):
    for text in range(3):
        assert runs.accuracy()[text] == pytest.approx(naive_accuracy(runs, 0, text, 40), rel=1e-5)
        assert runs.accuracy("induction", 2)[text] == pytest.approx(
            naive_accuracy(runs, 1, text, 40), rel=1e-5
        )
        both = [naive_accuracy(runs, c, text, 40) for c in (2, 3)]
        assert runs.accuracy("random", 2)[text] == pytest.approx(np.mean(both), rel=1e-5)
    assert runs.draws("random", 2) == pytest.approx(
        [np.mean([naive_accuracy(runs, c, text, 40) for text in range(3)]) for c in (2, 3)], rel=1e-5
    )
    assert (runs.within() > runs.accuracy()).all() and (runs.within() <= 1).all()
    assert runs.curve_by([0, 40, 80])[:, 1] == pytest.approx(runs.accuracy(), rel=1e-6)
    assert runs.curve("random", 2, n=4).shape == (2, 4)
    means = runs.means("induction", 2)
    for text in range(3):
        expected = geometry.plane_energies(means[text], GRID)
        assert runs.energies("induction", 2)[text] == pytest.approx(expected, nan_ok=True)


def test_table_puts_published_values_at_like_shares(runs):
    published = {
        "ablated_heads": [0, 32], "n_heads": 640,
        "accuracy_induction_ablated": [0.9, 0.4],
    }  # fmt: skip
    rows = runs.table(["induction"], [0, 2], published, 40, 2).rows
    assert rows[3] == ["Llama-3.1-8B", "0.90", "0.40"]
    assert rows[1][2].startswith(f"{runs.accuracy('induction', 2).mean():.2f}")
    assert runs.table(["induction"], [0, 2], published, 40, 1).rows[3][2] == "", "beyond the published share"


def test_layer_that_is_asked_for_must_be_there(organism, runs):
    assert layer_of_the_map(organism, runs.texts, GRID, 40, 3) == 3
    assert 2 <= layer_of_the_map(organism, runs.texts, GRID, 40, -1) < 5
    with pytest.raises(ModelError, match="layer 7"):
        layer_of_the_map(organism, runs.texts, GRID, 40, 7)


def test_means_of_a_layout_pool_its_walks(organism):
    texts = deal(organism, GRID, 40, first=0, n=2, seed=0, walk_seed=3, per_layout=2)
    labels = stretches(texts, [0, 20, 40], 10, 16)
    assert labels.shape == (3, 4, 40) and 32 <= labels.max() < 48
    sweep = ablation_sweep(organism, texts.ids, [Condition("baseline")], word_ids=texts.words, labels=labels,
                           n_classes=48, positions=[39], layers=[2])  # fmt: skip
    pooled = layout_means(sweep, 2, 3)
    assert pooled.shape == (1, 2, 1, 3, 16, 256)
    with torch.no_grad():
        hidden = organism._module(texts.ids, output_hidden_states=True).hidden_states[2][:, 1:]
    for layout in range(2):
        rows, nodes = hidden[2 * layout : 2 * layout + 2], texts.nodes[2 * layout : 2 * layout + 2]
        for group, (a, b) in enumerate([(10, 40), (0, 20), (20, 40)]):
            for node in range(16):
                here = rows[:, a:b][torch.from_numpy(nodes[:, a:b] == node)]
                expected = here.mean(0) if len(here) else torch.full((256,), torch.nan)
                assert pooled[0, layout, 0, group, node] == pytest.approx(
                    expected.numpy(), abs=1e-3, nan_ok=True
                )


def test_use_of_a_planted_map_is_found(organism, runs):
    """Turning everything turns what the organism predicts; what is restored is what is added."""
    rng = np.random.default_rng(0)
    known = {2: runs.means()[:, 2] + 0 * rng.random((3, 16, 256))}
    known[2] = np.nan_to_num(known[2], nan=0.0)
    lacking = {2: known[2] - np.nan_to_num(runs.means("induction", 2)[:, 2])}
    edits = maps.map_edits(GRID, known, lacking, runs.texts, removed_at=[2], turned_at=[2],
                           heads=[(3, 0)], share=0.1, seed=0)  # fmt: skip
    names = [edit.name for edit in edits]
    assert len(set(names)) == len(names) == 11 and "turn everything 2" in names
    bases = edits[names.index("remove shuffled grids 2")].edits[2].basis
    for text, shuffled in enumerate(maps.MapParts.of(GRID, n_texts=3).shuffled):
        assert np.allclose(bases[text], maps.pattern_basis(known[2][text], shuffled)), "one of its own each"
    positions = runs.sweep.positions[runs.late]
    edited = ablation_sweep(organism, runs.texts.ids, edits, word_ids=runs.texts.words, n_classes=16,
                            labels=runs.texts.within(40), positions=positions, layers=())  # fmt: skip
    intact = runs.sweep.word_probabilities[0][:, runs.late]
    use = maps.map_use(edited, GRID, runs.texts, removed_at=[2], turned_at=[2], intact=intact)
    assert set(use.cost) == {"grid", "shuffled grids", "checkerboard"}
    assert use.moved["everything"].mean() > 5 * abs(use.moved["grid"].mean())
    turn = names.index("turn grid 2")
    nodes = runs.texts.nodes[:, positions]
    for text in range(3):
        far = 0.0
        for place, node in enumerate(nodes[text]):
            opposite = 15 - node
            there = [j for j in range(16) if GRID.adjacency[opposite, j] and not GRID.adjacency[node, j]]
            far += (
                edited.word_probabilities[turn, text, place, there].sum() - intact[text, place, there].sum()
            )
        assert use.moved["grid"][text, 0] == pytest.approx(far / len(nodes[text]), abs=1e-5)


# -- circuits --------------------------------------------------------------------------------------


def test_shares_of_lists_count_a_head_once(organism):
    texts = deal(organism, GRID, 80, first=0, n=2, seed=0, walk_seed=0)
    parts = parts_of_stream(organism, texts, texts.nodes, 4)
    patterns = maps.graph_harmonics(GRID)[:, :2]
    lists = {"a": [(2, 0), (3, 1), (4, 4)], "b": [(2, 0), (2, 2)]}
    found = shares_by_kind(parts, patterns, lists)
    heads = parts.shares(patterns)["heads"]
    assert np.allclose(found["a"], heads[:, 2, 0] + heads[:, 3, 1]), "layer 4 is not below layer 4"
    assert np.allclose(found["b"], heads[:, 2, 2])
    assert np.allclose(sum(found.values()), 1, atol=1e-3)


def test_circuit_of_a_planted_copier_copies(organism, monkeypatch):
    """A head whose OV circuit is half of the identity on the stream is a copier; its negative is none."""
    ids = tokens.with_bos(organism, np.array(tokens.word_ids(organism, GRID_WORDS))[:, None])
    turns = [np.linalg.qr(np.random.default_rng(i).standard_normal((256, 256)))[0] for i in range(4)]
    stream, normed = circuits.read_words(organism, ids, 2)
    gain = (normed * stream).sum(0) / (stream**2).sum(0)
    monkeypatch.setattr(circuits, "ov_matrix", lambda *_: torch.from_numpy(np.diag(0.5 / gain)))
    found = circuit(organism, (2, 0), ids, GRID, turns, seed=0)
    assert found.alignment == pytest.approx(1, abs=1e-6) and found.size == pytest.approx(0.5)
    assert found.way.value == pytest.approx(1, abs=1e-6)
    monkeypatch.setattr(circuits, "ov_matrix", lambda *_: torch.from_numpy(np.diag(-0.5 / gain)))
    assert circuit(organism, (2, 0), ids, GRID, turns, seed=0).way.value < 0
