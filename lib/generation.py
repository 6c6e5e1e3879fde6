"""Greedy generation and next-token measures under ablation, with prompts and conditions in the batch.

The unit of work is a batch of (condition, prompt) rows: every row carries its own subspace, strength,
centre, layers and shift, so that a sweep is a few large forwards. Conditions that do the same run once,
and the blocks below the first one that a batch touches read every prompt once.

Prompts are left-padded under an attention mask with positions of their own: a row's answer does not depend
on the rows beside it. What all prompts begin with, such as the opening of a chat template, is read once a
condition. `last_token_streams` also offers the ways of padding that are wrong, to measure them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial

import numpy as np
import torch
from transformers import DynamicCache

from lib.batches import Batches, auto_rows
from lib.models import ModelError, TransformersModel, is_remote, provenance, shape
from lib.progress import counting
from lib.record import Cache

TODAY = date(2024, 7, 26)  # in chat templates: what Llama 3's fall back on

SITES = ("block_input", "attention", "mlp")
PADDINGS = ("left", "right", "left-unmasked", "none")

Tokens = Sequence[int]
Measure = Callable[[list[Tokens], list["Ablation"]], np.ndarray]  # of one prompt and one condition a row


@dataclass(frozen=True, eq=False)
class Ablation:
    """One condition: a subspace taken out of the residual stream.

    x -> x - strength * P (x - center) at block inputs, x -> x - strength * P x of what attention and MLP add:
    at strength 1 the stream's projection is that of the center throughout.

    Attributes:
        name: what the subspace is.
        basis: orthonormal rows [k, d_model]; k = 0 leaves the model intact.
        strength: 1 removes the projection, less weakens it, 2 reflects it.
        center: where the stream's projection goes instead of zero [d_model]; None is zero.
        sites: where, of "block_input", "attention" and "mlp" (what these add to the stream).
        layers: at which blocks; None is all.
        shift: (layer, vector [d_model]), added to that block's input at every token, after the removal there.

    Raises:
        ValueError: rows that are not orthonormal, an unknown site, an endless strength, or a center without
            block inputs to move there.
    """

    name: str
    basis: torch.Tensor
    strength: float = 1.0
    center: torch.Tensor | None = None
    sites: tuple[str, ...] = SITES
    layers: range | None = None
    shift: tuple[int, torch.Tensor] | None = None

    def __post_init__(self):
        if self.basis.ndim != 2:
            raise ValueError(
                f"condition {self.name!r}: basis must be [k, d_model], not {[*self.basis.shape]}"
            )
        rows = self.basis.double()
        error = (rows @ rows.T - torch.eye(len(rows), dtype=torch.float64, device=rows.device)).abs()
        if error.numel() and not error.max() < 1e-4:
            raise ValueError(
                f"condition {self.name!r}: the rows of basis are not orthonormal (off by {error.max():.1e}); "
                "make them so with lib.refusal.stack"
            )
        unknown = set(self.sites) - set(SITES)
        if unknown:
            raise ValueError(
                f"condition {self.name!r}: no site {min(unknown)!r}; sites are {', '.join(SITES)}"
            )
        if not np.isfinite(self.strength):
            raise ValueError(f"condition {self.name!r}: strength {self.strength} is no number")
        if self.center is not None and "block_input" not in self.sites:
            raise ValueError(
                f"condition {self.name!r}: center moves block inputs; add 'block_input' to sites or drop it"
            )

    @property
    def removes(self) -> bool:
        """Whether any projection is removed."""
        return bool(len(self.basis) and self.strength and self.sites and self.layers != range(0))


def intact(model: TransformersModel) -> Ablation:
    """The condition that changes nothing."""
    return Ablation("intact", torch.zeros(0, shape(model).d_model))


def remove_subspace(
    stream: torch.Tensor,
    basis: torch.Tensor,
    strength: torch.Tensor | float = 1.0,
    center: torch.Tensor | None = None,
) -> None:
    """Take a subspace out of activations, in place: x - strength * P (x - center). Works inside a trace.

    Args:
        stream: [row, token, d_model], such as `model.layers[i].input`.
        basis: orthonormal rows [k, d_model], or those of each row of the batch [row, k, d_model], where rows
            of zeros fill up smaller subspaces.
        strength: a number, or one a row [row, 1, 1].
        center: [d_model], or one a row [row, 1, d_model]; None is zero.
    """
    basis = basis.to(stream.device)
    strength = strength.to(stream.device) if isinstance(strength, torch.Tensor) else strength
    # In the basis' float32: in half precision the coordinates would be rounded before they are subtracted.
    with torch.autocast(stream.device.type, enabled=False):  # NDIF's would do so
        centred = stream.to(basis.dtype) if center is None else stream - center.to(stream.device)
        coordinates = centred @ basis.mT  # [row, token, k]
        stream -= (strength * coordinates) @ basis


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
    _pad_id(model)
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
        model: from `lib.models.load`.
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
    answer = _answers_there if is_remote(model) else _answers
    measure = partial(answer, model, max_new_tokens, end_tokens(model))
    tokens = _over_rows(
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
    return _over_rows(
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
        logits = _first_logits(model, rows, edits)
        return (logits[:, chosen].logsumexp(-1) - logits.logsumexp(-1)).exp().cpu().numpy()

    return _over_rows(
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
        return _first_logits(model, rows, edits).log_softmax(-1).cpu().numpy()

    return _over_rows(
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
    _check_prompts(model, prompts, longest)
    inputs = _padded(model, [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
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
        model: from `lib.models.load`.
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
    _check_prompts(model, prompts, 0)
    longest = max(map(len, prompts))
    size = 1 if padding == "none" else batch_size or auto_rows(model, longest)
    # By length, so that little is padded; the wrong ways stay in one frame for all.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = torch.empty(len(prompts), shape(model).n_layers + 1, shape(model).d_model)
    nothing = intact(model)

    def read(rows: list[int]) -> torch.Tensor:
        options: dict = {"use_cache": False}
        if padding in ("right", "left-unmasked"):
            inputs = _wrongly_padded(model, [prompts[i] for i in rows], longest, padding)
        elif is_remote(model):
            inputs = _padded(model, [prompts[i] for i in rows])
        else:
            inputs, opened = _read_opening(model, [prompts[i] for i in rows], [nothing] * len(rows))
            options = {"use_cache": True, "past_key_values": opened}
        last = last_of(inputs["input_ids"])
        with torch.no_grad(), model.trace(**inputs, **options, logits_to_keep=last):
            streams = [block.input[:, -1].detach().cpu() for block in model.layers]
            streams.append(model.layers[-1].output[:, -1].detach().cpu())
            at_last = torch.stack(streams, dim=1).float().save()
        return at_last

    found[order] = torch.cat(list(Batches(size).map(read, order)))
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
    _check_prompts(model, prompts, 0)
    if not 0 < n <= min(map(len, prompts)):
        raise ValueError(f"n = {n}: the shortest prompt has {min(map(len, prompts))} tokens")
    size = batch_size or auto_rows(model, max(map(len, prompts)))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = torch.empty(len(prompts), n, shape(model).d_model)

    def read(rows: list[int]) -> torch.Tensor:
        inputs = _padded(model, [prompts[i] for i in rows])
        last = last_of(inputs["input_ids"])
        with torch.no_grad(), model.trace(**inputs, use_cache=False, logits_to_keep=last) as tracer:
            tail = model.layers[layer].input[:, -n:].detach().float().cpu().save()
            tracer.stop()
        return tail

    found[order] = torch.cat(list(Batches(size).map(read, order)))
    return found


def end_tokens(model: TransformersModel) -> set[int]:
    """Tokens at which an answer ends: those of the model's generation settings, and the tokenizer's."""
    ends = model._module.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    return ends | ({model.tokenizer.eos_token_id} - {None})


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
    logits, state = _prefill(model, prompts, conditions)
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


def _answers_there(
    model: TransformersModel,
    max_new_tokens: int,
    end: set[int],
    prompts: list[Tokens],
    conditions: list[Ablation],
) -> np.ndarray:
    """What `_answers` gives, of a remote model: one job, of which nothing but the new tokens comes back."""
    inputs, edits = _padded(model, prompts), _Edits(model, conditions)
    start = inputs["input_ids"].shape[1]
    # How its makers have it chat (sampling, penalties) is undone: an answer is made of the likeliest tokens.
    settings = dict.fromkeys(model._module.generation_config.to_diff_dict()) | {
        "do_sample": False, "num_beams": 1, "use_cache": True, "max_new_tokens": max_new_tokens,
        "eos_token_id": sorted(end) or None, "pad_token_id": _pad_id(model),
    }  # fmt: skip
    removed, shifts = edits.removed, edits.shifts
    with torch.no_grad(), model.generate(**settings) as tracer:
        with tracer.invoke(**inputs):
            for _ in tracer.iter[:max_new_tokens]:
                for index, block in enumerate(model.layers):
                    _edit_block(block, index, removed, shifts)
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
    reference = _first_logits(model, distinct, [intact(model)] * len(distinct))
    logits = _first_logits(model, prompts, conditions)
    before = reference.log_softmax(-1)[_indices(prompts, distinct)]
    kl = (before.exp() * (before - logits.log_softmax(-1))).sum(-1)
    return kl.clamp_min(0).cpu().numpy()  # rounding alone makes it negative


# -- forwards --------------------------------------------------------------------------------------


class _Edits:
    """What is done to each row of a batch, by site and block.

    Attributes:
        first: the first block that any row touches.
        removed: site -> {layer: arguments of `remove_subspace`}.
        shifts: layer -> [row, 1, d_model].
    """

    def __init__(self, model: TransformersModel, conditions: list[Ablation]):
        n_layers, device = shape(model).n_layers, model.device
        distinct = list(dict.fromkeys(conditions))
        number = {condition: i for i, condition in enumerate(distinct)}
        row = torch.tensor([number[condition] for condition in conditions])
        k = max(len(condition.basis) for condition in distinct)
        basis = torch.stack(
            [torch.nn.functional.pad(c.basis.float().cpu(), (0, 0, 0, k - len(c.basis))) for c in distinct]
        )  # [condition, k, d_model]
        zero = torch.zeros(basis.shape[-1])
        center = torch.stack([zero if c.center is None else c.center.float().cpu() for c in distinct])
        self._basis = basis[row].to(device)
        self._center = center[row][:, None].to(device) if center.any() else None
        # Blocks at which the same conditions are active share one tensor of strengths.
        self._strengths: dict[tuple[bool, ...], torch.Tensor] = {}
        self._active: dict[str, dict[int, tuple[bool, ...]]] = {site: {} for site in SITES}
        for site in SITES:
            for layer in range(n_layers):
                active = tuple(
                    c.removes and site in c.sites and (c.layers is None or layer in c.layers)
                    for c in distinct
                )
                if any(active):
                    self._active[site][layer] = active
                    strength = torch.tensor([c.strength * on for c, on in zip(distinct, active, strict=True)])
                    self._strengths[active] = strength[row][:, None, None].to(device)
        self.shifts: dict[int, torch.Tensor] = {}
        for layer in sorted({c.shift[0] for c in distinct if c.shift}):
            vectors = [
                c.shift[1].float().cpu() if c.shift and c.shift[0] == layer else zero for c in distinct
            ]
            self.shifts[layer] = torch.stack(vectors)[row][:, None].to(device)
        self.first = min([n_layers, *self.shifts, *(layer for site in SITES for layer in self._active[site])])
        self._arrange()

    def keep(self, rows: torch.Tensor) -> None:
        """Forget all but these rows."""
        self._basis = self._basis[rows]
        self._center = None if self._center is None else self._center[rows]
        self._strengths = {active: strength[rows] for active, strength in self._strengths.items()}
        self.shifts = {layer: shift[rows] for layer, shift in self.shifts.items()}
        self._arrange()

    def _arrange(self) -> None:
        self.removed = {
            site: {
                # What is added to the stream has no center: each block's input is moved there already.
                layer: (self._basis, self._strengths[active], self._center if site == "block_input" else None)
                for layer, active in layers.items()
            }
            for site, layers in self._active.items()
        }


class _State:
    """A batch in the middle of its answers.

    Args:
        cache: keys and values of what was read.
        inputs: of the prefill; those of left-padded rows hold attention_mask and position_ids.
    """

    def __init__(self, model: TransformersModel, edits: _Edits, cache: DynamicCache, inputs: dict):
        self.model, self.edits, self.cache = model, edits, cache
        self.mask = inputs.get("attention_mask")
        self.position = None if self.mask is None else inputs["position_ids"][:, -1:]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read one more token a row [row]; logits of the next [row, vocabulary]."""
        inputs = {"input_ids": tokens[:, None]}
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
            self.position = self.position + 1
            inputs |= {"attention_mask": self.mask, "position_ids": self.position}
        return _forward(self.model, inputs, self.edits, self.cache)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all but these rows."""
        self.edits.keep(rows)
        self.cache.batch_select_indices(rows)
        if self.mask is not None:
            self.mask, self.position = self.mask[rows], self.position[rows]


def _prefill(
    model: TransformersModel, prompts: list[Tokens], conditions: list[Ablation]
) -> tuple[torch.Tensor, _State]:
    """Read the prompts: logits of the next token [row, vocabulary], and the state to go on from."""
    edits, inputs = _Edits(model, conditions), _padded(model, prompts)
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    if 0 < edits.first < shape(model).n_layers and len(distinct) < len(prompts):
        # No row touches the blocks below: they read every prompt once.
        lower, entry = _read_below(model, _padded(model, distinct), edits.first)
        of_row = _indices(prompts, distinct)
        lower.batch_select_indices(of_row)
        cache = DynamicCache(config=model._module.config)
        logits = _forward(model, inputs, edits, cache, edits.first, entry[of_row])
        cache.layers[: edits.first] = lower.layers[: edits.first]
        return logits, _State(model, edits, cache, inputs)
    inputs, cache = _read_opening(model, prompts, conditions)
    logits = _forward(model, inputs, edits, cache)
    return logits, _State(model, edits, cache, inputs)


def _read_opening(
    model: TransformersModel, prompts: list[Tokens], conditions: list[Ablation]
) -> tuple[dict[str, torch.Tensor], DynamicCache]:
    """Read what all prompts begin with, once a condition: inputs that are left to read, and the cache.

    Nothing is read where it would save little.
    """
    cache, opening = DynamicCache(config=model._module.config), _common_opening(prompts)
    different = list(dict.fromkeys(conditions))
    if len(opening) < _WORTH_SHARING or 2 * len(different) > len(prompts):
        return _padded(model, prompts), cache
    shared = {"input_ids": torch.tensor([opening] * len(different), device=model.device)}
    _forward(model, shared, _Edits(model, different), cache)
    number = {condition: i for i, condition in enumerate(different)}
    cache.batch_select_indices(torch.tensor([number[condition] for condition in conditions]))
    return _padded(model, [prompt[len(opening) :] for prompt in prompts], len(opening)), cache


_WORTH_SHARING = 8  # tokens


def _common_opening(prompts: list[Tokens]) -> list[int]:
    """Tokens that all prompts begin with, short of the last token of any."""
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # others lie between them
    length = min(len(prompt) for prompt in prompts) - 1
    different = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return list(first[: min(length, next(different, length))])


def _first_logits(
    model: TransformersModel, prompts: list[Tokens], conditions: list[Ablation]
) -> torch.Tensor:
    """Logits of the next token [row, vocabulary], in one trace where it runs remote."""
    if is_remote(model):
        return _forward(model, _padded(model, prompts), _Edits(model, conditions), None)
    return _prefill(model, prompts, conditions)[0]


def _forward(
    model: TransformersModel,
    inputs: dict[str, torch.Tensor],
    edits: _Edits,
    cache: DynamicCache | None,
    first: int = 0,
    entry: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of the next token [row, vocabulary] under the edits; block `first` reads `entry`."""
    removed, shifts = edits.removed, edits.shifts  # a remote model is sent what the block names
    last = last_of(inputs["input_ids"])
    options = {"past_key_values": cache, "use_cache": cache is not None, "logits_to_keep": last}
    with torch.no_grad(), model.trace(**inputs, **options):
        for index, block in enumerate(model.layers):
            if index < first:
                block.skip(entry)
                continue
            _edit_block(block, index, removed, shifts)
        logits = model.lm_head.output[:, -1].float().detach().save()
    return known_logits(logits, model)


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


