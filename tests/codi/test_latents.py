"""Thoughts, answers and patches: equal to a plain loop over the bare transformers model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_codi import N_POSITIONS, plain_loop, plain_texts, save_embedded

from lib.codi import latents
from lib.codi.checkpoint import load_codi
from lib.codi.decoding import alternation, parity
from lib.codi.latents import ThoughtIndex, Variant, answer, early_stops, mean_ablations, think, twin_patches
from lib.codi.patches import causal_role, plan_role
from lib.codi.problems import Equation, carried_answer, extract_answer, problems_of
from lib.core.cache import Cache

N = 6  # thoughts


def test_thoughts_and_answers_equal_a_loop_without_cache_or_batch(codi, questions, thoughts):
    assert len({len(codi.ids(question)) for question in questions}) > 1  # mixed lengths in one call
    written = think(codi, questions, max_answer=8)
    for i, question in enumerate(questions):
        z, tokens = plain_loop(codi, question)
        np.testing.assert_allclose(thoughts.z[i], z, atol=1e-4)
        assert written.answers.texts[0][i] == codi.model.tokenizer.decode(tokens)
    assert len(set(written.answers.texts[0])) > 1  # answers depend on the question


def test_early_stops_equal_runs_of_their_own(codi, questions):
    stops = [*early_stops(codi, prompted=False), *early_stops(codi)]
    together = answer(codi, questions, stops, max_answer=8)
    for n, (free, prompted) in enumerate(zip(together.texts[: N + 1], together.texts[N + 1 :], strict=True)):
        assert free == plain_texts(codi, questions, n_thoughts=n)
        assert prompted == plain_texts(codi, questions, n_thoughts=n, prompt=codi.answer_prompt)
        assert free != prompted
    assert len({tuple(texts) for texts in together.texts}) > 2


def test_a_fed_prompt_leaves_no_room_for_steps():
    """A model that writes its steps where it has not thought them: its freely written number is theirs."""
    codi = load_codi("organism/codi-results")
    problems = [p for p in problems_of(codi.folder) if len(p.equations) == 2][:20]
    questions, wanted = [p.question for p in problems], [p.answer for p in problems]
    free = answer(codi, questions, early_stops(codi, prompted=False)[:1])
    prompted = answer(codi, questions, early_stops(codi)[:1])
    assert free.equal(wanted).mean() > 0.5 and free.with_steps().mean() > 0.5
    assert not (free.equal(wanted) & ~free.with_steps()).any()
    assert prompted.equal(wanted).mean() < 0.1
    assert [variant.prompted for variant in prompted.variants] == [True]


def test_an_answer_ends_at_its_end_token_or_the_last_position(codi, questions, thoughts):
    """The weights' own end token is rare: any token that an answer holds is made the end."""
    first = codi.ids(thoughts.answers.texts[0][0])
    settings = codi.model._module.generation_config
    before, settings.eos_token_id = settings.eos_token_id, first[2]
    try:
        ended = think(codi, questions)
        assert ended.answers.texts[0][0] == codi.model.tokenizer.decode(first[: first.index(first[2])])
        cut = think(codi, questions, 20, max_answer=999)
        for question, text in zip(questions, cut.answers.texts[0], strict=True):
            # <bot>, thoughts and <eot>; the last token that is written is not read.
            assert len(codi.ids(text)) <= N_POSITIONS - len(codi.ids(question)) - 22 + 1
    finally:
        settings.eos_token_id = before


def test_bot_and_eot_are_never_written(codi, questions):
    """Words that this model writes often, as <bot> and as <eot>."""
    bot, eot = codi.ids("8 41")
    for other in (replace(codi, bot=bot), replace(codi, eot=eot)):
        written = think(other, questions, max_answer=8).answers.texts[0]
        assert written == plain_texts(other, questions)
        assert not any({other.bot, other.eot} & {*codi.ids(text)} for text in written)


def test_twin_patches_equal_a_plain_loop(codi, problems, questions):
    pair = [problem for problem in problems if problem.twin]
    asked = [problem.question for problem in pair]
    both = think(codi, asked, max_answer=8)
    sets = [(0,), (3,), (0, 2, 4), tuple(range(N))]
    patched = answer(codi, asked, twin_patches(pair, both, sets), max_answer=8)
    for chosen, texts in zip(sets, patched.texts, strict=True):
        swapped = {k: both.z[::-1, k] for k in chosen}
        assert texts == plain_texts(codi, asked, replaced=swapped, prompt=codi.answer_prompt)
    assert patched.variants[2].name == "twin's z_0, z_2, z_4"
    assert patched.texts[3] != answer(codi, asked, early_stops(codi)[-1:], max_answer=8).texts[0]
    of_all = think(codi, questions, max_answer=8)
    [alone] = twin_patches(problems[:2], of_all, [(0,)])  # a has no twin, and that of b is not among them
    np.testing.assert_array_equal(alone.values, of_all.z[:2])


