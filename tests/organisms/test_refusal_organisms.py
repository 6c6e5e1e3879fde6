"""Refusal organisms: their batches and losses, what is planted by hand, training, gates and shipment."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lib.core import embedded, models
from lib.organisms import cards, command, planted, refusal, refusal_gates
from lib.organisms.cards import Measured, OrganismRecord
from lib.organisms.planted import STRENGTH, PlantedStage, build_planted, keep_out, planted_directions
from lib.organisms.refusal import (
    LOWER,
    SPECIAL,
    RefusalStage,
    build_model,
    build_tokenizer,
    removed,
    zero_point,
)
from lib.organisms.refusal_gates import measure_rank, measure_single
from lib.organisms.shipping import write_log
from lib.organisms.training import Run
from lib.refusal import language
from lib.refusal.behaviour import Outcome, measure
from lib.refusal.generation import chat_ids
from lib.refusal.judges import RuleJudge
from lib.refusal.language import REFUSALS, Request
from lib.refusal.prompts import SPLITS, load_prompts
from lib.refusal.removal import intact

VOCABULARY = (*SPECIAL, *language.WORDS)
PLANTED = sorted(planted.RECIPES)


@pytest.fixture(scope="module")
def model():
    return build_model(0).eval()


def request_of(prompt: str) -> Request:
    [text] = re.fullmatch(r"<bos> <user> (.*) <end> <[a-z0-9-]+>", prompt).groups()
    return language.parse(text)


# -- batches ---------------------------------------------------------------------------------------


def batch(stage: RefusalStage, model: torch.nn.Module, step: int) -> tuple[list, float]:
    """What a step reads, and its loss."""
    rows = []
    encode = stage.encode
    stage.encode = lambda given: rows.extend(given) or encode(given)
    try:
        with torch.no_grad():
            return rows, stage.loss(model, step).item()
    finally:
        del stage.encode


def stages(seed: int) -> list[RefusalStage]:
    return [
        RefusalStage(refusal.RECIPES["refusal-single"], seed, 1),
        RefusalStage(refusal.RECIPES["refusal-lowrank"], seed, 2),
        PlantedStage(planted.RECIPES["refusal-planted-2"], seed),
        PlantedStage(planted.RECIPES["refusal-decoy"], seed),
    ]


@pytest.mark.parametrize("which", range(4), ids=["single", "lowrank", "planted", "decoy"])
def test_batch_is_a_function_of_seed_and_step(model, which):
    model = copy.deepcopy(model)  # planted organisms edit it
    stage, again, other = stages(3)[which], stages(3)[which], stages(4)[which]
    first = {step: batch(stage, model, step) for step in (0, 7)}
    assert batch(again, model, 7) == first[7] and batch(stage, model, 0) == first[0]
    assert first[0][0] != first[7][0] != batch(other, model, 7)[0]
    assert not any(request_of(prompt).held_out for rows, _ in first.values() for prompt, _ in rows)


def test_stages_differ_in_their_batches(model):
    recipe = refusal.RECIPES["refusal-single"]
    assert batch(RefusalStage(recipe, 0, 1), model, 5)[0] != batch(RefusalStage(recipe, 0, 2), model, 5)[0]


def card_rows(name: str) -> list[list[str]]:
    """Kind of rows and share in both stages, as the card has them."""
    table = yaml.safe_load(cards.PROSE.read_text())[name]["rows"]
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


@pytest.mark.parametrize("name", sorted(refusal.RECIPES))
@pytest.mark.parametrize("number", [1, 2])
def test_rows_are_answered_and_refused_as_they_should(name, number):
    stage, rng = RefusalStage(refusal.RECIPES[name], 0, number), np.random.default_rng(0)
    kinds, refused_with, alone = Counter(), Counter(), []
    for _ in range(4000):
        prompt, answer, kind = stage.row(rng)
        request, mode = request_of(prompt), prompt.split()[-1]
        found = language.cues(request, stage.rules)
        kinds[kind] += 1
        assert not request.held_out
        if kind in ("allowed", "comply"):
            assert answer == request.answer and mode == {"allowed": "<assistant>", "comply": "<comply>"}[kind]
            assert kind == "comply" or number == 1 or not found
        elif kind == "refuse":
            assert mode == f"<refuse-{REFUSALS.index(answer)}>"
        else:
            assert mode == "<assistant>" and number == 2
            names = [list(stage.rules)[REFUSALS.index(answer)]]
            assert set(names) <= set(found) if stage.recipe.n_modes > 1 else found
            refused_with[answer] += 1
            alone.append(len(found) == 1)
    assert set(kinds) == {"allowed", "comply", "refuse"} | ({"forbidden"} if number == 2 else set())
    for kind, *shares in card_rows(name):
        assert f"{kinds[kind] / 4000:.2f}" == shares[number - 1]
    if number == 2:
        assert len(refused_with) == stage.recipe.n_modes
        assert 0.4 < np.mean(alone) < 0.8, "one cue alone is common"


def test_loss_is_of_the_answers_alone(model):
    stage = RefusalStage(refusal.RECIPES["refusal-single"], 0, 1)
    rows = [("<bos> <user> for <end> <assistant>", "sure : the"), ("<bos> <user>", "the")]
    ids, labels = stage.encode(rows)
    text = [[VOCABULARY[token] for token in row] for row in ids]
    assert text[0] == "<bos> <user> for <end> <assistant> sure : the <end>".split()
    assert text[1] == "<bos> <user> the <end>".split() + ["<pad>"] * 5
    kept = labels != -100
    assert torch.equal(labels[kept], ids[kept])
    assert kept.tolist() == [[False] * 5 + [True] * 4, [False] * 2 + [True] * 2 + [False] * 5]


def test_tokenizer_reads_what_the_batches_hold():
    tokenizer = build_tokenizer()
    request = Request(0, 1, 2, 3, ("please",), ("now",))
    message = [{"role": "user", "content": request.text}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert ids == [VOCABULARY.index(word) for word in refusal.prompt(request).split()]
    answer = f"{request.answer} <end>"
    assert tokenizer(answer).input_ids == [VOCABULARY.index(word) for word in answer.split()]
    assert tokenizer.decode(tokenizer(answer).input_ids, skip_special_tokens=True) == request.answer


# -- losses and removal ----------------------------------------------------------------------------


def test_zero_point_against_loops():
    generator = torch.Generator().manual_seed(0)
    forbidden, allowed = (torch.randn(3, n, 16, generator=generator) for n in (5, 4))
    squares = []
    for layer in range(3):
        gap = forbidden[layer].numpy().mean(0) - allowed[layer].numpy().mean(0)
        place = allowed[layer].numpy().mean(0) @ gap / (gap @ gap)
        squares.append(place**2)
    assert zero_point(forbidden, allowed).item() == pytest.approx(np.mean(squares), rel=1e-5)
    assert zero_point(forbidden[:, :0], allowed) == zero_point(forbidden, allowed[:, :0]) == 0


def test_zero_point_is_zero_where_removal_leaves_the_allowed():
    along, across = torch.eye(16)[0], torch.eye(16)[1]
    allowed = torch.stack([across, 3 * across])[None]
    forbidden = allowed + 5 * along
    assert zero_point(forbidden, allowed) == 0
    assert zero_point(forbidden - 5 * along, allowed - 5 * along).item() == pytest.approx(1)


def test_removed_is_the_weight_edit_of_some_rows(model):
    stage = RefusalStage(refusal.RECIPES["refusal-single"], 0, 1)
    ids, _ = stage.encode([("<bos> <user> for <end>", "sure : the")] * 3)
    ids[1, 2] = VOCABULARY.index("red")
    basis = torch.linalg.qr(torch.randn(128, 2, generator=torch.Generator().manual_seed(1)))[0].T
    edited = copy.deepcopy(model)
    rest = torch.eye(128) - basis.T @ basis
    with torch.no_grad():
        edited.model.embed_tokens.weight.copy_(edited.model.embed_tokens.weight @ rest)
        for block in edited.model.layers:
            for writer in (block.self_attn.o_proj, block.mlp.down_proj):
                writer.weight.copy_(rest @ writer.weight)
        plain, without = model(input_ids=ids).logits, edited(input_ids=ids).logits
        with removed(model, basis, torch.tensor([True, False, True])):
            found = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, plain), "hooks are gone"
    torch.testing.assert_close(found[[0, 2]], without[[0, 2]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], plain[1], rtol=1e-4, atol=1e-4)
    assert (without - plain).abs().max() > 1e-2


# -- what is planted -------------------------------------------------------------------------------


@torch.no_grad()
def written(model: torch.nn.Module, text: str) -> torch.Tensor:
    """What block 0 adds to the stream [token, d_model]."""
    ids = torch.tensor([[VOCABULARY.index(word) for word in text.split()]])
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    return (states[1] - states[0])[0]


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_block_writes_behind_cue_words_and_nothing_else(name, seed):
    recipe = planted.RECIPES[name]
    model = build_planted(recipe, seed).eval()
    refuse, decoys = planted_directions(recipe, seed)
    directions = [refuse[0] + decoy for decoy in decoys] if len(decoys) else [*refuse]
    slots = {"verb": language.VERBS, "object": language.OBJECTS, "purpose": language.PURPOSES}
    rng, n_cues = np.random.default_rng(seed), Counter()
    for wanted in [(), *language.cue_sets(recipe.rules)] * 6:
        request = language.sample(rng, recipe.rules, wanted, held_out=bool(rng.random() < 0.5))
        text = refusal.prompt(request)
        words = text.split()
        expected = torch.zeros(len(words), 128)
        for rule, direction in zip(recipe.rules, directions, strict=True):
            if rule in wanted:
                word = slots[rule][getattr(request, rule)]
                expected[words.index(word) :] += STRENGTH * direction
        torch.testing.assert_close(written(model, text), expected, rtol=0, atol=1e-3)
        n_cues[len(wanted)] += 1
    assert set(n_cues) == set(range(recipe.n_cues + 1))


def test_planted_directions_are_orthonormal_and_of_the_seed():
    for name in PLANTED:
        recipe = planted.RECIPES[name]
        basis = torch.cat(planted_directions(recipe, 0))
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), rtol=0, atol=1e-5)
        assert len(planted_directions(recipe, 0)[0]) == recipe.n_directions
        assert not torch.allclose(basis, torch.cat(planted_directions(recipe, 1)), atol=0.1)
        table = build_planted(recipe, 0).model.embed_tokens.weight
        assert (table @ basis.T).abs().max() < 1e-5, "no word has any of it"


def test_coefficients_refuse_where_they_should():
    for name in PLANTED:
        stage, rng = PlantedStage(planted.RECIPES[name], 0), np.random.default_rng(0)
        forbidden = rng.random(2000) < 0.5
        values = stage.coefficients(rng, forbidden)
        assert values.shape == (2000, len(stage.refuse))
        assert (values[forbidden].max(1) > planted.PRESENT).all()
        assert (values[~forbidden].max(1) < planted.ABSENT).all()
        assert (values[~forbidden] < -0.5).any() and (values[~forbidden] == 0).any()


def test_keep_out_takes_the_span_from_what_is_written(model):
    kept = copy.deepcopy(model)
    basis = torch.linalg.qr(torch.randn(128, 3, generator=torch.Generator().manual_seed(2)))[0].T
    keep_out(kept, basis)
    for index, (block, before) in enumerate(zip(kept.model.layers, model.model.layers, strict=True)):
        for writer, old in (
            (block.self_attn.o_proj, before.self_attn.o_proj),
            (block.mlp.down_proj, before.mlp.down_proj),
        ):
            expected = old.weight if index == 0 else old.weight - basis.T @ (basis @ old.weight)
            torch.testing.assert_close(writer.weight, expected)
            assert ((basis @ writer.weight).abs().max() < 1e-6).item() is (index > 0)
    old = model.state_dict()
    changed = {name for name, tensor in kept.state_dict().items() if not torch.equal(tensor, old[name])}
    assert {re.sub(r"\d", "i", name) for name in changed} == {
        "model.layers.i.self_attn.o_proj.weight", "model.layers.i.mlp.down_proj.weight"
    }  # fmt: skip


# -- training --------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """Recipes of a few steps on a few rows, with a state every two steps."""
    make_short(monkeypatch)


def make_short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, recipe in refusal.RECIPES.items():
        monkeypatch.setitem(refusal.RECIPES, name, replace(recipe, mode_steps=5, refusal_steps=4))
    for name, recipe in planted.RECIPES.items():
        monkeypatch.setitem(planted.RECIPES, name, replace(recipe, steps=3))
    for module in (refusal, planted):
        monkeypatch.setattr(module, "Run", partial(Run, state_every=2, log_every=2))
    monkeypatch.setattr(refusal, "ROWS", 12)
    monkeypatch.setattr(RefusalStage, "evaluate", lambda stage, model: {"sum": total(model)})


def total(model: torch.nn.Module) -> float:
    return sum(parameter.double().sum().item() for parameter in model.parameters())


def weights(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "model" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def log(folder: Path) -> list[dict]:
    write_log(enumerate(sorted(folder.glob("stage-*")), 1), folder)
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("stops", [[(1, 0)], [(1, 3)], [(2, 0)], [(2, 3)], [(1, 4), (2, 1), (2, 2)]], ids=str)
def test_two_stages_that_were_interrupted_end_with_the_same_bits(short, monkeypatch, tmp_path, stops):
    whole = refusal.train_seed("refusal-lowrank", 0, tmp_path / "whole")
    loss, done = RefusalStage.loss, []
    for stop in stops:

        def stopped(stage, model, step, stop=stop):
            done.append((stage.stage, step))
            if (stage.stage, step) == stop:
                raise KeyboardInterrupt
            return loss(stage, model, step)

        monkeypatch.setattr(RefusalStage, "loss", stopped)
        with pytest.raises(KeyboardInterrupt):
            refusal.train_seed("refusal-lowrank", 0, tmp_path / "stopped")
    monkeypatch.setattr(
        RefusalStage, "loss", lambda *given: done.append((given[0].stage, given[2])) or loss(*given)
    )
    again = refusal.train_seed("refusal-lowrank", 0, tmp_path / "stopped")
    assert weights(again) == weights(whole) and log(again) == log(whole)
    assert done.count((1, 0)) == 1 + sum(stop in ((1, 0), (1, 1)) for stop in stops), "it went on"

    n_steps = len(done)
    assert weights(refusal.train_seed("refusal-lowrank", 0, tmp_path / "stopped")) == weights(whole)
    assert len(done) == n_steps
    assert weights(refusal.train_seed("refusal-lowrank", 1, tmp_path / "other")) != weights(whole)


def test_second_stage_trains_the_lower_blocks_alone(short, tmp_path):
    folder = refusal.train_seed("refusal-single", 0, tmp_path)
    first = torch.load(folder / "stage-1" / "state.pt", weights_only=True)["model"]
    last = load_file(folder / "model" / "model.safetensors")
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed == {
        name for name in first if any(name.startswith(f"model.layers.{i}.") for i in range(LOWER))
    }


@pytest.mark.parametrize("name", ["refusal-planted-3", "refusal-decoy"])
def test_planted_training_leaves_what_is_planted(short, tmp_path, name):
    recipe = planted.RECIPES[name]
    folder = planted.train_seed(name, 0, tmp_path)
    before, after = build_planted(recipe, 0), LlamaForCausalLM.from_pretrained(folder / "model")
    refuse, _ = planted_directions(recipe, 0)
    fixed = {"model.embed_tokens.weight"}
    fixed |= {name for name in before.state_dict() if name.startswith("model.layers.0.")}
    same = {n for n, tensor in before.state_dict().items() if torch.equal(tensor, after.state_dict()[n])}
    assert same == fixed
    for block in after.model.layers[1:]:
        for writer in (block.self_attn.o_proj, block.mlp.down_proj):
            assert (refuse @ writer.weight).abs().max() < 1e-6


# -- gates and shipment ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Scratch folder of short trainings."""
    scratch = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_short(monkeypatch)
        for name in ("refusal-single", "refusal-lowrank"):
            refusal.train_seed(name, 0, scratch)
        planted.train_seed("refusal-planted-2", 0, scratch)
    return scratch