def _edit_block(block, index: int, removed: dict, shifts: dict) -> None:
    """Do to a block, within a trace, what the `removed` and the `shifts` of `_Edits` say."""
    if index in removed["block_input"]:
        remove_subspace(block.input, *removed["block_input"][index])
    if index in shifts:
        stream = block.input
        stream += shifts[index].to(stream.device)
    if index in removed["attention"]:
        remove_subspace(block.self_attn.o_proj.output, *removed["attention"][index])
    if index in removed["mlp"]:
        remove_subspace(block.mlp.output, *removed["mlp"][index])


def _read_below(
    model: TransformersModel, inputs: dict[str, torch.Tensor], layer: int
) -> tuple[DynamicCache, torch.Tensor]:
    """Keys and values of the blocks below a layer, and that block's input [row, token, d_model]."""
    cache = DynamicCache(config=model._module.config)
    last = last_of(inputs["input_ids"])
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": last}
    with torch.no_grad(), model.trace(**inputs, **options):
        stream = model.layers[layer].input.save()
        # Not tracer.stop(): its exception holds on to all that its callers hold, until garbage is collected.
        for block in model.layers[layer:]:
            block.skip(stream)
    return cache, stream


# -- rows and batches ------------------------------------------------------------------------------


def _over_rows(
    model: TransformersModel,
    prompts: Sequence[Tokens],
    conditions: Sequence[Ablation],
    measure: Measure,
    *,
    name: str,
    key: dict,
    batch_size: int,
    cache: Cache | None,
    by_prompt: bool,
    new_tokens: int = 0,
) -> np.ndarray:
    """A measure of every prompt under every condition, [condition, prompt, ...].

    Args:
        measure: of a batch, [row, ...].
        name, key: of the cached result, besides the rows and the model.
        by_prompt: whether the conditions of a prompt share a batch, or the prompts of a condition.
        new_tokens: that will follow the prompts.
    """
    _pad_id(model)
    _check_prompts(model, prompts, new_tokens)
    if not conditions:
        raise ValueError("there are no conditions; give `intact(model)` for the model as it is")
    sizes = shape(model)
    for condition in conditions:
        _check_condition(condition, sizes.n_layers, sizes.d_model)
    signatures = [_signature(condition, sizes.n_layers) for condition in conditions]
    distinct = dict(zip(reversed(signatures), reversed(conditions), strict=True))
    starts = {s: _Edits(model, [c]).first for s, c in distinct.items()}
    lengths = [len(prompt) for prompt in prompts]

    def place(row: tuple[str, int]) -> tuple:
        signature, prompt = row
        start, size = starts[signature], len(distinct[signature].basis)
        # Of conditions that begin later than at block 0 a prompt's share what was read below.
        shared = prompt if by_prompt or start else -1
        return lengths[prompt], 0 if by_prompt else start, shared, start, size, signature, prompt

    rows = sorted(((s, j) for s in distinct for j in range(len(prompts))), key=place)
    size = batch_size or auto_rows(model, max(lengths) + new_tokens)
    found: dict[tuple[str, int], np.ndarray] = {}

    fitting = Batches(size)

    def run(batch: list[tuple[str, int]]) -> np.ndarray:
        return measure([prompts[j] for _, j in batch], [distinct[s] for s, _ in batch])

    def compute(batch: list[tuple[str, int]]) -> dict[str, np.ndarray]:
        return {"values": np.concatenate(list(fitting.map(run, batch)))}

    with counting(name.replace("_", " "), len(rows)) as count:
        for batch in _batches(rows, [lengths[j] for _, j in rows], size):
            if cache:
                contents = [[s, [int(token) for token in prompts[j]]] for s, j in batch]
                full_key = key | {"model": provenance(model), "new_tokens": new_tokens, "rows": contents}
                values = cache.get(name, full_key, partial(compute, batch))["values"]
            else:
                values = compute(batch)["values"]
            found.update(zip(batch, values, strict=True))
            count(len(batch))
    return np.array([[found[s, j] for j in range(len(prompts))] for s in signatures])