def test_mean_ablations_equal_a_plain_loop(codi, questions, thoughts):
    sets = [(1,), tuple(range(N))]
    ablated = answer(codi, questions, mean_ablations(thoughts, sets), max_answer=8)
    means = np.stack([z for z in thoughts.z]).mean(0)
    for chosen, texts in zip(sets, ablated.texts, strict=True):
        replaced = {k: np.repeat(means[None, k], len(questions), 0) for k in chosen}
        assert texts == plain_texts(codi, questions, replaced=replaced, prompt=codi.answer_prompt)


def test_a_cache_holds_every_batch(codi, questions, thoughts, tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    variants = [*mean_ablations(thoughts, [(0,), (1, 2)]), Variant("short", 2)]
    prompted = replace(variants[-1], prompted=True)
    first = think(codi, questions, cache=cache)
    written = answer(codi, questions, variants, cache=cache)
    monkeypatch.setattr(latents, "_think_batch", None)
    again = think(codi, questions, cache=cache)
    np.testing.assert_array_equal(again.z, first.z)
    assert again.answers.texts == first.answers.texts == thoughts.answers.texts
    assert answer(codi, questions, variants, cache=cache).texts == written.texts
    with pytest.raises(TypeError):  # other values are other results
        answer(codi, questions, mean_ablations(replace(first, z=first.z + 1), [(0,)]), cache=cache)
    with pytest.raises(TypeError):
        answer(codi, questions, [*variants[:-1], prompted], cache=cache)
    with pytest.raises(TypeError):
        think(codi, questions, 5, cache=cache)


def test_batches_halve_when_memory_runs_out(codi, questions, thoughts, monkeypatch):
    sizes, whole = [], latents._think_batch

    def scarce(codi, ids, variants, batch, *others):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return whole(codi, ids, variants, batch, *others)

    stops = answer(codi, questions, early_stops(codi))
    monkeypatch.setattr(latents, "_think_batch", scarce)
    assert answer(codi, questions, early_stops(codi)).texts == stops.texts
    assert max(sizes) > 2 and min(sizes) < 3


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "questions, options, wrong",
    [
        (["Ann has 3", ""], {}, "question 1"),
        (["Ann has zebra 3"], {}, "question 0: token 2"),
        (["Ann " * 53], {}, "question 0 has 53 tokens"),
        (["Ann has 3"], {"n_thoughts": -1}, "n_thoughts -1"),
        (["Ann has 3"], {"n_thoughts": 58}, "58 thoughts"),
    ],
)
def test_questions_that_cannot_be_thought_about(codi, questions, options, wrong):
    with pytest.raises(ValueError, match=wrong):
        think(codi, questions, **options)


def test_thoughts_of_a_model_without_projection(tmp_path):
    folder = save_embedded(tmp_path / "plain", n_thoughts=0, projection=False)
    plain = load_codi(str(folder))
    assert think(plain, ["Ann has 3"]).z.shape[1] == 1
    with pytest.raises(ValueError, match="without projection"):
        think(plain, ["Ann has 3"], 2)


@pytest.mark.parametrize(
    "variant, wrong",
    [
        (Variant("v", 2, (2,), np.zeros((1, 7, 32))), "'v' replaces z_2"),
        (Variant("v", None, (0,)), "'v'"),
        (Variant("v", None, (1,), np.zeros((1, 1, 32))), "'v'"),
        (Variant("v", None, (1,), np.zeros((2, 7, 32))), "'v'"),
        (Variant("v", None, (1,), np.full((1, 7, 32), np.nan)), "'v': a value is NaN"),
    ],
)
def test_variants_that_cannot_be_thought(codi, questions, variant, wrong):
    with pytest.raises(ValueError, match=wrong):
        answer(codi, questions, [Variant("intact"), variant])
    with pytest.raises(ValueError, match="no variants"):
        answer(codi, questions, [])


def test_both_published_ways_of_counting():
    assert str(ThoughtIndex(2)) == "z_2 (neverix: odd token 3; Goyal: even step 2)"
    assert str(ThoughtIndex(0)) == "z_0 (neverix: odd token 1; Goyal: before step 1)"


def test_parity_is_even_minus_odd_of_the_thoughts_that_are_fed():
    values = np.array([[1, 0, 1, 0, 1, 0, 100], [0, 3, 0, 3, 0, 3, 100]])
    np.testing.assert_allclose(parity(values), [1, -3])
    np.testing.assert_allclose(
        parity(values[:, :4]), [1, -3]
    )  # z_0 .. z_3: z_3 is not fed, so z_2 has no partner
    with pytest.raises(ValueError, match="1 thoughts"):
        parity(values[:, :1])


