"""Greedy generation and next-token measures under ablation, with prompts and conditions in the batch.

The unit of work is a batch of (condition, prompt) rows: every row carries its own subspace, strength,
centre, layers and shift, so that a sweep is a few large forwards. Conditions that do the same run once,
and the blocks below the first one that a batch touches read every prompt once.

Prompts are left-padded under an attention mask with positions of their own: a row's answer does not depend
on the rows beside it. What all prompts begin with, such as the opening of a chat template, is read once a
condition. `last_token_streams` also offers the ways of padding that are wrong, to measure them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from functools import partial

import numpy as np
import torch
from nnsight import TransformersModel

from lib.core.batches import Batches, auto_rows
from lib.core.cache import Cache
from lib.core.downloads import ModelError
from lib.core.families import is_remote, shape
from lib.core.tokens import end_tokens, last_of
from lib.refusal.forwards import (
    PADDINGS,
    Edits,
    Tokens,
    check_prompts,
    edit_block,
    first_logits,
    over_rows,
    pad_id,
    padded_rows,
    prefill,
    prompt_indices,
    read_opening,
    wrongly_padded,
)
from lib.refusal.removal import Ablation, intact

TODAY = date(2024, 7, 26)  # in chat templates: what Llama 3's fall back on


def chat_ids(model: TransformersModel, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as a user's message, up to where the model's answer begins.

    A template that prints the date prints `TODAY`.

    Raises:
        ModelError: a tokenizer without chat template or pad token.
    """
    tokenizer = model.tokenizer
    if not tokenizer.chat_template:
        raise ModelError(
            "this tokenizer has no chat template; take an instruction-tuned model, or set "
            "model.tokenizer.chat_template"
        )
    pad_id(model)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            chat_template=with_fixed_date(tokenizer.get_chat_template()),
            add_generation_prompt=True,
            return_dict=False,
            date_string=f"{TODAY:%d %b %Y}",
            # Qwen3 answers at once; templates without this switch ignore it.
            enable_thinking=False,
        )
        for text in texts
    ]


def with_fixed_date(template: str) -> str:
    """A chat template in which it is always `TODAY`.

    transformers gives templates a function `strftime_now`, and hands them no function of ours in its place; a
    macro of the same name, put before the template, takes it.
    """
    if "strftime_now" not in template:
        return template
    fields = {f"%{code}": TODAY.strftime(f"%{code}") for code in "aAbBdefFHIjlmMpSTuyY"}
    fields |= {"%-d": str(TODAY.day), "%-m": str(TODAY.month)}
    written = "".join(f".replace({field!r}, {value!r})" for field, value in fields.items())
    # The line end goes with the tag: what follows begins a line, as before.
    return f"{{% macro strftime_now(format) %}}{{{{ format{written} }}}}{{% endmacro %}}\n{template}"


def generate(
    model: TransformersModel,
    prompts: Sequence[Tokens],
    conditions: Sequence[Ablation],
    *,
    max_new_tokens: int,
    batch_size: int = 0,
    cache: Cache | None = None,
) -> list[list[list[int]]]:
    """Greedy answers to every prompt under every condition.

    Args:
        model: from `lib.core.models.load`.
        prompts: token ids, of any lengths, such as from `chat_ids`.
        conditions: any number, however different.
        max_new_tokens: where an answer is cut at the latest.
        batch_size: (condition, prompt) rows a forward; 0 chooses by memory. Halved when memory runs out.
        cache: keeps every finished batch, so that an interrupted sweep goes on where it was.

    Returns:
        [condition][prompt] new token ids, without the end token and what follows.

    Raises:
        ValueError: a prompt without tokens or longer than the model's positions, a layer that the model
            lacks, or a basis of another width, naming it.
        ModelError: a tokenizer without pad token.
    """
    answer = _answers_remote if is_remote(model) else _answers
    measure = partial(answer, model, max_new_tokens, end_tokens(model))
    tokens = over_rows(
        model, prompts, conditions, measure,
        name="generate", key={"end": sorted(end_tokens(model))}, new_tokens=max_new_tokens,
        batch_size=batch_size, cache=cache, by_prompt=False,
    )  # fmt: skip
    return [[[int(t) for t in answer if t >= 0] for answer in answers] for answers in tokens]


def first_token_kl(
    model: TransformersModel,
    prompts: Sequence[Tokens],
    conditions: Sequence[Ablation],
    *,
    batch_size: int = 0,
    cache: Cache | None = None,
) -> np.ndarray:
    """How far each condition moves the first token of the answer: KL(intact || condition) in nats.

    Arguments and errors as for `generate`.

    Returns:
        [condition, prompt], float32.
    """
    return over_rows(
        model, prompts, conditions, partial(_divergences, model),
        name="first_token_kl", key={}, batch_size=batch_size, cache=cache, by_prompt=True,
    )  # fmt: skip


