"""The picture on the front page is that of the committed results."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest

from lib import ROOT, hero
from lib.record import RecordError

FIGURES = ROOT / "figures"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    path = tmp_path_factory.mktemp("hero") / "hero"
    hero.save(hero.draw(FIGURES), path)
    return path


@pytest.fixture
def results(tmp_path):
    """The committed numbers, to be changed."""
    for study in hero.STUDIES:
        (tmp_path / study).mkdir()
        for file in (FIGURES / study).glob("*"):
            if file.suffix in (".npz", ".json"):
                shutil.copy(file, tmp_path / study)
    return tmp_path


def refile(path) -> None:
    """Have the record know an array file as it is now."""
    record = json.loads((path.parent / "record.json").read_text())
    record["artifacts"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "record.json").write_text(json.dumps(record))


def words(path) -> list[str]:
    """What an SVG writes: matplotlib leaves a comment before the outlines of each text."""
    return re.findall(r"<!-- (.+?) -->", path.with_suffix(".svg").read_text(encoding="utf-8"))


def apart(a, b) -> float:
    """Share of pixels that two pictures do not have in common; anti-aliasing may differ by a shade."""
    one, other = (plt.imread(path.with_suffix(".png"))[..., :3] for path in (a, b))
    return float((np.abs(one - other).max(axis=2) > 0.1).mean()) if one.shape == other.shape else 1.0


def test_committed_picture_is_what_the_results_draw(drawn):
    committed = FIGURES / "hero"
    assert words(committed) == words(drawn), "run `python -m lib.hero` and commit figures/hero.*"
    assert apart(committed, drawn) < 1e-4, "run `python -m lib.hero` and commit figures/hero.*"


def test_equal_results_are_equal_bytes_and_the_picture_is_opaque(drawn, tmp_path):
    hero.save(hero.draw(FIGURES), tmp_path / "again")
    for suffix in (".png", ".svg"):
        again = (tmp_path / "again").with_suffix(suffix).read_bytes()
        assert again == drawn.with_suffix(suffix).read_bytes()
    pixels = plt.imread(drawn.with_suffix(".png"))
    assert pixels.shape[1] == 1400 and (pixels[..., 3] == 1).all() and (pixels[0, 0] == 1).all()


@pytest.mark.parametrize(
    ("study", "file", "array"),
    [
        (0, "ablation", "zero_induction"), (1, "toy", "after"), (1, "stills", "positions"),
        (2, "answer", "lowrank categories"), (2, "answer", "lowrank optimised"),
        (3, "answer", "codi-seed1 decode"),
    ],
)  # fmt: skip
def test_changed_result_changes_it(results, drawn, tmp_path, study, file, array):
    path = results / hero.STUDIES[study] / f"{file}.npz"
    arrays = dict(np.load(path))
    arrays[array] = 0.7 * np.random.default_rng(0).permuted(arrays[array], axis=0)
    np.savez(path, **arrays)
    with pytest.raises(RecordError, match=f"{file}.npz is not the file that was recorded"):
        hero.draw(results)
    refile(path)
    hero.save(hero.draw(results), tmp_path / "changed")
    assert apart(tmp_path / "changed", drawn) > 1e-4


def test_titles_are_numbers_of_the_records(results, drawn, tmp_path):
    for study, metric, value in (
        (2, "k_star/lowrank/pairs", 1.0), (2, "cosine/single/pairs", 0.4),
        (3, "even - odd decoded/codi", 0.25),
    ):  # fmt: skip
        path = results / hero.STUDIES[study] / "record.json"
        record = json.loads(path.read_text())
        record["metrics"].setdefault(metric, {})["value"] = value
        path.write_text(json.dumps(record))
    hero.save(hero.draw(results), tmp_path / "changed")
    new = [text for text in words(tmp_path / "changed") if text not in words(drawn)]
    assert new == ["3  Directions needed: single ≤ 1, lowrank ≤ 1", "4  codi: even minus odd thoughts .25"]


def test_planes_are_found_by_what_they_are(results, drawn, tmp_path):
    path = results / hero.STUDIES[1] / "stills.npz"
    np.savez(path, **{name: values[::-1] for name, values in np.load(path).items()})
    refile(path)
    hero.save(hero.draw(results), tmp_path / "changed")
    assert apart(tmp_path / "changed", drawn) == 0


def test_missing_study_is_named(results):
    (results / hero.STUDIES[1] / "toy.npz").unlink()
    with pytest.raises(RecordError, match="02_neighbor_mixing/toy.npz is missing"):
        hero.draw(results)
