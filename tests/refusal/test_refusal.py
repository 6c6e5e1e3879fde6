"""Subspaces, their controls, and the weight edit against hooks on every family."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tiny import FAMILIES, save_tiny

from lib.core.cache import Cache
from lib.core.interventions import remove_subspace
from lib.core.models import load, provenance
from lib.core.statistics import wilson
from lib.organisms.planted import RECIPES, planted_directions
from lib.refusal import language
from lib.refusal.behaviour import (
    Outcome,
    answer_texts,
    behavioural_rank,
    mean_rate,
    measure,
    rate_band,
    rates_by_kind,
    refusals,
    refused_when_added,
    says_refusal,
)
from lib.refusal.directions import (
    category_subspace,
    direction_geometry,
    extract,
    geometry_nulls,
    mode_vectors,
    paired_svd,
    published_stack,
    random_in_top_activations,
    random_subspace,
    stack,
)
from lib.refusal.figures import draw_way
from lib.refusal.generation import chat_ids, first_token_kl, generate, last_token_streams
from lib.refusal.judges import RuleJudge
from lib.refusal.prompts import PromptSet, prompts_for
from lib.refusal.removal import SITES, Ablation, intact
from lib.refusal.search import (
    kl_matched,
    layer_conditions,
    optimised,
    optimised_conditions,
    own_answers,
    rank_conditions,
    select_layers,
    with_answers,
)
from lib.refusal.verdicts import JudgeError, Verdict, without_thought
from lib.refusal.weight_edit import edit_divergence, orthogonalized

D = 32
PROMPTS = [[0, 5, 9, 4], [0, 7, 3, 8, 6, 2, 30], [0, 11, 4, 4], [0, 2, 12, 9, 30]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(str(save_tiny("llama", tmp_path_factory.mktemp("llama"), chat=True)))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def projector(basis: torch.Tensor) -> torch.Tensor:
    return basis.T @ basis


def assert_orthonormal(basis: torch.Tensor) -> None:
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), rtol=0, atol=1e-5)


# -- directions and subspaces ----------------------------------------------------------------------


def test_stack_is_the_span_whatever_order_and_lengths(generator):
    vectors = torch.randn(4, D, generator=generator)
    found = stack(vectors)
    assert_orthonormal(found.basis)
    assert len(found.basis) == len(found.singular_values) == 4
    torch.testing.assert_close(vectors @ projector(found.basis), vectors, rtol=1e-4, atol=1e-4)
    scaled = torch.tensor([3.0, 0.01, -7.0, 1e4])[:, None] * vectors
    other = stack(scaled[[2, 0, 3, 1]])
    torch.testing.assert_close(projector(other.basis), projector(found.basis), rtol=0, atol=1e-5)
    torch.testing.assert_close(other.singular_values, found.singular_values)
    for basis in (found.basis, stack(-vectors).basis):  # its sign, which a decomposition leaves open
        assert (basis.gather(1, basis.abs().argmax(1, keepdim=True)) > 0).all()


def nearly_parallel(generator, cosine: float = 0.99) -> torch.Tensor:
    a, noise = torch.linalg.qr(torch.randn(D, 2, generator=generator)).Q.T
    return torch.stack([a, cosine * a + (1 - cosine**2) ** 0.5 * noise])


def test_nearly_parallel_vectors_are_one_direction_and_two_after_qr(generator):
    """QR makes a whole second direction of the noise between two vectors of cosine .99."""
    vectors = nearly_parallel(generator)
    found = stack(vectors)
    assert len(found.basis) == 1 and len(found.singular_values) == 2
    assert found.singular_values[1] / found.singular_values[0] < 0.1
    mean = torch.nn.functional.normalize(vectors.mean(0), dim=0)
    assert abs(float(found.basis[0] @ mean)) > 0.9999

    published = published_stack(vectors)
    assert_orthonormal(published)
    assert len(published) == 2
    assert (published[1] @ vectors.T).abs().max() < 0.15, "the second direction is hardly in either vector"
    # The other pair of the same two differs in the noise it is made of: QR's plane turns with it.
    redrawn = vectors.clone()
    redrawn[1] = 0.99 * vectors[0] + 0.141 * random_subspace(D, 1, 5)[0]
    turned = published_stack(redrawn)
    assert projector(turned).sub(projector(published)).norm() > 1
    assert projector(stack(redrawn).basis).sub(projector(found.basis)).norm() < 0.15


def test_vector_without_direction_is_named(generator):
    vectors = torch.randn(3, D, generator=generator)
    vectors[1] = 0
    with pytest.raises(ValueError, match="vector 1 has length 0"):
        stack(vectors)
    vectors[1] = torch.nan
    with pytest.raises(ValueError, match="vector 1 is NaN"):
        stack(vectors)


def test_category_subspace_spans_the_means_of_categories(generator):
    cues = torch.linalg.qr(torch.randn(D, 3, generator=generator)).Q.T
    labels = ["a", "b", "c"] * 20
    safe = torch.randn(60, D, generator=generator)
    noise = 0.01 * torch.randn(60, D, generator=generator)
    found = category_subspace(safe + 4 * cues.repeat(20, 1) + noise, safe, labels)
    assert_orthonormal(found.basis)
    torch.testing.assert_close(projector(found.basis), projector(cues), rtol=0, atol=0.02)


def test_paired_svd_finds_what_differs_most(generator):
    cues = torch.linalg.qr(torch.randn(D, 2, generator=generator)).Q.T
    safe = 5 * torch.randn(200, D, generator=generator)
    weights = torch.randn(200, 2, generator=generator) * torch.tensor([4.0, 2.0])
    found = paired_svd(safe + weights @ cues + 0.01 * torch.randn(200, D, generator=generator), safe, 1)
    assert abs(float(found.basis[0] @ cues[0])) > 0.98 and len(found.singular_values) == D
    assert found.singular_values[2] < 0.1 * found.singular_values[1]
    with pytest.raises(ValueError, match="k = 3"):
        paired_svd(safe + weights @ cues, safe, 3)


def test_random_subspaces_are_seeded_and_uniform():
    basis = random_subspace(D, 5, seed=1)
    assert basis.shape == (5, D)
    assert_orthonormal(basis)
    assert torch.equal(basis, random_subspace(D, 5, seed=1))
    assert not torch.allclose(basis, random_subspace(D, 5, seed=2))
    shares = torch.stack([random_subspace(D, 4, seed=s)[:, :8].square().sum() / 4 for s in range(300)])
    assert shares.mean() == pytest.approx(8 / D, abs=0.02)


def test_random_in_top_activations_stays_there(generator):
    scales = torch.cat([torch.full((6,), 5.0), torch.full((D - 6,), 0.1)])
    streams = 100 + scales * torch.randn(400, D, generator=generator)
    basis = random_in_top_activations(streams, k=3, m=6, seed=0)
    assert_orthonormal(basis)
    assert basis[:, :6].square().sum() / 3 > 0.99
    assert not torch.allclose(basis, random_in_top_activations(streams, k=3, m=6, seed=1))
    with pytest.raises(ValueError, match="5 streams"):
        random_in_top_activations(streams[:5], k=3, m=6, seed=0)


# -- selection and controls ------------------------------------------------------------------------


def test_layers_are_selected_by_the_mean_of_products_among_those_that_spare_harmless_prompts():
    compliance = np.array([[0.5, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0.5], [1, 1, 1, 1]])
    coherence = np.array([[1.0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    kl = np.array([0.0, 0.5, 0.05, 0.1, 0.0])
    # Layer 1 moves harmless prompts, layer 4 lies too deep. What layer 2 complies with is incoherent:
    # the mean of its products is 0, below layer 0's .125, though the product of its means is .25.
    assert select_layers(compliance, coherence, kl, n_layers=5) == [3, 0, 2]
    assert select_layers(compliance, coherence, kl, n_layers=6) == [4, 3, 0, 2]
    assert select_layers(compliance, coherence, kl, n_layers=5, max_kl=1) == [1, 3, 0, 2]
    assert select_layers(compliance, coherence, kl[:, None] * [2, 0], n_layers=5) == [3, 0, 2]
    assert select_layers(compliance, coherence, kl + 1, n_layers=5) == []
    compliance[3, 0], kl[0] = np.nan, np.nan
    assert select_layers(compliance, coherence, kl, n_layers=5) == [3, 2]
    compliance[3] = np.nan
    assert select_layers(compliance, coherence, kl, n_layers=5) == [2]
    with pytest.raises(ValueError, match="coherence"):
        select_layers(compliance, coherence[:4], kl, n_layers=5)


def test_behavioural_rank_is_the_smallest_that_passes_all_three():
    ks = [1, 2, 3, 5]
    compliance, coherence = [0.2, 0.9, 0.85, 0.95], [1.0, 0.8, 0.95, 0.95]
    kl = [0.0, 0.0, 0.1, 0.05]
    assert behavioural_rank(ks, compliance, coherence, kl) == 3
    assert behavioural_rank(ks, compliance, coherence, [0, 0, 0.2, 0.05]) == 5
    assert behavioural_rank(ks, compliance, coherence, [0.2] * 4) is None
    assert behavioural_rank(ks[::-1], compliance[::-1], coherence[::-1], kl[::-1]) == 3
    assert behavioural_rank(ks, compliance, coherence, [0, 0, np.nan, np.nan]) is None


def test_controls_are_scaled_to_the_kl_of_the_subspace(llama):
    target = first_token_kl(llama, PROMPTS, [Ablation("all", random_subspace(D, 6, 9))]).mean()
    controls = [Ablation(f"random {seed}", random_subspace(D, 1, seed)) for seed in range(3)]
    matched = kl_matched(llama, PROMPTS, controls, target)
    assert [m.name for m in matched] == [c.name for c in controls]
    assert all(torch.equal(m.basis, c.basis) for m, c in zip(matched, controls, strict=True))
    kl = first_token_kl(llama, PROMPTS, matched).mean(-1)
    np.testing.assert_allclose(kl, target, rtol=0.06)
    assert np.abs(first_token_kl(llama, PROMPTS, controls).mean(-1) / target - 1).min() > 0.06


def test_control_that_cannot_reach_the_kl_is_named(llama):
    controls = [Ablation("weak", random_subspace(D, 1, 0))]
    with pytest.raises(ValueError, match="'weak'"):
        kl_matched(llama, PROMPTS, controls, 5.0, max_strength=0.01)
    with pytest.raises(ValueError, match="target 0"):
        kl_matched(llama, PROMPTS, controls, 0.0)


# -- the weight edit -------------------------------------------------------------------------------


def hooked_logits(model, ids, basis, strength=1.0, sites=SITES):
    with torch.no_grad(), model.trace(ids, use_cache=False):
        for block in model.layers:
            if "block_input" in sites:
                remove_subspace(block.input, basis, strength)
            if "attention" in sites:
                remove_subspace(block.self_attn.o_proj.output, basis, strength)
            if "mlp" in sites:
                remove_subspace(block.mlp.output, basis, strength)
        logits = model.lm_head.output.save()
    return logits


def plain_logits(model, ids):
    with torch.no_grad():
        return model._module(input_ids=ids, use_cache=False).logits


def parameters(model) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in model._module.state_dict().items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_at_all_sites_equal_the_weight_edit(family, tied, tmp_path):
    model = load(str(save_tiny(family, tmp_path, chat=True, tied=tied)))
    module, basis = model._module, random_subspace(D, 3, seed=4)
    is_tied = module.get_input_embeddings().weight is module.get_output_embeddings().weight
    assert is_tied == tied
    ids = torch.tensor([[0, 5, 9, 4, 7, 30], [3, 2, 8, 8, 6, 1]])
    before, bits = plain_logits(model, ids), parameters(model)
    identities = {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}

    with orthogonalized(model, basis):
        edited = plain_logits(model, ids)
        changed = {name for name, value in parameters(model).items() if value != bits[name]}
        streams = last_token_streams(model, PROMPTS)
    torch.testing.assert_close(edited, hooked_logits(model, ids, basis), rtol=1e-4, atol=1e-4)
    assert (edited - before).abs().max() > 0.1
    assert (streams @ basis.T).abs().max() < 1e-4, "nothing writes to the subspace"
    assert not [name for name in changed if "lm_head" in name]
    if family == "gpt2":
        assert {"transformer.wpe.weight", "transformer.h.0.attn.c_proj.bias"} <= changed

    assert parameters(model) == bits, "restored bit for bit"
    assert {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)} == identities
    assert torch.equal(plain_logits(model, ids), before)


@pytest.mark.parametrize("sites", [SITES, ("block_input",), ("attention", "mlp")])
def test_divergence_of_hooks_from_the_edit_is_that_of_the_logits(llama, sites):
    basis = random_subspace(D, 3, seed=4)
    for strength in (0.5, 1.0):
        found = edit_divergence(llama, PROMPTS, basis, strength, sites)
        for prompt, value in zip(PROMPTS, found, strict=True):
            ids = torch.tensor([prompt])
            hooked = hooked_logits(llama, ids, basis, strength, sites)[0, -1].log_softmax(-1)
            with orthogonalized(llama, basis, strength):
                edited = plain_logits(llama, ids)[0, -1].log_softmax(-1)
            assert value == pytest.approx(float((edited.exp() * (edited - hooked)).sum()), rel=1e-3, abs=1e-6)
        exact = strength == 1.0 and len(sites) == 3
        assert (found < 1e-6).all() if exact else (found > 1e-3).any()


def test_edit_is_undone_after_an_error_and_keeps_out_of_the_cache(llama, tmp_path):
    bits, origin, cache = parameters(llama), provenance(llama), Cache(tmp_path)
    intact, basis = [Ablation("intact", torch.zeros(0, D))], random_subspace(D, 3, seed=4)
    plain = generate(llama, PROMPTS, intact, max_new_tokens=6, cache=cache)
    with pytest.raises(RuntimeError, match="stop"), orthogonalized(llama, basis):
        assert generate(llama, PROMPTS, intact, max_new_tokens=6, cache=cache) != plain
        raise RuntimeError("stop")
    assert parameters(llama) == bits and provenance(llama) == origin
    assert generate(llama, PROMPTS, intact, max_new_tokens=6, cache=cache) == plain


def test_basis_that_does_not_fit_is_named_and_nothing_edited(llama):
    bits = parameters(llama)
    with pytest.raises(ValueError, match="not orthonormal"), orthogonalized(llama, torch.ones(2, D)):
        pass
    with pytest.raises(ValueError, match="basis has 8"):
        with orthogonalized(llama, torch.eye(8)[:2]):
            pass
    assert parameters(llama) == bits


# -- behaviour and geometry of a study ----------------------------------------------------------------


@pytest.fixture
def prompt_set() -> PromptSet:
    rows = []
    for split in ("extraction", "selection", "test"):
        for i, (category, words) in enumerate({"a": "apple bird", "b": "car egg", "c": "house milk"}.items()):
            for j, extra in enumerate(("sun", "box sand")):
                shared = {"pair": f"{split}{i}{j}", "category": category, "split": split}
                rows.append({**shared, "label": "harmful", "text": f"{words} {extra}"})
                rows.append({**shared, "label": "safe", "text": f"plane {words.split()[1]} {extra}"})
        texts = ("opera sun", "mango", "box egg sun")
        rows += [{"split": split, "label": "harmless", "text": text} for text in texts]
    return PromptSet(tuple(rows))


def contains_apple(prompt: str, answer: str) -> tuple[float, float]:
    return float("apple" in prompt), 0.5


def test_measure_grades_answers_to_forbidden_and_harmless_prompts_apart(llama, prompt_set):
    harmful, harmless = prompt_set.harmful("test"), prompt_set.harmless("test")
    conditions = [intact(llama), Ablation("random", random_subspace(D, 3, seed=0))]
    found = measure(llama, harmful, harmless, conditions, RuleJudge(contains_apple), max_new_tokens=4)
    tokens = generate(llama, chat_ids(llama, harmful), conditions, max_new_tokens=4)
    expected = [[llama.tokenizer.decode(a, skip_special_tokens=True) for a in row] for row in tokens]
    assert found.answers == expected
    has_text = np.array([[bool(text.strip()) for text in row] for row in expected])
    apple = np.array([float("apple" in prompt) for prompt in harmful])
    np.testing.assert_array_equal(found.compliance, has_text * apple)
    np.testing.assert_array_equal(found.coherence, has_text * 0.5)
    np.testing.assert_array_equal(found.product, found.compliance * found.coherence)
    assert found.harmless_compliance.shape == (2, 3) and not found.harmless_compliance.any()
    everyday = generate(llama, chat_ids(llama, harmless), conditions, max_new_tokens=4)
    assert found.harmless_answers == [
        [llama.tokenizer.decode(a, skip_special_tokens=True) for a in row] for row in everyday
    ]
    sound = [[0.5 * bool(text.strip()) for text in row] for row in found.harmless_answers]
    np.testing.assert_array_equal(found.harmless_coherence, sound)
    assert found.kl[0] == pytest.approx(0, abs=1e-6) and (found.kl[1] > 0).all()
    assert found.part(1, 2).answers == expected[1:] and found.part(1, 2).kl.shape == (1, 3)
    by_layer = found.with_layer_zero()
    assert np.isnan(by_layer[0][0]).all() and (by_layer[2][1:] == found.kl).all()


def outcome(compliance: float, harmless: float) -> Outcome:
    """Of two conditions: intact, and one that does all that it should; the judge left one answer ungraded."""
    graded = np.array([[compliance, np.nan, compliance], [1.0, 1.0, 0.5]])
    kl = np.array([[0.0, 0.0], [0.05, 0.07]])
    answers, everyday = [["", "", ""]] * 2, np.full((2, 2), harmless)
    return Outcome(answers, graded, np.ones((2, 3)), kl, everyday, np.ones((2, 2)), [["", ""]] * 2)


def test_means_leave_out_what_was_not_graded():
    compliance, coherence, kl = outcome(0.25, 1.0).means
    np.testing.assert_allclose(compliance, [0.25, 2.5 / 3])
    np.testing.assert_allclose(coherence, [1, 1])
    np.testing.assert_allclose(kl, [0, 0.06])
    sizes = [Ablation("intact", torch.zeros(0, D)), Ablation("four", random_subspace(D, 4, seed=0))]
    assert outcome(0.25, 1.0).rank(sizes) == 4 and outcome(0.9, 1.0).rank(sizes) == 0


def test_model_without_refusal_is_said_to_have_none():
    assert outcome(0.0, 1.0).no_refusal == ""
    assert "refuses next to nothing" in outcome(1.0, 1.0).no_refusal
    assert "answers next to nothing" in outcome(0.0, 0.0).no_refusal


def test_measure_lets_one_invalid_verdict_pass(llama, prompt_set):
    """Of three answers it is a third, and says no more of the judge than one of three hundred."""

    def judge_of(n_bad):
        return lambda prompts, answers: [
            Verdict.invalid("no reply") if i < n_bad else Verdict(1.0, 1.0) for i in range(len(answers))
        ]

    harmless, conditions = prompt_set.harmless("test"), [intact(llama)]
    found = measure(llama, [], harmless, conditions, judge_of(1), max_new_tokens=2)
    assert np.isnan(found.harmless_compliance).sum() == 1
    with pytest.raises(JudgeError, match="no reply"):
        measure(llama, [], harmless, conditions, judge_of(2), max_new_tokens=2)


def test_extraction_reads_the_extraction_split(llama, prompt_set):
    found = extract(llama, prompt_set)
    assert found.harmful.shape == found.safe.shape == (6, 4, D) and found.harmless.shape == (3, 4, D)
    assert found.categories == ["a", "a", "b", "b", "c", "c"]
    expected = last_token_streams(llama, chat_ids(llama, prompt_set.harmful("extraction")), padding="none")
    torch.testing.assert_close(found.harmful, expected, rtol=1e-4, atol=1e-4)
    vectors = found.harmful.mean(0) - found.safe.mean(0)
    torch.testing.assert_close(found.vectors, vectors, rtol=1e-4, atol=1e-4)
    zero = found.zero_points()
    assert np.isnan(zero[0])
    gap = vectors[2] @ vectors[2]
    assert zero[2] == pytest.approx(float(found.harmless[:, 2].mean(0) @ vectors[2] / gap), rel=1e-3)


def test_support_of_the_rank_falls_where_a_mean_is_near_its_bound():
    conditions = [Ablation(f"{k}", random_subspace(D, k, seed=k)) for k in (1, 2)]

    def support(n_complying: int) -> float:
        compliance = np.stack([np.zeros(100), np.arange(100) < n_complying]).astype(float)
        harmless = np.ones((2, 20))
        outcome = Outcome([], compliance, np.ones((2, 100)), np.zeros((2, 20)), harmless, harmless, [])
        assert outcome.rank(conditions) == (2 if n_complying >= 80 else None)
        return outcome.rank_support(conditions, n_resamples=400)

    assert support(100) == 1.0
    assert support(40) == 1.0
    assert 0.4 < support(80) < 0.7
    assert 0.4 < support(79) < 0.7


def test_support_of_the_rank_draws_within_strata():
    """Where each kind of request is all or nothing, no resample of as many of each can move the mean."""
    conditions = [Ablation("one", random_subspace(D, 1, seed=1))]
    compliance, kinds = (np.arange(100) < 80).astype(float)[None], np.arange(100) < 80
    harmless = np.ones((1, 20))
    outcome = Outcome([], compliance, np.ones((1, 100)), np.zeros((1, 20)), harmless, harmless, [])
    assert outcome.rank_support(conditions, 400, kinds) == 1.0
    assert outcome.rank_support(conditions, 400) < 0.7
    near_the_bound = outcome._replace(compliance=np.ones((1, 100)), kl=np.repeat([[0.0, 0.199]], 20, axis=1))
    assert 0.3 < near_the_bound.rank_support(conditions, 400) < 0.8, "harmless prompts are drawn as well"


def test_conditions_that_spare_harmless_prompts_come_first():
    compliance = np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, np.nan]])
    kl = np.array([[0.0], [0.2], [0.1], [0.3]])
    ones = np.ones((4, 2))
    outcome = Outcome([], compliance, np.array([1.0, 1.0, 0.5, 0.5])[:, None] * ones, kl, ones, ones, [])
    assert outcome.best_first() == [0, 2, 1, 3]
    assert outcome.best_first(max_kl=1) == [1, 0, 3, 2]


def test_refusal_is_what_says_so_in_sound_text():
    answers = [
        "sorry i must decline this",
        "sorry sorry no unable no no",
        "sure : done",
        "",
        "no that is not",
    ]
    found = refusals(answers, np.array([1, 0, 1, 0, np.nan]), language.refuses)
    np.testing.assert_array_equal(found, [1, 0, 0, 0, np.nan])
    assert says_refusal("I cannot do that.") and not says_refusal("") and not says_refusal("Here you are.")


THOUGHT_MARKS = ["<think>", "</think>", "<mark>"]


def test_thought_is_told_from_the_answer(llama):
    """Marks that are special tokens stay, and one that ends the prompt is put before the answer."""
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": THOUGHT_MARKS})
    model = SimpleNamespace(tokenizer=tokenizer)
    open_, close, mark, apple, egg = tokenizer.convert_tokens_to_ids([*THOUGHT_MARKS, "apple", "egg"])
    plain, opened, closed = [egg, apple], [egg, open_], [egg, open_, close]
    cases = [
        (plain, [mark, egg, apple], "egg apple", "egg apple"),
        (plain, [open_, egg, close, apple, mark], None, "apple"),
        (plain, [open_, egg, mark], None, None),
        (opened, [egg, close, apple, mark], None, "apple"),
        (opened, [egg, apple], None, None),
        (closed, [egg, mark, apple], "egg apple", "egg apple"),
    ]
    prompts, answers = [case[0] for case in cases], [case[1] for case in cases]
    texts = answer_texts(model, prompts, answers)
    for text, (*_, whole, said) in zip(texts, cases, strict=True):
        assert whole is None or text.split() == whole.split()
        found = without_thought(text)
        assert said == (found if found is None else " ".join(found.split()))
        assert found is None or "<mark>" not in found


def test_added_vectors_are_measured_on_harmless_prompts(llama, prompt_set):
    harmless, vectors = prompt_set.harmless("test"), 3 * random_subspace(D, 2, seed=0)
    everything = {"judge": RuleJudge(contains_apple), "max_new_tokens": 4}
    refuse, not_complied = refused_when_added(llama, harmless, vectors, 1, is_refusal=bool, **everything)
    shifts = [Ablation(f"{i}", torch.zeros(0, D), shift=(1, vector)) for i, vector in enumerate(vectors)]
    expected = measure(llama, prompt_set.harmful("test"), harmless, shifts, **everything)
    has_text = [[bool(text.strip()) for text in row] for row in expected.harmless_answers]
    np.testing.assert_array_equal(refuse, np.array(has_text, dtype=float))
    np.testing.assert_array_equal(not_complied, np.ones((2, 3)))


def test_rates_leave_out_what_has_no_grade():
    values, kinds = np.array([[1.0, 0.5, np.nan, 0, 1], [1, 1, 1, 1, 1]]), list("abaab")
    band = rate_band(values, kinds)
    np.testing.assert_allclose(band.middle, [2.5 / 4, 1])
    assert band.low[1] == pytest.approx(wilson(4, 4).low) and band.high[1] == 1
    mean = mean_rate(values[0], kinds)
    assert mean.value == band.middle[0] and mean.interval == (band.low[0], band.high[0])
    by_kind = rates_by_kind(values, kinds)
    assert [*by_kind] == ["a", "b"]
    np.testing.assert_allclose(by_kind["a"], [0.5, 1])
    np.testing.assert_allclose(by_kind["b"], [0.75, 1])


def test_marks_of_subspaces_that_do_not_pass_are_hollow():
    sizes = [Ablation(f"{k}", random_subspace(D, k, seed=k)) for k in (1, 2, 3)]
    compliance, ones = np.array([[0.2], [0.9], [1.0]]), np.ones((3, 1))
    kl, coherence = np.array([[0.0], [0.2], [0.0]]), np.array([[1.0], [1.0], [0.8]])
    outcome = Outcome([], compliance, coherence, kl, ones, ones, [])
    ax = Figure().add_subplot()
    draw_way(ax, sizes, outcome, rate_band(compliance), colour="k", marker="o", key="way", shift=0.5)
    line, hollow = ax.get_lines()
    np.testing.assert_allclose(line.get_xdata(), [1.5, 2.5, 3.5])
    np.testing.assert_allclose(hollow.get_xydata(), [[2.5, 0.9], [3.5, 1.0]])
    assert hollow.get_markerfacecolor() == "white"


def test_mode_vectors_are_what_the_last_token_changes(llama):
    texts, last = ["apple sun", "box egg sun"], llama.tokenizer.convert_tokens_to_ids("w30")
    found = mode_vectors(llama, texts, ["w30", "w31"])
    prompts = chat_ids(llama, texts)
    streams = [last_token_streams(llama, [*(p[:-1] + [t] for p, t in zip(prompts, ends, strict=True))])
               for ends in ([last, last], [p[-1] for p in prompts])]  # fmt: skip
    torch.testing.assert_close(found[0], (streams[0] - streams[1]).mean(0), rtol=1e-4, atol=1e-5)
    assert found.shape == (2, 4, D)


# -- subspaces by gradient ---------------------------------------------------------------------------


PLANTED = "organism/refusal-planted-2"


def test_optimised_subspace_comes_nearer_to_the_planted_one():
    """Two directions that each lie 45 degrees beside the planted plane turn into it; one can not do."""
    model, prompts = load(PLANTED), prompts_for(PLANTED)
    planted, _ = planted_directions(RECIPES["refusal-planted-2"], seed=0)
    beside = random_subspace(planted.shape[1], 2, seed=3)
    start = stack(planted + beside - beside @ projector(planted)).basis
    texts = prompts.harmful("extraction")[:48], prompts.harmless("extraction")
    requests = [with_answers(model, part, lambda text: language.parse(text).answer) for part in texts]
    options = {"n_steps": 40, "seed": 0}
    found = optimised(model, *requests, start=start, n_snapshots=2, **options)
    assert len(found) == 3 and found[0] is start
    for basis in found:
        assert_orthonormal(basis)
    shares = [float((basis @ planted.T).square().sum() / 2) for basis in found]
    assert shares[0] == pytest.approx(0.5, abs=0.1) and shares[2] > 0.75
    conditions = [Ablation("start", start), Ablation("end", found[2])]
    one = optimised(model, *requests, start=start[:1], n_snapshots=1, **options)[1]
    test = prompts.harmful("test")[:48], prompts.harmless("test")[:8]
    judge = RuleJudge(language.grade)
    outcome = measure(model, *test, [*conditions, Ablation("one", one)], judge, max_new_tokens=12)
    before, after, alone = outcome.means[0]
    assert after > 0.8 and before < 0.8 and alone < 0.5


def test_optimised_direction_is_kept_apart_from_another():
    model, prompts = load(PLANTED), prompts_for(PLANTED)
    planted, _ = planted_directions(RECIPES["refusal-planted-2"], seed=0)
    texts = prompts.harmful("extraction")[:16], prompts.harmless("extraction")[:8]
    requests = [with_answers(model, part, lambda text: language.parse(text).answer) for part in texts]
    start = stack(planted[:1] + 0.5 * random_subspace(planted.shape[1], 1, seed=3)).basis
    options = {"start": start, "n_steps": 4, "seed": 0, "drawn": (4, 2), "apart_from": planted[:1]}
    found = optimised(model, *requests, **options)
    assert all(map(torch.equal, found, optimised(model, *requests, **options))), "of the seed alone"
    for basis in found:
        assert_orthonormal(basis)
        assert float((basis @ planted[:1].T).abs()) < 1e-6
    assert not torch.allclose(found[0], found[-1])


def test_own_answers_are_those_to_the_twins_without_refusals():
    model, prompts = load("organism/refusal-single"), prompts_for("organism/refusal-single")
    harmful, safe = prompts.harmful("extraction")[:6], prompts.safe("extraction")[:6]
    own = {"says_refusal": language.refuses, "max_new_tokens": 12}
    found = own_answers(model, harmful, safe, **own)
    assert [prompt for prompt, _ in found] == chat_ids(model, harmful)
    said = [model.tokenizer.decode(answer, skip_special_tokens=True) for _, answer in found]
    assert [language.grade(text, answer)[0] for text, answer in zip(safe, said, strict=True)] == [1] * 6
    assert own_answers(model, safe, harmful, **own) == []  # it refuses all of these


def test_optimised_way_asks_whether_fewer_directions_do(monkeypatch):
    """Below the smallest k that passes; from the best start of its size, and by the selection split."""
    starts = [Ablation(f"start {k}", random_subspace(D, k, seed=k)) for k in (1, 2, 3)]
    starts.insert(1, Ablation("better 1", random_subspace(D, 1, seed=9)))
    prompts, calls = prompts_for(PLANTED), []

    def outcome(compliance: list[float]) -> Outcome:
        graded, ones = np.array(compliance)[:, None], np.ones((len(compliance), 1))
        return Outcome([], graded, ones, 0 * ones, ones, ones, [])

    def descend(model, forbidden, kept, start, **options):
        calls.append((start, forbidden, len(kept)))
        return [start, *(random_subspace(D, len(start), seed=20 + i) for i in range(2))]

    monkeypatch.setattr("lib.refusal.search.optimised", descend)
    monkeypatch.setattr("lib.refusal.search.with_answers", lambda model, texts, answer_of: list(texts))
    options = {"measured": lambda c: outcome([0.1, 0.5, 0.3]), "answer_of": str, "n_steps": 3, "seed": 0}
    found = optimised_conditions(None, prompts, starts, outcome([0.1, 0.2, 0.9, 1.0]), **options)
    assert [c.name for c in found] == ["optimised 1", "optimised 2"]
    [(start, requests, n_kept)] = calls
    assert start is starts[1].basis and requests == prompts.harmful("extraction")
    assert n_kept == len(prompts.harmless("extraction")) + len(requests)
    assert torch.equal(found[0].basis, random_subspace(D, 1, seed=20)) and found[1].basis is starts[2].basis
    found = optimised_conditions(None, prompts, starts, outcome([0.1, 0.2, 0.3, 0.4]), **options)
    assert [len(c.basis) for c in found] == [1, 2, 3] and len(calls) == 4


def test_descent_from_nowhere_is_refused(llama):
    start = torch.full((1, D), torch.nan)
    with pytest.raises(ValueError, match="nan at step 1"):
        texts = [with_answers(llama, [text], lambda text: text) for text in ("apple sun", "box")]
        optimised(llama, *texts, start, n_steps=2, seed=0)


def test_conditions_of_each_rank_are_of_that_rank(llama, prompt_set):
    found = extract(llama, prompt_set)
    assert [c.name for c in layer_conditions(found)] == ["layer 1", "layer 2"]
    ways = rank_conditions(found, ranked=[2, 1], layer=2, ks=[1, 2, 5], n_random=2, seed=0)
    assert [len(c.basis) for c in ways["layers"]] == [1, 2]
    assert [len(c.basis) for c in ways["categories"]] == [1, 2]  # three categories span no more than three
    assert [len(c.basis) for c in ways["pairs"]] == [1, 2, 5]
    assert [len(c.basis) for c in ways["random"]] == [1, 1, 2, 2, 5, 5]
    assert [len(c.basis) for c in ways["random in the stream"]] == [1, 1, 2, 2, 5, 5]
    for condition in ways["layers"][1:]:
        span = stack(found.vectors[1:3]).basis
        torch.testing.assert_close(projector(condition.basis), projector(span), rtol=0, atol=1e-5)
    # Nested: k directions hold the k - 1 before them.
    assert torch.equal(ways["pairs"][1].basis[:1], ways["pairs"][0].basis)
    with pytest.raises(ValueError, match="k_values: 33"):
        rank_conditions(found, ranked=[2, 1], layer=2, ks=[33, 1], n_random=2, seed=0)


def test_layer_that_adds_no_dimension_is_passed_over(llama, prompt_set):
    found = extract(llama, prompt_set)
    doubled = found._replace(harmful=found.harmful.clone(), safe=found.safe.clone())
    doubled.harmful[:, 1], doubled.safe[:, 1] = 2 * found.harmful[:, 2], 2 * found.safe[:, 2]
    ways = rank_conditions(doubled, ranked=[2, 1, 3], layer=2, ks=[1, 2, 3], n_random=1, seed=0)
    assert [len(c.basis) for c in ways["layers"]] == [1, 2]


def test_geometry_of_known_directions():
    parallel = torch.tensor([1.0, -2.0, 0.5])[None].T.flatten()[:, None] * torch.ones(1, 8)
    assert direction_geometry(parallel[[0, 2]]) == pytest.approx((1.0, 1.0, 1.0))
    assert direction_geometry(torch.eye(8)[:5]) == pytest.approx((0.0, 5.0, 5.0))


def test_nulls_of_geometry_mean_what_they_say(generator):
    shared = torch.randn(1, 5, D, generator=generator)
    noise = torch.randn(40, 5, D, generator=generator)
    harmful, safe = 3 * shared + noise, torch.randn(40, 5, D, generator=generator)
    nulls = geometry_nulls(harmful, safe, range(1, 5), n=20, seed=0)
    assert {kind: len(draws) for kind, draws in nulls.items()} == {
        "iid": 20, "random walk": 20, "shuffled labels": 20,
    }  # fmt: skip
    ratio = {kind: np.mean([g.participation_ratio for g in draws]) for kind, draws in nulls.items()}
    assert ratio["random walk"] < ratio["iid"] and 3 < ratio["iid"] <= 4
    again = geometry_nulls(harmful, safe, range(1, 5), n=20, seed=0)
    assert again == nulls


def test_random_walk_takes_steps_as_long_as_the_directions_own(generator):
    """After one long step all that follows points its way; steps of equal length would turn."""
    direction = torch.nn.functional.normalize(torch.randn(5, D, generator=generator), dim=-1)
    vectors = (torch.tensor([1.0, 30.0, 1.0, 1.0, 1.0])[:, None] * direction).cumsum(0)
    nulls = geometry_nulls(vectors.expand(7, -1, -1), torch.zeros(7, 5, D), range(1, 5), n=20, seed=0)
    assert np.mean([draw.participation_ratio for draw in nulls["random walk"]]) < 1.05