def first_token_share(
    model: TransformersModel,
    prompts: Sequence[Tokens],
    conditions: Sequence[Ablation],
    tokens: Sequence[int],
    *,
    batch_size: int = 0,
    cache: Cache | None = None,
) -> np.ndarray:
    """Probability that an answer opens with one of some tokens, such as those that open refusals.

    Arguments and errors as for `generate`.

    Returns:
        [condition, prompt], float32.

    Source: the refusal score of Arditi et al. (2024), as a probability in place of its log-odds.
    """
    chosen = sorted({int(token) for token in tokens})

    def measure(rows: list[Tokens], edits: list[Ablation]) -> np.ndarray:
        logits = first_logits(model, rows, edits)
        return (logits[:, chosen].logsumexp(-1) - logits.logsumexp(-1)).exp().cpu().numpy()

    return over_rows(
        model, prompts, conditions, measure,
        name="first_token_share", key={"tokens": chosen}, batch_size=batch_size, cache=cache, by_prompt=False,
    )  # fmt: skip


def first_token_log_probabilities(
    model: TransformersModel,
    prompts: Sequence[Tokens],
    conditions: Sequence[Ablation],
    *,
    batch_size: int = 0,
) -> np.ndarray:
    """Log-probabilities of the first token of the answer [condition, prompt, vocabulary], float32.

    Arguments and errors as for `generate`.
    """

    def measure(rows: list[Tokens], edits: list[Ablation]) -> np.ndarray:
        return first_logits(model, rows, edits).log_softmax(-1).cpu().numpy()

    return over_rows(
        model, prompts, conditions, measure,
        name="first_token", key={}, batch_size=batch_size, cache=None, by_prompt=True,
    )  # fmt: skip


