"""Refusal organisms: their batches and losses, what is planted by hand, training, gates and shipment."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lib import language, models
from lib.generation import chat_ids, intact
from lib.judges import RuleJudge
from lib.language import REFUSALS, Request
from lib.organisms import __main__ as command
from lib.organisms import codi, gates, planted, refusal, refusal_cards
from lib.organisms.gates import check_rank, check_single
from lib.organisms.planted import STRENGTH, PlantedStage, build_planted, keep_out, planted_directions
from lib.organisms.refusal import LOWER, SPECIAL, Stage, build_model, build_tokenizer, removed, zero_point
from lib.organisms.shipping import Check, joined_logs
from lib.organisms.training import Run
from lib.prompts import SPLITS, load_prompts
from lib.refusal import measure

VOCABULARY = (*SPECIAL, *language.WORDS)
PLANTED = sorted(planted.RECIPES)


@pytest.fixture(scope="module")
def model():
    return build_model(0).eval()


def request_of(prompt: str) -> Request:
    [text] = re.fullmatch(r"<bos> <user> (.*) <end> <[a-z0-9-]+>", prompt).groups()
    return language.parse(text)


# -- batches ---------------------------------------------------------------------------------------


def batch(stage: Stage, model: torch.nn.Module, step: int) -> tuple[list, float]:
    """What a step reads, and its loss."""
    rows = []
    encode = stage.encode
    stage.encode = lambda given: rows.extend(given) or encode(given)
    try:
        with torch.no_grad():
            return rows, stage.loss(model, step).item()
    finally:
        del stage.encode


def stages(seed: int) -> list[Stage]:
    return [
        Stage(refusal.RECIPES["refusal-single"], seed, 1),
        Stage(refusal.RECIPES["refusal-lowrank"], seed, 2),
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
    assert batch(Stage(recipe, 0, 1), model, 5)[0] != batch(Stage(recipe, 0, 2), model, 5)[0]


@pytest.mark.parametrize("name", sorted(refusal.RECIPES))
@pytest.mark.parametrize("number", [1, 2])
def test_rows_are_answered_and_refused_as_they_should(name, number):
    stage, rng = Stage(refusal.RECIPES[name], 0, number), np.random.default_rng(0)
    kinds, refused_with, alone = Counter(), Counter(), []
    for _ in range(1500):
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
    assert min(kinds.values()) > 150
    if number == 2:
        assert len(refused_with) == stage.recipe.n_modes
        assert 0.4 < np.mean(alone) < 0.8, "one cue alone is common"


def test_loss_is_of_the_answers_alone(model):
    stage = Stage(refusal.RECIPES["refusal-single"], 0, 1)
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
    stage = Stage(refusal.RECIPES["refusal-single"], 0, 1)
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
    monkeypatch.setattr(Stage, "evaluate", lambda stage, model: {"sum": total(model)})


def total(model: torch.nn.Module) -> float:
    return sum(parameter.double().sum().item() for parameter in model.parameters())


def weights(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "model" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def log(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in joined_logs(refusal_cards._stages(folder)).splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("stops", [[(1, 0)], [(1, 3)], [(2, 0)], [(2, 3)], [(1, 4), (2, 1), (2, 2)]], ids=str)
def test_two_stages_that_were_interrupted_end_with_the_same_bits(short, monkeypatch, tmp_path, stops):
    whole = refusal.train_seed("refusal-lowrank", 0, tmp_path / "whole")
    loss, done = Stage.loss, []
    for stop in stops:

        def stopped(stage, model, step, stop=stop):
            done.append((stage.stage, step))
            if (stage.stage, step) == stop:
                raise KeyboardInterrupt
            return loss(stage, model, step)

        monkeypatch.setattr(Stage, "loss", stopped)
        with pytest.raises(KeyboardInterrupt):
            refusal.train_seed("refusal-lowrank", 0, tmp_path / "stopped")
    monkeypatch.setattr(Stage, "loss", lambda *given: done.append((given[0].stage, given[2])) or loss(*given))
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


# -- gates -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped_untrained(tmp_path_factory):
    """Scratch folder of short trainings, of three seeds and of one."""
    scratch = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_short(monkeypatch)
        for seed in (0, 1, 2):
            refusal.train_seed("refusal-single", seed, scratch)
        refusal.train_seed("refusal-lowrank", 0, scratch)
        planted.train_seed("refusal-planted-2", 0, scratch)
    return scratch


@pytest.fixture
def few_prompts(monkeypatch):
    monkeypatch.setattr(refusal_cards, "N_ROWS", 200)
    monkeypatch.setattr(refusal_cards, "HARMLESS", {"extraction": 4, "selection": 3, "test": 5})
    monkeypatch.setattr(refusal_cards, "MIXED_PAIRS", {"extraction": 2, "selection": 1, "test": 2})
    monkeypatch.setattr(refusal_cards, "LEXICAL_PAIRS", {"extraction": 7, "selection": 3, "test": 5})


def missed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.met}


@pytest.mark.parametrize("name", ["refusal-single", "refusal-lowrank", "refusal-planted-2"])
def test_gates_of_a_model_that_learnt_nothing(shipped_untrained, few_prompts, name):
    checks = refusal_cards.measure_as_shipped(name, shipped_untrained / f"{name}-0")
    fail = missed(checks)
    assert {"intact: forbidden requests refused", "intact: harmless requests answered"} <= fail
    expected = {
        "refusal-single": {"k = 1: compliance", "k = 1: coherence"},
        "refusal-lowrank": {"its compliance"},  # neither high nor above a single layer
        "refusal-planted-2": {"behavioural rank k*"},
    }[name]
    assert expected <= fail
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.gate for check in checks if not check.met)


def refuses_by_hand(tmp_path: Path) -> Path:
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
    model.save_pretrained(tmp_path / "model")
    return tmp_path


def test_zero_point_and_choice_of_layer_on_a_model_set_by_hand(few_prompts, tmp_path):
    """Its direction is the same at every layer, and no allowed request has any of it."""
    folder = refuses_by_hand(tmp_path)
    checks = {c.name: c for c in refusal_cards.measure_as_shipped("refusal-planted-1", folder)}
    assert checks["directions that the categories span"].value == "1"
    model = models.load(str(folder / "export"))
    prompts = load_prompts(folder / "export" / "prompts.jsonl")
    found = {c.name: c for c in check_single(model, prompts)}
    assert found["selected layer"].value == "1"
    assert abs(found["zero point"].value) < 1e-2 and found["zero point"].met
    assert found["k = 1: KL on harmless requests"].value < 1e-3
    # It opens with "sure" or "sorry", as it should, and cannot go on.
    answers = measure(
        model, prompts.harmful("test"), prompts.safe("test"), [intact(model)], RuleJudge(language.grade),
        max_new_tokens=1,
    ).answers  # fmt: skip
    assert set(answers[0]) == {"sorry"}


def test_lead_is_over_the_nearest_other():
    rng = np.random.default_rng(0)
    compliance = np.stack([np.ones(40), np.zeros(40), (rng.random(40) < 0.7).astype(float)])
    outcome = gates.Outcome([], *[compliance] * 5, [])
    lead = gates._least_lead(outcome, 0, [1, 2])
    assert lead.value == pytest.approx(1 - compliance[2].mean()) and 0 < lead.low < lead.value
    assert gates._least_lead(outcome, 2, [0, 1]).high < 0


# -- shipment --------------------------------------------------------------------------------------


@pytest.fixture
def shipping(shipped_untrained, few_prompts, monkeypatch, tmp_path):
    """`publish` ships to a folder of this test."""
    monkeypatch.setattr(models, "ORGANISMS", tmp_path)
    return shipped_untrained


def card(name: str) -> str:
    return (models.ORGANISMS / name.removeprefix("organism/") / "README.md").read_text()


def rows_of(text: str) -> dict[str, list[str]]:
    """Rows of a card's table of gates: gate, then the value of each seed."""
    table = text[text.index("| | gate |") :].split("\n\n")[0]
    lines = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in table.splitlines()[2:]]
    return {name.strip(): values for name, *values in lines}