def _batches(rows: list, lengths: list[int], size: int) -> Iterator[list]:
    """Rows in order, `size` at a time; a batch that is half full ends where longer rows begin.

    Rows of one length need no padding, hence no mask, which costs more than a few rows a forward.
    """
    batch: list = []
    for i, row in enumerate(rows):
        if len(batch) == size or (2 * len(batch) >= size and lengths[i] != lengths[i - 1]):
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _padded(
    model: TransformersModel, prompts: Sequence[Tokens], n_before: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs of a forward [row, token], left-padded under a mask where lengths differ.

    Args:
        n_before: tokens that the cache holds of every row, which the mask and the positions count.
    """
    longest = max(map(len, prompts))
    missing = torch.tensor([longest - len(prompt) for prompt in prompts])
    ids = torch.tensor([[_pad_id(model)] * (longest - len(prompt)) + [*prompt] for prompt in prompts])
    inputs = {"input_ids": ids}
    if missing.any():
        positions = torch.arange(longest) - missing[:, None]
        before = torch.ones(len(prompts), n_before, dtype=torch.long)
        inputs |= {
            "attention_mask": torch.cat([before, (positions >= 0).long()], dim=1),
            "position_ids": n_before + positions.clamp_min(0),
        }
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _wrongly_padded(
    model: TransformersModel, prompts: Sequence[Tokens], longest: int, padding: str
) -> dict[str, torch.Tensor]:
    """Inputs as people have padded them: to the right, or to the left without telling the model."""
    fill = [[_pad_id(model)] * (longest - len(prompt)) for prompt in prompts]
    if padding == "right":
        ids = torch.tensor([[*prompt, *pads] for prompt, pads in zip(prompts, fill, strict=True)])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    ids = torch.tensor([[*pads, *prompt] for prompt, pads in zip(prompts, fill, strict=True)])
    return {"input_ids": ids.to(model.device)}


def _indices(prompts: list[Tokens], distinct: list[tuple]) -> torch.Tensor:
    """Which of the distinct prompts each row reads [row], on the CPU."""
    number = {prompt: i for i, prompt in enumerate(distinct)}
    return torch.tensor([number[tuple(prompt)] for prompt in prompts])


def _signature(condition: Ablation, n_layers: int) -> str:
    """Equal for conditions that do the same to the model."""
    digest = hashlib.sha256()
    if condition.removes:
        center = condition.center if condition.center is not None and condition.center.any() else None
        layers = range(n_layers) if condition.layers is None else condition.layers
        digest.update(repr((float(condition.strength), sorted(set(condition.sites)), [*layers])).encode())
        digest.update(_bytes(condition.basis) + b"center" + (b"" if center is None else _bytes(center)))
    if condition.shift and condition.shift[1].any():
        digest.update(b"shift %d" % condition.shift[0] + _bytes(condition.shift[1]))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()


# -- checks ----------------------------------------------------------------------------------------


def _pad_id(model: TransformersModel) -> int:
    """The token that fills up short rows; it is masked, but has to be one of the model's."""
    if model.tokenizer.pad_token_id is None:
        raise ModelError(
            "this tokenizer has no pad token and no end-of-text token to pad with; set "
            "model.tokenizer.pad_token to a token that no prompt holds"
        )
    return model.tokenizer.pad_token_id


def _check_prompts(model: TransformersModel, prompts: Sequence[Tokens], new_tokens: int) -> None:
    limit = shape(model).n_positions
    if not len(prompts):
        raise ValueError("there are no prompts")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} has no tokens")
        if len(prompt) + new_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, and with {new_tokens} new ones that is more than the "
                f"{limit} positions of this model; shorten it or lower max_new_tokens"
            )


def _check_condition(condition: Ablation, n_layers: int, d_model: int) -> None:
    vectors = {"basis": condition.basis, "center": condition.center}
    layers = [*(condition.layers or ())]
    if condition.shift:
        vectors["shift"] = condition.shift[1]
        layers.append(condition.shift[0])
    for name, vector in vectors.items():
        if vector is not None and vector.shape[-1] != d_model:
            raise ValueError(
                f"condition {condition.name!r}: {name} has {vector.shape[-1]} dimensions, and the model's "
                f"residual stream has {d_model}; was it taken from another model?"
            )
        if vector is not None and not vector.isfinite().all():
            raise ValueError(f"condition {condition.name!r}: {name} is NaN or infinite somewhere")
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise ValueError(
                f"condition {condition.name!r}: layer {layer}; the model has layers 0 to {n_layers - 1}"
            )
