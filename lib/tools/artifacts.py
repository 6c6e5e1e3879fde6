"""Arrays that others released, through the measures, figures and claims of the studies; no model is needed.

    python -m lib arrays their.npz --name class_means=layer_26_means

or, in Python,

    arrays = read_arrays("their.npz", names={"class_means": "layer_26_means"})
    found = findings(arrays, grid_graph(4, 4, GRID_WORDS))
    ClaimsTable(found.claims)

A file (.npz or .safetensors) holds one or several of these; `names` says what they are called there:

    class_means     [node, d]                        mean activation of each word, or its projection; a
                                                     word that is absent is a row of NaN
    activations     [walk, token, d]                 single activations, with
    nodes           int [walk, token]                the word at each, and where that is not in `nodes`,
    previous        int [walk, token]                the word just before it; -1 for none
    spectra         [sequence, layer, head, offset]  attention on each offset, on random tokens repeated once
    spectrum        [layer, head, offset]            its mean over sequences
    previous_token  [layer, head]                    scores alone: one token back,
    induction       [layer, head]                    to the token after the first copy,
    anti_induction  [layer, head]                    and to the token before it
    vectors         [layer, d]                       directions of refusal, or of anything else, of each layer
    harmful, safe   [pair, layer, d]                 activations of paired prompts, whose difference they are
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.core import registry, statistics
from lib.core.claims import Claim, ClaimsTable, Table, with_interval
from lib.core.record import Metric
from lib.induction import geometry, graph_figures
from lib.induction.walks import Graph, grid_graph, other_nodes
from lib.tools.arrays import ATTENTION, WORDS, ArtifactError, read_arrays

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DISPLACED = (24, 40)  # offsets about an induction head's 31 on 32 tokens repeated once


@dataclass(frozen=True)
class Findings:
    """What was measured on arrays: metrics by name and claims, as a study records them."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    """Print what is found in files of arrays; returns the exit status, 1 if one can not be read."""
    parser = argparse.ArgumentParser(
        prog="python -m lib arrays", description="Measures and claims on arrays."
    )
    add = parser.add_argument
    add(
        "files",
        nargs="+",
        type=Path,
        help=".npz or .safetensors; the head of lib/tools/artifacts.py says of what",
    )
    add("--name", action="append", default=[], metavar="OURS=THEIRS", help="what an array is called there")
    add("--grid", nargs=2, type=int, default=(4, 4), metavar=("ROWS", "COLS"), help="of the words; 4 4")
    add("--figures", type=Path, metavar="FOLDER", help="draw what there is, a PNG a file")
    options = parser.parse_args(argv)
    try:
        if unclear := [pair for pair in options.name if "=" not in pair]:
            raise ArtifactError(f"--name {unclear[0]}: write OURS=THEIRS, such as class_means=layer_26_means")
        names, graph = dict(pair.split("=", 1) for pair in options.name), grid_graph(*options.grid)
        for path in options.files:
            arrays = read_arrays(path, names)
            found = findings(arrays, graph)
            rows = [
                [name, with_interval(m.value, m.interval), str(m.n or "")]
                for name, m in found.metrics.items()
            ]
            print(
                path,
                repr(Table([["metric", "value", "n"], *rows])),
                repr(ClaimsTable(found.claims)),
                sep="\n\n",
            )
            if options.figures:
                options.figures.mkdir(parents=True, exist_ok=True)
                draw(arrays, graph).savefig(options.figures / f"{path.stem}.png")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def findings(arrays: Mapping[str, np.ndarray], graph: Graph | None = None, **options: int) -> Findings:
    """All measures and claims that arrays of `read_arrays` admit.

    Args:
        arrays: see the head of this module.
        graph: of the words, for class_means or activations; nodes in the order of its words.
        options: of `graph_findings` (n_resamples, seed), `head_findings` (period, n_resamples) and
            `direction_findings` (seed).

    Raises:
        ArtifactError: words without a graph, or at odds with it.
    """
    metrics: dict[str, Metric] = {}
    claims: list[Claim] = []
    parts = (
        ({"class_means", "activations"}, graph_findings, ("n_resamples", "seed")),
        (ATTENTION, head_findings, ("period", "n_resamples")),
        ({"vectors", "harmful"}, direction_findings, ("seed",)),
    )
    unknown = set(options) - {name for _, _, takes in parts for name in takes}
    if unknown:
        raise TypeError(f"no option {', '.join(sorted(unknown))}")
    for needs, measure, takes in parts:
        if needs & set(arrays):
            own = {name: options[name] for name in takes if name in options}
            part = measure(arrays, graph, **own) if measure is graph_findings else measure(arrays, **own)
            metrics |= part.metrics
            claims += part.claims
    return Findings(metrics, claims)


def graph_findings(
    arrays: Mapping[str, np.ndarray], graph: Graph | None, *, n_resamples: int = 400, seed: int = 0
) -> Findings:
    """Geometry of word means on a graph, as study 1 measures and claims it.

    With activations the intervals are over walks, and the claim that single activations lean to the previous
    word is tested: means of the even walks, activations of the odd ones.

    Args:
        n_resamples: of the bootstrap over walks.
        seed: of shuffled words and of the other nodes that the previous word is held against.
    """
    if graph is None:
        raise ArtifactError(
            "word means need the graph of their words: pass graph, such as lib.induction.walks.grid_graph"
        )
    stream = arrays.get("activations")
    means = _word_means(arrays, graph)
    try:
        plane = geometry.pca(means).projection
    except ValueError as error:
        raise ArtifactError(f"class_means: {error}") from None
    null = geometry.shuffled_label_null(geometry.dirichlet_energy, plane, graph, 1000, seed)
    threshold = float(np.quantile(null, 0.05))
    value, interval, n = geometry.plane_energy(means, graph), None, ""
    if stream is not None:
        value, *interval = _energy_over_walks(stream, arrays["nodes"], graph, n_resamples)
        n = f"{len(stream)} walks"
    metrics = {
        "energy": Metric(value=value, interval=interval, n=n or None),
        "energy, 5% of shuffled words": Metric(value=threshold),
        "energy, full space": Metric(value=geometry.dirichlet_energy(means, graph)),
        "Procrustes distance": Metric(value=geometry.procrustes_distance(plane, graph)),
        "separation": Metric(value=geometry.neighbour_separation(plane, graph)),
        "words without a mean": Metric(value=len(geometry.absent_nodes(means))),
    }
    excess = None if interval is None else tuple(end - threshold for end in interval)
    claims = [
        Claim.test(
            "geometry", "The word means lie like the graph (energy minus 5% of shuffled words)",
            source="Arditi-26", measured=value - threshold, interval=excess, below=0.0, n=n,
            published=f"E = {registry.published('arditi-26/dirichlet_energy/baseline')}",
        )
    ]  # fmt: skip
    if stream is not None:
        claims.append(_bigram(arrays, graph, seed))
    return Findings(metrics, claims)


def _word_means(arrays: Mapping[str, np.ndarray], graph: Graph) -> np.ndarray:
    """Mean activation of each word [node, d], of the activations where there are any."""
    if "activations" in arrays:
        for name in sorted(WORDS & set(arrays)):
            if (highest := arrays[name].max()) >= graph.n_nodes:
                raise ArtifactError(
                    f"{name}: {highest} is no node of {graph.name}, which has {graph.n_nodes}"
                )
        return geometry.class_means(arrays["activations"], arrays["nodes"], graph.n_nodes)
    means = arrays["class_means"]
    if len(means) != graph.n_nodes:
        raise ArtifactError(f"class_means: {len(means)} words, but {graph.name} has {graph.n_nodes} nodes")
    return means


def _energy_over_walks(
    stream: np.ndarray, nodes: np.ndarray, graph: Graph, n_resamples: int
) -> tuple[float, float, float]:
    """Energy of the word means in their plane, and its 95% interval over walks."""
    by_walk = [
        geometry.ClassSums(graph.n_nodes).add(*walk)
        for walk in zip(stream[:, None], nodes[:, None], strict=True)
    ]
    sums, counts = np.stack([w.sums for w in by_walk]), np.stack([w.counts for w in by_walk])

    def energy(members: np.ndarray) -> float:
        resampled = statistics.means_of(sums[members].sum(0), counts[members].sum(0))
        seen = np.isfinite(resampled).all(1).sum()
        return geometry.plane_energy(resampled, graph) if seen > 2 else np.nan

    return tuple(map(float, statistics.bootstrap(energy, len(stream), n_resamples=n_resamples)))


def head_findings(arrays: Mapping[str, np.ndarray], *, period: int = 32, n_resamples: int = 400) -> Findings:
    """Head types, as study 1 measures and claims them; with spectra the intervals are over sequences.

    Args:
        period: of the random tokens (tokens): an induction head attends period - 1 back.
        n_resamples: of the bootstrap over sequences.
    """
    from lib.core import attention  # nnsight behind it: only where it is needed

    spectra = arrays.get("spectra")
    spectrum = arrays.get("spectrum") if spectra is None else spectra.mean(0)
    if spectrum is not None and spectrum.shape[-1] <= period + 1:
        raise ArtifactError(
            f"spectrum: {spectrum.shape[-1]} offsets do not hold {period + 1}; pass the repetition's period"
        )
    n = "" if spectra is None else f"{len(spectra)} sequences"

    def estimate(statistic: Callable[[np.ndarray], float]) -> tuple[float, tuple[float, float] | None]:
        if spectra is None:
            return float(statistic(spectrum)), None
        value, *interval = statistics.bootstrap(
            lambda rows: statistic(spectra[rows].mean(0)), len(spectra), n_resamples=n_resamples
        )
        return float(value), tuple(map(float, interval))

    metrics, claims = {}, []
    for kind, (id, statement, offset, rule) in _head_rules(period).items():
        if spectrum is None and kind not in arrays:
            known_rule = {key: rule[key] for key in ("source", "published")}
            claims.append(Claim.not_tested(id, statement, reason=f"no {kind} scores", **known_rule))
            continue
        if spectrum is None:
            scores, value, interval = arrays[kind], float(arrays[kind].max()), None
        else:
            scores = spectrum[..., offset]
            value, interval = estimate(lambda of, offset=offset: of[..., offset].max())
        layer, head = attention.top_heads(scores, 1)[0]
        metrics[f"top {kind.replace('_', '-')} score, head {layer}.{head}"] = Metric(
            value=value, interval=interval, n=n or None
        )
        claims.append(Claim.test(id, statement, measured=value, interval=interval, n=n, **rule))
    # A sequence of two periods has no offset beyond its own length.
    low, high = (min(max(1, offset - 32 + period), 2 * period - 1) for offset in _DISPLACED)
    statement = f"No head peaks at a displaced induction offset ({low} to {high}, not {period - 1})"
    reason = ""
    if spectrum is None:
        reason = "scores on single diagonals do not show it: the spectrum of offsets would"
    elif spectrum.shape[-1] <= high:
        reason = f"a spectrum of {spectrum.shape[-1]} offsets does not show it: it takes {high + 1}"
    if reason:
        claims.append(Claim.not_tested("not-displaced", statement, source="here", reason=reason))
    else:
        value, interval = estimate(partial(_n_displaced, low=low, high=high, right=period - 1))
        claims.append(Claim.test("not-displaced", statement, source="here", measured=value, interval=interval,
                                 below=0.5, unit="heads", n=n))  # fmt: skip
    return Findings(metrics, claims)


def _head_rules(period: int) -> dict[str, tuple[str, str, int, dict[str, Any]]]:
    """By kind of head: id and statement of the claim, offset of its score, and the claim's rule."""

    def published(kind: str) -> float:
        return max(registry.published(f"arditi-26/top_{kind}_heads").values())

    return {
        "previous_token": ("previous-token-head", "The top previous-token score is at least .5", 1,
                           dict(source="Olsson-22", above=0.5, published=published("previous_token"))),
        "induction": ("induction-head", "The top induction score is at least .5", period - 1,
                      dict(source="Olsson-22", above=0.5, published=published("induction"))),
        "anti_induction": ("anti-induction",
                           "No head attends to the token before the first copy (score below .1)", period + 1,
                           dict(source="Bi-Induct-26", below=0.1, published="near 0")),
    }  # fmt: skip