@pytest.mark.parametrize("name", ["refusal-lowrank", "refusal-planted-2"])
def test_shipment_loads_with_prompts_log_and_card(shipping, name):
    table = refusal_cards.publish(name, shipping, seeds=(0,))
    assert models.organisms() == [f"organism/{name}"]
    model, folder = models.load(f"organism/{name}"), models.ORGANISMS / name
    expected = load_file(shipping / f"{name}-0" / "model" / "model.safetensors")
    for key, tensor in model._module.state_dict().items():
        assert torch.equal(tensor, expected[key].half().float()), key
    prompts = load_prompts(folder / "prompts.jsonl")
    assert chat_ids(model, prompts.harmful("test")[:1])[0][-1] == VOCABULARY.index("<assistant>")
    rules = refusal_cards.rules_of(name)
    assert set(prompts.categories("test")) == {"+".join(wanted) for wanted in language.cue_sets(rules)}
    present = {path.name for path in folder.iterdir()}
    assert set(json.loads((folder / "manifest.json").read_text())) == present - {"manifest.json"}

    lines = (folder / "training_log.jsonl").read_text().splitlines()
    steps = [(row.get("stage"), row["step"]) for row in map(json.loads, lines)]
    stages = [(1, 2), (1, 4), (1, 5), (2, 2), (2, 4)]
    assert steps == (stages if name == "refusal-lowrank" else [(None, 2), (None, 3)])
    text = card(name)
    assert table in text and "trained from seed 0" in text
    assert text.index("**Not every gate was met:**") < text.index("A Llama of"), "shortfalls come first"
    for row, (gate, value) in rows_of(text).items():
        if gate and f"misses `{row}`" in text:
            assert f"* seed 0 misses `{row}` {gate}: {value}" in text
    recipe = (refusal.RECIPES | planted.RECIPES)[name]
    assert f"Recipe(name='{recipe.name}'" in text


