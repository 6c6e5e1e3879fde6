"""Released arrays give the numbers that the studies give; files that hold something else are named."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file
from tiny import save_tiny

from lib import ROOT
from lib.__main__ import main
from lib.core import attention, models, statistics, sweeps
from lib.core.claims import ClaimsTable
from lib.core.record import validate_record
from lib.induction import geometry
from lib.induction.parameters import GRID_WORDS
from lib.induction.walks import grid_graph, random_walks
from lib.refusal import directions
from lib.tools.arrays import ArtifactError, read_arrays
from lib.tools.artifacts import draw, findings

GRID = grid_graph(4, 4, GRID_WORDS)
N = GRID.n_nodes


def activations(n_walks: int = 6, length: int = 120, d: int = 24, lean: float = 0.6):
    """Every activation is its word plus a share of the one before it, and noise."""
    rng = np.random.default_rng(2)
    nodes = random_walks(GRID, n_walks, length, seed=1)
    vectors = rng.standard_normal((N, d))
    stream = vectors[nodes] + 0.3 * rng.standard_normal((*nodes.shape, d))
    stream[:, 1:] += lean * vectors[nodes[:, :-1]]
    return stream.astype(np.float32), nodes


def by_id(found) -> dict:
    return {claim.id: claim for claim in found.claims}


# -- the same numbers as the studies ---------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_activations_give_what_study_1_computes(tmp_path, suffix):
    stream, nodes = activations()
    path = tmp_path / f"theirs.{suffix}"
    save = np.savez if suffix == "npz" else lambda path, **arrays: save_numpy(arrays, path)
    save(path, resid=stream, words=nodes, more=np.zeros(3))
    arrays = read_arrays(path, {"activations": "resid", "nodes": "words"})
    assert set(arrays) == {"activations", "nodes"}
    found = findings(arrays, GRID, n_resamples=60)

    # As notebook 01 does it, with the sweep's sums of each walk.
    sums = sweeps.class_sums(torch.from_numpy(stream), torch.from_numpy(nodes), N).numpy()
    counts = (nodes[..., None] == np.arange(N)).sum(1)
    sweep = sweeps.Sweep((), np.empty(0), np.empty(0), (0,), sums[None, :, None], counts, 1.0)

    def energies(members):
        return geometry.plane_energy(sweep.class_means(members)[0, 0], GRID)

    energy = statistics.Estimate(*map(float, statistics.bootstrap(energies, len(nodes), n_resamples=60)))
    plane = geometry.pca(sweep.class_means()[0, 0]).projection
    null = geometry.shuffled_label_null(geometry.dirichlet_energy, plane, GRID, 1000, 0)
    metric = found.metrics["energy"]
    assert [metric.value, *metric.interval] == pytest.approx(list(energy), rel=1e-5)
    claim = by_id(found)["geometry"]
    assert claim.measured == pytest.approx(energy.value - np.quantile(null, 0.05), rel=1e-4)
    assert claim.n == "6 walks" and claim.published == "E = 0.655" and claim.verdict == "holds"

    odd, now, before = stream[1::2, 1:], nodes[1::2, 1:], nodes[1::2, :-1]
    even = geometry.class_means(stream[::2], nodes[::2], N)
    toward = geometry.in_betweenness(odd, now, before, even).mean(1)
    assert by_id(found)["bigram"].verdict == "holds"
    # Another neighbour lies at about 0 from here; the previous word's share is the planted .6 of the way.
    assert 0.2 < by_id(found)["bigram"].measured < toward.mean() + 0.2
    without = findings(
        {"activations": activations(lean=0.0)[0].astype(float), "nodes": nodes}, GRID, n_resamples=20
    )
    assert by_id(without)["bigram"].verdict != "holds" and by_id(without)["geometry"].verdict != "holds"


def test_previous_words_may_come_with_the_activations():
    stream, nodes = activations()
    whole = findings({"activations": stream[:, 1:], "nodes": nodes[:, 1:], "previous": nodes[:, :-1]}, GRID)
    shifted = findings({"activations": stream[:, 1:], "nodes": nodes[:, 1:]}, GRID)
    assert by_id(whole)["bigram"].measured == pytest.approx(by_id(shifted)["bigram"].measured, abs=0.05)
    few = findings({"activations": stream[:3], "nodes": nodes[:3]}, GRID, n_resamples=20)
    assert "3 walks do not give" in by_id(few)["bigram"].reason


def test_figures_of_the_repository_give_the_record_beside_them():
    folder = ROOT / "figures" / "01_induction_ablation"
    record = validate_record(folder / "record.json")
    claims = {claim.id: claim for claim in record.claims}
    if record.parameters["graph"] != "grid" or len(record.parameters["words"]) != N:
        pytest.skip("the stored run is of another graph")
    plane = read_arrays(folder / "answer.npz", {"class_means": "intact"})
    found = findings(plane, grid_graph(4, 4, record.parameters["words"]), seed=record.parameters["seed"])
    # The record's claim is over layouts of the words; these arrays are of one.
    assert found.metrics["energy"].value < record.metrics["energy, intact"].value + 0.5
    assert by_id(found)["geometry"].rule == claims["geometry"].rule
    heads = findings(read_arrays(folder / "head_scores.npz"))
    for id in ("previous-token-head", "induction-head", "anti-induction"):
        ours = by_id(heads)[id]
        assert ours.measured == pytest.approx(claims[id].measured, rel=1e-3), id
        assert (ours.statement, ours.source, ours.rule, ours.published) == (
            claims[id].statement, claims[id].source, claims[id].rule, claims[id].published,
        )  # fmt: skip


def test_spectra_give_what_the_model_that_made_them_gives(tmp_path):
    model = models.load(str(save_tiny("llama", tmp_path / "tiny")))
    scores = attention.head_scores(model, range(2, 30), n_sequences=6, period=8)
    np.savez(tmp_path / "heads.npz", spectra=scores.spectra)
    found = findings(read_arrays(tmp_path / "heads.npz"), period=8, n_resamples=50)
    value, low, high = statistics.bootstrap(
        lambda rows: scores.spectra[rows].astype(float).mean(0)[..., 7].max(), 6, n_resamples=50
    )
    claim = by_id(found)["induction-head"]
    assert claim.measured == pytest.approx(scores.induction.max()) == pytest.approx(float(value))
    assert claim.interval == pytest.approx((float(low), float(high))) and claim.n == "6 sequences"
    layer, head = attention.top_heads(scores.previous_token, 1)[0]
    assert f"top previous-token score, head {layer}.{head}" in found.metrics
    assert "(1 to 15, not 7)" in by_id(found)["not-displaced"].statement


def test_scores_alone_test_what_they_can():
    scores = np.zeros((3, 4))
    scores[1, 2] = 0.9
    found = by_id(findings({"induction": scores}))
    assert found["induction-head"].verdict == "holds" and found["induction-head"].interval is None
    for id in ("previous-token-head", "anti-induction", "not-displaced"):
        assert found[id].verdict == "not tested" and found[id].reason
    assert found["previous-token-head"].published == 0.702
    found = by_id(findings({"anti_induction": scores}))
    assert found["anti-induction"].verdict == "fails" and found["induction-head"].verdict == "not tested"


def test_spectrum_that_ends_too_early_shows_no_displaced_head():
    spectrum = np.zeros((3, 4, 41))
    spectrum[1, 2, 40] = 0.9
    assert by_id(findings({"spectrum": spectrum}))["not-displaced"].verdict == "fails"
    for n_offsets in (34, 40):
        claim = by_id(findings({"spectrum": spectrum[..., :n_offsets]}))["not-displaced"]
        assert claim.verdict == "not tested"


def test_directions_give_what_study_3_computes(tmp_path):
    rng = torch.Generator().manual_seed(0)
    common = torch.randn(1, 1, 16, generator=rng)
    safe = torch.randn(20, 6, 16, generator=rng)
    harmful = safe + common + 0.2 * torch.randn(20, 6, 16, generator=rng)
    save_file({"harmful": harmful.bfloat16(), "safe": safe.bfloat16()}, tmp_path / "pairs.safetensors")
    arrays = read_arrays(tmp_path / "pairs.safetensors")
    found = findings(arrays)
    vectors = directions.refusal_vectors(harmful.bfloat16().float(), safe.bfloat16().float())
    expected = directions.direction_geometry(vectors[3:])
    assert found.metrics["participation ratio"].value == pytest.approx(expected.participation_ratio, rel=1e-5)
    assert found.metrics["cosine of the later layers"].value == pytest.approx(expected.cosine, rel=1e-5)
    assert "participation ratio, shuffled labels" in found.metrics

    alone = findings({"vectors": vectors.double().numpy()})
    assert alone.metrics["effective rank"].value == pytest.approx(expected.effective_rank, rel=1e-5)
    assert "participation ratio, shuffled labels" not in alone.metrics  # it needs the pairs
    assert by_id(alone)["directions-agree"].verdict == "holds"
    steps = np.random.default_rng(5).standard_normal((6, 16)).cumsum(0)
    assert by_id(findings({"vectors": steps}))["directions-agree"].verdict == "fails"


def test_everything_of_one_file_is_claimed_and_drawn(tmp_path):
    stream, nodes = activations()
    spectra = np.random.default_rng(0).random((4, 2, 3, 64)) / 64
    vectors = np.random.default_rng(1).standard_normal((5, 7))
    np.savez(tmp_path / "all.npz", activations=stream, nodes=nodes, spectra=spectra, vectors=vectors)
    arrays = read_arrays(tmp_path / "all.npz")
    found = findings(arrays, GRID, n_resamples=20, seed=3)
    assert {claim.id for claim in found.claims} == {
        "geometry", "bigram", "previous-token-head", "induction-head", "anti-induction", "not-displaced",
        "directions-agree",
    }  # fmt: skip
    json.dumps({name: metric.model_dump() for name, metric in found.metrics.items()})
    assert "The word means lie like the graph" in ClaimsTable(found.claims)._repr_html_()
    titles = [ax.get_title("left") or ax.get_title() for ax in draw(arrays, GRID).axes]
    assert len(titles) == 4 and f"E = {found.metrics['energy'].value:.2f}" in titles[0]
    with pytest.raises(TypeError, match="n_bootstrap"):
        findings(arrays, GRID, n_bootstrap=3)


def test_absent_words_are_left_out_and_counted(tmp_path):
    means = np.random.default_rng(0).standard_normal((N, 5))
    means[[2, 7]] = np.nan
    np.savez(tmp_path / "means.npz", class_means=means)
    found = findings(read_arrays(tmp_path / "means.npz"), GRID)
    assert found.metrics["words without a mean"].value == 2
    assert found.metrics["energy"].value == geometry.plane_energy(means, GRID)
    assert found.metrics["energy"].interval is None


# -- files that do not hold what they should ---------------------------------------------------------

MEANS = np.random.default_rng(0).standard_normal((N, 5))
STREAM, NODES = np.zeros((2, 3, 4)), np.zeros((2, 3), int)


def poisoned(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[(1,) * array.ndim] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "names", "message"),
    [
        ({"x": MEANS}, {}, "class_means"),
        ({"x": MEANS}, {"class_means": "y"}, "'y'"),
        ({"x": MEANS}, {"means": "x"}, "'means'"),
        ({"x": MEANS[None]}, {"class_means": "x"}, r"x is \[1, 16, 5\]"),
        ({"class_means": MEANS[:0]}, {}, r"class_means is \[0, 5\]"),
        ({"class_means": MEANS.astype(complex)}, {}, "class_means is of type complex128"),
        ({"class_means": poisoned(MEANS, np.nan)}, {}, r"class_means is nan at \[1, 1\]"),
        ({"vectors": poisoned(MEANS, np.inf)}, {}, r"vectors is inf at \[1, 1\]"),
        ({"activations": STREAM}, {}, "nodes"),
        ({"activations": STREAM, "nodes": NODES[:, :2]}, {}, "'token'"),
        ({"activations": STREAM, "nodes": NODES + 0.5}, {}, "nodes"),
        ({"activations": STREAM, "nodes": NODES - 1}, {}, "nodes holds -1"),
        ({"induction": MEANS}, {}, "induction"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, arrays, names, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ArtifactError, match=message):
        read_arrays(tmp_path / "a.npz", names)


def test_files_that_are_none_are_named(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"pickle")
    config = np.array([{"code": "runs"}], dtype=object)
    np.savez(tmp_path / "pickled.npz", class_means=config)
    np.savez(tmp_path / "cut.npz", class_means=MEANS)
    save_numpy({"class_means": MEANS}, tmp_path / "cut.safetensors")
    for name in ("cut.npz", "cut.safetensors"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-40])
    for name in ("none.npz", "a.pt", "pickled.npz", "cut.npz", "cut.safetensors"):
        with pytest.raises(ArtifactError, match=name):
            read_arrays(tmp_path / name)
    np.savez(tmp_path / "mixed.npz", class_means=MEANS, config=config)
    assert list(read_arrays(tmp_path / "mixed.npz")) == ["class_means"], "an array that nobody asked for"
    with pytest.raises(ArtifactError, match=r"config \(no numbers\)"):
        read_arrays(tmp_path / "mixed.npz", {"class_means": "y"})


@pytest.mark.parametrize(
    ("arrays", "graph", "culprit"),
    [
        ({"class_means": MEANS}, None, "graph"),
        ({"class_means": MEANS[:5]}, GRID, "class_means: 5"),
        ({"activations": STREAM, "nodes": NODES + 16}, GRID, "nodes: 16"),
        ({"spectrum": np.zeros((2, 2, 20))}, None, "spectrum: 20"),
        ({"vectors": MEANS[:1]}, None, "vectors: 1"),
        ({"vectors": np.vstack([MEANS[:3], np.zeros((1, 5))])}, None, "vectors: .*layer 3"),
        ({"class_means": np.ones((N, 3))}, GRID, "class_means"),
    ],
)
def test_arrays_at_odds_with_the_question_are_named(arrays, graph, culprit):
    with pytest.raises(ArtifactError, match=culprit):
        findings(arrays, graph)


def test_nothing_to_draw_is_named():
    with pytest.raises(ArtifactError, match="graph"):
        draw({"class_means": MEANS})


def test_command_says_what_is_found_and_names_what_can_not_be_read(tmp_path, capsys):
    means = np.random.default_rng(0).normal(size=(9, 6))
    np.savez(tmp_path / "theirs.npz", layer_26=means)
    words = ["arrays", str(tmp_path / "theirs.npz"), "--grid", "3", "3"]
    assert main([*words, "--name", "class_means=layer_26", "--figures", str(tmp_path / "figures")]) == 0
    said = capsys.readouterr().out
    energy = geometry.plane_energy(means, grid_graph(3, 3))
    assert (
        re.search(rf"^energy +{energy:.3g}", said, re.MULTILINE)
        and "The word means lie like the graph" in said
    )
    assert (tmp_path / "figures" / "theirs.png").read_bytes().startswith(b"\x89PNG")
    for wrong, culprit in (("class_means=layer_27", "layer_27"), ("layer_26", "--name layer_26")):
        assert main([*words, "--name", wrong]) == 1
        assert culprit in capsys.readouterr().err