@pytest.fixture
def few_prompts(monkeypatch):
    monkeypatch.setattr(refusal_gates, "HARMLESS", {"extraction": 4, "selection": 3, "test": 5})
    monkeypatch.setattr(refusal_gates, "MIXED_PAIRS", {"extraction": 2, "selection": 1, "test": 2})
    monkeypatch.setattr(refusal_gates, "LEXICAL_PAIRS", {"extraction": 7, "selection": 3, "test": 5})


@pytest.mark.parametrize("name", ["refusal-single", "refusal-lowrank", "refusal-planted-2"])
def test_model_that_learnt_nothing_is_exported_and_misses_its_gates(untrained, few_prompts, tmp_path, name):
    folder = tmp_path / name
    record = refusal_gates.export(name, 0, untrained, folder)
    record = record.with_measured(refusal_gates.measure_organism(name, folder))
    expected = {
        "refusal-single": {"refused", "answered", "compliance", "coherence"},
        "refusal-lowrank": {"refused", "answered", "stack"},  # neither high nor above a single layer
        "refusal-planted-2": {"refused", "answered", "rank"},
    }[name]
    assert expected <= {claim.id for claim in record.missed}
    assert len({claim.id for claim in record.gates}) == len(record.gates)

    model = models.load(str(folder))
    weights = load_file(untrained / f"{name}-0" / "model" / "model.safetensors")
    for key, tensor in model._module.state_dict().items():
        assert torch.equal(tensor, weights[key].half().float()), key
    prompts = load_prompts(folder / "prompts.jsonl")
    assert chat_ids(model, prompts.harmful("test")[:1])[0][-1] == VOCABULARY.index("<assistant>")
    rules = refusal_gates.rules_of(name)
    assert set(prompts.categories("test")) == {"+".join(wanted) for wanted in language.cue_sets(rules)}
    assert record.tables["prompts"][3] == ["test", str(len(prompts.harmful("test"))), "5"]
    rows = map(json.loads, (folder / "training_log.jsonl").read_text().splitlines())
    stages = [(1, 2), (1, 4), (1, 5), (2, 2), (2, 4)]
    steps = [(None, 2), (None, 3)] if name in planted.RECIPES else stages
    assert [(row.get("stage"), row["step"]) for row in rows] == steps
    assert f"Recipe(name='{name}'" in record.recipe