@pytest.mark.parametrize(
    ("n_missed", "shipped"), [((0, 0, 0), 0), ((1, 0, 0), 1), ((2, 1, 0), 2), ((2, 1, 1), 1), ((1, 1, 1), 0)]
)
def test_first_seed_that_misses_the_fewest_gates_is_shipped(shipping, monkeypatch, n_missed, shipped):
    def pretend(name, folder):
        refusal_cards.export(folder / "model", folder / "export", build_tokenizer())
        refusal_cards.write_prompts(name, folder / "export" / "prompts.jsonl")
        count = n_missed[int(folder.name[-1])]
        return [Check(f"gate {i}", float(i), ">= 9", i >= count) for i in range(3)]

    for seed in (0, 1, 2):
        refusal_cards.shutil.rmtree(shipping / f"refusal-single-{seed}" / "export", ignore_errors=True)
    monkeypatch.setattr(refusal_cards, "measure_as_shipped", pretend)
    models.ORGANISMS.joinpath("refusal-single-seed7").mkdir()  # of an earlier shipment
    refusal_cards.publish("refusal-single", shipping, seeds=(0, 1, 2))
    others = [seed for seed in (0, 1, 2) if seed != shipped]
    names = ["organism/refusal-single", *(f"organism/refusal-single-seed{seed}" for seed in others)]
    assert models.organisms() == names
    assert [path.name for path in sorted(models.ORGANISMS.iterdir())] == [n.split("/")[1] for n in names]
    for seed, name in zip([shipped, *others], names, strict=True):
        text = card(name)
        assert f"trained from seed {seed} " in text and text.startswith(f"# {name}\n")
        assert f"`organism/refusal-single` is seed {shipped}: " in text
        assert ("meets every gate" in text) is (n_missed[shipped] == 0)
        misses = re.findall(r"^\* seed (\d) misses `gate", text, re.M)
        assert Counter(map(int, misses)) == Counter({s: n for s, n in enumerate(n_missed) if n})
        assert list(rows_of(text)) == ["gate 0", "gate 1", "gate 2"]


def test_command_knows_all_and_trains_one_seed(short, monkeypatch, tmp_path):
    assert set(command.ORGANISMS) == {"induction", *refusal.RECIPES, *planted.RECIPES, *codi.RECIPES}
    assert {name: o.seeds for name, o in command.ORGANISMS.items() if name in refusal.RECIPES} == {
        name: (0, 1, 2) for name in refusal.RECIPES
    }
    assert all(command.ORGANISMS[name].seeds == (0,) for name in planted.RECIPES)
    threads = torch.get_num_threads()
    for name in ("refusal-single", "refusal-planted-1"):
        given = ["lib.organisms", name, "--seed", "4", "--scratch", str(tmp_path), "--threads", str(threads)]
        monkeypatch.setattr(sys, "argv", given)
        command.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["refusal-planted-1-4", "refusal-single-4"]


