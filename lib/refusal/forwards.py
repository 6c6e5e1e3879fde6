"""Forwards over prompts and conditions: shared openings and layers, padding, batches, key-value caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from nnsight import TransformersModel
from transformers import DynamicCache

from lib.core.batches import Batches, auto_rows
from lib.core.cache import Cache
from lib.core.downloads import ModelError
from lib.core.families import is_remote, shape
from lib.core.interventions import remove_subspace
from lib.core.models import provenance
from lib.core.progress import counting
from lib.core.tokens import known_logits, last_of
from lib.refusal.removal import SITES, Ablation, check_condition, signature_of

PADDINGS = ("left", "right", "left-unmasked", "none")
Tokens = Sequence[int]
Measure = Callable[[list[Tokens], list["Ablation"]], np.ndarray]  # of one prompt and one condition a row


# -- forwards --------------------------------------------------------------------------------------
class Edits:
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

    def __init__(self, model: TransformersModel, edits: Edits, cache: DynamicCache, inputs: dict):
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


def prefill(
    model: TransformersModel, prompts: list[Tokens], conditions: list[Ablation]
) -> tuple[torch.Tensor, _State]:
    """Read the prompts: logits of the next token [row, vocabulary], and the state to go on from."""
    edits, inputs = Edits(model, conditions), padded_rows(model, prompts)
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    if 0 < edits.first < shape(model).n_layers and len(distinct) < len(prompts):
        # No row touches the blocks below: they read every prompt once.
        lower, entry = _read_below(model, padded_rows(model, distinct), edits.first)
        of_row = prompt_indices(prompts, distinct)
        lower.batch_select_indices(of_row)
        cache = DynamicCache(config=model._module.config)
        logits = _forward(model, inputs, edits, cache, edits.first, entry[of_row])
        cache.layers[: edits.first] = lower.layers[: edits.first]
        return logits, _State(model, edits, cache, inputs)
    inputs, cache = read_opening(model, prompts, conditions)
    logits = _forward(model, inputs, edits, cache)
    return logits, _State(model, edits, cache, inputs)


def read_opening(
    model: TransformersModel, prompts: list[Tokens], conditions: list[Ablation]
) -> tuple[dict[str, torch.Tensor], DynamicCache]:
    """Read what all prompts begin with, once a condition: inputs that are left to read, and the cache.

    Nothing is read where it would save little.
    """
    cache, opening = DynamicCache(config=model._module.config), _common_opening(prompts)
    different = list(dict.fromkeys(conditions))
    if len(opening) < _WORTH_SHARING or 2 * len(different) > len(prompts):
        return padded_rows(model, prompts), cache
    shared = {"input_ids": torch.tensor([opening] * len(different), device=model.device)}
    _forward(model, shared, Edits(model, different), cache)
    number = {condition: i for i, condition in enumerate(different)}
    cache.batch_select_indices(torch.tensor([number[condition] for condition in conditions]))
    return padded_rows(model, [prompt[len(opening) :] for prompt in prompts], len(opening)), cache


_WORTH_SHARING = 8  # tokens


def _common_opening(prompts: list[Tokens]) -> list[int]:
    """Tokens that all prompts begin with, short of the last token of any."""
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # others lie between them
    length = min(len(prompt) for prompt in prompts) - 1
    different = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return list(first[: min(length, next(different, length))])


def first_logits(model: TransformersModel, prompts: list[Tokens], conditions: list[Ablation]) -> torch.Tensor:
    """Logits of the next token [row, vocabulary], in one trace where it runs remote."""
    if is_remote(model):
        return _forward(model, padded_rows(model, prompts), Edits(model, conditions), None)
    return prefill(model, prompts, conditions)[0]


def _forward(
    model: TransformersModel,
    inputs: dict[str, torch.Tensor],
    edits: Edits,
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
            edit_block(block, index, removed, shifts)
        logits = model.lm_head.output[:, -1].float().detach().save()
    return known_logits(logits, model)


def edit_block(block, index: int, removed: dict, shifts: dict) -> None:
    """Do to a block, within a trace, what the `removed` and the `shifts` of `Edits` say."""
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
def over_rows(
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
    pad_id(model)
    check_prompts(model, prompts, new_tokens)
    if not conditions:
        raise ValueError("there are no conditions; give `intact(model)` for the model as it is")
    sizes = shape(model)
    for condition in conditions:
        check_condition(condition, sizes.n_layers, sizes.d_model)
    signatures = [signature_of(condition, sizes.n_layers) for condition in conditions]
    distinct = dict(zip(reversed(signatures), reversed(conditions), strict=True))
    starts = {s: Edits(model, [c]).first for s, c in distinct.items()}
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


def padded_rows(
    model: TransformersModel, prompts: Sequence[Tokens], n_before: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs of a forward [row, token], left-padded under a mask where lengths differ.

    Args:
        n_before: tokens that the cache holds of every row, which the mask and the positions count.
    """
    longest = max(map(len, prompts))
    missing = torch.tensor([longest - len(prompt) for prompt in prompts])
    ids = torch.tensor([[pad_id(model)] * (longest - len(prompt)) + [*prompt] for prompt in prompts])
    inputs = {"input_ids": ids}
    if missing.any():
        positions = torch.arange(longest) - missing[:, None]
        before = torch.ones(len(prompts), n_before, dtype=torch.long)
        inputs |= {
            "attention_mask": torch.cat([before, (positions >= 0).long()], dim=1),
            "position_ids": n_before + positions.clamp_min(0),
        }
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def wrongly_padded(
    model: TransformersModel, prompts: Sequence[Tokens], longest: int, padding: str
) -> dict[str, torch.Tensor]:
    """Inputs as people have padded them: to the right, or to the left without telling the model."""
    fill = [[pad_id(model)] * (longest - len(prompt)) for prompt in prompts]
    if padding == "right":
        ids = torch.tensor([[*prompt, *pads] for prompt, pads in zip(prompts, fill, strict=True)])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    ids = torch.tensor([[*pads, *prompt] for prompt, pads in zip(prompts, fill, strict=True)])
    return {"input_ids": ids.to(model.device)}


def prompt_indices(prompts: list[Tokens], distinct: list[tuple]) -> torch.Tensor:
    """Which of the distinct prompts each row reads [row], on the CPU."""
    number = {prompt: i for i, prompt in enumerate(distinct)}
    return torch.tensor([number[tuple(prompt)] for prompt in prompts])


# -- checks ----------------------------------------------------------------------------------------
def pad_id(model: TransformersModel) -> int:
    """The token that fills up short rows; it is masked, but has to be one of the model's."""
    if model.tokenizer.pad_token_id is None:
        raise ModelError(
            "this tokenizer has no pad token and no end-of-text token to pad with; set "
            "model.tokenizer.pad_token to a token that no prompt holds"
        )
    return model.tokenizer.pad_token_id


def check_prompts(model: TransformersModel, prompts: Sequence[Tokens], new_tokens: int) -> None:
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