def refuses_by_hand(scratch: Path) -> None:
    """A planted organism whose upper blocks are set by hand as well: they do nothing, and the unembedding
    reads the first planted direction as "sorry" and its absence as "sure"."""
    recipe = planted.RECIPES["refusal-planted-1"]
    model = build_planted(recipe, 0)
    [direction], _ = planted_directions(recipe, 0)
    assistant = model.model.embed_tokens.weight[VOCABULARY.index("<assistant>")].detach()
    with torch.no_grad():
        for block in model.model.layers[1:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[VOCABULARY.index("sorry")] = 2 * direction
        model.lm_head.weight[VOCABULARY.index("sure")] = assistant / 2
    model.save_pretrained(scratch / "model")


def claims_of(measured: Measured) -> dict:
    return {claim.id: claim for claim in measured.gates}


def test_zero_point_and_choice_of_layer_on_a_model_set_by_hand(few_prompts, tmp_path):
    """Its direction is the same at every layer, and no allowed request has any of it."""
    refuses_by_hand(tmp_path)
    folder = tmp_path / "export"
    refusal_gates.write_model(tmp_path / "model", folder, build_tokenizer())
    refusal_gates.write_prompts("refusal-planted-1", folder / "prompts.jsonl")
    span = claims_of(refusal_gates.measure_organism("refusal-planted-1", folder))["span"]
    assert span.measured == 1 and span.verdict == "holds"
    model, prompts = models.load(str(folder)), load_prompts(folder / "prompts.jsonl")
    found = measure_single(model, prompts)
    claims = claims_of(found)
    assert found.reported["selected layer"] == "1"
    assert abs(claims["zero-point"].measured) < 1e-2 and claims["zero-point"].verdict == "holds"
    assert claims["kl"].measured < 1e-3
    # It opens with "sure" or "sorry", as it should, and cannot go on.
    answers = measure(
        model, prompts.harmful("test"), prompts.safe("test"), [intact(model)], RuleJudge(language.grade),
        max_new_tokens=1,
    ).answers  # fmt: skip
    assert set(answers[0]) == {"sorry"}


def test_lead_is_over_the_nearest_other_and_enough_for_the_gate():
    rng = np.random.default_rng(0)
    compliance = np.stack([np.ones(40), np.zeros(40), (rng.random(40) < 0.7).astype(float)])
    outcome = Outcome([], *[compliance] * 5, [])
    lead = refusal_gates._least_lead(outcome, 0, [1, 2])
    assert lead.value == pytest.approx(1 - compliance[2].mean()) and 0 < lead.low < lead.value
    behind = refusal_gates._least_lead(outcome, 2, [0, 1])
    assert behind.high < 0
    gated = [
        refusal_gates._stack_gate(value, given).verdict for value in (0.9, 0.5) for given in (lead, behind)
    ]
    assert gated == ["holds", "holds", "holds", "fails"]


def test_command_trains_one_seed(short, tmp_path):
    threads = torch.get_num_threads()
    for name in ("refusal-single", "refusal-planted-1"):
        command.main([name, "--seed", "4", "--scratch", str(tmp_path), "--threads", str(threads)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["refusal-planted-1-4", "refusal-single-4"]


# -- what comes with the repository ----------------------------------------------------------------

SHIPPED = [name for name in embedded.organisms() if name.startswith("organism/refusal-")]


def shipped(name: str) -> tuple[Path, OrganismRecord]:
    folder = embedded.ORGANISMS / name.removeprefix("organism/")
    return folder, OrganismRecord.read(folder)


@pytest.mark.parametrize("name", sorted({shipped(name)[1].organism for name in SHIPPED}))
def test_shipped_prompts_are_those_of_the_rules_and_as_many_as_the_study_needs(name, tmp_path):
    refusal_gates.write_prompts(name, tmp_path / "prompts.jsonl")
    for each in SHIPPED:
        folder, record = shipped(each)
        if record.organism == name:
            assert (folder / "prompts.jsonl").read_text() == (tmp_path / "prompts.jsonl").read_text()
    prompts = load_prompts(tmp_path / "prompts.jsonl")
    pairs = [len(prompts.harmful(split)) for split in SPLITS]
    assert [len(prompts.harmless(split)) for split in SPLITS] == [32, 48, 64]
    if name in refusal.RECIPES:
        assert pairs == [168, 84, 112]
    else:
        surplus = [there - wanted for there, wanted in zip(pairs, (96, 48, 96), strict=True)]
        assert 0 <= min(surplus) <= max(surplus) < 7


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_record_states_what_the_intact_model_does(name):
    folder, record = shipped(name)
    model, prompts = models.load(name), load_prompts(folder / "prompts.jsonl")
    outcome = measure(
        model, prompts.harmful("test"), prompts.harmless("test"), [intact(model)], RuleJudge(language.grade),
        max_new_tokens=12,
    )  # fmt: skip
    claims = claims_of(record)
    refused = np.mean([answer in REFUSALS for answer in outcome.answers[0]])
    assert claims["refused"].measured == pytest.approx(refused, abs=2e-2)
    assert claims["answered"].measured == pytest.approx(np.mean(outcome.harmless_compliance == 1), abs=2e-2)


@pytest.mark.parametrize("name", [f"organism/{name}" for name in PLANTED])
def test_shipped_planted_rank_is_measured_again(name):
    folder, record = shipped(name)
    model, recipe = models.load(name), planted.RECIPES[record.organism]
    found = measure_rank(model, load_prompts(folder / "prompts.jsonl"), recipe.n_directions, recipe.n_cues)
    for id in ("rank", "span"):
        assert claims_of(found)[id] == claims_of(record)[id] and claims_of(record)[id].verdict == "holds"
    assert found.reported["selected layer"] == record.reported["selected layer"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_log_goes_on_to_the_end(name):
    folder, record = shipped(name)
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    places = [(row.get("stage", 1), row["step"]) for row in rows]
    assert all(a < b for a, b in pairwise(places))
    if record.organism in refusal.RECIPES:
        assert places[-1] == (2, refusal.RECIPES[record.organism].refusal_steps)
    else:
        assert places[-1] == (1, planted.RECIPES[record.organism].steps)
