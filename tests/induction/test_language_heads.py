"""Appendix 1a: losses equal plain transformers, heads are chosen as it says, its notebook runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, blocks, output_projection, save_tiny

from lib.core.interventions import Condition
from lib.core.models import ModelError, load
from lib.induction.geometry import plane_energies
from lib.induction.language import (
    NaturalTexts,
    decode_previous_word,
    matched_heads,
    mixing_energy,
    python_topics,
    strongest_offsets,
    token_losses,
    top_of_each_layer,
)
from lib.induction.mixing import WordRegression
from lib.induction.walks import grid_graph


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(str(save_tiny("qwen2", tmp_path_factory.mktemp("tiny") / "qwen2")))


def plain_losses(model, ids: torch.Tensor, heads: list[tuple[int, int]]) -> np.ndarray:
    """Loss on every token but the first, with heads zeroed by hooks [text, token - 1]."""
    module, size = model._module, 32 // 4

    def zero(layer):
        def hook(_, args):
            outputs = args[0].clone()
            for at, head in heads:
                if at == layer:
                    outputs[..., head * size : (head + 1) * size] = 0
            return (outputs,)

        return hook

    handles = [
        output_projection(block).register_forward_pre_hook(zero(i)) for i, block in enumerate(blocks(module))
    ]
    try:
        with torch.no_grad():
            logits = module(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    return losses.numpy()


@pytest.mark.parametrize("n_prefix", [0, 1])
def test_gain_from_context_equals_plain_transformers(model, n_prefix):
    ids = torch.from_numpy(np.random.default_rng(0).integers(2, VOCABULARY, (3, 60 + n_prefix)))
    early, late = np.arange(9, 15), np.arange(50, 58)
    tokens, heads = np.unique(np.r_[1:60:4, early, late]), [(0, 1), (2, 3)]
    conditions = [Condition("baseline"), Condition("two", heads)]
    losses = token_losses(model, NaturalTexts(ids, n_prefix, 0.0), conditions, tokens)
    assert losses.shape == (2, 3, len(tokens))
    for found, removed in zip(losses, ([], heads), strict=True):
        naive = plain_losses(model, ids, removed)
        np.testing.assert_allclose(found, naive[:, tokens + n_prefix - 1], atol=1e-4)
        gain = found[:, np.isin(tokens, early)].mean(1) - found[:, np.isin(tokens, late)].mean(1)
        of_text = naive[:, n_prefix - 1 :][:, 1:] if n_prefix else naive  # token 1 first
        expected = of_text[:, early - 1].mean(1) - of_text[:, late - 1].mean(1)
        np.testing.assert_allclose(gain, expected, atol=1e-4)
    assert np.abs(losses[0] - losses[1]).max() > 1e-2


def test_texts_are_pieces_of_the_documentation():
    model = load("organism/induction")
    texts = python_topics(model, 5)
    opening = texts.ids[0, 0]
    assert texts.ids.shape == (5, 513) and texts.n_prefix == 1
    assert (texts.ids[:, 0] == opening).all() and (texts.ids[:, 1:] != opening).all()
    assert texts.unknown > 0.5, "an embedded model knows few words"
    longest = python_topics(model, 4, length=10**6, bos="none")
    assert longest.ids.shape == (4, 1023) and longest.n_prefix == 0  # a model of 1,024 positions
    assert len({tuple(row) for row in longest.ids.tolist()}) == 4
    others = python_topics(model, 4, length=10**6, bos="none", odd=True)
    assert not {tuple(row) for row in longest.ids.tolist()} & {tuple(row) for row in others.ids.tolist()}
    with pytest.raises(ModelError, match="n_texts"):
        python_topics(model, 10**6)


def test_heads_of_each_layer_are_the_best_that_score_enough():
    scores = np.array([[0.05, 0.09, 0.0, 0.02], [0.2, 0.9, 0.4, 0.1], [0.3, 0.0, 0.1, 0.3]])
    assert top_of_each_layer(scores) == [(1, 1), (2, 0)]  # a layer may have none; ties by head
    assert top_of_each_layer(scores, share=0.51) == [(1, 1), (1, 2), (1, 0), (2, 0), (2, 3), (2, 2)]
    assert len(top_of_each_layer(np.ones((24, 14)))) == 24  # 2% of 14 heads, rounded up


def test_matched_heads_are_as_many_in_the_same_layers():
    allowed = np.ones((3, 6), dtype=bool)
    allowed[1, :3] = False
    sets = matched_heads([(1, 0), (1, 1), (2, 5)], allowed, n_draws=8, seed=0)
    assert len(sets) == 8 and len({tuple(sorted(heads)) for heads in sets}) > 1
    for heads in sets:
        assert sorted(layer for layer, _ in heads) == [1, 1, 2] and len(set(heads)) == 3
        assert all(allowed[head] for head in heads)
    assert sets == matched_heads([(1, 0), (1, 1), (2, 5)], allowed, n_draws=8, seed=0)
    assert matched_heads([(1, 0)] * 4, allowed, n_draws=2, seed=0) == []
    assert matched_heads([], allowed, n_draws=2, seed=0) == []


def test_strongest_offsets_leave_out_self_weak_heads_and_rare_offsets():
    spectrum = np.zeros((2, 3, 64))
    spectrum[0, 0, [0, 1]] = 0.6, 0.35  # mostly to itself
    spectrum[0, 1, [31, 63]] = 0.4, 1.0  # 63: one pair of positions
    spectrum[0, 2, 56] = 0.5  # eight pairs
    spectrum[1, 0, 57] = 0.5
    spectrum[1, 1, 32] = 0.29
    assert sorted(strongest_offsets(spectrum)) == [1, 31, 56]


def test_previous_word_is_decoded_where_it_is_and_without_the_graph():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 6, (4, 200))
    before = np.roll(words, 1, axis=1)
    own, carried = rng.normal(size=(2, 6, 40))
    noise = rng.normal(size=(4, 200, 40))
    assert decode_previous_word(own[words] + carried[before], words, before) == pytest.approx(np.ones(4))
    without = decode_previous_word(own[words] + noise, words, before)
    assert without.shape == (4,) and abs(without.mean() - 1 / 6) < 0.08


def test_energy_of_a_planted_mixture_is_predicted():
    graph, rng = grid_graph(3, 3), np.random.default_rng(0)
    layouts = np.stack([rng.permutation(9) for _ in range(6)])
    own, carried = rng.normal(size=(2, 9, 4000))
    counts = np.tile(graph.adjacency.astype(int), (6, 1, 1))  # each pair once

    def regression(weight):
        by_node, by_before = np.zeros((2, 6, 1, 9, 4000))
        for i, layout in enumerate(layouts):
            for node, behind in zip(*np.nonzero(graph.adjacency), strict=True):
                x = own[layout[node]] + weight * carried[layout[behind]]
                by_node[i, 0, node] += x
                by_before[i, 0, behind] += x
        return WordRegression(by_node, by_before, counts, layouts, graph)

    [energy] = mixing_energy(regression(1.0), np.arange(6), graph)
    means = [own[w] + (graph.adjacency / graph.degrees[:, None]) @ carried[w] for w in layouts]
    assert energy == pytest.approx(plane_energies(np.stack(means), graph).mean(), abs=0.3)
    assert np.isnan(mixing_energy(regression(0.0), np.arange(6), graph)).all()
