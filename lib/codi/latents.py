"""How a CODI model thinks and answers, and what follows when its thoughts are replaced.

One index throughout. z_0 is the final hidden state (after the last norm) at <bot>, z_k the one at the k-th
thought. z_0 .. z_{n-1} are projected and fed back as the n thoughts; z_n is decoded, never fed back.
`ThoughtIndex` translates into the two published ways of counting.

    position      question  <bot>  thought 1    ...  thought n        <eot>  answer prompt
    reads                          project(z_0)      project(z_{n-1})
    final state             z_0    z_1               z_n

Behind <eot> the model writes the answer prompt by itself, or something else first: with too few thoughts it
may write out its steps. To ask what the thoughts alone are good for, the prompt is fed (`Variant.prompted`):
so it is in `early_stops` and wherever thoughts are replaced.

The model runs as it is used, with a key-value cache. All problems and variants (fewer thoughts, thoughts
replaced) ride in the batch; variants of a problem share its question. Questions of equal length share a
batch, so that nothing is padded or masked. `lib.codi.readings` looks inside.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from lib.codi.checkpoint import CodiModel
from lib.codi.problems import Problem, extract_answer, question_numbers, twin_indices
from lib.core.batches import Batches, auto_rows
from lib.core.cache import Cache
from lib.core.families import shape
from lib.core.models import provenance
from lib.core.progress import counting
from lib.core.tokens import end_tokens, known_logits, last_of

MAX_ANSWER = 24  # tokens of an answer, prompt included
MAX_NUMBER = 8  # tokens of a number behind a prompt that was fed


class ThoughtIndex(NamedTuple):
    """z_k, and what it is called elsewhere. The only place that knows.

    neverix (2026) counts the thoughts that are fed, from 1: its odd tokens are z_0, z_2, z_4. Goyal et al.
    (2025) count the steps at which thoughts are computed, from 0: their even steps are z_2, z_4, z_6.
    """

    k: int

    @property
    def neverix(self) -> str:
        token = self.k + 1
        return f"{'odd' if token % 2 else 'even'} token {token}"

    @property
    def goyal(self) -> str:
        return f"{'odd' if self.k % 2 else 'even'} step {self.k}" if self.k else "before step 1"

    def __str__(self) -> str:
        return f"z_{self.k} (neverix: {self.neverix}; Goyal: {self.goyal})"


# -- thoughts and answers --------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Variant:
    """One way to think: how many thoughts, and what stands in for some of them.

    Attributes:
        name: what it is.
        n_thoughts: None is the model's own number; 0 goes from <bot> to <eot>.
        replaced: which z_k are replaced before they are projected and fed.
        values: what stands in their place [problem, k, d_model], k as in `Thoughts.z`; [1, k, d_model] for
            all problems alike.
        prompted: whether the answer prompt is fed behind <eot>: the answer is then the first number written,
            else the last one.
    """

    name: str
    n_thoughts: int | None = None
    replaced: tuple[int, ...] = ()
    values: np.ndarray | None = None
    prompted: bool = False


@dataclass(frozen=True)
class Answers:
    """What the model wrote.

    Attributes:
        variants: ways to think, in the order asked.
        texts: answers without the end token, and without the prompt if that was fed [variant][problem].
        values: number of each, see `Variant.prompted`, NaN without one, float64 [variant, problem].
    """

    variants: tuple[Variant, ...]
    texts: list[list[str]]
    values: np.ndarray

    def equal(self, wanted: Sequence[float] | np.ndarray) -> np.ndarray:
        """Whether each answer is the number wanted of its problem, bool [variant, problem].

        The problems' answers give the accuracy; those of the twins, how often a patch carries its own.
        """
        return np.isclose(self.values, np.asarray(wanted, dtype=float), rtol=1e-9, atol=1e-9)

    def with_steps(self) -> np.ndarray:
        """Whether steps stand before the number, bool [variant, problem]: several numbers in a text."""
        return np.array([[len(question_numbers(text)) > 1 for text in row] for row in self.texts])


@dataclass(frozen=True)
class Thoughts:
    """Thoughts of every problem, and the answers that they led to.

    Attributes:
        z: final hidden states z_0 .. z_n, float32 [problem, n + 1, d_model].
        answers: of the one variant.
    """

    z: np.ndarray
    answers: Answers

    @property
    def values(self) -> np.ndarray:
        """Answers as numbers [problem], NaN for none."""
        return self.answers.values[0]


def think(
    codi: CodiModel,
    questions: Sequence[str],
    n_thoughts: int | None = None,
    *,
    max_answer: int = MAX_ANSWER,
    batch_size: int = 0,
    cache: Cache | None = None,
) -> Thoughts:
    """Think about every question, then answer greedily.

    Args:
        codi: from `load_codi`.
        questions: texts of any lengths.
        n_thoughts: None is the model's own number; 0 answers at once.
        max_answer: tokens at which an answer is cut.
        batch_size: rows a forward; 0 chooses by memory. Halved when memory runs out.
        cache: keeps every finished batch.

    Raises:
        ValueError: no questions, an empty one or one longer than the model's positions, a number of thoughts
            that is negative or that the model cannot think.
    """
    n = codi.n_thoughts if n_thoughts is None else n_thoughts
    variants = [Variant("intact", n)]
    tokens, z = _run(codi, questions, variants, max_answer, batch_size, cache, keep_z=True)
    return Thoughts(z[0], _answers(codi, variants, tokens))


def answer(
    codi: CodiModel,
    questions: Sequence[str],
    variants: Sequence[Variant],
    *,
    max_answer: int = MAX_ANSWER,
    batch_size: int = 0,
    cache: Cache | None = None,
) -> Answers:
    """Greedy answers to every question under every variant; arguments and errors as for `think`."""
    tokens, _ = _run(codi, questions, variants, max_answer, batch_size, cache, keep_z=False)
    return _answers(codi, variants, tokens)


def early_stops(codi: CodiModel, *, prompted: bool = True) -> list[Variant]:
    """<eot> after 0, 1, .. n thoughts, then the answer prompt; without it a model may write its steps first,
    and what is scored is a written chain of thought."""
    return [Variant(f"{n} thoughts", n, prompted=prompted) for n in range(codi.n_thoughts + 1)]


def twin_patches(
    problems: Sequence[Problem], thoughts: Thoughts, sets: Sequence[Sequence[int]]
) -> list[Variant]:
    """For each set of k the variant in which these z_k are those of the problem's twin.

    A problem whose twin is not among the problems keeps its own.
    """
    values = thoughts.z[twin_indices(problems)]
    return [replacing("twin's", chosen, thoughts, values) for chosen in sets]


def mean_ablations(
    thoughts: Thoughts, sets: Sequence[Sequence[int]], groups: Sequence[Hashable] | None = None
) -> list[Variant]:
    """For each set of k the variant in which these z_k are their means over the problems, or over those of
    the same group [problem]."""
    values = thoughts.z.mean(0, keepdims=True)
    if groups is not None:
        labels = np.array(groups)
        values = np.stack([thoughts.z[labels == label].mean(0) for label in labels])
    return [replacing("mean", chosen, thoughts, values) for chosen in sets]


def replacing(what: str, chosen: Sequence[int], thoughts: Thoughts, values: np.ndarray) -> Variant:
    names = ", ".join(f"z_{k}" for k in chosen)
    return Variant(f"{what} {names}", thoughts.z.shape[1] - 1, tuple(chosen), values, prompted=True)


def _answers(codi: CodiModel, variants: Sequence[Variant], tokens: np.ndarray) -> Answers:
    """Texts and values of answers, tokens [variant, problem, token] filled up with -1."""
    decode = codi.model.tokenizer.decode
    texts = [[decode([t for t in row if t >= 0]) for row in rows.tolist()] for rows in tokens]
    ways = zip(texts, variants, strict=True)
    values = [[extract_answer(text, first=variant.prompted) for text in row] for row, variant in ways]
    return Answers(tuple(variants), texts, np.array(values, dtype=float))


def _run(
    codi: CodiModel,
    questions: Sequence[str],
    variants: Sequence[Variant],
    max_answer: int,
    batch_size: int,
    cache: Cache | None,
    keep_z: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Answers [variant, problem, token], -1 after the end, and, if kept, z [variant, problem, n + 1, d].

    z of a variant with fewer thoughts ends in NaN.
    """
    if not len(variants):
        raise ValueError("there are no variants to answer under")
    ids = [codi.ids(question) for question in questions]
    numbers = [_n_thoughts(codi, variant) for variant in variants]
    check_questions(codi, ids, numbers)
    for variant in variants:
        _check_variant(codi, variant, len(questions))
    # Variants that end alike follow one another: a batch that ends at once is the fastest.
    ends = [(n, variant.prompted) for n, variant in zip(numbers, variants, strict=True)]
    alike = [[i for i, end in enumerate(ends) if end == each] for each in sorted(set(ends))]
    rows = [(i, problem) for group in alike for problem in range(len(ids)) for i in group]
    lengths = [len(ids[problem]) for _, problem in rows]
    deepest = max(numbers)
    # Variants share their question, and behind it a row's activations are those of one token.
    size = batch_size or 2 * auto_rows(codi.model, max(lengths) + deepest + 2 + max_answer)

    def run(batch: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        return _think_batch(codi, ids, variants, batch, deepest, max_answer, keep_z)

    def key(batch: list[tuple[int, int]]) -> dict:
        used = sorted({i for i, _ in batch})
        return {
            "max_answer": max_answer,
            "keep_z": keep_z,
            "rows": [[used.index(i), ids[problem]] for i, problem in batch],
            "variants": [
                [_n_thoughts(codi, variants[i]), list(variants[i].replaced), variants[i].prompted]
                for i in used
            ],
            "values": [_values_of(variants[i], problem) for i, problem in batch],
        }

    found = over_batches(codi, "think", rows, lengths, size, run, key, cache)
    tables = []
    for name in ("tokens", "z"):
        values = np.array(found[name])
        table = np.empty((len(variants), len(ids), *values.shape[1:]), values.dtype)
        table[tuple(np.array(rows).T)] = values
        tables.append(table)
    return tables[0], tables[1]


def _think_batch(
    codi: CodiModel,
    ids: list[list[int]],
    variants: Sequence[Variant],
    batch: list[tuple[int, int]],
    deepest: int,
    max_answer: int,
    keep_z: bool,
) -> dict[str, np.ndarray]:
    """Run (variant, problem) rows whose questions are equally long: tokens and z by row."""
    module, device = codi.model._module, codi.model.device
    problems = list(dict.fromkeys(problem for _, problem in batch))
    of_row = torch.tensor([problems.index(problem) for _, problem in batch], device=device)
    last = np.array([_n_thoughts(codi, variants[i]) for i, _ in batch])  # z at which each row stops
    prompted = np.array([variants[i].prompted for i, _ in batch])
    prompt = codi.ids(codi.answer_prompt)
    tokens = np.full((len(batch), max_answer), -1)
    zs = np.full((len(batch), (deepest + 1) * keep_z, shape(codi.model).d_model), np.nan, np.float32)
    rows = np.arange(len(batch))  # those that still think

    with torch.no_grad():
        read = torch.tensor([[*ids[problem], codi.bot] for problem in problems], device=device)
        cache = DynamicCache(config=module.config)
        z = module.base_model(input_ids=read, past_key_values=cache, use_cache=True).last_hidden_state
        z = z[of_row, -1]  # [row, d_model]
        cache.batch_select_indices(of_row)
        for k in range(deepest + 1):
            if keep_z:
                zs[rows, k] = z.float().cpu().numpy()
            for fed in (False, True):
                stop = (last[rows] == k) & (prompted[rows] == fed)
                if not stop.any():
                    continue
                done, left = (torch.from_numpy(np.flatnonzero(w)).to(device) for w in (stop, ~stop))
                ending = cache if stop.all() else _part(module, cache, done)
                behind = [codi.eot, *prompt] if fed else [codi.eot]
                longest = min(max_answer, MAX_NUMBER) if fed else max_answer
                tokens[rows[stop], :longest] = _write(codi, ending, behind, len(done), longest)
                rows = rows[~stop]
                if not len(rows):
                    break
                cache.batch_select_indices(left)
                z = z[left]
            if not len(rows):
                break
            thought = codi.projection(_replace(z, variants, [batch[row] for row in rows], k))
            out = module.base_model(inputs_embeds=thought[:, None], past_key_values=cache, use_cache=True)
            z = out.last_hidden_state[:, -1]
    return {"tokens": tokens, "z": zs}


def _replace(
    z: torch.Tensor, variants: Sequence[Variant], rows: list[tuple[int, int]], k: int
) -> torch.Tensor:
    """z_k [row, d_model] with the values of the variants that replace it."""
    z = z.clone()
    for place, (i, problem) in enumerate(rows):
        if k in variants[i].replaced:
            z[place] = torch.as_tensor(_values_of(variants[i], problem)[k]).to(z)
    return z


def _write(
    codi: CodiModel, cache: DynamicCache, behind: list[int], n_rows: int, max_answer: int
) -> np.ndarray:
    """Read what stands behind the thoughts and write greedily: tokens [row, token], -1 after the end."""
    module, ends = codi.model._module, sorted(end_tokens(codi.model))
    room = shape(codi.model).n_positions - cache.get_seq_length() - len(behind) + 1
    tokens = np.full((n_rows, max_answer), -1)
    rows = np.arange(n_rows)  # those that are still in the batch
    read = torch.tensor([behind] * n_rows, device=codi.model.device)
    for step in range(min(max_answer, room)):
        out = module(input_ids=read, past_key_values=cache, use_cache=True, logits_to_keep=last_of(read))
        logits = known_logits(out.logits[:, -1].float(), codi.model)
        logits[:, [codi.bot, codi.eot]] = -torch.inf  # answers are text
        chosen = logits.argmax(-1)
        written = chosen.cpu().numpy()
        running = ~np.isin(written, ends)
        tokens[rows[running], step] = written[running]
        if not running.any():
            break
        if not running.all():
            left = torch.from_numpy(np.flatnonzero(running)).to(chosen.device)
            cache.batch_select_indices(left)
            chosen, rows = chosen[left], rows[running]
        read = chosen[:, None]
    return tokens


def _part(module: torch.nn.Module, cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """A cache of its own with these rows."""
    part = DynamicCache(config=module.config)
    for index, layer in enumerate(cache.layers):
        part.update(layer.keys[rows], layer.values[rows], index)
    return part


def _n_thoughts(codi: CodiModel, variant: Variant) -> int:
    return codi.n_thoughts if variant.n_thoughts is None else variant.n_thoughts


def _values_of(variant: Variant, problem: int) -> np.ndarray | None:
    """What a variant puts in the place of a problem's z [k, d_model]."""
    if not variant.replaced:
        return None
    return variant.values[problem if len(variant.values) > 1 else 0]


# -- batches and checks ----------------------------------------------------------------------------
def over_batches(
    codi: CodiModel,
    name: str,
    rows: list,
    lengths: list[int],
    size: int,
    run: Callable[[list], dict[str, np.ndarray]],
    key: Callable[[list], dict],
    cache: Cache | None,
) -> dict[str, list[np.ndarray]]:
    """What `run` measures of batches of equally long rows, by name, in the order of the rows.

    Args:
        name, key: of a cached batch, besides the model.
    """
    found: dict[str, list] = {}
    fitting = Batches(size)
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    with counting(name.replace("_", " "), len(rows)) as count:
        for _, alike in groupby(order, key=lengths.__getitem__):
            places = list(alike)
            for start in range(0, len(places), size):
                batch = places[start : start + size]
                contents = [rows[i] for i in batch]
                compute = partial(_measure, fitting, run, contents)
                full_key = {"model": provenance(codi.model), **key(contents)} if cache else {}
                for what, values in (cache.get(name, full_key, compute) if cache else compute()).items():
                    column = found.setdefault(what, [None] * len(rows))
                    for i, value in zip(batch, values, strict=True):
                        column[i] = value
                count(len(batch))
    return found


def _measure(fitting: Batches, run: Callable, rows: list) -> dict[str, np.ndarray]:
    parts = list(fitting.map(run, rows))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check_questions(codi: CodiModel, questions: Sequence[list[int]], numbers: Sequence[int]) -> None:
    """Raise ValueError for what the model cannot read, or as many thoughts as it cannot think."""
    if not len(questions):
        raise ValueError("there are no questions")
    if min(numbers) < 0:
        raise ValueError(f"n_thoughts {min(numbers)} must be 0 or more")
    n_thoughts = max(numbers)
    if n_thoughts and codi.projection is None:
        raise ValueError(f"{n_thoughts} thoughts of a model without projection: it can only answer at once")
    limit = shape(codi.model).n_positions
    behind = n_thoughts + 2 + len(codi.ids(codi.answer_prompt))  # <bot>, <eot>
    if behind >= limit:
        raise ValueError(
            f"{n_thoughts} thoughts and the answer prompt take {behind} tokens of the {limit} positions of "
            "this model; lower n_thoughts"
        )
    for i, ids in enumerate(questions):
        if not ids:
            raise ValueError(f"question {i} is empty")
        check_known(codi, ids, f"question {i}")
        if len(ids) + behind > limit:
            raise ValueError(
                f"question {i} has {len(ids)} tokens, and with {n_thoughts} thoughts and the answer prompt "
                f"that is more than the {limit} positions of this model; shorten or leave it out"
            )


def check_known(codi: CodiModel, ids: list[int], what: str) -> None:
    """Raise ValueError for a text with a token that stands for any unknown word."""
    unknown = codi.model.tokenizer.unk_token_id
    if unknown in ids and unknown not in end_tokens(codi.model):  # GPT-2 has one token for both, and no need
        raise ValueError(
            f"{what}: token {ids.index(unknown)} is no word of this model's vocabulary; say it in its words"
        )


def _check_variant(codi: CodiModel, variant: Variant, n_problems: int) -> None:
    n = _n_thoughts(codi, variant)
    for k in variant.replaced:
        if not 0 <= k < n:
            raise ValueError(
                f"variant {variant.name!r} replaces z_{k}; of {n} thoughts z_0 to z_{n - 1} are fed back"
            )
    if not variant.replaced:
        return
    d_model = shape(codi.model).d_model
    got = None if variant.values is None else variant.values.shape
    fits = got is not None and len(got) == 3 and got[0] in (1, n_problems) and got[2] == d_model
    if not fits or got[1] <= max(variant.replaced):
        raise ValueError(
            f"variant {variant.name!r}: values must be [{n_problems} or 1, {max(variant.replaced) + 1} or "
            f"more, {d_model}], not {got}"
        )
    if not np.isfinite(variant.values[:, list(variant.replaced)]).all():
        raise ValueError(f"variant {variant.name!r}: a value is NaN or infinite")
