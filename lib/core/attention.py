"""What heads attend to, summed as the rows pass: no attention map outlives its layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from nnsight import TransformersModel

from lib.core.batches import Batches
from lib.core.families import check_length, eager_attention


@dataclass(frozen=True)
class HeadScores:
    """Attention of every head on repeated random tokens, and the scores that name head types.

    Every score is the mean attention on one diagonal, over sequences [layer, head].

    Attributes:
        spectra: mean attention of each sequence on every offset, float32: `spectra[..., k]` is that k
            tokens back [sequence, layer, head, offset].
        period: of the repetition (tokens).
    """

    spectra: np.ndarray
    period: int

    @property
    def spectrum(self) -> np.ndarray:
        """Mean of the spectra over sequences [layer, head, offset], float64."""
        return self.spectra.mean(axis=0, dtype=np.float64)

    @property
    def previous_token(self) -> np.ndarray:
        """One token back."""
        return self.spectrum[..., 1]

    @property
    def induction(self) -> np.ndarray:
        """From the second copy of a token to the token after its first copy."""
        return self.spectrum[..., self.period - 1]

    @property
    def duplicate_token(self) -> np.ndarray:
        """From the second copy of a token to its first copy."""
        return self.spectrum[..., self.period]

    @property
    def anti_induction(self) -> np.ndarray:
        """From the second copy of a token to the token before its first copy."""
        return self.spectrum[..., self.period + 1]


def repeated_random_tokens(
    tokens: Sequence[int], n_sequences: int = 32, period: int = 32, seed: int = 0
) -> np.ndarray:
    """Sequences of `period` random tokens, repeated once [sequence, 2 * period]."""
    rng = np.random.default_rng(seed)
    half = rng.choice(np.asarray(tokens), size=(n_sequences, period))
    return np.concatenate([half, half], axis=1)


def attention_spectra(
    model: TransformersModel, ids: torch.Tensor, *, n_prefix: int = 0, batch_size: int = 32
) -> np.ndarray:
    """Mean attention probability on every offset, for every sequence and head.

    Args:
        model: from `lib.core.models.load`.
        ids: token ids, no padding [sequence, token].
        n_prefix: leading tokens (BOS) dropped, as query and as key, before averaging.
        batch_size: sequences a forward. Halved when memory runs out.

    Returns:
        [sequence, layer, head, offset], float32: entry k is the mean over positions t >= k of the attention
        from t to t - k.

    Raises:
        ValueError: no sequence, or sequences of more tokens than the model has positions.
        RuntimeError: the model returned no attention probabilities.
    """
    _check_ids(model, ids)

    def run(rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), model.trace(rows.to(model.device), use_cache=False) as tracer:
            means = [
                _offset_means(block.self_attn.output[1], n_prefix).detach().cpu() for block in model.layers
            ]
            part = torch.stack(means, dim=1).save()
            tracer.stop()
        return part

    with eager_attention(model):
        return torch.cat(list(Batches(batch_size).map(run, ids, what="attention by offset"))).numpy()


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
        model: from `lib.core.models.load`.
        tokens: ids to draw from.
        n_sequences, period, seed: the stimulus.
        bos: id to prepend, or None.
        batch_size: sequences a forward. Halved when memory runs out.

    Returns:
        HeadScores, each score a mean over the whole diagonal, so the induction
        score includes the last token of the first copy (it attends to the first).
    """
    ids = _repeated(tokens, n_sequences, period, seed, bos)
    spectra = attention_spectra(model, ids, n_prefix=0 if bos is None else 1, batch_size=batch_size)
    return HeadScores(spectra, period)


def second_copy_loss(
    model: TransformersModel,
    tokens: Sequence[int],
    *,
    n_sequences: int = 32,
    period: int = 32,
    seed: int = 0,
    bos: int | None = None,
    batch_size: int = 32,
) -> float:
    """Mean cross-entropy (nats) on the second copy of repeated random tokens, without its first token.

    The stimulus and arguments of `head_scores`. A uniform guess over `tokens` has log(len(tokens)), a model
    that copies less.
    """

    def run(rows: torch.Tensor) -> torch.Tensor:
        targets = rows[:, -period + 1 :].flatten()
        with torch.no_grad(), model.trace(rows.to(model.device), use_cache=False):
            # Logits at a token predict the next one; the first token of the second copy comes as a surprise.
            logits = model.lm_head.output[:, -period:-1].float().cpu().flatten(0, 1)
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").detach().save()
        return losses

    ids = _repeated(tokens, n_sequences, period, seed, bos)
    _check_ids(model, ids)
    return torch.cat(list(Batches(batch_size).map(run, ids, what="loss on repeats"))).mean().item()


def top_heads(scores: np.ndarray, k: int | None = None) -> list[tuple[int, int]]:
    """(layer, head) pairs by falling score.

    Scores that agree to three decimals are ties, ordered by layer, then head: ranks do not hang on the last
    bits, which differ between machines.

    Raises:
        ValueError: a score that is NaN, which has no rank.
    """
    if np.isnan(scores).any():
        layer, head = np.argwhere(np.isnan(scores))[0]
        raise ValueError(f"the score of head {layer}.{head} is NaN: it has no rank")
    order = np.argsort(-np.round(scores, 3), axis=None, kind="stable")[:k]
    return [(int(i // scores.shape[1]), int(i % scores.shape[1])) for i in order]


def _check_ids(model: TransformersModel, ids: torch.Tensor) -> None:
    if not ids.numel():
        raise ValueError(f"ids must be [sequence, token] with a token at least, not {tuple(ids.shape)}")
    check_length(model, ids.shape[1], "take shorter sequences (a smaller period)")


def _repeated(
    tokens: Sequence[int], n_sequences: int, period: int, seed: int, bos: int | None
) -> torch.Tensor:
    """Token ids of repeated random tokens, behind `bos` if there is one [sequence, prefix + token]."""
    ids = torch.from_numpy(repeated_random_tokens(tokens, n_sequences, period, seed))
    return ids if bos is None else torch.nn.functional.pad(ids, (1, 0), value=bos)


def _offset_means(attention: torch.Tensor | None, n_prefix: int) -> torch.Tensor:
    """Mean of attention [batch, head, query, key] over the positions of each offset [batch, head, offset]."""
    if attention is None:
        raise RuntimeError("this model returned no attention probabilities: load it with eager attention")
    rows = attention[:, :, n_prefix:, n_prefix:].float()
    diagonals = [rows.diagonal(-offset, dim1=-2, dim2=-1).mean(-1) for offset in range(rows.shape[-1])]
    return torch.stack(diagonals, dim=-1)
