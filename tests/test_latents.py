"""Thoughts, attention, lens and patches: equal to plain loops over the bare transformers model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_codi import N_HEADS, N_LAYERS, N_POSITIONS, save_embedded

from lib import latents
from lib.codi_checkpoint import load_codi
from lib.latents import (
    OPERAND,
    SINK,
    TEXT_CATEGORIES,
    ThoughtIndex,
    Variant,
    answer,
    attended,
    decoding,
    early_stops,
    mean_ablations,
    measure,
    measure_text,
    settling,
    teacher_text,
    think,
    thought_categories,
    twin_patches,
)
from lib.problems import Equation, Problem, read_problems
from lib.record import Cache

N = 6  # thoughts


@pytest.fixture(scope="module")
def codi(tmp_path_factory):
    return load_codi(str(save_embedded(tmp_path_factory.mktemp("codi") / "codi")))


@pytest.fixture(scope="module")
def problems(codi):
    return read_problems(codi.folder / "problems.jsonl")


@pytest.fixture(scope="module")
def questions(problems):
    return [problem.question for problem in problems]


@pytest.fixture(scope="module")
def thoughts(codi, questions):
    return think(codi, questions)


@pytest.fixture(scope="module")
def reading(codi, problems, thoughts):
    return measure(codi, problems, thoughts.z, layers=range(N_LAYERS))


def plain_loop(codi, question: str, n_thoughts: int = N, replaced: dict | None = None, n_tokens: int = 8):
    """One question, no cache, no batch: z [n + 1, d] before replacement, and greedy tokens."""
    module, projection = codi.model._module, codi.projection
    embed = module.transformer.wte
    with torch.no_grad():
        stream = embed(torch.tensor([[*codi.ids(question), codi.bot]]))
        zs = []
        for k in range(n_thoughts + 1):
            z = module.transformer(inputs_embeds=stream, use_cache=False).last_hidden_state[:, -1:]
            zs.append(z[0, 0])
            if k < n_thoughts:
                if replaced and k in replaced:
                    z = torch.from_numpy(replaced[k])[None, None]
                stream = torch.cat([stream, projection(z)], dim=1)
        stream = torch.cat([stream, embed(torch.tensor([[codi.eot]]))], dim=1)
        tokens = []
        for _ in range(n_tokens):
            logits = module(inputs_embeds=stream, use_cache=False).logits[0, -1]
            logits[[codi.bot, codi.eot]] = -torch.inf
            token = int(logits.argmax())
            if token == codi.model.tokenizer.eos_token_id:
                break
            tokens.append(token)
            stream = torch.cat([stream, embed(torch.tensor([[token]]))], dim=1)
    return torch.stack(zs).numpy(), tokens


def plain_texts(codi, questions, replaced: dict[int, np.ndarray] | None = None, **options) -> list[str]:
    """Answers of the plain loop, with z_k of each question replaced by a row of replaced[k]."""
    found = []
    for i, question in enumerate(questions):
        own = {k: values[i] for k, values in (replaced or {}).items()}
        found.append(codi.model.tokenizer.decode(plain_loop(codi, question, replaced=own, **options)[1]))
    return found


def plain_maps(codi, embeddings: torch.Tensor) -> tuple[np.ndarray, tuple[torch.Tensor, ...]]:
    """All attention maps of one sequence [layer, head, query, key], and the hidden states."""
    module = codi.model._module
    module.set_attn_implementation("eager")
    with torch.no_grad():
        out = module(
            inputs_embeds=embeddings, output_attentions=True, output_hidden_states=True, use_cache=False
        )
    module.set_attn_implementation("sdpa")
    return torch.stack(out.attentions)[:, 0].numpy(), out.hidden_states


def whole_sequence(codi, question: str, z: np.ndarray) -> torch.Tensor:
    embed = codi.model._module.transformer.wte
    with torch.no_grad():
        return torch.cat(
            [
                embed(torch.tensor([[*codi.ids(question), codi.bot]])),
                codi.projection(torch.from_numpy(z[None, :-1])),
                embed(torch.tensor([[codi.eot, *codi.ids(codi.answer_prompt)]])),
            ],
            dim=1,
        )


# -- thoughts --------------------------------------------------------------------------------------


def test_thoughts_and_answers_equal_a_loop_without_cache_or_batch(codi, questions, thoughts):
    assert len({len(codi.ids(question)) for question in questions}) > 1  # mixed lengths in one call
    written = think(codi, questions, max_answer=8)
    for i, question in enumerate(questions):
        z, tokens = plain_loop(codi, question)
        np.testing.assert_allclose(thoughts.z[i], z, atol=1e-5)
        assert written.answers.texts[0][i] == codi.model.tokenizer.decode(tokens)
    assert len(set(written.answers.texts[0])) > 1  # answers depend on the question


def test_a_batch_equals_one_by_one(codi, questions, thoughts):
    for i, question in enumerate(questions):
        alone = think(codi, [question])
        np.testing.assert_allclose(alone.z[0], thoughts.z[i], atol=1e-5)
        assert alone.answers.texts[0][0] == thoughts.answers.texts[0][i]
    small = think(codi, questions, batch_size=1)
    np.testing.assert_allclose(small.z, thoughts.z, atol=1e-5)


def test_no_thoughts_go_from_bot_to_eot(codi, questions):
    none = think(codi, questions, 0, max_answer=8)
    assert none.z.shape[1] == 1
    assert none.answers.texts[0] == plain_texts(codi, questions, n_thoughts=0)


def test_early_stops_equal_runs_of_their_own(codi, questions):
    together = answer(codi, questions, early_stops(codi), max_answer=8)
    assert [variant.n_thoughts for variant in together.variants] == list(range(N + 1))
    for n, texts in enumerate(together.texts):
        assert texts == plain_texts(codi, questions, n_thoughts=n)
    assert len({tuple(texts) for texts in together.texts}) > 1


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


def test_twin_patches_equal_a_plain_loop(codi, problems, questions):
    pair = [problem for problem in problems if problem.twin]
    asked = [problem.question for problem in pair]
    both = think(codi, asked, max_answer=8)
    sets = [(0,), (3,), (0, 2, 4), tuple(range(N))]
    patched = answer(codi, asked, twin_patches(pair, both, sets), max_answer=8)
    for chosen, texts in zip(sets, patched.texts, strict=True):
        assert texts == plain_texts(codi, asked, replaced={k: both.z[::-1, k] for k in chosen})
    assert patched.variants[2].name == "twin's z_0, z_2, z_4"
    assert patched.texts[3] != both.answers.texts[0]  # it does something
    own = answer(codi, asked, [Variant("own", None, tuple(range(N)), both.z)], max_answer=8)
    assert own.texts[0] == both.answers.texts[0]  # and one's own thoughts do not
    with pytest.raises(ValueError, match="problem 'a' has no twin"):
        twin_patches(problems, think(codi, questions), sets)


def test_mean_ablations_equal_a_plain_loop(codi, questions, thoughts):
    sets = [(1,), tuple(range(N))]
    ablated = answer(codi, questions, mean_ablations(thoughts, sets), max_answer=8)
    means = np.stack([z for z in thoughts.z]).mean(0)
    for chosen, texts in zip(sets, ablated.texts, strict=True):
        replaced = {k: np.repeat(means[None, k], len(questions), 0) for k in chosen}
        assert texts == plain_texts(codi, questions, replaced=replaced)


def test_answers_are_compared_as_numbers(thoughts):
    values = np.array([[3.0, np.nan, 1200.5], [3.0, 4.0, 5.0]])
    answers = replace(thoughts.answers, values=values)
    np.testing.assert_array_equal(answers.equal([3, 4, 1200.5]), [[True, False, True], [True, True, False]])


# -- one pass --------------------------------------------------------------------------------------


def test_one_pass_gives_the_thoughts_of_the_loop(reading, thoughts):
    assert reading.rows == ("z_0", "z_1", "z_2", "z_3", "z_4", "z_5", "z_6", "<eot>", "answer")
    np.testing.assert_allclose(reading.z[:, : N + 1], thoughts.z, atol=1e-5)


def test_one_pass_gives_the_attention_of_the_cached_loop(codi, problems, reading):
    """Row after row as the model generates, with a key-value cache and `output_attentions`."""
    module = codi.model._module
    module.set_attn_implementation("eager")
    for i, problem in enumerate(problems):
        fed = codi.model._module.transformer.wte(torch.tensor([[*codi.ids(problem.question), codi.bot]]))
        cache = None
        for k in range(N + 1):
            with torch.no_grad():
                out = module.transformer(
                    inputs_embeds=fed, past_key_values=cache, use_cache=True, output_attentions=True
                )
                fed = codi.projection(out.last_hidden_state[:, -1:])
            cache = out.past_key_values
            row = torch.stack(out.attentions)[:, 0, :, -1].mean((0, 1)).numpy()
            np.testing.assert_allclose(reading.attention[i][k, : len(row)], row, atol=1e-6)
            assert not reading.attention[i][k, len(row) :].any()
    module.set_attn_implementation("sdpa")


def test_mean_attention_equals_stacked_maps(codi, problems, thoughts, reading):
    for i, problem in enumerate(problems):
        maps, _ = plain_maps(codi, whole_sequence(codi, problem.question, thoughts.z[i]))
        n = len(codi.ids(problem.question))
        rows = [*range(n, n + N + 2), maps.shape[-1] - 1]
        np.testing.assert_allclose(reading.attention[i], maps.mean((0, 1))[rows], atol=1e-6)
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
    only = measure(codi, problems, thoughts.z, k=2, layers=[2, 0])
    np.testing.assert_array_equal(only.tokens, reading.tokens[:, [2, 0], :, :2])
    assert measure(codi, problems, thoughts.z).layers == (N_LAYERS - 1,)


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
    shifted = measure(codi, problems[3:4], reading.z[3:4, : N + 1], steps=[1] * 7)
    assert names[shifted.kinds[0][0, place["3"]]] == "operand"
    assert names[shifted.kinds[0][0, place["6"]]] == "other operand"


def test_masses_equal_a_loop_and_sum_to_one(codi, problems, thoughts, reading):
    np.testing.assert_allclose(reading.mass.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(reading.base.sum(-1), 1, rtol=1e-6)
    assert reading.mass.shape == (5, N_LAYERS, N_HEADS, N + 3, len(reading.categories))
    for i, problem in enumerate(problems):
        maps, _ = plain_maps(codi, whole_sequence(codi, problem.question, thoughts.z[i]))
        n, length = len(codi.ids(problem.question)), maps.shape[-1]
        for row, position in enumerate([*range(n, n + N + 2), length - 1]):
            for kind in range(len(reading.categories)):
                tokens = [t for t in range(position + 1) if reading.kinds[i][row, t] == kind]
                mass = sum((maps[:, :, position, t] for t in tokens), np.zeros((N_LAYERS, N_HEADS)))
                np.testing.assert_allclose(reading.mass[i, :, :, row, kind], mass, atol=1e-6)
                assert reading.base[i, row, kind] == pytest.approx(len(tokens) / (position + 1))
        by_rows = [np.bincount(k[k >= 0], a[k >= 0], len(reading.categories)) for k, a in zip(
            reading.kinds[i], reading.attention[i], strict=True)]  # fmt: skip
        np.testing.assert_allclose(reading.mass[i].mean((0, 1)), by_rows, atol=1e-6)


def test_the_null_takes_the_numbers_of_another_problem_of_equal_length(codi, problems):
    """a, and a copy of it whose numbers stand elsewhere; b and c are twins, and no null for each other."""
    a, b, c, *_ = problems
    words = a.question.split()
    words[0], words[2] = words[2], words[0]  # "14 has Ann pears ..."
    other = Problem("o", " ".join(words), a.equations, 19)
    chosen = [a, other, b, c]
    z = think(codi, [problem.question for problem in chosen]).z
    read = measure(codi, chosen, z)
    assert np.isnan(read.null[2:]).all() and np.isfinite(read.null[:2]).all()
    for own, donor in ((0, 1), (1, 0)):
        for row in range(N + 1):
            kinds = read.kinds[own][row].copy()
            n = len(words)
            kinds[:n] = read.kinds[donor][row][:n]
            open_ = kinds >= 0
            mass = np.bincount(kinds[open_], read.attention[own][row][open_], len(read.categories))
            np.testing.assert_allclose(read.null[own].mean((0, 1))[row], mass, atol=1e-6)
    assert abs(read.null[0] - read.mass[0]).max() > 1e-3


def test_no_gradients_and_no_trace_of_eager_attention(codi, problems, questions):
    seen = []
    block = codi.model._module.transformer.h[0]
    handle = block.register_forward_hook(
        lambda module, args, output: seen.append((torch.is_grad_enabled(), output.requires_grad))
    )
    for parameter in codi.projection.parameters():
        parameter.requires_grad_(True)  # even then
    try:
        found = think(codi, questions)
        measure(codi, problems, found.z)
        measure_text(codi, problems)
    finally:
        handle.remove()
        codi.projection.requires_grad_(False)
    assert len(seen) > 10 and not any(enabled or grad for enabled, grad in seen)
    assert codi.model._module.config._attn_implementation == "sdpa"


def test_attention_that_never_formed_is_an_error(codi, problems, thoughts, monkeypatch):
    monkeypatch.setattr(latents, "eager_attention", lambda model: nullcontext())
    with pytest.raises(Exception, match="returned no attention probabilities"):
        measure(codi, problems, thoughts.z)


def test_batches_halve_when_memory_runs_out(codi, problems, thoughts, reading, monkeypatch):
    sizes, whole = [], latents._read_batch

    def scarce(codi, ids, *others):
        sizes.append(len(ids))
        if len(ids) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return whole(codi, ids, *others)

    monkeypatch.setattr(latents, "_read_batch", scarce)
    found = measure(codi, problems, thoughts.z, layers=range(N_LAYERS))
    assert max(sizes) == 3 and sizes.count(1) == len(problems)  # three questions are equally long
    np.testing.assert_allclose(found.mass, reading.mass, atol=1e-6)
    np.testing.assert_array_equal(found.tokens, reading.tokens)


def test_a_cache_holds_every_batch(codi, problems, questions, thoughts, reading, tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    variants = mean_ablations(thoughts, [(0,), (1, 2)])
    first = think(codi, questions, cache=cache)
    written = answer(codi, questions, variants, cache=cache)
    read = measure(codi, problems, first.z, layers=range(N_LAYERS), cache=cache)
    for name in ("_read_batch", "_think_batch"):
        monkeypatch.setattr(latents, name, None)
    again = think(codi, questions, cache=cache)
    np.testing.assert_array_equal(again.z, first.z)
    assert again.answers.texts == thoughts.answers.texts
    assert answer(codi, questions, variants, cache=cache).texts == written.texts
    reread = measure(codi, problems, again.z, layers=range(N_LAYERS), cache=cache)
    np.testing.assert_array_equal(reread.mass, read.mass)
    np.testing.assert_allclose(read.mass, reading.mass, atol=1e-6)
    with pytest.raises(TypeError):  # other values are other results
        answer(codi, questions, mean_ablations(replace(first, z=first.z + 1), [(0,)]), cache=cache)
    with pytest.raises(TypeError):
        measure(codi, problems, again.z, k=3, cache=cache)


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
    assert (question.kinds < len(latents.SHARED)).all() and (question.kinds == SINK).any()
    without = attended(reading, 5, question_only=True, sink=False)
    assert (without.kinds != SINK).all()
    np.testing.assert_array_equal(without.sink, question.sink)  # reported all the same
    assert ((question.kinds == OPERAND).any(-1) <= (without.kinds == OPERAND).any(-1)).all()


def test_attended_more_tokens_than_there_are(reading):
    shortest = min(len(texts) for texts in reading.texts) - 12
    attended(reading, shortest + 1)  # question and <bot>
    with pytest.raises(ValueError, match=f"k {shortest + 2}: z_0 of problem .* lower k"):
        attended(reading, shortest + 2)
    with pytest.raises(ValueError, match="k 0: z_0 of problem 0"):
        attended(reading, 0)


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
    assert decoding(codi, without, [problems[0]]).all_in_top.all()  # no intermediate result


def test_settling_of_planted_tokens(codi, reading):
    words = [["16"], ["."], ["16"], ["nuts"], ["13"], ["nuts"], ["13"]]
    assert settling(codi, with_lens(codi, reading, words))[0, 0].tolist() == [True, False, False, True, True]
    # A reading with rows of other kinds: they do not take part.
    assert settling(codi, reading).shape == (5, N_LAYERS, N - 1)


def test_decoding_of_a_reading_has_its_shape(codi, problems, reading):
    found = decoding(codi, reading, problems)
    assert found.number.shape == (5, N_LAYERS, N + 3)
    by_hand = [
        [codi.token_texts[t].strip().isdigit() for t in row] for row in reading.tokens[:, -1, :, 0].tolist()
    ]
    np.testing.assert_array_equal(found.number[:, -1], by_hand)


def test_both_published_ways_of_counting():
    odd_tokens = [ThoughtIndex.from_neverix(token) for token in (1, 3, 5)]
    even_steps = [ThoughtIndex.from_goyal(step) for step in (2, 4, 6)]
    assert [index.k for index in odd_tokens] == [0, 2, 4]
    assert [index.k for index in even_steps] == [2, 4, 6]
    assert str(ThoughtIndex(2)) == "z_2 (neverix: odd token 3; Goyal: even step 2)"
    assert str(ThoughtIndex(0)) == "z_0 (neverix: odd token 1; Goyal: before step 1)"
    assert str(ThoughtIndex(1)) == "z_1 (neverix: even token 2; Goyal: odd step 1)"
    for k in range(7):
        assert ThoughtIndex.from_neverix(int(ThoughtIndex(k).neverix.split()[-1])).k == k


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
    read = measure_text(codi, problems, layers=[0, 2])
    assert read.rows == ("step 0", "step 1", "answer") and read.categories == TEXT_CATEGORIES
    module = codi.model._module
    for i, problem in enumerate(problems):
        text = teacher_text(codi, problem)
        maps, states = plain_maps(codi, module.transformer.wte(torch.tensor([text.ids])))
        n_steps = len(problem.equations) - 1
        for row, position in [*enumerate(r[0] - 1 for r in text.results), (2, len(text.ids) - 1)]:
            np.testing.assert_allclose(read.attention[i][row], maps.mean((0, 1))[position], atol=1e-6)
            np.testing.assert_allclose(read.mass[i, :, :, row].sum(-1), 1, rtol=1e-5)
            np.testing.assert_allclose(read.z[i, row], states[-1][0, position], atol=1e-5)
            lens = module.lm_head(module.transformer.ln_f(states[1][0, position])).argmax()
            assert read.tokens[i, 0, row, 0] == lens
        for missing in range(n_steps, 2):
            assert np.isnan(read.attention[i][missing]).all() and np.isnan(read.mass[i, :, :, missing]).all()
            assert (read.tokens[i, :, missing] == -1).all() and np.isnan(read.base[i, missing]).all()
    assert (attended(read, 3).positions[0, 0] == -1).all()


def test_text_categories_by_hand(codi, problems):
    read = measure_text(codi, problems[3:4])
    words = read.texts[0]
    kinds = [[TEXT_CATEGORIES[k] if k >= 0 else "-" for k in row] for row in read.kinds[0]]
    n = words.index("<<")
    assert words[n:] == "<< 6 + 10 = 16 >> << 16 - 3 = 13 >> The answer is :".split()
    assert kinds[0][n:] == [*["this step"] * 4, "self", *["-"] * 13]
    second = [*["CoT"] * 5, "earlier result", "CoT", *["this step"] * 4, "self", *["-"] * 6]
    assert kinds[1][n:] == second
    last = [*["CoT"] * 5, "earlier result", *["CoT"] * 6, "earlier result", "CoT"]
    assert kinds[2][n:] == [*last, *["answer prompt"] * 3, "self"]
    for row, operands in ((0, {"6", "10"}), (1, {"3"}), (2, set())):
        assert {words[t] for t in range(n) if kinds[row][t] == "operand"} == operands
        assert {words[t] for t in range(n) if kinds[row][t] == "distractor"} == {"12"}


def test_any_rows_of_a_text(codi, problems):
    texts = [teacher_text(codi, problem) for problem in problems]
    rows = [[span[0] for span in text.results] for text in texts]
    read = measure_text(codi, problems, rows)
    assert read.rows == ("row 0", "row 1")
    maps, _ = plain_maps(codi, codi.model._module.transformer.wte(torch.tensor([texts[3].ids])))
    np.testing.assert_allclose(read.attention[3], maps.mean((0, 1))[rows[3]], atol=1e-6)
    with pytest.raises(ValueError, match=r"problem 'a': rows \[99\]; its text has"):
        measure_text(codi, problems, [[99], *rows[1:]])


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "questions, options, wrong",
    [
        ([], {}, "there are no questions"),
        (["Ann has 3", ""], {}, "question 1 is empty"),
        (["Ann has zebra 3"], {}, "question 0: token 2 is no word of this model's vocabulary"),
        (["Ann " * 53], {}, "question 0 has 53 tokens, and with 6 thoughts and the answer prompt"),
        (["Ann has 3"], {"n_thoughts": -1}, "n_thoughts -1 must be 0 or more"),
        (["Ann has 3"], {"n_thoughts": 58}, "58 thoughts and the answer prompt take 64 tokens of the 64"),
    ],
)
def test_questions_that_cannot_be_thought_about(codi, questions, options, wrong):
    with pytest.raises(ValueError, match=wrong):
        think(codi, questions, **options)


def test_the_longest_question_that_fits(codi):
    longest = think(codi, ["Ann " * 52])
    assert len(codi.ids(longest.answers.texts[0][0])) <= 5  # the positions that were left
    assert np.isfinite(longest.z).all()


def test_thoughts_of_a_model_without_projection(tmp_path):
    folder = save_embedded(tmp_path / "plain", n_thoughts=0, projection=False)
    plain = load_codi(str(folder))
    assert think(plain, ["Ann has 3"]).z.shape[1] == 1
    with pytest.raises(ValueError, match="2 thoughts of a model without projection"):
        think(plain, ["Ann has 3"], 2)


@pytest.mark.parametrize(
    "variant, wrong",
    [
        (Variant("v", None, (6,), np.zeros((1, 7, 32))), "'v' replaces z_6; of 6 thoughts z_0 to z_5"),
        (Variant("v", 2, (2,), np.zeros((1, 7, 32))), "'v' replaces z_2; of 2 thoughts z_0 to z_1"),
        (Variant("v", None, (0,)), r"'v': values must be \[5 or 1, 1 or more, 32\], not None"),
        (Variant("v", None, (1,), np.zeros((1, 1, 32))), r"must be \[5 or 1, 2 or more, 32\]"),
        (Variant("v", None, (1,), np.zeros((2, 7, 32))), r"must be \[5 or 1, 2 or more, 32\]"),
        (Variant("v", -2), "n_thoughts -2 must be 0 or more"),
    ],
)
def test_variants_that_cannot_be_thought(codi, questions, variant, wrong):
    with pytest.raises(ValueError, match=wrong):
        answer(codi, questions, [Variant("intact"), variant])


def test_no_variants(codi, questions):
    with pytest.raises(ValueError, match="there are no variants"):
        answer(codi, questions, [])


def test_readings_that_cannot_be_made(codi, problems, thoughts):
    z = thoughts.z
    for options, wrong in [
        ({"layers": [3]}, "layer 3 for the lens; the model has layers 0 to 2"),
        ({"k": 0}, "k 0: the lens has 1 to"),
        ({"k": 999}, "k 999: the lens has 1 to"),
        ({"steps": [0]}, "steps has 1 entries; there are 7 thoughts"),
    ]:
        with pytest.raises(ValueError, match=wrong):
            measure(codi, problems, z, **options)
    for bad in (z[:2], z[0], z[..., :5], z[:, :0]):
        with pytest.raises(ValueError, match=r"z must be \[5, n \+ 1, 32\], not"):
            measure(codi, problems, bad)
    with pytest.raises(ValueError, match="z holds NaN"):
        measure(codi, problems, np.where(z > 0, np.nan, z))
    with pytest.raises(ValueError, match="there are no questions"):
        measure(codi, [], z[:0])
    wordless = Problem("w", "how many pears ?", (Equation.parse("1+1=2"),), 2)
    with pytest.raises(ValueError, match="problem 'w' has no number in its question"):
        measure(codi, [wordless], z[:1])
    long = Problem("l", "Ann has 3 " * 15, tuple([Equation.parse("1+1=2")] * 9), 2)
    with pytest.raises(ValueError, match="problem 'l': question, solution and answer prompt are 105 tokens"):
        measure_text(codi, [long])
