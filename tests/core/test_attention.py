"""Head scores: equal to a loop over full attention maps, and right about a circuit that was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import FAMILIES, save_tiny, tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from lib.core.attention import (
    attention_spectra,
    head_scores,
    repeated_random_tokens,
    second_copy_loss,
    top_heads,
)
from lib.core.families import wrap
from lib.core.models import load

PERIOD = 6


@pytest.mark.parametrize("family, bos", [(family, 0) for family in FAMILIES] + [("llama", None)])
def test_scores_equal_a_loop_over_attention_maps(family, bos, tmp_path):
    model = load(str(save_tiny(family, tmp_path / family)))
    tokens = range(2, 30)
    scores = head_scores(model, tokens, n_sequences=5, period=PERIOD, seed=3, bos=bos, batch_size=2)

    ids = repeated_random_tokens(tokens, 5, PERIOD, seed=3)
    skip = 0
    if bos is not None:
        ids, skip = np.pad(ids, ((0, 0), (1, 0)), constant_values=bos), 1
    module = model._module
    module.set_attn_implementation("eager")
    with torch.no_grad():
        maps = module(input_ids=torch.from_numpy(ids), output_attentions=True, use_cache=False).attentions
    offsets = {
        "previous_token": 1,
        "induction": PERIOD - 1,
        "duplicate_token": PERIOD,
        "anti_induction": PERIOD + 1,
    }
    naive = {name: np.zeros((3, 4)) for name in offsets}
    for layer in range(3):
        for head in range(4):
            for name, offset in offsets.items():
                seen = []
                for sequence in range(5):
                    for query in range(offset + skip, 2 * PERIOD + skip):
                        seen.append(maps[layer][sequence, head, query, query - offset].item())
                naive[name][layer, head] = np.mean(seen)
    for name, expected in naive.items():
        np.testing.assert_allclose(getattr(scores, name), expected, rtol=1e-4, atol=1e-7, err_msg=name)
    assert module.config._attn_implementation == "eager"  # as it was found


def test_spectra_are_those_of_each_sequence_alone(tmp_path):
    model = load(str(save_tiny("llama", tmp_path / "llama")))
    scores = head_scores(model, range(2, 30), n_sequences=4, period=PERIOD, bos=0)
    ids = np.pad(repeated_random_tokens(range(2, 30), 4, PERIOD), ((0, 0), (1, 0)))
    for row, spectra in zip(torch.from_numpy(ids), scores.spectra, strict=True):
        alone = attention_spectra(model, row[None], n_prefix=1)[0]
        np.testing.assert_allclose(spectra, alone, rtol=1e-4, atol=1e-7)
    of_sequences = scores.spectra[..., PERIOD - 1]  # [sequence, layer, head]
    assert np.ptp(of_sequences, axis=0).max() > 1e-3  # they differ, so there is an interval
    np.testing.assert_allclose(scores.induction, of_sequences.mean(0), rtol=1e-5)


def planted_induction_circuit(n_tokens: int = 48, n_positions: int = 32) -> GPT2LMHeadModel:
    """Head 0.1 attends to the previous token and copies it; head 1.0 matches the copy with the current token.

    The stream holds three one-hot blocks: token, position, previous token. All other heads are zero.
    """
    d, d_head, sharp = 2 * n_tokens + n_positions, 64, 60.0
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=n_tokens, n_embd=d, n_layer=2, n_head=2, n_positions=n_positions, n_inner=4)
    )
    token, position, previous = 0, n_tokens, n_tokens + n_positions
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for block in model.transformer.h:
            block.ln_1.weight.fill_(1)
        model.transformer.wte.weight[:, token : token + n_tokens] = torch.eye(n_tokens)
        model.transformer.wpe.weight[:, position : position + n_positions] = torch.eye(n_positions)
        query, key, value = 0, d, 2 * d
        first, second = (block.attn for block in model.transformer.h)
        for p in range(n_positions):  # head 0.1: position p looks for p - 1
            if p:
                first.c_attn.weight[position + p, query + d_head + p - 1] = sharp
            first.c_attn.weight[position + p, key + d_head + p] = sharp / 10
        for t in range(n_tokens):  # ... and writes its token into the third block
            first.c_attn.weight[token + t, value + d_head + t] = 1
            first.c_proj.weight[d_head + t, previous + t] = 1
            second.c_attn.weight[token + t, query + t] = sharp  # head 1.0
            second.c_attn.weight[previous + t, key + t] = sharp / 10
    return model.eval()


def test_planted_circuit_is_found():
    model = wrap(planted_induction_circuit(), tokenizer())
    scores = head_scores(model, range(48), n_sequences=16, period=12)
    assert top_heads(scores.previous_token, 1) == [(0, 1)]
    assert top_heads(scores.induction, 1) == [(1, 0)]
    assert scores.previous_token[0, 1] > 0.95
    assert scores.induction[1, 0] > 0.7  # tokens drawn twice within a period share the attention
    assert scores.induction[0].max() < 0.2 and scores.anti_induction.max() < 0.2
    assert scores.duplicate_token.max() < 0.2
    # The whole spectrum shows nothing else: the planted offsets are the peaks.
    assert scores.spectrum[0, 1].argmax() == 1 and scores.spectrum[1, 0].argmax() == 11


@pytest.mark.parametrize("family, bos", [(family, 0) for family in FAMILIES] + [("llama", None)])
def test_second_copy_loss_equals_a_loop_over_positions(family, bos, tmp_path):
    model = load(str(save_tiny(family, tmp_path / family)))
    ids = repeated_random_tokens(range(2, 30), 5, PERIOD, seed=3)
    losses = []
    for row in ids:
        text = row.tolist() if bos is None else [bos, *row.tolist()]
        with torch.no_grad():
            logits = model._module(input_ids=torch.tensor([text]), use_cache=False).logits[0]
        second_copy = range(len(text) - PERIOD, len(text))
        for position in second_copy[1:]:  # its first token can not be foreseen
            losses.append(-logits[position - 1].log_softmax(-1)[text[position]].item())
    loss = second_copy_loss(model, range(2, 30), n_sequences=5, period=PERIOD, seed=3, bos=bos)
    assert len(losses) == 5 * (PERIOD - 1) and loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_stimulus_that_the_model_cannot_take_is_named(tmp_path):
    model = load(str(save_tiny("llama", tmp_path / "llama")))
    for score in (head_scores, second_copy_loss):
        with pytest.raises(ValueError, match="97 tokens"):
            score(model, range(2, 30), n_sequences=1, period=48, bos=0)
        with pytest.raises(ValueError, match="a token at least"):
            score(model, range(2, 30), n_sequences=0)


def test_top_heads_are_ordered_and_ties_are_stable():
    scores = np.array([[0.1, 0.9], [0.9, 0.5]])
    assert top_heads(scores) == [(0, 1), (1, 0), (1, 1), (0, 0)]
    assert top_heads(scores, 2) == [(0, 1), (1, 0)]
    # The last bits, which differ between machines, make no rank; of equal heads the earlier comes first.
    shares = np.tile([0.2, 0.7, 0.4, 0.7], (16, 4)) + 1e-6 * np.arange(256).reshape(16, 16)
    highest = top_heads(shares, 128)
    assert highest == sorted(highest) and {head % 2 for _, head in highest} == {1}
    with pytest.raises(ValueError, match="head 1.0"):
        top_heads(np.array([[0.1, 0.2], [np.nan, 0.3]]))
