"""The picture on the front page, a panel a study, drawn from the results in figures/: `python -m lib.hero`.

It computes nothing of its own: curves are the arrays beside the studies' figures, numbers in the titles are
those of the records. Run it after the studies, and commit figures/hero.png and hero.svg with their results.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure, SubFigure

from lib import plots
from lib.geometry import dirichlet_energy
from lib.parameters import schemas
from lib.record import Metric, Record, RecordError, artifact_problem, figures_folder, read_record
from lib.statistics import Band, bootstrap_band

_WAYS = {"categories": "means", "optimised": "gradient"}
STUDIES = ("01_induction_ablation", "02_neighbor_mixing", "03_refusal_low_rank", "04_codi_attention")


def draw(folder: Path) -> Figure:
    """The figure of the results in a folder of studies.

    Raises:
        RecordError: a study without record or numbers, or with others than those of its record.
    """
    matplotlib.use("agg")
    plots.use_house_style()
    fig = Figure(figsize=(plots.PAGE, 5.0), layout="constrained")
    panels = fig.subfigures(2, 2, hspace=0.04).flat
    for panel, draw_panel, study in zip(panels, (_induction, _mixing, _refusal, _codi), STUDIES, strict=True):
        title = draw_panel(panel, folder / study)
        panel.suptitle(f"{study[1]}  {title}", x=0.02, ha="left", fontsize=9.5, fontweight="bold")
    return fig


def _induction(panel: SubFigure, study: Path) -> str:
    """Accuracy against the number of ablated heads; returns the title, as the other panels do."""
    record, arrays = _results(study, "ablation")
    ks, kind = arrays["k"], record.parameters["ablation"]
    names = {"random": plots.GREY, "induction": plots.BLUE, "previous token": plots.VERMILLION}
    bands = {name: bootstrap_band(arrays[f"{kind}_{name.replace(' ', '_')}"]) for name in names}
    bands["random"] = Band(*[bands["random"].middle] * 3)  # what differs is the draw of heads: each has a dot
    ax = panel.subplots()
    ax.plot(np.arange(1, len(ks)), arrays["random_draws"], ".", color=plots.GREY, markersize=3)
    ax.set(ylim=(-0.05, 1), ylabel="accuracy", xlabel="heads ablated", xticks=range(len(ks)), xticklabels=ks)
    plots.draw_bands(ax, np.arange(len(ks)), bands, list(names.values()), marker="o")
    intact, *_, without = bands["induction"].middle
    return f"Accuracy {_short(intact)}, without {ks[-1]} induction heads {_short(without)}"


def _mixing(panel: SubFigure, study: Path) -> str:
    """Random vectors, and the same after one step along the graph, with and without the word itself."""
    record, arrays = _results(study, "toy")
    graph = schemas()[study.name](**record.parameters).word_graph()
    planes = {"random": arrays["before"], "mixed": arrays["after"]}
    stills = _results(study, "stills")[1]
    alone = (stills["self_weight"] == 0) & (stills["steps"] == 1)
    [planes["mixed without itself"]] = stills["positions"][alone]
    for ax, (name, positions) in zip(panel.subplots(1, 3), planes.items(), strict=True):
        plots.draw_graph(ax, positions, graph, labels=())
        ax.set_title(f"E = {_short(dirichlet_energy(positions, graph))}", loc="center", fontweight="normal")
        ax.set_xlabel(name.replace(" without", "\nwithout"))
    return "Vectors averaged with neighbours (PCA)"


def _refusal(panel: SubFigure, study: Path) -> str:
    """Compliance against the number of directions removed: those of means by category, and by gradient."""
    record, arrays = _results(study, "answer")
    ks = np.array(record.parameters["k_values"])
    ax = panel.subplots()
    for model, colour in (("single", plots.BLUE), ("lowrank", plots.VERMILLION)):
        for way, marker in (("categories", "o"), ("optimised", "D")):
            values = arrays[f"{model} {way}"]
            band, at = bootstrap_band(values.T), ks[: len(values)]
            ax.fill_between(at, band.low, band.high, color=colour, alpha=0.2, linewidth=0)
            ax.plot(at, band.middle, color=colour, marker=marker, label=f"{model}, {_WAYS[way]}")
    draws = arrays["lowrank random"].mean(axis=1).reshape(len(ks), -1).mean(axis=1)
    ax.plot(ks, draws, "x--", color=plots.GREY, label="random")
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 0.08))
    ax.set(ylim=(-0.05, 1.05), xticks=ks, ylabel="compliance", xlabel="refusal directions removed")
    ranks = {model: _fewest(record.metrics, model) for model in ("single", "lowrank")}
    return "Directions needed: " + ", ".join(f"{model} ≤ {k:.0f}" for model, k in ranks.items())


def _fewest(metrics: Mapping[str, Metric], model: str) -> float:
    """The least k* of a model by any way; infinite where none found one."""
    found = [metric.value for name, metric in metrics.items() if name.startswith(f"k_star/{model}/")]
    return min((k for k in found if k is not None), default=np.inf)


def _codi(panel: SubFigure, study: Path) -> str:
    """Share of problems of which each thought decodes to an intermediate result."""
    record, arrays = _results(study, "answer")
    colours = (plots.BLUE, plots.VERMILLION, plots.SKY, plots.ORANGE)
    bands = {name.removesuffix(" decode"): bootstrap_band(values)
             for name, values in arrays.items() if name.endswith(" decode")}  # fmt: skip
    thoughts = np.arange(len(next(iter(bands.values())).middle))
    ax = panel.subplots()
    ax.set(ylim=(-0.05, 1.05), xticks=thoughts, xlabel="continuous thought", ylabel="decodes to a result")
    plots.draw_bands(ax, thoughts, bands, colours[: len(bands)], marker="o")
    return f"codi: even minus odd thoughts {_short(record.metrics['even - odd decoded/codi'].value)}"


def _results(study: Path, figure: str) -> tuple[Record, dict[str, np.ndarray]]:
    """A study's record, and the numbers of one of its figures as that run left them."""
    record = read_record(study / "record.json")
    if problem := artifact_problem(study / "record.json", f"{figure}.npz", record.artifacts[f"{figure}.npz"]):
        raise RecordError(f"{study / figure}.npz {problem}; run the study again")
    with np.load(study / f"{figure}.npz", allow_pickle=False) as arrays:
        return record, dict(arrays)


def _short(value: float) -> str:
    """Two digits, as the front page writes them: .63, 4.58, −.67."""
    text = f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
    return text.replace("0.", ".", 1) if abs(value) < 0.995 else text


def save(fig: Figure, path: Path) -> None:
    """Write PATH.png, 1400 px wide, and PATH.svg; an equal figure has equal bytes."""
    fig.savefig(path.with_suffix(".png"), metadata={"Software": None})
    fig.savefig(path.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    try:
        save(draw(figures_folder()), figures_folder() / "hero")
    except RecordError as error:
        sys.exit(f"{error}\nhero: run the studies first, by make run")
