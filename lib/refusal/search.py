"""Subspaces to remove, by layers, categories, pairs, gradient, and controls; which of them is best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from nnsight import TransformersModel

from lib.core.progress import counting
from lib.core.tokens import end_tokens
from lib.refusal.behaviour import MAX_KL, RATE, Outcome, answer_texts
from lib.refusal.directions import (
    Extraction,
    orthonormal_rows,
    paired_svd,
    random_in_top_activations,
    random_subspace,
    stack,
)
from lib.refusal.forwards import Tokens
from lib.refusal.generation import (
    answer_loss,
    chat_ids,
    first_token_kl,
    generate,
)
from lib.refusal.prompts import PromptSet
from lib.refusal.removal import Ablation, intact

MAX_DEPTH = 0.8  # share of the layers


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

    What is descended is the loss of answers (`lib.refusal.generation.answer_loss`) over a few forbidden and a
    few other requests drawn at each step, with Adam, in the rows of the basis; these are made orthonormal
    before each use. Choose among what is returned on other prompts than these.

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
        return orthonormal_rows(rows if away is None else rows - rows @ away.T @ away)

    rows = start.double().cpu().clone().requires_grad_(True)
    optimiser = torch.optim.Adam([rows], lr=RATE)
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
        options: of `lib.refusal.generation.generate`.

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


def with_answers(
    model: TransformersModel, texts: Sequence[str], answer_of: Callable[[str], str]
) -> list[tuple[Tokens, Tokens]]:
    """Token ids of each request and of its right answer, with the end of it."""
    end = sorted(end_tokens(model))[:1]
    answers = [model.tokenizer(answer_of(text), add_special_tokens=False).input_ids + end for text in texts]
    return list(zip(chat_ids(model, texts), answers, strict=True))