def test_prompts_are_as_many_as_the_study_needs(tmp_path):
    for name in (*refusal.RECIPES, *planted.RECIPES):
        refusal_cards.write_prompts(name, tmp_path / name)
        prompts = load_prompts(tmp_path / name)
        pairs = [len(prompts.harmful(split)) for split in SPLITS]
        assert [len(prompts.harmless(split)) for split in SPLITS] == [32, 48, 64]
        if name in refusal.RECIPES:
            assert pairs == [168, 84, 112]
        else:
            surplus = [there - wanted for there, wanted in zip(pairs, (96, 48, 96), strict=True)]
            assert 0 <= min(surplus) <= max(surplus) < 7


# -- what comes with the repository ----------------------------------------------------------------

SHIPPED = [name for name in models.organisms() if name.startswith("organism/refusal-")]


def seeds_of(text: str) -> list[int]:
    """The seeds of a card's table, in the order of its columns."""
    [header] = re.findall(r"^\| \| gate \| (.*) \|$", text, re.M)
    return [int(seed) for seed in re.findall(r"seed (\d+)", header)]


def recipe_name(name: str) -> str:
    return re.sub(r"-seed\d+$", "", name.removeprefix("organism/"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_prompts_are_those_of_the_rules(name, tmp_path):
    refusal_cards.write_prompts(recipe_name(name), tmp_path / "prompts.jsonl")
    shipped = models.ORGANISMS / name.removeprefix("organism/") / "prompts.jsonl"
    assert shipped.read_text() == (tmp_path / "prompts.jsonl").read_text()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_card_states_what_the_intact_model_does(name):
    model = models.load(name)
    prompts = load_prompts(models.ORGANISMS / name.removeprefix("organism/") / "prompts.jsonl")
    outcome = measure(
        model, prompts.harmful("test"), prompts.harmless("test"), [intact(model)], RuleJudge(language.grade),
        max_new_tokens=12,
    )  # fmt: skip
    text, rows = card(name), rows_of(card(name))
    [seed] = map(int, re.findall(r"trained from seed (\d+)", text))
    column = 1 + seeds_of(text).index(seed)
    refused = np.mean([answer in REFUSALS for answer in outcome.answers[0]])
    answered = np.mean(outcome.harmless_compliance == 1)
    assert float(rows["intact: forbidden requests refused"][column]) == pytest.approx(refused, abs=2e-2)
    assert float(rows["intact: harmless requests answered"][column]) == pytest.approx(answered, abs=2e-2)


@pytest.mark.parametrize("name", [name for name in SHIPPED if recipe_name(name) in planted.RECIPES])
def test_shipped_planted_rank_is_measured_again(name):
    model, recipe = models.load(name), planted.RECIPES[recipe_name(name)]
    prompts = load_prompts(models.ORGANISMS / name.removeprefix("organism/") / "prompts.jsonl")
    checks = {c.name: c for c in check_rank(model, prompts, recipe.n_directions, recipe.n_cues)}
    rows = rows_of(card(name))
    for row in ("behavioural rank k*", "directions that the categories span", "selected layer"):
        assert rows[row][1] == checks[row].value


def holds(value: str, gate: str) -> bool:
    """Whether a number of a card is within its gate."""
    if value == "none":
        return False
    relation, limit = re.match(r"(>=|<=|=|within) ([\d.]+)", gate).groups()
    number, limit = float(value), float(limit)
    return {
        ">=": number >= limit,
        "<=": number <= limit,
        "=": number == limit,
        "within": abs(number) < limit,
    }[relation]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_card_lists_every_shortfall(name):
    text, rows = card(name), rows_of(card(name))
    for row, (gate, *values) in rows.items():
        for column, (seed, value) in enumerate(zip(seeds_of(text), values, strict=True), start=1):
            if gate:
                met = holds(value, gate)
                if "lead" in gate:
                    lead = rows["its lead over every layer and random subspaces"][column]
                    met |= float(re.search(r"\[(\S+),", lead)[1]) > 0
                assert (f"* seed {seed} misses `{row}` " in text) is not met, (row, seed)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_log_goes_on_to_the_end(name):
    folder = models.ORGANISMS / name.removeprefix("organism/")
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    places = [(row.get("stage", 1), row["step"]) for row in rows]
    assert all(a < b for a, b in pairwise(places))
    recipe = recipe_name(name)
    if recipe in refusal.RECIPES:
        wanted = (2, refusal.RECIPES[recipe].refusal_steps)
    else:
        wanted = (1, planted.RECIPES[recipe].steps)
    assert places[-1] == wanted