def answer_loss(
    model: TransformersModel, prompts: Sequence[Tokens], answers: Sequence[Tokens], basis: torch.Tensor
) -> torch.Tensor:
    """Loss of answers while a subspace is removed at all `SITES`, with its gradient to the basis.

    Args:
        prompts, answers: token ids, an answer with its end token [row].
        basis: orthonormal rows [k, d_model].

    Returns:
        Mean negative log-likelihood of the answers' tokens, in nats.

    Raises:
        ValueError, ModelError: as for `generate`; a remote model, through which no gradient comes back.
    """
    if is_remote(model):
        raise ModelError("gradients do not come back from a remote model; load it here")
    longest = max(map(len, answers))
    check_prompts(model, prompts, longest)
    inputs = padded_rows(model, [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
    target = torch.full((len(answers), longest), -100)
    for row, answer in zip(target, answers, strict=True):
        row[longest - len(answer) :] = torch.tensor(answer)
    basis, last = basis.to(model.device, model.dtype), last_of(inputs["input_ids"], longest + 1)
    with torch.enable_grad(), model.trace(**inputs, use_cache=False, logits_to_keep=last):
        for block in model.layers:  # not in place, as elsewhere: the gradient needs what was there before
            block.input = block.input - block.input @ basis.T @ basis
            attention, mlp = block.self_attn.o_proj, block.mlp
            attention.output = attention.output - attention.output @ basis.T @ basis
            mlp.output = mlp.output - mlp.output @ basis.T @ basis
        logits = model.lm_head.output[:, :-1].float().save()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten().to(logits.device))


def last_token_streams(
    model: TransformersModel, prompts: Sequence[Tokens], *, padding: str = "left", batch_size: int = 0
) -> torch.Tensor:
    """Residual stream of every layer at the last token of each prompt.

    Args:
        model: from `lib.core.models.load`.
        prompts: token ids, of any lengths.
        padding: "left" masks the padding and counts positions from the first token; "none" reads prompts one
            by one. The other two are mistakes, to measure: "left-unmasked" lets tokens attend to the padding,
            "right" pads after the prompt and reads the last column. They pad to the longest prompt of all.
        batch_size: prompts a forward; 0 chooses by memory.

    Returns:
        [prompt, layer + 1, d_model], float32: at the inputs of the blocks and after the last one.

    Raises:
        ValueError, ModelError: as for `generate`; a padding that there is not.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding {padding!r} is not one of {', '.join(PADDINGS)}")
    check_prompts(model, prompts, 0)
    longest = max(map(len, prompts))
    size = 1 if padding == "none" else batch_size or auto_rows(model, longest)
    # By length, so that little is padded; the wrong ways stay in one frame for all.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = torch.empty(len(prompts), shape(model).n_layers + 1, shape(model).d_model)
    nothing = intact(model)

    def read(rows: list[int]) -> torch.Tensor:
        options: dict = {"use_cache": False}
        if padding in ("right", "left-unmasked"):
            inputs = wrongly_padded(model, [prompts[i] for i in rows], longest, padding)
        elif is_remote(model):
            inputs = padded_rows(model, [prompts[i] for i in rows])
        else:
            inputs, opened = read_opening(model, [prompts[i] for i in rows], [nothing] * len(rows))
            options = {"use_cache": True, "past_key_values": opened}
        last = last_of(inputs["input_ids"])
        with torch.no_grad(), model.trace(**inputs, **options, logits_to_keep=last):
            streams = [block.input[:, -1].detach().cpu() for block in model.layers]
            streams.append(model.layers[-1].output[:, -1].detach().cpu())
            at_last = torch.stack(streams, dim=1).float().save()
        return at_last

    found[order] = torch.cat(list(Batches(size).map(read, order, what="streams at the last token")))
    return found


def tail_streams(
    model: TransformersModel, prompts: Sequence[Tokens], layer: int, n: int, *, batch_size: int = 0
) -> torch.Tensor:
    """Input of a block at the last n tokens of each prompt [prompt, n, d_model], float32.

    Args:
        layer: of the block.
        n: at most the tokens of the shortest prompt.
        prompts, batch_size: see `last_token_streams`.

    Raises:
        ValueError: more tokens than a prompt has; as for `generate`.
    """
    check_prompts(model, prompts, 0)
    if not 0 < n <= min(map(len, prompts)):
        raise ValueError(f"n = {n}: the shortest prompt has {min(map(len, prompts))} tokens")
    size = batch_size or auto_rows(model, max(map(len, prompts)))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = torch.empty(len(prompts), n, shape(model).d_model)

    def read(rows: list[int]) -> torch.Tensor:
        inputs = padded_rows(model, [prompts[i] for i in rows])
        last = last_of(inputs["input_ids"])
        with torch.no_grad(), model.trace(**inputs, use_cache=False, logits_to_keep=last) as tracer:
            tail = model.layers[layer].input[:, -n:].detach().float().cpu().save()
            tracer.stop()
        return tail

    found[order] = torch.cat(list(Batches(size).map(read, order, what="streams at the last tokens")))
    return found


# -- what is measured of a batch: one prompt and one condition a row -------------------------------
def _answers(
    model: TransformersModel,
    max_new_tokens: int,
    end: set[int],
    prompts: list[Tokens],
    conditions: list[Ablation],
) -> np.ndarray:
    """Greedy answers [row, token], filled up with -1."""
    tokens = np.full((len(prompts), max_new_tokens), -1)
    rows = np.arange(len(prompts))  # those that are still in the batch
    running = np.ones(len(prompts), dtype=bool)  # of them, those whose answer has not ended
    logits, state = prefill(model, prompts, conditions)
    for step in range(max_new_tokens):
        chosen = logits.argmax(-1)
        written = chosen.cpu().numpy()
        running &= ~np.isin(written, list(end))
        tokens[rows[running], step] = written[running]
        if step == max_new_tokens - 1 or not running.any():
            break
        # Dropping copies what stays, so it waits until a quarter has ended.
        if running.sum() <= 0.75 * len(running):
            left = torch.from_numpy(np.flatnonzero(running))  # on the CPU it picks rows on any device
            state.keep(left)
            chosen, rows, running = chosen[left], rows[running], running[running]
        logits = state.step(chosen)
    return tokens


def _answers_remote(
    model: TransformersModel,
    max_new_tokens: int,
    end: set[int],
    prompts: list[Tokens],
    conditions: list[Ablation],
) -> np.ndarray:
    """What `_answers` gives, of a remote model: one job, of which nothing but the new tokens comes back."""
    inputs, edits = padded_rows(model, prompts), Edits(model, conditions)
    start = inputs["input_ids"].shape[1]
    # How its makers have it chat (sampling, penalties) is undone: an answer is made of the likeliest tokens.
    settings = dict.fromkeys(model._module.generation_config.to_diff_dict()) | {
        "do_sample": False, "num_beams": 1, "use_cache": True, "max_new_tokens": max_new_tokens,
        "eos_token_id": sorted(end) or None, "pad_token_id": pad_id(model),
    }  # fmt: skip
    removed, shifts = edits.removed, edits.shifts
    with torch.no_grad(), model.generate(**settings) as tracer:
        with tracer.invoke(**inputs):
            for _ in tracer.iter[:max_new_tokens]:
                for index, block in enumerate(model.layers):
                    edit_block(block, index, removed, shifts)
                model.lm_head.output  # noqa: B018 - a round waits here for the model, also without edits
        # A block of its own: where all answers end early, the rounds' is cut short.
        with tracer.invoke():
            written = tracer.result[:, start:].detach().cpu().save()
    tokens = np.full((len(prompts), max_new_tokens), -1)
    for row, answer in zip(tokens, written.tolist(), strict=True):
        length = next((i for i, token in enumerate(answer) if token in end), len(answer))
        row[:length] = answer[:length]
    return tokens


def _divergences(model: TransformersModel, prompts: list[Tokens], conditions: list[Ablation]) -> np.ndarray:
    """KL(intact || condition) of the next token [row]."""
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    reference = first_logits(model, distinct, [intact(model)] * len(distinct))
    logits = first_logits(model, prompts, conditions)
    before = reference.log_softmax(-1)[prompt_indices(prompts, distinct)]
    kl = (before.exp() * (before - logits.log_softmax(-1))).sum(-1)
    return kl.clamp_min(0).cpu().numpy()  # rounding alone makes it negative
