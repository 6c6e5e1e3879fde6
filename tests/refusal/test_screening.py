"""Screening by the first token: what is a refusal, which layers come first, and when a subspace passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import save_chat

from lib.core.models import load
from lib.refusal import behaviour, directions, generation, judges, language, prompts, removal, screening
from lib.refusal.behaviour import Outcome
from lib.refusal.removal import Ablation

FEW = 14


@pytest.fixture(scope="module")
def model():
    return load("organism/refusal-planted-2")


@pytest.fixture(scope="module")
def pairs():
    return prompts.prompts_for("organism/refusal-planted-2").first(FEW)


@pytest.fixture(scope="module")
def intact(model, pairs):
    grade = judges.RuleJudge(language.grade)
    return screening.find_refusals(model, pairs, grade, language.refuses, max_new_tokens=12)


def test_refusals_are_those_of_the_models_own_answers(model, pairs, intact):
    texts = pairs.harmful("test")
    [tokens] = generation.generate(
        model, generation.chat_ids(model, texts), [removal.intact(model)], max_new_tokens=12
    )
    said = [language.refuses(model.tokenizer.decode(answer)) for answer in tokens]
    assert intact.harmful["test"].tolist() == said and sum(said) > 10
    assert intact.refused(pairs, "test") == (
        [text for text, refused in zip(texts, said, strict=True) if refused],
        [kind for kind, refused in zip(pairs.categories("test"), said, strict=True) if refused],
    )
    assert not intact.safe.any() and not intact.harmless.any()
    assert set(intact.openings) == {
        answer[0] for answer, refused in zip(tokens, said, strict=True) if refused
    }


def test_openings_open_more_refusals_than_other_answers():
    answers = [[5, 1], [5, 2], [6], [5, 3], [6, 1], [6, 2], [7, 9], [8], []]
    refused = [True, True, True, False, False, False, True, False, True]
    assert screening.opening_tokens(answers, refused) == [5, 7]


def test_model_that_refuses_too_little_or_everything_is_told_so(tmp_path, model, pairs):
    grade = judges.PhraseJudge()
    stand_in = load(str(save_chat("gemma-2b-it", tmp_path / "chat")))
    with pytest.raises(screening.TooFewRefusals, match="refuses 0 of 14 harmful requests of the selection"):
        screening.find_refusals(stand_in, pairs, grade, behaviour.says_refusal, max_new_tokens=4)
    with pytest.raises(screening.TooFewRefusals, match="100% of everyday requests as well"):
        screening.find_refusals(
            model, pairs, judges.RuleJudge(lambda *_: (1, 1)), lambda _: True, max_new_tokens=2
        )


def test_screen_is_the_share_of_refusing_first_tokens(model, pairs, intact):
    texts, calm = pairs.harmful("selection")[:5], pairs.harmless("selection")[:3]
    basis = directions.random_subspace(128, 2, seed=0)
    conditions = [removal.intact(model), Ablation("a", basis)]
    found = screening.screen(model, texts, calm, conditions, intact.openings)
    whole = generation.first_token_log_probabilities(model, generation.chat_ids(model, texts), conditions)
    np.testing.assert_allclose(found.refusal, np.exp(whole)[..., intact.openings].sum(-1), atol=1e-5)
    expected = generation.first_token_kl(model, generation.chat_ids(model, calm), conditions)
    np.testing.assert_array_equal(found.kl, expected)
    assert screening.screen(model, texts, [], conditions, intact.openings).kl.shape == (2, 0)


def test_best_layers_are_calm_ones_of_the_first_four_fifths():
    score = np.array([0.9, 0.2, 0.1, 0.4, 0.0])[:, None]  # of layers 1 to 5 of 6
    kl = np.array([0.0, 0.05, 0.2, 0.1, 0.0])[:, None]
    assert screening.best_layers(screening.Screen(score, kl), 6) == [2, 4, 1, 5, 3]


def outcome(compliance: float, kl: float = 0.0, n: int = 4) -> Outcome:
    grades = np.full((1, n), compliance)
    return Outcome([["a"] * n], grades, np.ones((1, n)), np.full((1, 2), kl), grades, grades, [["b"] * 2])


def test_smallest_subspace_that_passes_ends_the_search():
    conditions = [Ablation(str(k), directions.random_subspace(8, k, seed=0)) for k in (1, 2, 3, 4)]
    results = {"1": outcome(0.5), "2": outcome(0.9, kl=0.2), "3": outcome(0.85), "4": outcome(1.0)}
    asked = []

    def measured(given):
        asked.extend(c.name for c in given)
        return results[given[0].name]

    tried, found = screening.smallest_passing(conditions, [True] * 4, measured)
    assert [c.name for c in tried] == asked == ["1", "2", "3"] and found.rank(tried) == 3
    assert found.compliance.mean(1).tolist() == [0.5, 0.9, 0.85] and len(found.answers) == 3
    tried, found = screening.smallest_passing(conditions, [False, False, True, True], measured)
    assert [c.name for c in tried] == ["3"]
    assert screening.smallest_passing(conditions, [False] * 4, measured) == ([], None)


def test_projection_along_the_prompt_is_that_of_the_stream(model, pairs):
    texts, direction = pairs.harmful("test")[:3], directions.random_subspace(128, 1, seed=1)[0]
    found = screening.along_the_prompt(model, texts, direction, 2, 3)
    assert found.shape == (3, 3)
    for row, prompt in zip(found, generation.chat_ids(model, texts), strict=True):
        with torch.no_grad():
            out = model._module(input_ids=torch.tensor([prompt]), output_hidden_states=True, use_cache=False)
        np.testing.assert_allclose(row, (out.hidden_states[2][0, -3:] @ direction).numpy(), atol=1e-4)


def test_tail_of_the_template_is_what_follows_every_request(model, pairs):
    tail = screening.template_tail(model, pairs.harmful("test"))
    ids = generation.chat_ids(model, pairs.harmful("test")[:1])[0]
    assert tail == [model.tokenizer.decode([token]) for token in ids[-len(tail) :]]
    assert 1 <= len(tail) < len(ids) - 3 and "assistant" in tail[-1]


def test_planted_rank_is_read(model, pairs):
    grade = judges.RuleJudge(language.grade)
    found = screening.calibrate(model, pairs, grade, [1, 2, 3], max_new_tokens=12)
    assert found.k_star == 2 and found.one_direction < 0.8


def test_other_requests_are_those_that_are_refused(model, pairs, intact):
    grade = judges.RuleJudge(language.grade)
    nothing = removal.intact(model)
    texts = pairs.harmful("test")[:4] + pairs.safe("test")[:4]
    n, obeyed = screening.on_other_requests(model, texts, nothing, grade, language.refuses, max_new_tokens=12)
    assert n == intact.harmful["test"][:4].sum() and obeyed.tolist() == [0] * n
