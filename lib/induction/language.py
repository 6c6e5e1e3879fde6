"""Natural text, and what heads that were found on random tokens are worth in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from nnsight import TransformersModel

from lib.core.cache import Cache
from lib.core.downloads import ModelError
from lib.core.families import shape
from lib.core.interventions import Condition, Head
from lib.core.sweeps import ablation_sweep
from lib.core.tokens import with_bos
from lib.induction.geometry import class_means
from lib.induction.mixing import WordRegression, map_gram, nearest, predicted_energy
from lib.induction.walks import Graph


class NaturalTexts(NamedTuple):
    """Pieces of natural text.

    Attributes:
        ids: what the model reads, int64 [text, prefix + token].
        n_prefix: tokens that open a text and are not measured, 0 or 1.
        unknown: share of the tokens that the tokenizer has no name for.
    """

    ids: torch.Tensor
    n_prefix: int
    unknown: float


def python_topics(
    model: TransformersModel, n_texts: int, length: int = 512, bos: str = "auto", odd: bool = False
) -> NaturalTexts:
    """Pieces of Python's own documentation, evenly spread over it.

    Args:
        model: its tokenizer cuts the text.
        n_texts: number of pieces; none overlaps another one.
        length: tokens of a piece, fewer for a model of fewer positions.
        bos: what opens a piece, see `lib.core.tokens.bos_id`.
        odd: take other pieces, of which none is among those that are taken without it.

    Raises:
        ModelError: the text holds fewer pieces.
    """
    from pydoc_data.topics import topics  # every Python has it

    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = np.array(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    length = min(length, shape(model).n_positions - 1)
    pieces = tokens[: len(tokens) // length * length].reshape(-1, length)[int(odd) :: 2]
    if len(pieces) < n_texts:
        raise ModelError(f"n_texts: {n_texts} pieces of {length} tokens, and the text holds {len(pieces)}")
    chosen = pieces[np.linspace(0, len(pieces) - 1, n_texts).astype(int)]
    ids = with_bos(model, chosen, bos)
    unknown = float((chosen == model.tokenizer.unk_token_id).mean())  # 0 for a tokenizer without that token
    return NaturalTexts(ids, ids.shape[1] - length, unknown)


def token_losses(
    model: TransformersModel, texts: NaturalTexts, conditions: Sequence[Condition], tokens: np.ndarray,
    *, fill: torch.Tensor | None = None, batch_size: int = 0, cache: Cache | None = None,
) -> np.ndarray:  # fmt: skip
    """Loss (nats) on some tokens of every text under every condition, without keeping other logits.

    Args:
        tokens: places behind the prefix, counted from 0, each at least 1 [place].
        fill: what ablated heads put out, see `lib.core.sweeps.ablation_sweep`; zero by default.

    Returns:
        [condition, text, place].
    """
    targets = texts.ids[:, texts.n_prefix + tokens].numpy()  # [text, place]
    sweep = ablation_sweep(
        model, texts.ids, conditions, word_ids=targets, positions=tokens - 1, n_prefix=texts.n_prefix,
        fill=fill, batch_size=batch_size, cache=cache,
    )  # fmt: skip
    # At each place the sweep has the probability of every target of the text: that of its own is kept.
    own = np.diagonal(sweep.word_probabilities, axis1=2, axis2=3).astype(np.float64)
    return -np.log(np.maximum(own, np.finfo(np.float32).tiny))


def top_of_each_layer(scores: np.ndarray, share: float = 0.02, least: float = 0.1) -> list[Head]:
    """The highest-scoring heads of every layer [layer, head], a share of its heads and at least one.

    Heads that score less than `least` are left out, so that a layer may have none.
    """
    n_heads = scores.shape[1]
    chosen = []
    for layer, of_layer in enumerate(scores):
        order = np.argsort(-np.round(of_layer, 3), kind="stable")[: int(np.ceil(share * n_heads))]
        chosen += [(layer, int(head)) for head in order if of_layer[head] >= least]
    return chosen


def matched_heads(heads: Iterable[Head], allowed: np.ndarray, n_draws: int, seed: int) -> list[list[Head]]:
    """Random sets with as many heads in every layer as a given set has there.

    Args:
        heads: the set to match.
        allowed: heads that may be drawn, bool [layer, head].
        n_draws: number of sets.
        seed: of the draws.

    Returns:
        The sets; none if there is nothing to match, or a layer has too few heads that may be drawn.
    """
    counts = Counter(layer for layer, _ in heads)
    if not counts or any(allowed[layer].sum() < n for layer, n in counts.items()):
        return []
    sets = []
    for draw in range(n_draws):
        rng = np.random.default_rng([seed, draw])
        drawn = {
            i: rng.choice(np.flatnonzero(allowed[i]), n, replace=False) for i, n in sorted(counts.items())
        }
        sets.append([(layer, int(head)) for layer, of_layer in drawn.items() for head in of_layer])
    return sets


def strongest_offsets(spectrum: np.ndarray, least: float = 0.3, least_pairs: int = 8) -> np.ndarray:
    """Strongest offset of every head that gives it at least `least` of its attention, int [head].

    Offset 0 is left out, and so are the longest offsets, whose mean is over fewer than `least_pairs`
    pairs of positions.

    Args:
        spectrum: mean attention on every offset [layer, head, offset].
    """
    reached = spectrum[..., 1 : spectrum.shape[-1] - least_pairs + 1]
    return reached.argmax(-1)[reached.max(-1) >= least] + 1


def decode_previous_word(stream: np.ndarray, words: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Share of single activations from which the previous word is read, [layout].

    From each activation the mean of its word is subtracted; the previous word is named by the nearest of
    the means that these rests have after each word. All means come from the other layouts, so that no
    graph is known.

    Args:
        stream: activations [layout, token, d].
        words, before: the word at each token and at the one before, int [layout, token].
    """
    n_words, every = int(max(words.max(), before.max())) + 1, np.arange(len(stream))
    found = []
    for layout in every:
        others = every[every != layout]
        rest = stream - np.nan_to_num(class_means(stream[others], words[others], n_words))[words]
        after = class_means(rest[others], before[others], n_words)
        found.append((nearest(rest[layout], after) == before[layout]).mean())
    return np.array(found)


def mixing_energy(regression: WordRegression, layouts: np.ndarray, graph: Graph) -> np.ndarray:
    """Energy that c and f of some layouts predict [layer]; NaN where neighbours weigh nothing."""
    c, f = regression.fit(layouts).mixing()
    return np.array([
        predicted_energy(map_gram(graph, *weights), graph, k=2) if weights[1] >= 0.01 else np.nan
        for weights in zip(c, f, strict=True)
    ])  # fmt: skip
