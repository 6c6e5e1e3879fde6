"""What heads attend to, summed as the rows pass: no attention map outlives its layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lib.models import TransformersModel, eager_attention, shape


class HeadScores(NamedTuple):
    """Mean attention of every head on the diagonals that name head types.

    Attributes:
        previous_token: on offset -1 [layer, head].
        induction: from the second copy of a token to the token after its first copy [layer, head].
        duplicate_token: from the second copy of a token to its first copy [layer, head].
        anti_induction: from the second copy to the token before the first copy [layer, head].
        spectrum: on every offset; `spectrum[..., k]` is the mean attention k tokens back
            [layer, head, offset].
    """

    previous_token: np.ndarray
    induction: np.ndarray
    duplicate_token: np.ndarray
    anti_induction: np.ndarray
    spectrum: np.ndarray


def repeated_random_tokens(
    tokens: Sequence[int], n_sequences: int = 32, period: int = 32, seed: int = 0
) -> np.ndarray:
    """Sequences of `period` random tokens, repeated once [sequence, 2 * period]."""
    rng = np.random.default_rng(seed)
    half = rng.choice(np.asarray(tokens), size=(n_sequences, period))
    return np.concatenate([half, half], axis=1)


def attention_spectrum(
    model: TransformersModel, ids: torch.Tensor, *, n_prefix: int = 0, batch_size: int = 32
) -> np.ndarray:
    """Mean attention probability on every offset, for every head.

    Args:
        model: from `lib.models.load`.
        ids: token ids, no padding [sequence, token].
        n_prefix: leading tokens (BOS) dropped, as query and as key, before averaging.
        batch_size: sequences a forward.

    Returns:
        [layer, head, offset]: entry k is the mean over sequences and positions t >= k of the attention
        from t to t - k.

    Raises:
        RuntimeError: the model returned no attention probabilities.
    """
    n_layers, n_heads = shape(model).n_layers, shape(model).n_heads
    length = ids.shape[1] - n_prefix
    total = torch.zeros(n_layers, n_heads, length, dtype=torch.float64)
    for rows in ids.split(batch_size):
        rows = rows.to(model.device)
        with eager_attention(model), torch.no_grad(), model.trace(rows, use_cache=False) as tracer:
            sums = [_offset_sums(block.self_attn.output[1], n_prefix) for block in model.layers]
            batch = torch.stack(sums).cpu().save()
            tracer.stop()
        total += batch
    positions = torch.arange(length, 0, -1)  # an offset of k has length - k query positions
    return (total / (len(ids) * positions)).numpy()


def head_scores(
    model: TransformersModel,
    tokens: Sequence[int],
    *,
    n_sequences: int = 32,
    period: int = 32,
    seed: int = 0,
    bos: int | None = None,
    batch_size: int = 32,
) -> HeadScores:
    """Head scores on repeated random tokens (Olsson et al. 2022, as computed by Arditi 2026).

    Sequences are `period` random tokens repeated once. With `bos` the token is
    prepended and dropped from the scores, as key and as query.

    Args:
        model: from `lib.models.load`.
        tokens: ids to draw from.
        n_sequences, period, seed: the stimulus.
        bos: id to prepend, or None.
        batch_size: sequences a forward.

    Returns:
        HeadScores, each score a mean over the whole diagonal, so the induction
        score includes the last token of the first copy (it attends to the first).
    """
    ids = torch.from_numpy(repeated_random_tokens(tokens, n_sequences, period, seed))
    if bos is not None:
        ids = torch.cat([torch.full((len(ids), 1), bos), ids], dim=1)
    spectrum = attention_spectrum(model, ids, n_prefix=0 if bos is None else 1, batch_size=batch_size)
    return HeadScores(
        previous_token=spectrum[..., 1],
        induction=spectrum[..., period - 1],
        duplicate_token=spectrum[..., period],
        anti_induction=spectrum[..., period + 1],
        spectrum=spectrum,
    )


def second_copy_loss(
    model: TransformersModel,
    tokens: Sequence[int],
    *,
    n_sequences: int = 32,
    period: int = 32,
    seed: int = 0,
    bos: int | None = None,
) -> float:
    """Mean cross-entropy (nats) on the second copy of repeated random tokens, without its first token.

    The stimulus of `head_scores`. A uniform guess over `tokens` has log(len(tokens)), a model that copies
    less.
    """
    ids = torch.from_numpy(repeated_random_tokens(tokens, n_sequences, period, seed))
    if bos is not None:
        ids = torch.cat([torch.full((len(ids), 1), bos), ids], dim=1)
    with torch.no_grad(), model.trace(ids.to(model.device), use_cache=False):
        # Logits at a token predict the next one; the first token of the second copy comes as a surprise.
        logits = model.lm_head.output[:, -period:-1].float().cpu().save()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -period + 1 :].flatten()).item()


def top_heads(scores: np.ndarray, k: int | None = None) -> list[tuple[int, int]]:
    """(layer, head) pairs by falling score.

    Scores that agree to three decimals are ties, ordered by layer, then head: ranks do not hang on the last
    bits, which differ between machines.
    """
    order = np.argsort(-np.round(scores, 3), axis=None, kind="stable")[:k]
    return [(int(i // scores.shape[1]), int(i % scores.shape[1])) for i in order]


def _offset_sums(attention: torch.Tensor | None, n_prefix: int) -> torch.Tensor:
    """Sum of the attention over batch and positions, by offset [head, offset]."""
    if attention is None:
        raise RuntimeError("this model returned no attention probabilities: load it with eager attention")
    map_sum = attention[:, :, n_prefix:, n_prefix:].float().sum(0)  # [head, query, key]
    length = map_sum.shape[-1]
    query = torch.arange(length, device=map_sum.device)
    offset = query[:, None] - query[None]
    causal = offset >= 0
    sums = map_sum.new_zeros(map_sum.shape[0], length)
    return sums.index_add_(1, offset[causal], map_sum[:, causal])
