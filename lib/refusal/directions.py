"""Refusal in the residual stream: directions and subspaces, their selection, controls, and the weight edit.

A subspace is a set of orthonormal rows [k, d_model]; `lib.refusal.removal.Ablation` takes it out of a model's
stream, `orthogonalized` out of its weights, in memory alone: no edited model is ever saved.

Everything is computed in float64 and returned in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from nnsight import TransformersModel

from lib.core.statistics import (
    effective_rank,
    participation_ratio,
)
from lib.refusal.generation import (
    chat_ids,
    last_token_streams,
)
from lib.refusal.prompts import PromptSet


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
        harmful_streams, safe_streams: from `lib.refusal.generation.last_token_streams` [prompt, layer, d].

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


def orthonormal_rows(rows: torch.Tensor) -> torch.Tensor:
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


def _principal(rows: torch.Tensor, cut: float) -> Subspace:
    """Right singular vectors of rows [row, d] whose value is over a share of the largest."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    # Rounding of float32 vectors leaves values of 1e-8 where there is nothing.
    basis = vectors[values > max(cut, 1e-6) * values[0]]
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return Subspace((basis * largest.sign()).float(), values)
