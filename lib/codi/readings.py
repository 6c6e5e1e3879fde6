"""What a CODI model attends to and what its states decode to, while it thinks and while it reads a solution.

Once the thoughts are known (`lib.codi.latents.think`), one uncached pass over the whole sequence gives
everything at z_0 .. z_n: attention, averaged and by category of token, the lens at any layer, the states. No
attention map is kept: the rows that are wanted are summed as layers pass.

Attention to "operands" means little without what it is compared with. Every reading has the share of tokens
of each category (`base`), the masses with the numbers of another problem of equal length and as many steps
(`null`), and the first token as a category of its own (sink), because models rest their attention there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lib.codi.checkpoint import CodiModel
from lib.codi.latents import check_known, check_questions, over_batches
from lib.codi.problems import Problem, twins
from lib.core.batches import auto_batch_size
from lib.core.cache import Cache
from lib.core.families import eager_attention, shape
from lib.core.tokens import last_of

# Of every token that a row can attend to. The first five are of the question.
SHARED = ("sink", "operand", "other operand", "distractor", "text")
SINK, OPERAND, OTHER, DISTRACTOR, TEXT = range(len(SHARED))
TEXT_CATEGORIES = (
    *SHARED, "written operand", "this step", "earlier result", "CoT", "answer prompt", "self"
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What `read_thoughts` and `read_solution` saw at a few rows of every problem.

    Attention is a probability: a row sums to 1 over the tokens up to its own. Where a problem has fewer rows
    than others, what is missing is NaN, or -1 for whole numbers.

    Attributes:
        rows: what each row is: "z_0", ..., "<eot>", "answer".
        categories: names of the kinds of tokens. "operand" is a number of the question that the row's step
            takes, "other operand" one that another step takes, "distractor" one that none does; "sink" is
            the first token, whatever it says, and "self" the row's own.
        texts: tokens of every problem, for display [problem][token].
        attention: mean over all layers and heads, float32 [problem][row, token].
        kinds: category of each token seen from each row, -1 for those to come, int8 [problem][row, token].
        mass: attention by category, float32 [problem, layer, head, row, category].
        null: the same with the numbers of another problem of equal length and as many steps, no twin; NaN
            where there is none.
        base: share of the tokens up to the row by category, float32 [problem, row, category].
        z: final hidden states, float32 [problem, row, d_model].
        layers: after which blocks the lens was put.
        tokens: the lens' top tokens, int32 [problem, layer, row, k]; layer as in `layers`.
        probabilities: of these tokens, float32 [problem, layer, row, k].
    """

    rows: tuple[str, ...]
    categories: tuple[str, ...]
    texts: list[list[str]]
    attention: list[np.ndarray]
    kinds: list[np.ndarray]
    mass: np.ndarray
    null: np.ndarray
    base: np.ndarray
    z: np.ndarray
    layers: tuple[int, ...]
    tokens: np.ndarray
    probabilities: np.ndarray

    @property
    def thought_rows(self) -> list[int]:
        """Rows z_0 .. z_n."""
        return [i for i, name in enumerate(self.rows) if name.startswith("z_")]


class TeacherText(NamedTuple):
    """A problem with its solution in words, as the teacher reads it.

    Question, steps without the last one, answer prompt. The row before a result is the one that writes it.
    """

    ids: list[int]
    steps: list[range]  # tokens of each step
    operands: list[
        list[int]
    ]  # tokens of each step's copies of its operands, none where it is its result alone
    results: list[range]  # tokens of each step's result
    prompt: range  # tokens of the answer prompt; the last one writes the answer


class _Sequence(NamedTuple):
    """What is read of one problem.

    Attributes:
        ids: tokens, -1 where a thought is fed.
        rows: positions that are measured.
        kinds: category of each token seen from each row, those of the question's numbers left open
            [row, token].
        steps: of the solution, one a row; -1 for none.
        texts: tokens for display.
    """

    ids: list[int]
    rows: list[int]
    kinds: np.ndarray
    steps: list[int]
    texts: list[str]


def thought_categories(n_thoughts: int) -> tuple[str, ...]:
    """Names of the categories of `read_thoughts`."""
    thoughts = (f"thought {k}" for k in range(1, n_thoughts + 1))
    return (*SHARED, "<bot>", *thoughts, "<eot>", "answer prompt", "self")


