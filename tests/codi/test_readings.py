"""Attention, categories and lens: equal to stacked maps of the bare transformers model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_codi import N_HEADS, N_LAYERS, plain_maps, whole_sequence

from lib.codi import readings
from lib.codi.decoding import (
    ROLES,
    attended,
    by_role,
    chance_in_top,
    decoding,
    operators_decoded,
    settles,
    settling,
)
from lib.codi.latents import think
from lib.codi.problems import Equation, Problem
from lib.codi.readings import (
    OPERAND,
    SINK,
    TEXT_CATEGORIES,
    read_solution,
    read_thoughts,
    teacher_text,
    thought_categories,
)
from lib.core.cache import Cache

N = 6  # thoughts


@pytest.fixture(scope="module")
def reading(codi, problems, thoughts):
    found = read_thoughts(codi, problems, thoughts.z, layers=range(N_LAYERS))
    assert codi.model._module.config._attn_implementation == "sdpa"  # as it was
    return found


def test_one_pass_gives_the_thoughts_of_the_loop(reading, thoughts):
    assert reading.rows == ("z_0", "z_1", "z_2", "z_3", "z_4", "z_5", "z_6", "<eot>", "answer")
    np.testing.assert_allclose(reading.z[:, : N + 1], thoughts.z, atol=1e-4)


def test_mean_attention_equals_stacked_maps(codi, problems, thoughts, reading):
    for i, problem in enumerate(problems):
        maps, _ = plain_maps(codi, whole_sequence(codi, problem.question, thoughts.z[i]))
        n = len(codi.ids(problem.question))
        rows = [*range(n, n + N + 2), maps.shape[-1] - 1]
        np.testing.assert_allclose(reading.attention[i], maps.mean((0, 1))[rows], atol=1e-5)
        np.testing.assert_allclose(reading.attention[i].sum(-1), 1, rtol=1e-5)
        assert reading.texts[i][n : n + N + 2] == ["<bot>", *(f"thought {k}" for k in range(1, 7)), "<eot>"]


def test_the_lens_applies_the_final_norm_once(codi, problems, thoughts, reading):
    module = codi.model._module
    for i, problem in enumerate(problems):
        _, states = plain_maps(codi, whole_sequence(codi, problem.question, thoughts.z[i]))
        n = len(codi.ids(problem.question))
        for layer in range(N_LAYERS):
            stream = states[layer + 1][0, [*range(n, n + N + 2), -1]]
            if layer < N_LAYERS - 1:  # the last of transformers' states has been through the norm
                stream = module.transformer.ln_f(stream)
            top = module.lm_head(stream).softmax(-1).topk(5)
            np.testing.assert_array_equal(reading.tokens[i, layer], top.indices)
            np.testing.assert_allclose(reading.probabilities[i, layer], top.values, rtol=1e-4)
    # At the last layer it decodes z.
    direct = module.lm_head(torch.from_numpy(reading.z)).argmax(-1)
    np.testing.assert_array_equal(reading.tokens[:, -1, :, 0], direct)
    only = read_thoughts(codi, problems, thoughts.z, k=2, layers=[2, 0])
    np.testing.assert_array_equal(only.tokens, reading.tokens[:, [2, 0], :, :2])
    assert read_thoughts(codi, problems, thoughts.z).layers == (N_LAYERS - 1,)


def test_a_reading_without_thoughts(codi, problems, questions):
    none = think(codi, questions, 0)
    read = read_thoughts(codi, problems, none.z)
    assert read.rows == ("z_0", "<eot>", "answer") and "thought 1" not in read.categories
    np.testing.assert_allclose(read.z[:, :1], none.z, atol=1e-4)
    for i, problem in enumerate(problems):
        maps, _ = plain_maps(codi, whole_sequence(codi, problem.question, none.z[i]))
        n = len(codi.ids(problem.question))
        np.testing.assert_allclose(read.attention[i], maps.mean((0, 1))[[n, n + 1, n + 5]], atol=1e-5)


def test_categories_of_a_problem_by_hand(codi, problems, reading):
    """a box holds 12 nuts . Ann has 6 . she buys 10 more . he loses 3 pears . ?
    6 + 10 = 16, 16 - 3 = 13, 13 * 2 = 26"""
    words = problems[3].question.split()
    place = {word: words.index(word) for word in ("12", "6", "10", "3")}
    expected_of_step = {
        0: {"6": "operand", "10": "operand", "3": "other operand"},
        1: {"6": "other operand", "10": "other operand", "3": "operand"},
        2: {"6": "other operand", "10": "other operand", "3": "other operand"},
    }
    names = reading.categories
    assert names == thought_categories(N)
    n = len(words)
    for row, step in enumerate([0, 0, 1, 1, 2, 2, 3, 2, 2]):
        expected = ["text"] * n + ["<bot>", *(f"thought {k}" for k in range(1, 7)), "<eot>"]
        expected += ["answer prompt"] * 4
        expected[0], expected[place["12"]] = "sink", "distractor"
        for word, name in expected_of_step.get(step, expected_of_step[2]).items():
            expected[place[word]] = name
        own = n + row if row < 8 else n + 11
        expected[own] = "self"
        found = reading.kinds[3][row]
        assert [names[kind] for kind in found[: own + 1]] == expected[: own + 1], reading.rows[row]
        assert (found[own + 1 :] == -1).all()
    shifted = read_thoughts(codi, problems[3:4], reading.z[3:4, : N + 1], steps=[1] * 7)
    assert names[shifted.kinds[0][0, place["3"]]] == "operand"
    assert names[shifted.kinds[0][0, place["6"]]] == "other operand"


def test_masses_equal_a_loop_and_sum_to_one(codi, problems, thoughts, reading):
    np.testing.assert_allclose(reading.mass.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(reading.base.sum(-1), 1, rtol=1e-6)
    for i, problem in enumerate(problems):
        maps, _ = plain_maps(codi, whole_sequence(codi, problem.question, thoughts.z[i]))
        n, length = len(codi.ids(problem.question)), maps.shape[-1]
        for row, position in enumerate([*range(n, n + N + 2), length - 1]):
            for kind in range(len(reading.categories)):
                tokens = [t for t in range(position + 1) if reading.kinds[i][row, t] == kind]
                mass = sum((maps[:, :, position, t] for t in tokens), np.zeros((N_LAYERS, N_HEADS)))
                np.testing.assert_allclose(reading.mass[i, :, :, row, kind], mass, atol=1e-5)
                assert reading.base[i, row, kind] == pytest.approx(len(tokens) / (position + 1))


def test_the_null_takes_the_numbers_of_another_problem_of_equal_length(codi, problems):
    """a, and a copy of it whose numbers stand elsewhere; b and c are twins, and no null for each other."""
    a, b, c, *_ = problems
    words = a.question.split()
    words[0], words[2] = words[2], words[0]  # "14 has Ann pears ..."
    other = Problem("o", " ".join(words), a.equations, 19)
    chosen = [a, other, b, c]
    z = think(codi, [problem.question for problem in chosen]).z
    read = read_thoughts(codi, chosen, z)
    assert np.isnan(read.null[2:]).all() and np.isfinite(read.null[:2]).all()
    for own, donor in ((0, 1), (1, 0)):
        for row in range(N + 1):
            kinds = read.kinds[own][row].copy()
            n = len(words)
            kinds[:n] = read.kinds[donor][row][:n]
            open_ = kinds >= 0
            mass = np.bincount(kinds[open_], read.attention[own][row][open_], len(read.categories))
            np.testing.assert_allclose(read.null[own].mean((0, 1))[row], mass, atol=1e-5)
    assert abs(read.null[0] - read.mass[0]).max() > 1e-3


def test_the_null_is_of_problems_with_as_many_steps(codi, problems):
    """Of two steps more operands are read at once than of one: a null of fewer is none."""
    a, *_ = problems
    two = replace(a, id="two", equations=(*a.equations, Equation.parse("19-9=10")))
    z = think(codi, [a.question] * 2).z
    assert np.isnan(read_thoughts(codi, [a, two], z).null).all()
    assert np.isfinite(read_thoughts(codi, [a, replace(a, id="one")], z).null).all()


def test_attention_that_never_formed_is_an_error(codi, problems, thoughts, monkeypatch):
    monkeypatch.setattr(readings, "eager_attention", lambda model: nullcontext())
    with pytest.raises(Exception, match="returned no attention probabilities"):
        read_thoughts(codi, problems, thoughts.z)


def test_a_cache_holds_every_batch(codi, problems, thoughts, reading, tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    first = read_thoughts(codi, problems, thoughts.z, layers=range(N_LAYERS), cache=cache)
    np.testing.assert_allclose(first.mass, reading.mass, atol=1e-5)
    monkeypatch.setattr(readings, "_read_batch", None)
    again = read_thoughts(codi, problems, thoughts.z, layers=range(N_LAYERS), cache=cache)
    for name in ("mass", "null", "base", "z", "tokens", "probabilities"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    for options in ({"k": 3}, {"steps": [1] * 7}, {"layers": [0]}):  # others are other results
        with pytest.raises(TypeError):
            read_thoughts(codi, problems, thoughts.z, cache=cache, **options)
    with pytest.raises(TypeError):
        read_thoughts(codi, problems, thoughts.z + 1, layers=range(N_LAYERS), cache=cache)


# -- attended, decoded -----------------------------------------------------------------------------


def test_attended_tokens_by_sorting(reading):
    found = attended(reading, 4)
    for i, attention in enumerate(reading.attention):
        for row, masses in enumerate(attention):
            order = sorted(range(len(masses)), key=(-masses).__getitem__)[:4]
            assert found.positions[i, row].tolist() == order
            np.testing.assert_array_equal(found.mass[i, row], masses[order])
            np.testing.assert_array_equal(found.kinds[i, row], reading.kinds[i][row, order])
            assert found.sink[i, row] == masses[0]


def test_attended_tokens_of_the_question_alone_and_without_the_sink(reading):
    question = attended(reading, 5, question_only=True)
    assert (question.kinds < len(readings.SHARED)).all() and (question.kinds == SINK).any()
    without = attended(reading, 5, question_only=True, sink=False)
    assert (without.kinds != SINK).all()
    np.testing.assert_array_equal(without.sink, question.sink)  # reported all the same
    assert ((question.kinds == OPERAND).any(-1) <= (without.kinds == OPERAND).any(-1)).all()


def test_attended_more_tokens_than_there_are(reading):
    shortest = min(len(texts) for texts in reading.texts) - 12
    attended(reading, shortest + 1)  # question and <bot>
    for k in (0, shortest + 2):
        with pytest.raises(ValueError, match=f"k {k}"):
            attended(reading, k)


def with_lens(codi, reading, words: list[list[str]]):
    """A reading whose lens, at one layer, reads these words: those of z_0, z_1, ... of one problem."""
    tokens = [[codi.model.tokenizer.convert_tokens_to_ids(word) for word in row] for row in words]
    made = np.array(tokens, dtype=np.int32)[None, None]
    return replace(reading, tokens=made, rows=tuple(f"z_{k}" for k in range(len(words))), layers=(2,))


def test_decoding_of_planted_tokens(codi, problems, reading):
    """d: results 16, 13, and the answer 26."""
    words = [["16", "box"], [".", "13"], ["13", "16"], ["box", "nuts"], ["26", "4"], ["5", "26"], ["13", "."]]
    found = decoding(codi, with_lens(codi, reading, words), [problems[3]])
    assert found.number[0, 0].tolist() == [True, False, True, False, True, True, True]
    assert found.intermediate[0, 0].tolist() == [True, False, True, False, False, False, True]
    assert found.answer[0, 0].tolist() == [False, False, False, False, True, False, False]
    assert found.step[0, 0].tolist() == [0, -1, 1, -1, 2, -1, 1]
    assert found.intermediate_in_top[0, 0].tolist() == [True, True, True, False, False, False, True]
    assert found.all_in_top.tolist() == [[True]]
    without = with_lens(codi, reading, [["16", "box"]] * 7)
    assert not decoding(codi, without, [problems[3]]).all_in_top.any()
    behind = with_lens(codi, reading, [*[["16", "box"]] * 7, ["13", "box"]])
    behind = replace(behind, rows=(*behind.rows[:7], "<eot>"))
    assert not decoding(codi, behind, [problems[3]]).all_in_top.any()  # <eot> is no thought
    assert decoding(codi, without, [problems[0]]).all_in_top.all()  # no intermediate result


def test_settling_of_planted_tokens(codi, reading):
    words = [["16"], ["."], ["16"], ["nuts"], ["13"], ["nuts"], ["13"]]
    found = settling(codi, with_lens(codi, reading, words))
    np.testing.assert_array_equal(found[0, 0], [1, np.nan, 0, np.nan, 1])  # a word that stays settles nothing
    assert settles(found)[0, 0] == 0  # even ones agree from the start
    # A reading with rows of other kinds: they do not take part.
    assert settling(codi, reading).shape == (5, N_LAYERS, N - 1)


def test_values_settle_where_thoughts_decode_to_numbers():
    nan = np.nan
    cases = {
        (0, nan, 0, nan, 1): 1,  # z_4 and z_6 agree, z_0 and z_2 do not
        (nan, 0, nan, 1, nan): 1,  # z_1 and z_3, z_3 and z_5
        (1, 0, 1, 0, 0): -0.5,
        (nan, 0, 1, nan, 1): nan,
    }
    for row, expected in cases.items():
        np.testing.assert_array_equal(settles(np.array([row]))[0], expected)
    assert np.isnan(settles(np.array([[1.0, 0.0]]))).all()  # a single pair of each parity


# -- the solution in words -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cot, steps", [("operators", "<< 6 + 10 = 16 >> << 16 - 3 = 13 >>"), ("results", "16 ; 13 ;")]
)
def test_teacher_text_is_what_the_teacher_reads(codi, problems, cot, steps):
    text = teacher_text(replace(codi, cot=cot), problems[3])
    whole = f"{problems[3].question} {steps} The answer is :".split()
    assert codi.model.tokenizer.convert_ids_to_tokens(text.ids) == whole
    assert [[whole[t] for t in span] for span in text.results] == [["16"], ["13"]]
    n = len(steps.split()) // 2
    assert [" ".join(whole[t] for t in span) for span in text.steps] == [
        " ".join(steps.split()[:n]),
        " ".join(steps.split()[n:]),
    ]
    assert [whole[t] for t in text.prompt] == ["The", "answer", "is", ":"]


def test_text_attention_and_lens_equal_plain_maps(codi, problems):
    read = read_solution(codi, problems, layers=[0, 2])
    assert read.rows == ("step 1", "step 2", "answer") and read.categories == TEXT_CATEGORIES
    module = codi.model._module
    for i, problem in enumerate(problems):
        text = teacher_text(codi, problem)
        maps, states = plain_maps(codi, module.transformer.wte(torch.tensor([text.ids])))
        n_steps = len(problem.equations) - 1
        for row, position in [*enumerate(r[0] - 1 for r in text.results), (2, len(text.ids) - 1)]:
            np.testing.assert_allclose(read.attention[i][row], maps.mean((0, 1))[position], atol=1e-5)
            np.testing.assert_allclose(read.mass[i, :, :, row].sum(-1), 1, rtol=1e-5)
            np.testing.assert_allclose(read.z[i, row], states[-1][0, position], atol=1e-4)
            lens = module.lm_head(module.transformer.ln_f(states[1][0, position])).argmax()
            assert read.tokens[i, 0, row, 0] == lens
        for missing in range(n_steps, 2):
            assert np.isnan(read.attention[i][missing]).all() and np.isnan(read.mass[i, :, :, missing]).all()
            assert (read.tokens[i, :, missing] == -1).all() and np.isnan(read.base[i, missing]).all()
    assert (attended(read, 3).positions[0, 0] == -1).all()


def test_text_categories_by_hand(codi, problems):
    read = read_solution(codi, problems[3:4])
    words = read.texts[0]
    kinds = [[TEXT_CATEGORIES[k] if k >= 0 else "-" for k in row] for row in read.kinds[0]]
    n = words.index("<<")
    assert words[n:] == "<< 6 + 10 = 16 >> << 16 - 3 = 13 >> The answer is :".split()
    step = ["this step", "written operand"] * 2  # << 6 + 10
    assert kinds[0][n:] == [*step, "self", *["-"] * 13]
    assert kinds[1][n:] == [*["CoT"] * 5, "written operand", "CoT", *step, "self", *["-"] * 6]  # 16 is taken
    last = [*["CoT"] * 5, "earlier result", *["CoT"] * 6, "written operand", "CoT"]  # 13 is, 16 is not
    assert kinds[2][n:] == [*last, *["answer prompt"] * 3, "self"]
    for row, operands in ((0, {"6", "10"}), (1, {"3"}), (2, set())):
        assert {words[t] for t in range(n) if kinds[row][t] == "operand"} == operands
        assert {words[t] for t in range(n) if kinds[row][t] == "distractor"} == {"12"}


def test_any_rows_of_a_text(codi, problems):
    texts = [teacher_text(codi, problem) for problem in problems]
    rows = [[span[0] for span in text.results] for text in texts]
    read = read_solution(codi, problems, rows)
    assert read.rows == ("row 0", "row 1")
    maps, _ = plain_maps(codi, codi.model._module.transformer.wte(torch.tensor([texts[3].ids])))
    np.testing.assert_allclose(read.attention[3], maps.mean((0, 1))[rows[3]], atol=1e-5)
    # At the >> behind a result, that result is of this step, not an earlier one.
    closing = read_solution(codi, problems, [[span[-1] for span in text.steps] for text in texts])
    at, own = texts[3].steps[1][-1], texts[3].results[1][0]
    assert closing.kinds[3][1, at] == TEXT_CATEGORIES.index("self")
    assert closing.kinds[3][1, own] == TEXT_CATEGORIES.index("this step")
    with pytest.raises(ValueError, match=r"problem 'a': rows \[99\]"):
        read_solution(codi, problems, [[99], *rows[1:]])


# -- bad input -------------------------------------------------------------------------------------


def test_readings_that_cannot_be_made(codi, problems, thoughts):
    z = thoughts.z
    for options, wrong in [({"layers": [3]}, "layer 3"), ({"k": 999}, "k 999"), ({"steps": [0]}, "steps")]:
        with pytest.raises(ValueError, match=wrong):
            read_thoughts(codi, problems, z, **options)
    for bad in (z[:2], z[0], z[:, :0], np.where(z > 0, np.nan, z)):
        with pytest.raises(ValueError, match="z "):
            read_thoughts(codi, problems, bad)
    with pytest.raises(ValueError, match="no questions"):
        read_thoughts(codi, [], z[:0])
    with pytest.raises(ValueError, match="no problems"):
        read_solution(codi, [])
    wordless = Problem("w", "how many pears ?", (Equation.parse("1+1=2"),), 2)
    divided = Problem("v", "Ann has 3 pears", (Equation.parse("6/3=2"), Equation.parse("2+1=3")), 3)
    long = Problem("l", "Ann has 3 " * 15, tuple([Equation.parse("1+1=2")] * 9), 2)
    for problem in (wordless, divided, long):
        with pytest.raises(ValueError, match=f"problem '{problem.id}'"):
            read_solution(codi, [problem])


def test_roles_are_the_categories_with_thoughts_told_apart_by_distance(reading):
    roles = by_role(reading)
    assert roles.mass.shape == (len(reading.texts), N + 1, len(ROLES))
    np.testing.assert_allclose(roles.mass.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(roles.base.sum(-1), 1, atol=1e-5)
    for i, (attention, kinds) in enumerate(zip(reading.attention, reading.kinds, strict=True)):
        bot = list(kinds[N]).index(reading.categories.index("<bot>"))
        for j in range(N + 1):
            seen = dict.fromkeys(ROLES, 0.0)
            for position in range(bot + j + 1):
                role = reading.categories[kinds[j, position]]
                if position == bot + j:
                    role = "self"
                elif position >= bot:
                    role = "just before" if position == bot + j - 1 else "earlier latents"
                seen[role] += attention[j, position]
            np.testing.assert_allclose(roles.mass[i, j], [*seen.values()], atol=1e-5)


def test_chance_of_the_top_is_that_of_random_draws(reading):
    found = chance_in_top(reading, 3, {OPERAND})
    rng = np.random.default_rng(0)
    for i, row in ((0, 0), (1, 2), (3, N)):
        kinds = reading.kinds[i][row]
        question = kinds[(kinds >= 0) & (kinds < len(readings.SHARED))]
        draws = [(rng.choice(question, 3, replace=False) == OPERAND).any() for _ in range(4000)]
        assert found[i, row] == pytest.approx(np.mean(draws), abs=0.03)
    assert (chance_in_top(reading, 3, {OPERAND, readings.OTHER}) >= found).all()


def test_operators_are_those_of_the_steps(codi, problems, reading):
    ids = {sign: codi.ids(sign)[0] for sign in "+-*"}
    tokens = reading.tokens.copy()
    tokens[:, -1, :, 0] = ids["*"]
    tokens[:, -1, 0, 0], tokens[:, -1, 2, 0] = ids["+"], ids["-"]
    found = operators_decoded(codi, replace(reading, tokens=tokens), problems)
    assert found.shape == (len(problems), N + 1, 3)
    for i, problem in enumerate(problems):
        for step in range(3):
            if step >= len(problem.equations):
                assert np.isnan(found[i, :, step]).all()
                continue
            sign = next(c for c in problem.equations[step].left if c in "+-*")
            said = ["+", "*", "-", *["*"] * (N - 2)]
            np.testing.assert_array_equal(found[i, :, step], [word == sign for word in said])