def test_causal_role_is_that_of_the_patches_and_ablations(codi, problems, questions, thoughts):
    twins = [problem for problem in problems if problem.twin]
    # The model is random: what it says stands in for what is right, so that there is something to lose.
    said = think(codi, [problem.question for problem in twins])
    own = [replace(problem, answer=value) for problem, value in zip(twins, said.values, strict=True)]
    sets = [(0,), (1, 3), tuple(range(N))]
    role = causal_role(codi, own, said, sets)
    asked = [problem.question for problem in own]
    patched = answer(codi, asked, twin_patches(own, said, sets)).values
    ablated = answer(codi, asked, mean_ablations(said, sets)).values
    told = np.isfinite(said.values)
    both = told & told[[1, 0]]
    assert both.all() and np.isfinite(role.carried).all()
    np.testing.assert_array_equal(role.lost_any, ablated != said.values)
    np.testing.assert_array_equal(role.lost, role.lost_any)  # all have as many steps
    np.testing.assert_array_equal(role.twin, patched == said.values[[1, 0]])
    np.testing.assert_array_equal(role.kept, patched == said.values)
    expected = [carried_answer(own[0], own[1]), carried_answer(own[1], own[0])]
    np.testing.assert_array_equal(role.carried, patched == expected)


def test_a_problem_without_twin_leaves_the_others_theirs(codi, problems, questions, thoughts):
    known = np.isfinite(thoughts.values)
    own = [replace(problem, answer=value) for problem, value in zip(problems, thoughts.values, strict=True)]
    role = causal_role(codi, own, thoughts, [(0,), (1, 3)])
    paired = np.array([bool(problem.twin) for problem in problems])
    assert 0 < paired.sum() < len(problems) and known.all()
    assert np.isnan(role.twin[:, ~paired]).all() and np.isfinite(role.lost).all()
    twins = [problem for problem in own if problem.twin]
    said = think(codi, [problem.question for problem in twins])
    np.testing.assert_array_equal(role.kept[:, paired], causal_role(codi, twins, said, [(0,), (1, 3)]).kept)


def test_means_are_of_problems_with_as_many_steps(codi, questions, thoughts):
    groups = [1, 2, 2, 3, 1]
    [ablated] = mean_ablations(thoughts, [(0, 2)], groups)
    for i, group in enumerate(groups):
        alike = [j for j, other in enumerate(groups) if other == group]
        np.testing.assert_allclose(ablated.values[i], thoughts.z[alike].mean(0), rtol=1e-6)
    [of_all] = mean_ablations(thoughts, [(0, 2)])
    assert of_all.values.shape[0] == 1 and abs(of_all.values - ablated.values).max() > 0.01


def test_strangers_of_the_same_plan_and_of_another(codi, problems):
    """b and c are twins (+ -), e has the same operations, f others; a has another number of steps."""
    a, b, c, _, e = problems
    e = replace(e, equations=(Equation.parse("30+13=43"), Equation.parse("43-1=42")))
    f = replace(e, id="f", equations=(Equation.parse("30-13=17"), Equation.parse("17-1=16")))
    asked = [a, b, c, e, f]
    said = think(codi, [problem.question for problem in asked])
    assert np.isfinite(said.values).all()
    own = [replace(problem, answer=value) for problem, value in zip(asked, said.values, strict=True)]
    sets = [(0,), tuple(range(N))]
    found = plan_role(codi, own, said, sets)
    assert np.isnan(found.same[:, [0, 4]]).all() and np.isnan(found.other[:, 0]).all()
    donors = {"same": {1: [3], 2: [3], 3: [1, 2]}, "other": {1: [4], 2: [4], 3: [4], 4: [1, 2, 3]}}
    for kind, of in donors.items():
        for i, possible in of.items():
            for chosen, value in zip(sets, getattr(found, kind)[:, i], strict=True):
                patches = ({k: said.z[[j], k] for k in chosen} for j in possible)
                written = [
                    plain_texts(codi, [asked[i].question], replaced=z, prompt=codi.answer_prompt)[0]
                    for z in patches
                ]
                assert value in [extract_answer(text, first=True) == said.values[i] for text in written]


def test_alternation_is_of_every_thought_with_its_neighbours():
    np.testing.assert_allclose(alternation(np.array([[1, 0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 0, 1, 0]])), [1, -1])
    np.testing.assert_allclose(alternation(np.arange(7.0)), 0)
    one = np.array([1, 0, 0, 0, 0, 0, 0])
    assert alternation(one) == pytest.approx(0.1) and parity(one) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="2 thoughts"):
        alternation(one[:2])