def _n_displaced(spectrum: np.ndarray, low: int, high: int, right: int) -> int:
    """Heads that attend most to one offset, by .3 at least, from low to high back but not `right`."""
    beyond = spectrum[..., 1:]
    offsets = beyond.argmax(-1)[beyond.max(-1) >= 0.3] + 1
    return int(((offsets >= low) & (offsets <= high) & (offsets != right)).sum())


def direction_findings(arrays: Mapping[str, np.ndarray], *, seed: int = 0) -> Findings:
    """How alike the layers' directions are in the later half, as study 3 measures it, against its nulls.

    Args:
        seed: of the 100 draws of each null. Shuffled labels need the paired activations.
    """
    import torch

    from lib.refusal import directions  # nnsight behind it: only where it is needed

    paired = "harmful" in arrays
    if paired:
        harmful, safe = (torch.from_numpy(arrays[name]).float() for name in ("harmful", "safe"))
        vectors = directions.refusal_vectors(harmful, safe)
    else:
        vectors = torch.from_numpy(arrays["vectors"]).float()
        harmful, safe = vectors[None], torch.zeros_like(vectors[None])
    later = [*range(len(vectors) // 2, len(vectors))]
    if len(later) < 2:
        raise ArtifactError(f"vectors: {len(vectors)} layers have no later half to compare; give all layers")
    lengths = vectors.norm(dim=-1)
    if empty := [layer for layer in later if lengths[layer] < 1e-8]:
        raise ArtifactError(f"vectors: the direction of layer {empty[0]} is zero; leave that layer out")
    found = directions.direction_geometry(vectors[later])
    nulls = directions.geometry_nulls(harmful, safe, later, n=100, seed=seed)
    metrics = {
        "cosine of the later layers": Metric(value=found.cosine),
        "participation ratio": Metric(value=found.participation_ratio),
        "effective rank": Metric(value=found.effective_rank),
    }
    for kind, draws in nulls.items():
        if paired or kind != "shuffled labels":
            ratios = [draw.participation_ratio for draw in draws]
            ends = tuple(map(float, np.quantile(ratios, [0.025, 0.975])))
            metrics[f"participation ratio, {kind}"] = Metric(
                value=float(np.mean(ratios)), interval=ends, n="100 draws"
            )
    low = float(np.quantile([draw.participation_ratio for draw in nulls["random walk"]], 0.05))
    published = registry.published("arditi-24/random_walk_participation_ratio")
    claim = Claim.test(
        "directions-agree",
        "The later layers' directions agree more than a random walk's (participation ratio minus its 5%)",
        source="here", measured=found.participation_ratio - low, below=0.0,
        published=f"random walks {published[0]} to {published[1]}",
    )  # fmt: skip
    return Findings(metrics, [claim])


def draw(arrays: Mapping[str, np.ndarray], graph: Graph | None = None, *, period: int = 32) -> Figure:
    """The studies' figures of whatever arrays there are, a panel each: word means in their plane,
    previous-token and induction scores of every head, cosines between the directions of layers."""
    import matplotlib.pyplot as plt

    from lib.core import plots

    panels: list[tuple[str, Any, dict]] = []
    means = arrays.get("class_means")
    if "activations" in arrays and graph is not None:
        means = geometry.class_means(arrays["activations"], arrays["nodes"], graph.n_nodes)
    if means is not None and graph is not None:
        title = f"word means: E = {geometry.plane_energy(means, graph):.2f}"
        panels.append(
            (title, graph_figures.draw_graph, dict(positions=geometry.pca(means).projection, graph=graph))
        )
    spectrum = arrays["spectra"].mean(0) if "spectra" in arrays else arrays.get("spectrum")
    for kind, offset in (("previous_token", 1), ("induction", period - 1)):
        scores = arrays.get(kind) if spectrum is None else spectrum[..., offset]
        if scores is not None:
            panels.append((f"{kind.replace('_', '-')} score", plots.draw_head_scores, dict(scores=scores)))
    vectors = arrays.get("vectors")
    if "harmful" in arrays:
        vectors = arrays["harmful"].mean(0) - arrays["safe"].mean(0)
    if vectors is not None:
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
        units = (vectors / np.where(lengths > 1e-8, lengths, np.nan))[lengths[:, 0] > 1e-8]
        panels.append(("cosine between layers", plots.draw_matrix, dict(matrix=units @ units.T, limit=1.0)))
    if not panels:
        raise ArtifactError("nothing here can be drawn: word means need a graph")
    fig, axes = plt.subplots(1, len(panels), figsize=(plots.PAGE, 2.8), squeeze=False, layout="constrained")
    for ax, (title, draw_panel, what) in zip(axes[0], panels, strict=True):
        draw_panel(ax, **what)
        ax.set_title(title)
    return fig


def _bigram(arrays: Mapping[str, np.ndarray], graph: Graph, seed: int) -> Claim:
    """The claim that activations lean to the previous word, of study 1."""
    stream, now = arrays["activations"], arrays["nodes"]
    before = arrays.get("previous")
    if before is None:
        before = np.pad(now[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    statement = "Activations lie towards the previous word, beyond another neighbour"
    if len(stream) < 4:
        reason = f"{len(stream)} walks do not give means of half of them and activations of the others"
        return Claim.not_tested("bigram", statement, source="Arditi-26", reason=reason)
    means = geometry.class_means(stream[::2], now[::2], graph.n_nodes)
    odd, now, before = stream[1::2], now[1::2], before[1::2]
    another = other_nodes(now, before, graph, neighbours=True, seed=seed)
    another = np.where(before >= 0, another, -1)
    between = (geometry.in_betweenness(odd, now, target, means) for target in (before, another))
    per_walk = [
        np.array([walk[seen].mean() if (seen := np.isfinite(walk)).any() else np.nan for walk in each])
        for each in between
    ]
    lean = per_walk[0] - per_walk[1]
    if not np.isfinite(lean).all():
        reason = "a walk holds no word with both a previous one and another neighbour that have means"
        return Claim.not_tested("bigram", statement, source="Arditi-26", reason=reason)
    mean = statistics.bootstrap_mean(lean)
    return Claim.test("bigram", statement, source="Arditi-26", measured=mean.value, interval=mean.interval,
                      above=0.0, n=f"{len(odd)} odd walks")  # fmt: skip
