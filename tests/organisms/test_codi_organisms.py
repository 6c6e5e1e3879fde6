"""CODI organisms: their problems, both readings of one model, training, gates and shipment."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lib.codi import latents
from lib.codi.checkpoint import load_codi
from lib.codi.problems import read_problems
from lib.core import embedded
from lib.core.statistics import Estimate
from lib.organisms import codi, codi_gates, word_problems
from lib.organisms.cards import OrganismRecord, reported
from lib.organisms.codi import IDS, N_THOUGHTS, RECIPES, Codi, CodiStage, answer, ask, distillation, teach
from lib.organisms.codi_gates import problem_rows, teacher_writes
from lib.organisms.word_problems import (
    ANSWER_PROMPT,
    BOT,
    EOT,
    LENGTHS,
    NAMES,
    TOP_RESULT,
    VOCABULARY,
    WordProblem,
    held_out,
    sample,
    sample_twins,
)

SHIPPED = [name for name in embedded.organisms() if re.fullmatch(r"organism/codi.*", name)]
ROWS = problem_rows()
JOINT = CodiStage("joint", "joint", 4, 1e-3, True, (0.3, 0.3, 0.4), gamma=5.0, rows=6)


@pytest.fixture(scope="module")
def model():
    return Codi(0, d_model=32, n_layers=2).eval()


def problems(test: bool, n: int = 60, seed: int = 0) -> list[WordProblem]:
    rng = np.random.default_rng(seed)
    return [problem for steps in (1, 2, 3) for problem in sample(rng, [steps] * n, 22 + 2 * steps, test=test)]


# -- problems --------------------------------------------------------------------------------------


def solve(question: str) -> int:
    """The answer from the text alone, by reading its clauses one after the other."""
    clauses = [clause.strip() for clause in re.split(r"[.?]", question) if clause.strip()]
    things = re.match(r"how many (\w+)", clauses[-1])[1]
    value = None
    for clause in clauses[:-1]:
        numbers = [int(word) for word in clause.split() if word.isdecimal()]
        words = clause.split()
        if re.fullmatch(rf"\w+ has \d+ {things}", clause):
            [value] = numbers
        elif words[0] in ("he", "she") and words[1] in ("buys", "finds", "gets"):
            value += numbers[0]
        elif words[0] in ("he", "she"):
            assert words[1] in ("loses", "gives", "sells")
            value -= numbers[0]
        elif clause.endswith("fold") or clause.endswith("times that"):
            value *= numbers[0]
    return value


@pytest.mark.parametrize("test", [False, True], ids=["train", "test"])
def test_answers_are_those_of_the_text(test):
    for problem in problems(test):
        assert solve(problem.question) == problem.answer == problem.equations[-1][-1]
        left = problem.operands[0]
        for start, op, right, result in problem.equations:
            assert start == left and eval(f"{start}{op}{right}") == result
            left = result


@pytest.mark.parametrize("test", [False, True], ids=["train", "test"])
def test_numbers_tell_what_is_read_from_what_is_computed(test):
    for problem in problems(test):
        numbers = [int(word) for word in problem.question.split() if word.isdecimal()]
        results = [result for *_, result in problem.equations]
        assert len(set(numbers)) == len(numbers) and len(set(results)) == len(results)
        assert not set(numbers) & set(results)
        assert set(problem.operands) <= set(numbers)
        assert all(1 <= value <= TOP_RESULT for value in numbers + results)
        assert all(word in IDS for word in problem.question.split())


def test_length_is_exact_and_operands_stand_at_varying_places():
    rng = np.random.default_rng(1)
    for length in LENGTHS:
        drawn = sample(rng, [1, 2, 3] * 20, length)
        assert {len(problem.question.split()) for problem in drawn} == {length}
        assert [len(problem.equations) for problem in drawn] == [1, 2, 3] * 20
    places = [
        [problem.question.split().index(str(operand)) for operand in problem.operands]
        for problem in sample(rng, [3] * 100, 27)
    ]
    assert all(len(set(column)) >= 4 for column in zip(*places, strict=True))
    unused = [
        len([word for word in problem.question.split() if word.isdecimal()]) - len(problem.operands)
        for problem in sample(rng, [3] * 100, 27)
    ]
    assert set(unused) == {0, 1}
    assert max(len(re.findall(r"\d+", p.question)) for p in sample(rng, [1] * 50, 30, max_unused=2)) == 4


def test_unused_numbers_stand_between_those_that_are_used():
    def unused_places(drawn):
        for problem in drawn:
            numbers = [int(word) for word in problem.question.split() if word.isdecimal()]
            places = [numbers.index(operand) for operand in problem.operands]
            assert places == sorted(places)
            for number in set(numbers) - set(problem.operands):
                yield places[0] < numbers.index(number) < places[-1]

    rng = np.random.default_rng(5)
    inside = list(unused_places(sample(rng, [1, 2, 3] * 50, 28)))
    assert len(inside) > 50 and all(inside)
    assert 0.2 < np.mean(list(unused_places(sample(rng, [1, 2, 3] * 50, 28, anywhere=True)))) < 0.7


def test_length_into_which_not_every_problem_fits_is_named():
    with pytest.raises(ValueError, match="length 23"):
        sample(np.random.default_rng(0), [3], 23)


def test_held_out_tuples_are_never_drawn_in_training_and_every_fact_is():
    def tuples(drawn):
        return {(*problem.operands, *[0] * (4 - len(problem.operands))) for problem in drawn}

    rng = np.random.default_rng(2)
    train_rows = [p for steps in (1, 2, 3) for p in sample(rng, [steps] * 6000, 28)]
    test_rows = [problem for pair in codi_gates.test_pairs() for problem in pair]
    assert not tuples(train_rows) & tuples(test_rows)
    assert not held_out(np.array(sorted(tuples(train_rows)))).any()
    assert held_out(np.array(sorted(tuples(test_rows)))).all()
    share = held_out(np.stack(np.meshgrid(*[np.arange(2, 14)] * 4), -1)).mean()
    assert 0.17 < share < 0.23
    facts = {equation for problem in train_rows for equation in problem.equations}
    asked = {
        equation for problem in test_rows if len(problem.equations) == 1 for equation in problem.equations
    }
    assert len(asked - facts) < 0.05 * len(asked)  # a few rare ones take more than these rows


def test_answers_are_balanced():
    rng = np.random.default_rng(3)
    for steps in (1, 2, 3):
        counts = np.bincount([p.answer for p in sample(rng, [steps] * 4000, 28)], minlength=TOP_RESULT + 1)
        assert counts[0] == 0 and counts[1:].min() > 50 and counts.max() < 160


def test_twins_share_the_text_and_no_result():
    for steps in (1, 2, 3):
        for first, second in sample_twins(np.random.default_rng(4), 30, steps):
            assert re.sub(r"\d+", "#", first.question) == re.sub(r"\d+", "#", second.question)
            assert [e[1] for e in first.equations] == [e[1] for e in second.equations]
            for one, other in ((first, second), (second, first)):
                assert solve(one.question) == one.answer
                results = {str(result) for *_, result in one.equations}
                assert not results & {str(result) for *_, result in other.equations}


def test_problem_names_and_pronouns_agree():
    for problem in problems(False):
        [name] = re.findall(r"([A-Z]\w+) has \d+", problem.question)
        pronouns = set(problem.question.split()) & {"he", "she"}
        assert pronouns <= {NAMES[name]}


def test_tokenizer_has_one_token_for_every_word_and_number():
    tokenizer = word_problems.build_tokenizer()
    text = f"{problems(True)[0].question} {BOT} {EOT} {ANSWER_PROMPT} 60 << 0 * 3 = 0 >> ;"
    assert tokenizer(text).input_ids == [IDS[word] for word in text.split()]
    assert set(map(str, range(61))) <= set(VOCABULARY)


# -- one model, two readings -----------------------------------------------------------------------


def test_blocks_are_those_of_transformers(model):
    ids = torch.randint(len(VOCABULARY), (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states, cache = model.run(model.embed(ids[:, :12]))
        later, _ = model.run(model.embed(ids[:, 12:]), cache)
        expected = model.gpt2(ids, output_hidden_states=True).hidden_states[1:]
    for ours, late, theirs in zip(states, later, expected, strict=True):
        torch.testing.assert_close(torch.cat([ours, late], dim=1), theirs, atol=1e-5, rtol=1e-4)


def test_cached_thoughts_equal_one_pass_without_a_cache(model):
    drawn = problems(False, n=2)[-2:]
    with torch.no_grad():
        _, cache = ask(model, drawn)
        written, zs = answer(model, cache, drawn)
        question = model.embed(codi.encode([problem.question for problem in drawn]))
        bot, end = (model.embed(torch.full((2, 1), IDS[token])) for token in (BOT, EOT))
        text = model.embed(codi.encode([codi.answer_text(problem) for problem in drawn]))
        x = torch.cat([question, bot, model.projection(zs[:, :-1]), end, text], dim=1)
        states = model.gpt2.transformer(inputs_embeds=x).last_hidden_state
        logits = model.gpt2.lm_head(states)
    start = question.shape[1]
    torch.testing.assert_close(states[:, start : start + N_THOUGHTS + 1], zs, atol=1e-5, rtol=1e-4)
    labels = codi.encode([codi.answer_text(problem) for problem in drawn])
    behind = logits[:, -labels.shape[1] - 1 : -1]
    loss = torch.nn.functional.cross_entropy(behind.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(written.loss, loss, atol=1e-5, rtol=1e-4)


def test_padding_of_short_chains_changes_nothing(model):
    short, long = (next(p for p in problems(False) if len(p.equations) == n) for n in (1, 3))
    long = replace(long, question=short.question)
    with torch.no_grad():
        last, cache = ask(model, [short, long])
        both = teach(model, last, cache, [short, long], True)
        alone = teach(model, *ask(model, [short]), [short], True)
    torch.testing.assert_close(both.states[:, :1], alone.states, atol=1e-5, rtol=1e-4)


def test_teacher_reads_all_steps_but_the_last():
    problem = WordProblem("how many pears ?", ((14, "+", 5, 19), (19, "-", 3, 16)))
    assert codi.teacher_text(problem, True) == "<< 14 + 5 = 19 >> The answer is : 16 <eos>"
    assert codi.teacher_text(problem, False) == "19 ; The answer is : 16 <eos>"
    assert problem.cot == "<<14+5=19>> <<19-3=16>>"


def test_distillation_reaches_the_student_only():
    student, teacher = (torch.randn(2, 5, 8).requires_grad_() for _ in range(2))
    distillation(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_distillation_is_the_official_one():
    student, teacher = torch.randn(3, 5, 8), 3 * torch.randn(3, 5, 8)
    wanted = sum(
        torch.nn.SmoothL1Loss()(s, t) / t.std() for s, t in zip(student, teacher, strict=True)
    ) / len(student)
    torch.testing.assert_close(distillation(student, teacher), wanted)


def test_joint_loss_trains_the_projection_and_nothing_supervises_thoughts(model):
    model = copy.deepcopy(model)
    JOINT.loss(model, JOINT.batch(0, 0)).backward()
    assert all(parameter.grad is not None for parameter in model.projection.parameters())
    last, cache = ask(model, drawn := JOINT.batch(0, 0))
    steps = [replace(p, equations=((7, "+", 1, 8), p.equations[-1])) for p in drawn]
    # Of the solution, the student's loss knows the answer alone.
    torch.testing.assert_close(answer(model, cache, drawn)[0].loss, answer(model, cache, steps)[0].loss)


# -- training --------------------------------------------------------------------------------------


def test_batch_is_a_function_of_seed_and_step():
    assert JOINT.batch(3, 7) == replace(JOINT).batch(3, 7)
    assert JOINT.batch(3, 7) != JOINT.batch(3, 8) and JOINT.batch(3, 7) != JOINT.batch(4, 7)
    assert JOINT.batch(3, 7) != replace(JOINT, name="other").batch(3, 7)


@pytest.mark.parametrize("n_thoughts", [0, N_THOUGHTS])
def test_log_knows_accuracy_by_number_of_steps(model, n_thoughts):
    row = codi.Evaluation(True, n_thoughts, rows=4)(model)
    assert set(row) == {f"{who}_{n}" for who in ("teacher", "student") for n in (1, 2, 3)}
    assert all(0 <= value <= 1 for value in row.values())


def test_recipes_share_their_first_stages():
    for name, stages in RECIPES.items():
        assert stages[: len(codi.TEACHER)] == codi.TEACHER or name == codi_gates.SCRATCH
    named = {stage.name: stage for stages in RECIPES.values() for stage in stages}
    assert {stage for stages in RECIPES.values() for stage in stages} == set(named.values())
    assert RECIPES["codi"][-1].operators and not RECIPES["codi-results"][-1].operators


def test_stage_of_another_recipe_is_not_continued(tmp_path, monkeypatch):
    stage = replace(JOINT, steps=2)
    monkeypatch.setitem(RECIPES, "codi", (stage,))
    trained = codi.train_seed("codi", 0, tmp_path)
    weights = load_file(trained / "model.safetensors")
    state = torch.load(tmp_path / "codi-0" / "joint" / "state.pt", weights_only=True)["model"]
    assert all(torch.equal(weights[name], state[f"gpt2.{name}"]) for name in weights)
    monkeypatch.setitem(RECIPES, "codi", (replace(stage, gamma=1.0),))
    with pytest.raises(ValueError, match="trained by another recipe; remove"):
        codi.train_seed("codi", 0, tmp_path)


# -- what is shipped -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["codi", "codi-teacher", "codi-answer-only"])
def test_exported_model_is_measured_and_thinks_alike_in_both_readings(tmp_path, monkeypatch, name):
    last = replace(RECIPES[name][-1], steps=2, rows=6)
    monkeypatch.setitem(RECIPES, name, (last,))
    monkeypatch.setattr(codi_gates, "PAIRS", 4)
    codi.train_seed(name, 0, tmp_path)
    record = codi_gates.export(name, 0, tmp_path, tmp_path / name)
    record = record.with_measured(codi_gates.measure(name, tmp_path / name))
    shipped = load_codi(str(tmp_path / name))
    assert shipped.n_thoughts == (N_THOUGHTS if last.thinks else 0)
    missed = {"codi": {"teacher", "answer", "no-thoughts", "baseline"}, "codi-teacher": {"teacher"}}
    assert {claim.id for claim in record.missed} == missed.get(name, set())
    if not last.thinks:
        assert not (tmp_path / name / "projection.safetensors").exists()
        return
    assert [row[0] for row in record.tables["free"]] == ["", "1 step", "2 steps", "3 steps"]
    assert "1 thought" in record.tables["prompted"][0] and "z_6" in record.tables["decoded"][0]
    again = Codi(0).eval()
    again.gpt2.load_state_dict(load_file(tmp_path / name / "model.safetensors"))
    again.projection.load_state_dict(load_file(tmp_path / name / "projection.safetensors"))
    drawn = problems(True, n=3)
    thoughts = latents.think(shipped, [problem.question for problem in drawn])
    with torch.no_grad():
        for i, problem in enumerate(drawn):
            zs, _ = again.think(ask(again, [problem])[1])
            np.testing.assert_allclose(thoughts.z[i], zs[0].numpy(), atol=1e-4)


def test_no_thoughts_have_to_answer_fewer_by_the_whole_interval():
    answered = Estimate(0.975, 0.943, 0.989)
    without = [
        reported(Estimate(*values)) for values in ((0.9, 0.85, 0.94), (0.9, 0.85, 0.95), (1.0, 0.98, 1.0))
    ]
    gated = [codi_gates.below_answer("id", "0 thoughts", each, answered).verdict for each in without]
    assert gated == ["holds", "unclear", "fails"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_model_does_what_its_record_says(name):
    """On a tenth of the problems, within what a sample of that size may differ."""
    folder = embedded.ORGANISMS / name.removeprefix("organism/")
    assert [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()] == ROWS
    assert len(read_problems(folder / "problems.jsonl")) == len(ROWS) == 600
    record = OrganismRecord.read(folder)
    last, claims = RECIPES[record.organism][-1], {claim.id: claim.measured for claim in record.gates}
    drawn = [problem for pair in codi_gates.test_pairs()[::10] for problem in pair]
    n_steps = np.array([len(problem.equations) for problem in drawn])
    shipped = load_codi(name)

    def agrees(said: float, right: np.ndarray) -> None:
        assert abs(right.mean() - said) < 3.5 * np.sqrt(max(said * (1 - said), 0.02) / right.size)

    if last.writes:
        agrees(claims["teacher"], teacher_writes(shipped, drawn, last.operators))
    if last.answers:
        stops = [*latents.early_stops(shipped), *latents.early_stops(shipped, prompted=False)]
        answers = latents.answer(shipped, [p.question for p in drawn], stops)
        right, free = np.split(answers.equal([problem.answer for problem in drawn]), 2)
        answered = claims["answer"] if last.thinks else record.reported["answer, 3 steps"].value
        agrees(answered, free[-1, n_steps == 3])
        if last.thinks:
            agrees(claims["no-thoughts"], right[0, n_steps == 3])
            agrees(record.reported["0 thoughts, 3 steps, no prompt fed"].value, free[0, n_steps == 3])
        else:
            agrees(record.reported["answer with the prompt fed, 3 steps"].value, right[0, n_steps == 3])


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_log_is_of_the_recipe(name):
    folder = embedded.ORGANISMS / name.removeprefix("organism/")
    stages = RECIPES[OrganismRecord.read(folder).organism]
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    for stage in stages:
        steps = [row["step"] for row in rows if row["stage"] == stage.name]
        assert all(a < b for a, b in pairwise(steps)) and steps[-1] == stage.steps
    assert {row["stage"] for row in rows} == {stage.name for stage in stages}
