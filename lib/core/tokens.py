"""Tokens: single words, what opens a text, what ends an answer, which rows of logits are tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from nnsight import TransformersModel

from lib.core.downloads import ModelError
from lib.core.families import shape

# What stood between documents in pretraining, by family: the first one among a tokenizer's added tokens.
DOCUMENT_MARKS = (
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<bos>",
    "<s>",
    "<｜begin▁of▁sentence｜>",
)
# Tokens that no text has: padding of GGUF vocabularies, reserves of several families, bytes of SentencePiece.
_UNUSED = re.compile(r"\[PAD\d+\]|\[unused\d+\]|<unused\d+>|<\|reserved_special_token_\d+\|>|<0x[0-9A-F]{2}>")


def word_ids(model: TransformersModel, words: Sequence[str]) -> list[int]:
    """Token ids of words inside a text, that is with a leading space.

    Args:
        model: its tokenizer decides.
        words: distinct words.

    Raises:
        ModelError: naming the words that are not one token, or not in the vocabulary, of this tokenizer.
    """
    tokenizer, found, broken = model.tokenizer, [], []
    for word in words:
        # The word's second occurrence has a space before it in every kind of tokenizer.
        once = tokenizer(word, add_special_tokens=False).input_ids
        inside = tokenizer(f"{word} {word}", add_special_tokens=False).input_ids[len(once) :]
        if len(inside) != 1:
            broken.append(f"{word!r} ({len(inside)} tokens)")
        elif inside[0] == tokenizer.unk_token_id:
            broken.append(f"{word!r} (unknown)")
        found += inside
    if broken:
        raise ModelError(f"not one token of this tokenizer: {', '.join(broken)}; choose other words")
    if len(set(found)) < len(found):
        raise ModelError("two of the words are the same token of this tokenizer; choose other words")
    return found


def bos_id(model: TransformersModel, bos: str = "auto") -> int | None:
    """The token that opens a text.

    Args:
        model: its tokenizer and configuration decide.
        bos: "auto" is the mark that stood between documents in training: the tokenizer's BOS, unless that
            opens the turns of a chat (SmolLM2's `<|im_start|>`), or what families without one use; "none" is
            no token; any other text is one token of the vocabulary.

    Raises:
        ModelError: the tokenizer has no such token.
    """
    tokenizer = model.tokenizer
    vocabulary = tokenizer.get_vocab()
    if bos == "none":
        return None
    if bos != "auto":
        if bos not in vocabulary:
            raise ModelError(f"bos {bos!r} is no token of this tokenizer; pass 'auto', 'none' or one that is")
        return vocabulary[bos]
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    template = str(tokenizer.chat_template or "")
    own, end = tokenizer.bos_token, tokenizer.eos_token
    configured = getattr(model._module.config, "bos_token_id", None)
    if own and (own in DOCUMENT_MARKS or own not in template):
        return vocabulary[own]
    for mark in DOCUMENT_MARKS:
        if vocabulary.get(mark) in added:
            return vocabulary[mark]
    if configured in added:
        return configured
    if end and end not in template:
        return vocabulary[end]
    raise ModelError(
        "this tokenizer has no BOS and no end-of-text token to open a text with; pass bos='none', or a token"
    )


def with_bos(model: TransformersModel, tokens: np.ndarray, bos: str = "auto") -> torch.Tensor:
    """Token ids [sequence, 1 + token] of tokens [sequence, token] behind `bos_id`; without it for "none"."""
    opening = bos_id(model, bos)
    width = 0 if opening is None else 1
    return torch.from_numpy(np.pad(tokens, ((0, 0), (width, 0)), constant_values=opening or 0))


def plain_token_ids(model: TransformersModel) -> list[int]:
    """Ids of all tokens but special, added, unused and single-byte ones, to draw random tokens from."""
    left_out = set(model.tokenizer.all_special_ids) | set(model.tokenizer.added_tokens_decoder)
    # Some models pad their embedding beyond the tokenizer's vocabulary.
    size = min(len(model.tokenizer), shape(model).n_vocabulary)
    tokens = model.tokenizer.convert_ids_to_tokens(range(size))
    return [
        token
        for token, text in enumerate(tokens)
        if token not in left_out and text is not None and not _UNUSED.fullmatch(text)
    ]


def end_tokens(model: TransformersModel) -> set[int]:
    """Tokens at which an answer ends: those of the model's generation settings, and the tokenizer's."""
    ends = model._module.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    return ends | ({model.tokenizer.eos_token_id} - {None})


def last_of(ids: torch.Tensor, n: int = 1) -> torch.Tensor:
    """The last n positions of [row, token, ...], as transformers' `logits_to_keep` takes them.

    A tensor and not a number, for two reasons. transformers slices by a number, and of a slice of many rows
    PyTorch multiplies each row by a copy of the unembedding of its own. And nnsight hands a batch on as it
    is, instead of taking it apart into rows and putting them together at every step.
    """
    return torch.arange(ids.shape[1] - n, ids.shape[1])


def known_logits(logits: torch.Tensor, model: TransformersModel) -> torch.Tensor:
    """The logits [row, vocabulary] as they are.

    Raises:
        ModelError: one is NaN: the likeliest token of a row would be its first.
    """
    if logits.sum(-1).isnan().any():
        dtype = str(model._module.dtype).removeprefix("torch.")
        raise ModelError(
            f"logits are NaN: activations overflowed in {dtype}; load the model in bfloat16 or float32, or "
            "lower the strength of the edit"
        )
    return logits
