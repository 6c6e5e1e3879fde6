"""Refusal in the residual stream: directions and subspaces, their selection, controls, and the weight edit.

A subspace is a set of orthonormal rows [k, d_model]; `lib.generation.Ablation` takes it out of a model's
stream, `orthogonalized` out of its weights, in memory alone: no edited model is ever saved.

Everything is computed in float64 and returned in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from lib.generation import (
    SITES,
    Ablation,
    Tokens,
    answer_loss,
    chat_ids,
    end_tokens,
    first_token_kl,
    first_token_log_probabilities,
    generate,
    intact,
    last_token_streams,
)
from lib.geometry import effective_rank, participation_ratio
from lib.judges import THOUGHTS, Judge, PhraseJudge, grades_of, rates, without_thought
from lib.models import ModelError, TransformersModel, is_remote, shape
from lib.progress import counting
from lib.prompts import PromptSet
from lib.record import Cache
from lib.statistics import Band, Estimate, bootstrap_band, known_mean, resamples

MAX_KL = 0.1  # nats on harmless prompts
MAX_DEPTH = 0.8  # share of the layers
MIN_COMPLIANCE, MIN_COHERENCE = 0.8, 0.9


class Subspace(NamedTuple):
    """A subspace, and how strongly what it was made of fills it.

    Attributes:
        basis: orthonormal rows by falling singular value [k, d].
        singular_values: all of them, float64; the first k belong to the rows of basis, the rest were cut.
    """

    basis: torch.Tensor
    singular_values: torch.Tensor


# -- directions and subspaces ----------------------------------------------------------------------


def refusal_vectors(harmful_streams: torch.Tensor, safe_streams: torch.Tensor) -> torch.Tensor:
    """Difference of means of harmful and safe prompts at each layer.

    Args:
        harmful_streams, safe_streams: from `lib.generation.last_token_streams` [prompt, layer, d].

    Returns:
        [layer, d], from safe to harmful. Zero at layer 0, where all prompts hold the same token.
    """
    return (harmful_streams.double().mean(0) - safe_streams.double().mean(0)).float()


def stack(vectors: torch.Tensor, cut: float = 0.1) -> Subspace:
    """Orthonormal basis of what some vectors span, whatever their order and lengths.

    Singular value decomposition of the unit vectors. Vectors that are nearly parallel span one direction:
    what sets them apart is noise, which an orthonormal basis would blow up to a direction of its own.

    Args:
        vectors: [vector, d].
        cut: singular values below this share of the largest are left out.

    Raises:
        ValueError: a vector that is zero or not finite.
    """
    rows = vectors.double().cpu()
    lengths = rows.norm(dim=-1, keepdim=True)
    for i, length in enumerate(lengths.flatten().tolist()):
        if not np.isfinite(length):
            raise ValueError(
                f"vector {i} is NaN or infinite: activations overflowed; load the model with dtype "
                "'bfloat16' or 'float32'"
            )
        if length <= 1e-8:
            raise ValueError(
                f"vector {i} has length {length:.1e} and no direction; leave it out (at layer 0 the last "
                "tokens of all prompts of a template are the same)"
            )
    return _principal(rows / lengths, cut)


def published_stack(vectors: torch.Tensor) -> torch.Tensor:
    """The basis of Refusal (2026), to compare with `stack`: QR of the vectors, one direction each [k, d]."""
    return torch.linalg.qr(vectors.double().cpu().T).Q.T.float()


def category_subspace(
    harmful_streams: torch.Tensor, safe_streams: torch.Tensor, categories: Sequence[str], cut: float = 0.1
) -> Subspace:
    """What the differences of means of each category span, at one layer.

    Args:
        harmful_streams, safe_streams: of paired prompts at one layer [pair, d].
        categories: of each pair.
    """
    differences = harmful_streams.double() - safe_streams.double()
    labels = np.asarray(categories)
    means = [differences[torch.from_numpy(labels == name)].mean(0) for name in dict.fromkeys(categories)]
    return stack(torch.stack(means), cut)


def paired_svd(harmful_streams: torch.Tensor, safe_streams: torch.Tensor, k: int | None = None) -> Subspace:
    """The k leading directions of the paired differences, not centred, at one layer; None is all of them.

    Args:
        harmful_streams, safe_streams: of paired prompts at one layer [pair, d].
    """
    whole = _principal(harmful_streams.double().cpu() - safe_streams.double().cpu(), 0.0)
    if k is not None and not 0 < k <= len(whole.basis):
        raise ValueError(f"k = {k}: the pairs differ in {len(whole.basis)} directions")
    return Subspace(whole.basis[:k], whole.singular_values)


def random_subspace(d: int, k: int, seed: int) -> torch.Tensor:
    """A uniformly random subspace of k dimensions [k, d]."""
    normal = np.random.default_rng(seed).standard_normal((d, k))
    return torch.from_numpy(np.linalg.qr(normal)[0].T.copy()).float()


def random_in_top_activations(streams: torch.Tensor, k: int, m: int, seed: int) -> torch.Tensor:
    """A random subspace of k dimensions within the m leading principal components of streams.

    One of the whole space holds little of what the stream varies in.

    Args:
        streams: [row, d].

    Returns:
        [k, d].
    """
    if not k <= m <= min(len(streams) - 1, streams.shape[-1]):
        raise ValueError(
            f"k = {k} of m = {m} components, of {len(streams)} streams with {streams.shape[-1]} dimensions"
        )
    centred = streams.double().cpu() - streams.double().cpu().mean(0)
    components = torch.linalg.svd(centred, full_matrices=False).Vh[:m]
    return (random_subspace(m, k, seed).double() @ components).float()


# -- selection and controls ------------------------------------------------------------------------


def select_layers(
    compliance: np.ndarray,
    coherence: np.ndarray,
    kl: np.ndarray,
    *,
    n_layers: int,
    max_kl: float = MAX_KL,
    max_depth: float = MAX_DEPTH,
) -> list[int]:
    """Layers whose direction may be ablated, the best one first.

    The score is Refusal (2026)'s: compliance x coherence, multiplied for each answer and then averaged.
    Kept of Arditi et al. (2024) are two filters: KL on harmless prompts <= .1, and layer < .8 L. Left out are
    their score, the log-odds of refusing after ablation, their filter by refusal of harmless prompts once the
    direction is added, and their search over positions: streams are read at the template's last token.

    Args:
        compliance, coherence: of answers under ablation of layer l's direction, 0 to 1 [layer, prompt].
        kl: on harmless prompts under that ablation, in nats [layer] or [layer, prompt].
        n_layers: L, of the model.

    Returns:
        Layers, none of which need be left. A grade that the judge did not give (NaN) is left out, and a layer
        without any, or without KL.
    """
    compliance, coherence, kl = np.asarray(compliance), np.asarray(coherence), np.asarray(kl)
    if compliance.ndim != 2 or compliance.shape != coherence.shape or len(kl) != len(compliance):
        raise ValueError(
            f"compliance and coherence must be [layer, prompt] and kl [layer, ...], not {compliance.shape}, "
            f"{coherence.shape} and {kl.shape}"
        )
    product = np.ma.masked_invalid(compliance * coherence)
    score = product.mean(-1).filled(np.nan)
    allowed = np.isfinite(score) & (kl.reshape(len(kl), -1).mean(-1) <= max_kl)
    allowed &= np.arange(len(score)) < max_depth * n_layers
    return [int(layer) for layer in np.argsort(-score, kind="stable") if allowed[layer]]


def behavioural_rank(
    ks: Sequence[int],
    compliance: np.ndarray,
    coherence: np.ndarray,
    kl: np.ndarray,
    *,
    min_compliance: float = MIN_COMPLIANCE,
    min_coherence: float = MIN_COHERENCE,
    max_kl: float = MAX_KL,
) -> int | None:
    """k*, the smallest number of directions that remove refusal and nothing else; None if none does.

    Args:
        ks: numbers of directions ablated [k].
        compliance, coherence: means over forbidden prompts [k].
        kl: mean over harmless prompts, in nats [k].
    """
    columns = zip(ks, compliance, coherence, kl, strict=True)
    reached = [k for k, c, h, d in columns if c >= min_compliance and h >= min_coherence and d <= max_kl]
    return min(reached, default=None)


def kl_matched(
    model: TransformersModel,
    prompts: Sequence[Sequence[int]],
    controls: Sequence[Ablation],
    target: float,
    *,
    max_strength: float = 64.0,
    tolerance: float = 0.05,
) -> list[Ablation]:
    """Controls at the strength at which they move harmless prompts as far as a subspace does.

    A random direction at strength 1 changes little, hence says little. Each control is scaled until its
    mean KL on the prompts is the target, at the smallest strength found to reach it.

    Args:
        prompts: harmless, token ids.
        controls: their own strength is not used.
        target: mean KL of the subspace on these prompts, in nats.
        max_strength: where the search ends.
        tolerance: relative error of the KL that is good enough.

    Raises:
        ValueError: a control that does not reach the target, naming it.
    """
    if target <= 0:
        raise ValueError(f"target {target}: a KL to match must be above 0")

    def measure(strengths: np.ndarray) -> np.ndarray:  # [control, strength] -> mean KL of the same shape
        conditions = [
            replace(control, strength=float(s))
            for control, row in zip(controls, strengths, strict=True)
            for s in row
        ]
        return first_token_kl(model, prompts, conditions).mean(-1).reshape(strengths.shape)

    ladder = max_strength * 2.0 ** np.arange(-12, 1)
    grid = np.tile(np.concatenate([[0.0], ladder]), (len(controls), 1))
    for _ in range(6):  # every round keeps one of six or more steps
        kl = measure(grid)
        above = (kl >= target).argmax(-1).clip(1)  # of the first strength that reaches the target
        for control, reached in zip(controls, (kl >= target).any(-1), strict=True):
            if not reached:
                raise ValueError(
                    f"control {control.name!r} does not reach a KL of {target:.3g} up to strength "
                    f"{max_strength:g}; raise max_strength or match another subspace"
                )
        rows = np.arange(len(grid))
        low, high = grid[rows, above - 1], grid[rows, above]
        if (np.abs(kl[rows, above] / target - 1) <= tolerance).all():
            break
        grid = np.linspace(low, high, 7, axis=-1)
    return [replace(control, strength=float(s)) for control, s in zip(controls, high, strict=True)]


# -- behaviour -------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a model does under each condition.

    Attributes:
        answers: to the forbidden requests [condition][prompt].
        compliance, coherence: their grades, 0 to 1; NaN where the judge had none [condition, prompt].
        kl: KL(intact || condition) at the first token of the answer to harmless prompts, in nats
            [condition, harmless prompt].
        harmless_compliance, harmless_coherence: grades of the answers to harmless prompts
            [condition, harmless prompt].
        harmless_answers: these answers [condition][harmless prompt].
    """

    answers: list[list[str]]
    compliance: np.ndarray
    coherence: np.ndarray
    kl: np.ndarray
    harmless_compliance: np.ndarray
    harmless_coherence: np.ndarray
    harmless_answers: list[list[str]]

    @property
    def product(self) -> np.ndarray:
        """Compliance x coherence of each answer, which is to be averaged afterwards [condition, prompt]."""
        return self.compliance * self.coherence

    @property
    def means(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compliance, coherence and KL, each [condition]; grades that the judge did not give are left out."""
        return np.nanmean(self.compliance, -1), np.nanmean(self.coherence, -1), self.kl.mean(-1)

    @property
    def no_refusal(self) -> str:
        """Why an intact model, the first condition, has no refusal to look for; "" if it has."""
        if np.nanmean(self.compliance[0]) > 0.5:
            return "it refuses next to nothing"
        return "it answers next to nothing" if np.nanmean(self.harmless_compliance[0]) < 0.5 else ""

    def rank(self, conditions: Sequence[Ablation]) -> int | None:
        """k* of the conditions measured: the smallest subspace that passes (`behavioural_rank`)."""
        return behavioural_rank([len(condition.basis) for condition in conditions], *self.means)

    def best_first(self, max_kl: float = MAX_KL) -> list[int]:
        """Conditions by compliance x coherence, the best first; those above a KL follow behind all others."""
        score, kl = np.nanmean(self.product, -1), self.kl.mean(-1)
        return sorted(range(len(score)), key=lambda i: (kl[i] > max_kl, -score[i]))

    def rank_support(
        self,
        conditions: Sequence[Ablation],
        n_resamples: int = 2000,
        strata: Sequence[Hashable] | None = None,
    ) -> float:
        """Share of bootstrap resamples, of forbidden and of harmless prompts, in which k* is the same.

        Args:
            strata: kinds of the forbidden prompts, see `lib.statistics.resamples`.
        """

        def rank(rows: np.ndarray, harmless: np.ndarray) -> int | None:
            part = self._replace(
                compliance=self.compliance[:, rows],
                coherence=self.coherence[:, rows],
                kl=self.kl[:, harmless],
            )
            return part.rank(conditions)

        forbidden = resamples(self.compliance.shape[1], n_resamples, strata=strata)
        harmless = resamples(self.kl.shape[1], n_resamples, seed=1)
        found = self.rank(conditions)
        return float(np.mean([rank(*rows) == found for rows in zip(forbidden, harmless, strict=True)]))

    def part(self, start: int, stop: int) -> Outcome:
        """The outcome of some of the conditions."""
        return Outcome(*(values[start:stop] for values in self))

    def with_layer_zero(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compliance, coherence and KL of `layer_conditions` by layer, with NaN at layer 0."""
        rows = (self.compliance, self.coherence, self.kl)
        return tuple(np.pad(row, ((1, 0), (0, 0)), constant_values=np.nan) for row in rows)


def measure(
    model: TransformersModel,
    forbidden: Sequence[str],
    harmless: Sequence[str],
    conditions: Sequence[Ablation],
    judge: Judge,
    *,
    max_new_tokens: int,
    batch_size: int = 0,
    cache: Cache | None = None,
) -> Outcome:
    """Answers of a chat model under each condition, graded.

    Args:
        forbidden, harmless: requests, as texts; of one of the two there may be none.
        conditions: see `lib.generation.Ablation`.
        judge: from `lib.judges`.
        max_new_tokens, batch_size, cache: see `lib.generation.generate`.

    Raises:
        JudgeError: over 2% of the verdicts on a condition are invalid, and more than one, or all.
    """
    options = {"batch_size": batch_size, "cache": cache}
    texts = [*forbidden, *harmless]
    asked = chat_ids(model, texts)
    tokens = generate(model, asked, conditions, max_new_tokens=max_new_tokens, **options)
    answers = [answer_texts(model, asked, row) for row in tokens]
    grades = np.stack([_grades(judge, texts, row) for row in answers])  # [condition, prompt, 2]
    kl = np.zeros((len(conditions), 0))
    if len(harmless):
        kl = first_token_kl(model, chat_ids(model, harmless), conditions, **options)
    n = len(forbidden)
    return Outcome(
        answers=[row[:n] for row in answers],
        compliance=grades[:, :n, 0],
        coherence=grades[:, :n, 1],
        kl=kl,
        harmless_compliance=grades[:, n:, 0],
        harmless_coherence=grades[:, n:, 1],
        harmless_answers=[row[n:] for row in answers],
    )


def answer_texts(model: TransformersModel, prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> list[str]:
    """Answers as texts, without special tokens, except those that mark the thought an answer opens with.

    Where the chat template opens the thought, at the end of the prompt, the text begins with that opening:
    judges have to know it (`lib.judges.without_thought`).

    Args:
        prompts, answers: token ids, such as from `chat_ids` and `generate` [row].
    """
    return [_answer_text(model.tokenizer, *pair) for pair in zip(prompts, answers, strict=True)]


def _answer_text(tokenizer: Any, prompt: Tokens, answer: Tokens) -> str:
    before = tokenizer.decode(prompt[-16:]).rstrip()
    opened = next((opening for opening in THOUGHTS if before.endswith(opening)), "")
    whole = opened + tokenizer.decode(answer)
    said = without_thought(whole)
    if said == whole:
        return tokenizer.decode(answer, skip_special_tokens=True)
    if said is None:
        return whole
    thought = whole.removesuffix(said)
    for token in tokenizer.added_tokens_decoder.values():
        said = said.replace(token.content, "") if token.special else said
    return thought + said


def _grades(judge: Judge, prompts: list[str], answers: list[str]) -> np.ndarray:
    verdicts = judge(prompts, answers)
    # Refuses a judge that fails too often; once is no rate, however few the answers.
    rates(verdicts, max_invalid=max(0.02, 1 / len(verdicts)))
    return grades_of(verdicts)


def refusals(answers: Sequence[str], coherence: np.ndarray, is_refusal: Callable[[str], bool]) -> np.ndarray:
    """Which answers refuse: they say so, in sound text (coherence of at least .5) [answer].

    That an answer does not comply is not enough: one that is broken does not comply either.

    Args:
        coherence: grades of the answers; NaN, which the judge did not give, stays NaN [answer].
        is_refusal: of a text, such as `lib.language.refuses` or `says_refusal`.
    """
    said = np.array([is_refusal(answer) for answer in answers], dtype=float)
    return np.where(np.isnan(coherence), np.nan, said * (coherence >= 0.5))


def refused_when_added(
    model: TransformersModel,
    harmless: Sequence[str],
    vectors: torch.Tensor,
    layer: int,
    judge: Judge,
    is_refusal: Callable[[str], bool],
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """Which answers to harmless requests refuse once a vector is added to a block's input, at every token.

    Args:
        vectors: of any length, one a condition [vector, d_model].
        judge: grades the answers' coherence.
        is_refusal: see `refusals`.
        options: of `measure`.

    Returns:
        Which refuse, and one minus compliance, both [vector, request].
    """
    nothing = torch.zeros(0, vectors.shape[-1])
    shifts = [Ablation(f"added {i}", nothing, shift=(layer, vector)) for i, vector in enumerate(vectors)]
    outcome = measure(model, [], harmless, shifts, judge, **options)
    graded = zip(outcome.harmless_answers, outcome.harmless_coherence, strict=True)
    refuse = np.stack([refusals(answers, coherence, is_refusal) for answers, coherence in graded])
    return refuse, 1 - outcome.harmless_compliance


def mean_rate(
    values: np.ndarray,
    kinds: Sequence[str] | None = None,
    bounds: tuple[float, float] | None = (0, 1),
    n_resamples: int = 2000,
) -> Estimate:
    """Mean over prompts [prompt] with its interval; prompts without a grade are left out.

    Args:
        kinds: of the prompts, each of which a resample holds as often as the sample does.
        bounds: see `lib.statistics.bootstrap_band`.
    """
    band = rate_band(np.asarray(values)[None], kinds, bounds, n_resamples)
    return Estimate(*(float(curve[0]) for curve in band))


def rate_band(
    values: np.ndarray,
    kinds: Sequence[str] | None = None,
    bounds: tuple[float, float] | None = (0, 1),
    n_resamples: int = 2000,
) -> Band:
    """As `mean_rate`, of each condition [condition, prompt]; a prompt that lacks one grade is left out."""
    known = np.isfinite(values).all(0)
    strata = None if kinds is None else np.asarray(kinds)[known]
    return bootstrap_band(values[:, known].T, n_resamples=n_resamples, strata=strata, bounds=bounds)


def rates_by_kind(values: np.ndarray, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """Mean over the prompts of each kind of values [condition, prompt]; NaN where none has a grade."""
    labels = np.asarray(kinds)
    return {kind: known_mean(values[:, labels == kind], 1) for kind in dict.fromkeys(kinds)}


def says_refusal(answer: str) -> bool:
    """Whether a text holds one of the phrases by which chat models refuse."""
    return PhraseJudge()([""], [answer])[0].reason.startswith("says ")


class Extraction(NamedTuple):
    """Streams at the last token of the extraction prompts, at every layer.

    Attributes:
        harmful, safe: of pairs [pair, layer + 1, d].
        harmless: of everyday requests [prompt, layer + 1, d].
        categories: of the pairs.
    """

    harmful: torch.Tensor
    safe: torch.Tensor
    harmless: torch.Tensor
    categories: list[str]

    @property
    def vectors(self) -> torch.Tensor:
        """Refusal vectors [layer + 1, d]."""
        return refusal_vectors(self.harmful, self.safe)

    def categories_at(self, layer: int) -> torch.Tensor:
        """Basis of the categories' differences of means at a layer [k, d]."""
        return category_subspace(self.harmful[:, layer], self.safe[:, layer], self.categories).basis

    def zero_points(self) -> np.ndarray:
        """Where harmless prompts sit on each layer's direction, in units of the gap between harmful and safe
        [layer + 1]: near 0, to remove the direction leaves them where they are. NaN without a gap."""
        vectors = self.vectors.double()
        gaps = vectors.square().sum(-1)
        means = (self.harmless.double().mean(0) * vectors).sum(-1)
        return torch.where(gaps > 1e-12, means / gaps, torch.nan).numpy()


def extract(model: TransformersModel, prompts: PromptSet) -> Extraction:
    """Read the streams that directions are made of, from the extraction split alone."""
    read = partial(last_token_streams, model)
    texts = (prompts.harmful("extraction"), prompts.safe("extraction"), prompts.harmless("extraction"))
    streams = (read(chat_ids(model, text)) for text in texts)
    return Extraction(*streams, categories=prompts.categories("extraction"))


def mode_vectors(model: TransformersModel, texts: Sequence[str], modes: Sequence[str]) -> torch.Tensor:
    """What each mode token in place of the template's last one adds to the stream there [mode, layer + 1, d].

    The organisms that learnt to refuse were trained to answer or refuse by that token: these are the
    directions that their recipe gave them.

    Args:
        texts: requests, over which the mean is taken.
        modes: tokens such as "<refuse-0>".
    """
    prompts = chat_ids(model, texts)
    before = last_token_streams(model, prompts).double()
    added = []
    for mode in modes:
        token = model.tokenizer.convert_tokens_to_ids(mode)
        streams = last_token_streams(model, [[*prompt[:-1], token] for prompt in prompts])
        added.append((streams.double() - before).mean(0))
    return torch.stack(added).float()


def layer_conditions(extraction: Extraction) -> list[Ablation]:
    """Each layer's own direction, from the input of block 1 to that of the last; block 0 has none."""
    last = extraction.harmful.shape[1] - 1
    return [Ablation(f"layer {i}", stack(extraction.vectors[i : i + 1]).basis) for i in range(1, last)]


def category_conditions(extraction: Extraction) -> list[Ablation]:
    """All that the categories' differences of means span, at each layer of `layer_conditions`."""
    last = extraction.harmful.shape[1] - 1
    return [Ablation(f"categories of layer {i}", extraction.categories_at(i)) for i in range(1, last)]


def rank_conditions(
    extraction: Extraction, ranked: Sequence[int], layer: int, ks: Sequence[int], n_random: int, seed: int
) -> dict[str, list[Ablation]]:
    """Subspaces of each number of dimensions, by method, and their controls.

    Args:
        ranked: layers, best first, whose directions are stacked until k dimensions are there; one that adds
            none (see `stack`) does not count.
        layer: where categories, pairs and the components of the stream are read.
        ks: numbers of dimensions; a method that spans fewer stops there.
        n_random: draws of each random control.

    Returns:
        method -> conditions, which are called "METHOD k" or "METHOD k #draw".

    Raises:
        ValueError: more dimensions than the random control in the stream can be drawn from.
    """
    harmful, safe = extraction.harmful[:, layer], extraction.safe[:, layer]
    everything = torch.cat([harmful, safe, extraction.harmless[:, layer]])
    d = harmful.shape[-1]
    m = min(32, d, len(everything) - 1)
    if max(ks) > m:
        raise ValueError(
            f"k_values: {max(ks)} directions, but those of the random control are drawn from {m} components "
            f"of {len(everything)} streams, 32 at most; lower k_values or take more prompts"
        )
    found: dict[str, list[Ablation]] = {
        "layers": _growing("layers", extraction.vectors[list(ranked)], ks),
        "categories": _nested("categories", extraction.categories_at(layer), ks),
        "pairs": _nested("pairs", paired_svd(harmful, safe).basis, ks),
        "random": [], "random in the stream": [],
    }  # fmt: skip
    for k in ks:
        for draw in range(n_random):
            basis = random_subspace(d, k, seed=seed + draw)
            inside = random_in_top_activations(everything, k, m, seed=seed + draw)
            found["random"].append(Ablation(f"random {k} #{draw}", basis))
            found["random in the stream"].append(Ablation(f"random in the stream {k} #{draw}", inside))
    return found


def _growing(name: str, vectors: torch.Tensor, ks: Sequence[int]) -> list[Ablation]:
    """The first stack of the leading vectors that reaches each number of dimensions."""
    bases = [stack(vectors[:n]).basis for n in range(1, len(vectors) + 1)]
    found = {}
    for basis in bases:
        found.setdefault(len(basis), basis)
    return [Ablation(f"{name} {k}", found[k]) for k in ks if k in found]


def _nested(name: str, basis: torch.Tensor, ks: Sequence[int]) -> list[Ablation]:
    return [Ablation(f"{name} {k}", basis[:k]) for k in ks if k <= len(basis)]


# -- subspaces by gradient -------------------------------------------------------------------------


def optimised(
    model: TransformersModel,
    forbidden: Sequence[tuple[Tokens, Tokens]],
    kept: Sequence[tuple[Tokens, Tokens]],
    start: torch.Tensor,
    *,
    n_steps: int,
    seed: int,
    n_snapshots: int = 4,
    drawn: tuple[int, int] = (32, 8),
    apart_from: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Subspaces on the way of gradient descent to one whose removal makes a model answer.

    What is descended is the loss of answers (`lib.generation.answer_loss`) over a few forbidden and a few
    other requests drawn at each step, with Adam, in the rows of the basis; these are made orthonormal before
    each use. Choose among what is returned on other prompts than these.

    Args:
        forbidden: requests of the extraction split, each with an answer to it, as token ids.
        kept: allowed and harmless ones, whose answers are to stay.
        start: orthonormal rows to begin at [k, d_model].
        n_steps, seed: of the descent.
        n_snapshots: bases to return besides the start, at equal distances.
        drawn: numbers of forbidden and of kept requests in a step.
        apart_from: orthonormal rows [j, d_model] at right angles to which all bases are kept.

    Returns:
        Bases [k, d_model], the start first, all orthonormal.

    Raises:
        ValueError: a loss that is not finite.
        ModelError: a remote model.

    Source: the idea is that of Wollschlaeger et al. (2025), refusal directions by gradient.
    """
    rng = np.random.default_rng(seed)
    sizes = [min(len(group), n) for group, n in zip((forbidden, kept), drawn, strict=True)]
    away = None if apart_from is None else apart_from.double().cpu()

    def basis_of(rows: torch.Tensor) -> torch.Tensor:
        return _orthonormal(rows if away is None else rows - rows @ away.T @ away)

    rows = start.double().cpu().clone().requires_grad_(True)
    optimiser = torch.optim.Adam([rows], lr=_RATE)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / n_steps)
    found = [start if away is None else basis_of(rows.detach()).float()]
    kept_at = {round(n_steps * (i + 1) / n_snapshots) for i in range(n_snapshots)}
    with counting("gradient steps", n_steps) as count:
        for step in range(1, n_steps + 1):
            of_step = [group[i] for group, n in zip((forbidden, kept), sizes, strict=True)
                       for i in rng.choice(len(group), n, replace=False)]  # fmt: skip
            loss = answer_loss(model, *zip(*of_step, strict=True), basis_of(rows).float())
            if not torch.isfinite(loss):
                raise ValueError(f"the loss of the answers is {loss.item()} at step {step}; begin elsewhere")
            rows.grad = torch.autograd.grad(loss, rows)[0]
            optimiser.step()
            decay.step()
            if step in kept_at:
                found.append(basis_of(rows.detach()).float())
            count(1)
    return found


def own_answers(
    model: TransformersModel,
    requests: Sequence[str],
    answered: Sequence[str],
    *,
    says_refusal: Callable[[str], bool],
    **options,
) -> list[tuple[Tokens, Tokens]]:
    """Requests with the answers that the intact model gives to others, such as their safe twins.

    Answers that refuse are left out, with their requests.

    Args:
        answered: what is answered in place of each request; the requests themselves for their own answers.
        options: of `lib.generation.generate`.

    Returns:
        Token ids of requests and answers, as `optimised` takes them.
    """
    asked = chat_ids(model, answered)
    [answers] = generate(model, asked, [intact(model)], **options)
    rows = zip(chat_ids(model, requests), answers, answer_texts(model, asked, answers), strict=True)
    return [(prompt, answer) for prompt, answer, text in rows if len(answer) and not says_refusal(text)]


def optimised_conditions(
    model: TransformersModel,
    prompts: PromptSet,
    starts: Sequence[Ablation],
    on_selection: Outcome,
    measured: Callable[[list[Ablation]], Outcome],
    answer_of: Callable[[str], str],
    *,
    n_steps: int,
    seed: int,
) -> list[Ablation]:
    """Subspaces by gradient: whether fewer directions do than with those that are had in closed form.

    At each k below the smallest that passes on the selection split (`behavioural_rank`; at every k where
    none does) the best start of that size is `optimised` on the extraction split, and the best snapshot on
    the selection split is taken, the start among them. At the k that passes, its start stays as it is.

    Args:
        prompts: of the model.
        starts: conditions of any sizes.
        on_selection: what they do on the selection split.
        measured: outcome of conditions on the selection split.
        answer_of: the right answer to a request.
        n_steps, seed: see `optimised`.

    Returns:
        A condition for each k, by rising k, called "optimised K".
    """
    enough = on_selection.rank(starts)
    best = {len(starts[i].basis): starts[i].basis for i in reversed(on_selection.best_first())}
    forbidden = with_answers(model, prompts.harmful("extraction"), answer_of)
    kept = with_answers(model, prompts.harmless("extraction") + prompts.safe("extraction"), answer_of)
    found = []
    for k in sorted(k for k in best if enough is None or k <= enough):
        basis = best[k]
        if k != enough:
            bases = optimised(model, forbidden, kept, basis, n_steps=n_steps, seed=seed)
            snapshots = [Ablation(f"optimised {k} #{i}", basis) for i, basis in enumerate(bases)]
            basis = bases[measured(snapshots).best_first()[0]]
        found.append(Ablation(f"optimised {k}", basis))
    return found


_RATE = 0.02  # of Adam, at first; it falls to 0


def with_answers(
    model: TransformersModel, texts: Sequence[str], answer_of: Callable[[str], str]
) -> list[tuple[Tokens, Tokens]]:
    """Token ids of each request and of its right answer, with the end of it."""
    end = sorted(end_tokens(model))[:1]
    answers = [model.tokenizer(answer_of(text), add_special_tokens=False).input_ids + end for text in texts]
    return list(zip(chat_ids(model, texts), answers, strict=True))


def _orthonormal(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows with the span of rows [k, d], differentiable; orthonormal ones stay as they are."""
    basis, triangle = torch.linalg.qr(rows.T)
    return (basis * triangle.diagonal().sign()).T


# -- geometry across layers ------------------------------------------------------------------------


class Geometry(NamedTuple):
    """How alike the directions of some layers are.

    Attributes:
        cosine: mean off-diagonal cosine.
        participation_ratio: of the squared singular values of the unit vectors; 1 if all are parallel.
        effective_rank: exponential of the entropy of their shares.
    """

    cosine: float
    participation_ratio: float
    effective_rank: float


def direction_geometry(vectors: torch.Tensor) -> Geometry:
    """Geometry of refusal vectors [layer, d]."""
    units = torch.nn.functional.normalize(vectors.double(), dim=-1)
    n = len(units)
    values = torch.linalg.svdvals(units).numpy()
    cosine = ((units @ units.T).sum().item() - n) / (n * (n - 1))
    return Geometry(cosine, participation_ratio(values), effective_rank(values))


def geometry_nulls(
    harmful_streams: torch.Tensor, safe_streams: torch.Tensor, layers: Sequence[int], n: int, seed: int
) -> dict[str, list[Geometry]]:
    """Geometry of directions that mean nothing, n draws of each kind.

    "iid" directions are independent at every layer. A "random walk" takes steps of random direction and of
    the lengths that the refusal vector's own have from layer to layer. "shuffled labels" swaps harmful and
    safe in random pairs, so that its vectors are differences of means of nothing, in the model's own stream.

    Args:
        harmful_streams, safe_streams: of pairs [pair, layer, d].
        layers: the layers whose geometry is asked for.
    """
    rng = np.random.default_rng(seed)
    differences = (harmful_streams - safe_streams).double()
    vectors = differences.mean(0)
    steps = vectors.diff(dim=0, prepend=torch.zeros_like(vectors[:1])).norm(dim=-1, keepdim=True)
    found: dict[str, list[Geometry]] = {"iid": [], "random walk": [], "shuffled labels": []}
    for _ in range(n):
        noise = torch.from_numpy(rng.standard_normal(vectors.shape))
        walk = (steps * torch.nn.functional.normalize(noise, dim=-1)).cumsum(0)
        signs = torch.from_numpy(rng.choice([-1.0, 1.0], size=(len(differences), 1, 1)))
        draws = (noise, walk, (signs * differences).mean(0))
        for kind, draw in zip(found.values(), draws, strict=True):
            kind.append(direction_geometry(draw[list(layers)]))
    return found


# -- the weight edit -------------------------------------------------------------------------------


@contextmanager
def orthogonalized(model: TransformersModel, basis: torch.Tensor, strength: float = 1.0) -> Iterator[None]:
    """Within the block nothing in the model writes to a subspace of the stream; afterwards it is as before.

    Edits embeddings, attention outputs and MLP outputs with their biases: W -> W - strength * P W. At
    strength 1 this equals an `Ablation` at all sites. A tied unembedding reads the stream and stays as it is.

    Args:
        basis: orthonormal rows [k, d_model].
        strength: other than 1 it differs from hooks, which act on every block's input again.

    Raises:
        ValueError: see `lib.generation.Ablation`; a basis of another width.
        ModelError: a remote model, whose weights are on NDIF and not for us to edit; a mixture of experts.
    """
    if is_remote(model):
        raise ModelError(
            "weights of a remote model are on NDIF and cannot be edited; use an Ablation, or load it here"
        )
    Ablation("orthogonalized", basis)
    if basis.shape[-1] != shape(model).d_model:
        raise ValueError(f"basis has {basis.shape[-1]} dimensions, the model's stream {shape(model).d_model}")
    module, originals = model._module, []
    before = getattr(module, "_provenance", None)
    try:
        for writer, name in _writers(model):
            parameter = getattr(writer, name)
            edited = _without(parameter, basis, strength, rows_are_written=_writes_rows(writer, name))
            # Another parameter in its place: the original stays, also as the unembedding that it may be.
            setattr(writer, name, torch.nn.Parameter(edited, requires_grad=False))
            originals.append((writer, name, parameter))
        if before is not None:  # cached results of the edited model are not those of the original
            module._provenance = before | {"orthogonalized": [basis.cpu().numpy(), strength]}
        yield
    finally:
        for writer, name, parameter in originals:
            setattr(writer, name, parameter)
        if before is not None:
            module._provenance = before


def edit_divergence(
    model: TransformersModel,
    prompts: Sequence[Sequence[int]],
    basis: torch.Tensor,
    strength: float = 1.0,
    sites: Sequence[str] = SITES,
) -> np.ndarray:
    """How far removal by hooks is from removal by the weight edit of the same strength.

    Args:
        prompts: token ids.
        basis, strength, sites: of `lib.generation.Ablation`; the edit knows no sites.

    Returns:
        KL(edited || hooked) of the first token of the answer, in nats [prompt].
    """
    hooks = [Ablation("hooks", basis, strength=strength, sites=tuple(sites))]
    hooked = first_token_log_probabilities(model, prompts, hooks)[0]
    with orthogonalized(model, basis, strength):
        edited = first_token_log_probabilities(model, prompts, [intact(model)])[0]
    return np.maximum((np.exp(edited) * (edited - hooked)).sum(-1), 0)


def _writers(model: TransformersModel) -> list[tuple[torch.nn.Module, str]]:
    """(module, parameter's name) of all that writes to the stream."""
    found = [(model.embed_tokens._module, "weight")]
    backbone = model._module.base_model
    if hasattr(backbone, "wpe"):  # GPT-2 adds its positions to the stream
        found.append((backbone.wpe, "weight"))
    for block in model.layers:
        mlp = dict(block.mlp._module.named_children())
        last = next((mlp[name] for name in ("down_proj", "c_proj", "dense_4h_to_h") if name in mlp), None)
        if last is None:
            raise ModelError(
                f"the MLPs of this {model._module.config.model_type!r} model are not written by one matrix "
                "(a mixture of experts): they cannot be edited; use an Ablation"
            )
        for projection in (block.self_attn.o_proj._module, last):
            found.append((projection, "weight"))
            if projection.bias is not None:
                found.append((projection, "bias"))
    return found


def _writes_rows(writer: torch.nn.Module, name: str) -> bool:
    """Whether a parameter's rows are vectors of the stream, not its columns (as in a Linear)."""
    return name == "bias" or not isinstance(writer, torch.nn.Linear)


def _without(
    parameter: torch.Tensor, basis: torch.Tensor, strength: float, rows_are_written: bool
) -> torch.Tensor:
    rows = parameter if rows_are_written else parameter.T  # [..., d_model]
    basis = basis.to(rows.device).float()
    removed = (rows.float() - strength * (rows.float() @ basis.T) @ basis).to(rows.dtype)
    return removed if rows_are_written else removed.T.contiguous()


def _principal(rows: torch.Tensor, cut: float) -> Subspace:
    """Right singular vectors of rows [row, d] whose value is over a share of the largest."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    # Rounding of float32 vectors leaves values of 1e-8 where there is nothing.
    basis = vectors[values > max(cut, 1e-6) * values[0]]
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return Subspace((basis * largest.sign()).float(), values)
