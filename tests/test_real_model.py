"""Study 1 on a real language model, SmolLM2-135M: its known heads come out on top, and ablating them tells.

The model is fetched (98 MB); where no source of it can be reached these tests are skipped, and say so.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.core import attention, models, tokens
from lib.core.interventions import Condition
from lib.core.sweeps import ablation_sweep
from lib.induction import geometry, walks
from lib.induction.parameters import GRID_WORDS
from lib.induction.texts import deal

GRID = walks.grid_graph(4, 4, GRID_WORDS)


@pytest.fixture(scope="module")
def model(smollm2):
    return models.load("SmolLM2-135M-Instruct", dtype="float32")


@pytest.fixture(scope="module")
def scores(model):
    opening = tokens.bos_id(model)
    return attention.head_scores(model, tokens.plain_token_ids(model), n_sequences=8, bos=opening)


def test_known_heads_come_out_on_top(scores):
    """Previous-token head 16.0 and induction head 18.6, as found by plain torch."""
    assert attention.top_heads(scores.previous_token, 1) == [(16, 0)]
    assert attention.top_heads(scores.induction, 1) == [(18, 6)]
    assert scores.previous_token[16, 0] == pytest.approx(0.9, abs=0.05)
    assert scores.induction[18, 6] == pytest.approx(0.88, abs=0.05)


def test_it_copies_behind_the_separator_of_its_documents(model):
    plain = tokens.plain_token_ids(model)
    loss = attention.second_copy_loss(model, plain, n_sequences=4, bos=tokens.bos_id(model))
    assert loss < 3 < np.log(len(plain)), "a uniform guess has ten"


def test_short_study_equals_plain_hooks(model, scores):
    texts = deal(model, GRID, 60, first=0, n=2, seed=0, walk_seed=0)
    top = attention.top_heads(scores.induction, 4)
    sweep = ablation_sweep(model, texts.ids, [Condition("baseline"), Condition("induction", top)],
                           word_ids=texts.words, n_classes=16, labels=texts.within(20),
                           positions=[30, 59])  # fmt: skip
    module, handles = model._module, []
    for layer in {layer for layer, _ in top}:
        heads = [head for at, head in top if at == layer]

        def cut(module, args, heads=heads):
            outputs = args[0].clone().unflatten(-1, (9, -1))
            outputs[..., heads, :] = 0
            return (outputs.flatten(-2),)

        projection = module.model.layers[layer].self_attn.o_proj
        handles.append(projection.register_forward_pre_hook(cut))
    with torch.no_grad():
        out = module(texts.ids, output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    probabilities = out.logits[:, [31, 60]].softmax(-1)
    for text in range(2):
        expected = probabilities[text][:, texts.words[text]]
        assert np.allclose(sweep.word_probabilities[1, text], expected, atol=1e-5)
    assert not np.allclose(sweep.word_probabilities[0], sweep.word_probabilities[1], atol=1e-3)
    stream = out.hidden_states[25][:, 21:].numpy()
    means = geometry.class_means(stream[:1], texts.nodes[:1, 20:], 16)
    found = sweep.class_means(per_sequence=True)[1, 0, 25]
    assert np.allclose(found, means, rtol=1e-3, atol=1e-3 * np.nanmax(np.abs(means)), equal_nan=True)