def read_thoughts(
    codi: CodiModel,
    problems: Sequence[Problem],
    z: np.ndarray,
    *,
    k: int = 5,
    layers: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 0,
    cache: Cache | None = None,
) -> Reading:
    """Attention, lens and hidden states at z_0 .. z_n, at <eot>, and where the answer is written.

    One uncached pass over [question, <bot>, projected z_0 .. z_{n-1}, <eot>, answer prompt].

    Args:
        codi: from `load_codi`.
        problems: with a question, whose numbers make the categories.
        z: thoughts of the problems, from `think` [problem, n + 1, d_model]; the last one is not fed.
        k: number of the lens' top tokens.
        layers: after which blocks the lens is put; None is the last one, where it reads z itself.
        steps: step of the solution whose operands count as "operand" at z_k, from 0; None is k // 2, a step
            for every other thought. At <eot> and the answer it is the last step.
        seed: of the other problems for the null.
        batch_size: problems a forward; 0 chooses by memory. Halved when memory runs out.
        cache: keeps every finished batch.

    Raises:
        ValueError: no problems, one without a number or too long for the model's positions, thoughts of
            another shape, a layer or k that the model does not have.
        RuntimeError: the model returned no attention probabilities.
    """
    n = _check_z(codi, problems, z)
    steps = [j // 2 for j in range(n + 1)] if steps is None else list(steps)
    if len(steps) != n + 1:
        raise ValueError(f"steps has {len(steps)} entries; there are {n + 1} thoughts, z_0 to z_{n}")
    names = thought_categories(n)
    prompt = codi.ids(codi.answer_prompt)
    sequences = []
    for problem in problems:
        ids, last = codi.ids(problem.question), len(problem.equations) - 1
        bot, eot = len(ids), len(ids) + n + 1
        kinds = np.full(eot + 1 + len(prompt), names.index("answer prompt"), dtype=np.int8)
        kinds[:bot] = TEXT
        kinds[bot : eot + 1] = range(names.index("<bot>"), names.index("<eot>") + 1)
        rows = [*range(bot, eot + 1), len(kinds) - 1]
        texts = [codi.token_texts[token] for token in ids]
        texts += ["<bot>", *names[names.index("thought 1") : names.index("<eot>")]] if n else ["<bot>"]
        texts += ["<eot>", *(codi.token_texts[token] for token in prompt)]
        whole = [*ids, codi.bot, *[-1] * n, codi.eot, *prompt]
        sequences.append(_Sequence(whole, rows, np.tile(kinds, (len(rows), 1)), [*steps, last, last], texts))
    rows = (*(f"z_{j}" for j in range(n + 1)), "<eot>", "answer")
    return _read(codi, problems, sequences, z[:, :n], rows, names, k, layers, seed, batch_size, cache)


def read_solution(
    codi: CodiModel,
    problems: Sequence[Problem],
    rows: Sequence[Sequence[int]] | None = None,
    *,
    k: int = 5,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 0,
    cache: Cache | None = None,
) -> Reading:
    """The same of the solution in words, read by the same model (teacher forcing).

    Args:
        rows: positions in `teacher_text` that are measured, for each problem; None is the token before each
            result, which writes it, and the one that writes the answer.
        others: as for `read_thoughts`.

    Returns:
        Reading; without `rows` its rows are "step 1", "step 2", ..., "answer". A row's step is the one whose
        result it writes, else the one that it stands in. "written operand" are the numbers of the solution
        that this step takes, its copies of operands and the result before it; "this step" are its other
        tokens up to the row, "earlier result" the other results, "CoT" other tokens of the steps before it.
    """
    texts = [teacher_text(codi, problem) for problem in problems]
    deepest = max((len(text.steps) for text in texts), default=0)
    names = (*(f"step {step}" for step in range(1, deepest + 1)), "answer")
    if rows is None:
        rows = [
            [
                *(span.start - 1 for span in text.results),
                *[-1] * (deepest - len(text.results)),
                text.prompt[-1],
            ]
            for text in texts
        ]
    else:
        names = tuple(f"row {i}" for i in range(max(map(len, rows), default=0)))
    sequences = []
    for problem, text, chosen in zip(problems, texts, rows, strict=True):
        if not all(-1 <= row < len(text.ids) for row in chosen):
            raise ValueError(f"problem {problem.id!r}: rows {chosen}; its text has {len(text.ids)} tokens")
        kinds, steps = np.full((len(chosen), len(text.ids)), TEXT, dtype=np.int8), []
        # Where a step is its result alone, the token that writes it is of the step before or of the question.
        writes = {span.start - 1: step for step, span in enumerate(text.results)}
        for row, of in zip(chosen, kinds, strict=True):
            current = next((step for step, span in enumerate(text.steps) if row in span), -1)
            current = writes.get(row, current)
            current = len(problem.equations) - 1 if row in text.prompt else current
            steps.append(current)
            taken = problem.equations[current].operands if current >= 0 else ()
            for step, (span, results) in enumerate(zip(text.steps, text.results, strict=True)):
                of[span] = TEXT_CATEGORIES.index("this step" if step == current else "CoT")
                if step != current:
                    was_taken = problem.equations[step].result in taken
                    of[results] = TEXT_CATEGORIES.index("written operand" if was_taken else "earlier result")
                else:
                    of[text.operands[step]] = TEXT_CATEGORIES.index("written operand")
            of[text.prompt] = TEXT_CATEGORIES.index("answer prompt")
        shown = [codi.token_texts[token] for token in text.ids]
        sequences.append(_Sequence(text.ids, [int(row) for row in chosen], kinds, steps, shown))
    none = np.zeros((len(problems), 0, shape(codi.model).d_model), np.float32)
    return _read(codi, problems, sequences, none, names, TEXT_CATEGORIES, k, layers, seed, batch_size, cache)


def teacher_text(codi: CodiModel, problem: Problem) -> TeacherText:
    """A problem with its solution in words, as the model's teacher was trained to read it.

    Raises:
        ValueError: a word or a sign that the model has no token for.
    """
    question = codi.ids(problem.question)
    text, steps, operands, results = "", [], [], []
    for equation in problem.equations[:-1]:
        text += " " if text else ""
        before = {
            "operators": f"<< {' '.join(_pieces(equation.left))} = ",
            "results": "",
            "compact": f"<<{equation.left}=",
        }[codi.cot]
        after = {"operators": " >>", "results": " ;", "compact": ">>"}[codi.cot]
        copies = re.finditer(r"[\d.,]*\d", before)
        operands.append([(len(text) + copy.start(), len(text) + copy.end()) for copy in copies])
        start = len(text) + len(before)
        results.append((start, start + len(equation.right)))
        steps.append((len(text), len(text) + len(before + equation.right + after)))
        text += before + equation.right + after
    ids, offsets = _with_offsets(codi, text)
    prompt = codi.ids(codi.answer_prompt)
    check_known(codi, question + ids, f"problem {problem.id!r} with its solution")
    end = len(question) + len(ids)

    def positions(span: tuple[int, int]) -> range:
        found = _overlapping(offsets, *span)
        return range(len(question) + found[0], len(question) + found[-1] + 1)

    return TeacherText(
        [*question, *ids, *prompt],
        [positions(span) for span in steps],
        [[token for span in spans for token in positions(span)] for spans in operands],
        [positions(span) for span in results],
        range(end, end + len(prompt)),
    )


def _read(
    codi: CodiModel,
    problems: Sequence[Problem],
    sequences: list[_Sequence],
    fed: np.ndarray,
    rows: tuple[str, ...],
    categories: tuple[str, ...],
    k: int,
    layers: Sequence[int] | None,
    seed: int,
    batch_size: int,
    cache: Cache | None,
) -> Reading:
    """Read sequences, with `fed` [problem, thought, d_model] projected to where their ids are -1."""
    if not len(problems):
        raise ValueError("there are no problems")
    for problem in problems:
        if not problem.numbers:
            raise ValueError(f"problem {problem.id!r} has no number in its question; leave it out")
    sizes = shape(codi.model)
    layers = (sizes.n_layers - 1,) if layers is None else tuple(int(layer) for layer in layers)
    for layer in layers:
        if not 0 <= layer < sizes.n_layers:
            raise ValueError(f"layer {layer} for the lens; the model has layers 0 to {sizes.n_layers - 1}")
    if not 1 <= k <= sizes.n_vocabulary:
        raise ValueError(f"top_k {k}: the lens has 1 to {sizes.n_vocabulary} tokens to show")
    lengths = [len(sequence.ids) for sequence in sequences]
    for problem, length in zip(problems, lengths, strict=True):
        if length > sizes.n_positions:
            raise ValueError(
                f"problem {problem.id!r}: question, solution and answer prompt are {length} tokens, "
                f"more than the {sizes.n_positions} positions of this model; leave it out"
            )

    layouts = [number_positions(codi, problem) for problem in problems]
    questions = [len(codi.ids(problem.question)) for problem in problems]
    donors = _donors(problems, questions, seed)
    n = len(rows)
    at = np.array([[*sequence.rows, *[-1] * (n - len(sequence.rows))] for sequence in sequences])
    kinds, nulls = [], []
    for i, sequence in enumerate(sequences):
        kinds.append(_kinds(sequence, problems[i], layouts[i], n, len(categories) - 1))
        donor = donors[i]
        nulls.append(np.full_like(kinds[i], -1))
        if donor >= 0:
            nulls[i] = _kinds(sequence, problems[donor], layouts[donor], n, len(categories) - 1)

    def run(batch: list[int]) -> dict[str, np.ndarray]:
        ids = np.array([sequences[i].ids for i in batch])
        two = np.stack([[kinds[i], nulls[i]] for i in batch])  # [problem, 2, row, token]
        return _read_batch(codi, ids, fed[batch], at[batch], two, len(categories), layers, k)

    def key(batch: list[int]) -> dict:
        return {
            "ids": [sequences[i].ids for i in batch],
            "rows": at[batch],
            "kinds": np.stack([[kinds[i], nulls[i]] for i in batch]),
            "fed": fed[batch],
            "layers": list(layers),
            "k": k,
        }

    size = batch_size or auto_batch_size(codi.model, max(lengths))
    found = over_batches(codi, "measure", list(range(len(problems))), lengths, size, run, key, cache)
    absent = at < 0
    stacked = {name: np.stack(found[name]) for name in ("mass", "z", "tokens", "probabilities")}
    for name, values in stacked.items():  # the row is the last but one axis of all but mass and its null
        filler = -1 if name == "tokens" else np.nan
        np.moveaxis(values, -2, 1)[absent] = filler
    attention = found["attention"]
    for i, missing in enumerate(absent):
        attention[i][missing] = np.nan
    counts = np.stack([[np.bincount(of[of >= 0], minlength=len(categories)) for of in rs] for rs in kinds])
    mass, null = np.split(stacked["mass"], 2, axis=-1)
    null[np.array(donors) < 0] = np.nan
    with np.errstate(invalid="ignore"):
        base = (counts / counts.sum(-1, keepdims=True)).astype(np.float32)
    return Reading(
        rows, categories, [sequence.texts for sequence in sequences], attention, kinds, mass, null, base,
        stacked["z"], layers, stacked["tokens"], stacked["probabilities"],
    )  # fmt: skip


def _read_batch(
    codi: CodiModel,
    ids: np.ndarray,
    fed: np.ndarray,
    rows: np.ndarray,
    kinds: np.ndarray,
    n_categories: int,
    layers: tuple[int, ...],
    k: int,
) -> dict[str, np.ndarray]:
    """One pass over sequences of equal length, ids [problem, token], kinds [problem, 2, row, token]."""
    model, device = codi.model, codi.model.device
    tokens, at = torch.from_numpy(ids).to(device), torch.from_numpy(rows).clamp_min(0).to(device)
    # Two blocks of categories, the problem's own and those of the null [problem, row, token, 2 category].
    one_hot = torch.from_numpy(kinds).to(device)[..., None] == torch.arange(n_categories, device=device)
    one_hot = one_hot.permute(0, 2, 3, 1, 4).flatten(3).float()
    with torch.no_grad():
        embeddings = model._module.get_input_embeddings()(tokens.clamp_min(0))
        if fed.shape[1]:
            embeddings[tokens < 0] = codi.projection(torch.from_numpy(fed).to(embeddings)).flatten(0, 1)
    each = torch.arange(len(ids), device=device)[:, None]

    with (
        eager_attention(model),
        torch.no_grad(),
        model.trace(inputs_embeds=embeddings, use_cache=False, logits_to_keep=last_of(embeddings)),
    ):
        attention, masses, streams = 0, [], []
        for index, block in enumerate(model.layers):
            seen = _rows(block.self_attn.output[1], at)  # [problem, row, head, token]
            attention = attention + seen.mean(2)
            masses.append(seen @ one_hot)
            if index in layers:
                streams.append(block.output[each, at])
        measured = [attention, torch.stack(masses, 1), torch.stack(streams, 1), model.norm.output[each, at]]
        measured = measured.save()
    attention, masses, streams, z = measured
    order = [sorted(set(layers)).index(layer) for layer in layers]
    top, probabilities = _top_tokens(codi, streams[:, order], k)
    return {
        "attention": (attention / len(model.layers)).cpu().numpy(),
        "mass": masses.transpose(2, 3).cpu().numpy(),  # [problem, layer, head, row, category]
        "z": z.float().cpu().numpy(),
        "tokens": top.to(torch.int32).cpu().numpy(),
        "probabilities": probabilities.cpu().numpy(),
    }


def _rows(attention: torch.Tensor | None, at: torch.Tensor) -> torch.Tensor:
    """Rows `at` [problem, row] of attention [problem, head, query, key], as [problem, row, head, key]."""
    if attention is None:
        raise RuntimeError("this model returned no attention probabilities: load it with eager attention")
    index = at[:, None, :, None].expand(-1, attention.shape[1], -1, attention.shape[3])
    return attention.gather(2, index).transpose(1, 2).float()


def _top_tokens(codi: CodiModel, streams: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top k of softmax(unembedding(final norm(stream))) of streams [..., d_model], and their probabilities.

    The stream after the last block has not been through the final norm either.
    """
    module = codi.model._module
    norm, head = codi.model.norm._module, module.get_output_embeddings()
    # As many rows at a time as half a million logits (2 MB) hold, on a GPU 128 million.
    size = max(1, (2**19 if streams.device.type == "cpu" else 2**27) // shape(codi.model).n_vocabulary)
    found = []
    with torch.no_grad():
        for part in streams.flatten(0, -2).split(size):
            logits = head(norm(part)).float()
            top = logits.topk(k)
            found.append((top.indices, (top.values - logits.logsumexp(-1, keepdim=True)).exp()))
    tokens, probabilities = (torch.cat(column) for column in zip(*found, strict=True))
    return tokens.unflatten(0, streams.shape[:-1]), probabilities.unflatten(0, streams.shape[:-1])


def _kinds(
    sequence: _Sequence, problem: Problem, numbers: list[list[int]], n_rows: int, own: int
) -> np.ndarray:
    """Category of each token seen from each row [row, token], with the numbers of a problem; -1 for none."""
    kinds = np.full((n_rows, len(sequence.ids)), -1, dtype=np.int8)
    for row, (position, step) in enumerate(zip(sequence.rows, sequence.steps, strict=True)):
        if position < 0:
            continue
        of = sequence.kinds[row].copy()
        for positions, readers in zip(numbers, problem.readers, strict=True):
            of[positions] = OPERAND if step in readers else OTHER if readers else DISTRACTOR
        of[0] = SINK
        of[position] = own
        kinds[row, : position + 1] = of[: position + 1]
    return kinds


def _donors(problems: Sequence[Problem], lengths: list[int], seed: int) -> list[int]:
    """For every problem another one whose question is as long, with as many steps and thus operands, not its
    twin; -1 where there is none."""
    rng, donors = np.random.default_rng(seed), []
    kinds = [(length, len(problem.equations)) for length, problem in zip(lengths, problems, strict=True)]
    for i, problem in enumerate(problems):
        others = [
            j
            for j, other in enumerate(problems)
            if j != i and kinds[j] == kinds[i] and not twins(problem, other)
        ]
        donors.append(int(rng.choice(others)) if others else -1)
    return donors


# -- tokens ----------------------------------------------------------------------------------------
def number_positions(codi: CodiModel, problem: Problem) -> list[list[int]]:
    """Tokens of each number in the question."""
    _, offsets = _with_offsets(codi, problem.question)
    return [_overlapping(offsets, number.start, number.stop) for number in problem.numbers]


def _with_offsets(codi: CodiModel, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a text and the characters of each."""
    found = codi.model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return found.input_ids, found.offset_mapping


def _overlapping(offsets: list[tuple[int, int]], start: int, stop: int) -> list[int]:
    """Tokens that hold one of the characters start .. stop - 1."""
    return [i for i, (first, last) in enumerate(offsets) if first < stop and last > start]


def _pieces(expression: str) -> list[str]:
    """Numbers and signs of an expression: 16-3 is 16, -, 3."""
    return re.findall(r"[\d.,]+|\S", expression)


# -- checks ----------------------------------------------------------------------------------------
def _check_z(codi: CodiModel, problems: Sequence[Problem], z: np.ndarray) -> int:
    """Number of thoughts that z [problem, n + 1, d_model] holds; raises ValueError."""
    wanted = (len(problems), shape(codi.model).d_model)
    if z.ndim != 3 or (len(z), z.shape[-1]) != wanted or z.shape[1] < 1:
        raise ValueError(f"z must be [{wanted[0]}, n + 1, {wanted[1]}], not {[*z.shape]}")
    if not np.isfinite(z).all():
        raise ValueError("z holds NaN: take it from `think` with one number of thoughts")
    n = z.shape[1] - 1
    check_questions(codi, [codi.ids(problem.question) for problem in problems], [n])
    return n
