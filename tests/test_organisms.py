"""Embedded models: what they are trained on, that training resumes to the bit, and what is shipped."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lib import attention, models
from lib.interventions import Condition, ablation_sweep
from lib.organisms import induction, training
from lib.organisms.induction import FREE_WORDS, GATES, GRID_WORDS, PHASES, SCHEDULE, SPECIAL, Phase, Stream
from lib.organisms.streams import TrigramLanguage, chains, repeats
from lib.organisms.training import Run, Schedule, train
from lib.parameters import GRID_WORDS as WORDS_OF_THE_GRID
from lib.walks import grid_graph, random_walks, rule_following_accuracy

WORDS = np.arange(100, 160)

# The real recipe on a model that trains in seconds: two blocks first, the third joins at step 12.
SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "head_dim": 16,
}  # fmt: skip
SMALL_PHASES = (
    Phase(6, 16, 4, blocks=2, repeats=0.0, chains=0.0, trigrams=1.0),
    Phase(6, 32, 4, blocks=2, repeats=0.5, chains=0.25, trigrams=0.25),
    Phase(6, 32, 4, blocks=3, repeats=0.25, chains=0.7, trigrams=0.05),
)
JOINS, STEPS, CHECKPOINTS = 12, 18, (0, 4, 13)


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(induction, "LlamaConfig", lambda **options: LlamaConfig(**options | SIZES))
    monkeypatch.setattr(induction, "PHASES", SMALL_PHASES)
    monkeypatch.setattr(induction, "STEPS", STEPS)
    monkeypatch.setattr(induction, "SCHEDULE", Schedule(cycles=((STEPS, 2e-3),)))
    monkeypatch.setattr(induction, "CHECKPOINTS", CHECKPOINTS)


@pytest.fixture
def small(monkeypatch):
    """The recipe made small, with a state every three steps and a cheap row of the log every four."""
    make_small(monkeypatch)
    monkeypatch.setattr(induction, "Run", partial(Run, state_every=3, log_every=4))
    monkeypatch.setattr(induction, "Evaluation", lambda: lambda model: {"sum": total(model)})


def total(model: torch.nn.Module) -> float:
    return sum(parameter.double().sum().item() for parameter in model.parameters())


# Streams


def test_repeats_have_a_period_and_two_copies_at_least():
    length = 48
    rows = repeats(np.random.default_rng(0), 400, length, WORDS)
    assert rows.shape == (400, length) and set(rows.ravel()) == set(WORDS)
    periods = [
        next(p for p in range(1, length + 1) if np.array_equal(row[p:], row[: length - p])) for row in rows
    ]
    assert set(periods) == set(range(4, length // 2 + 1)), "each of them occurs, and no other"


def follows(row: np.ndarray) -> set[tuple[int, int]]:
    return set(zip(row[:-1].tolist(), row[1:].tolist(), strict=True))


def is_directed_and_sparse(edges: set[tuple[int, int]]) -> bool:
    """No word follows itself, no pair occurs in both orders, no word has more than four successors."""
    fan_out = Counter(before for before, _ in edges)
    return all((after, before) not in edges for before, after in edges) and max(fan_out.values()) <= 4


def test_chains_walk_on_directed_graphs():
    """With many states none is without a successor (probability 1e-5 a row), so the rule is strict."""
    rows = chains(np.random.default_rng(0), 400, 300, WORDS, n_states=(22, 28))
    assert set(rows.ravel()) == set(WORDS) and max(len(set(row)) for row in rows) <= 28
    assert all(is_directed_and_sparse(follows(row)) for row in rows)
    assert len({frozenset(row) for row in rows}) == len(rows), "a graph of its own every row"


def test_dead_end_is_the_only_exception_and_rare():
    """A state that no pair leaves is followed by any state; a graph has one at most."""
    rows = chains(np.random.default_rng(1), 2000, 300, WORDS)
    odd = [follows(row) for row in rows if not is_directed_and_sparse(follows(row))]
    assert 0 < len(odd) < 0.02 * len(rows)
    for edges in odd:
        assert any(
            is_directed_and_sparse({edge for edge in edges if edge[0] != dead_end})
            for dead_end in {before for before, _ in edges}
        )


def test_walk_leaves_a_dead_end_for_any_state():
    rows = chains(np.random.default_rng(2), 30, 400, WORDS, n_states=(2, 2))
    for row in rows:
        after = defaultdict(list)
        for before, now in zip(row[:-1], row[1:], strict=True):
            after[before].append(now)
        [start], [dead_end] = [w for w in after if w not in after[w]], [w for w in after if w in after[w]]
        assert set(after[start]) == {dead_end}
        assert 0.3 < np.mean(np.array(after[dead_end]) == start) < 0.7


def test_successors_are_two_to_four_and_equally_likely():
    fans = Counter()
    for row in chains(np.random.default_rng(3), 20, 4000, WORDS, n_states=(24, 24)):
        pairs = Counter(zip(row[:-1], row[1:], strict=True))
        for word, visits in Counter(row[:-1]).items():
            counts = np.array([n for (before, _), n in pairs.items() if before == word])
            if visits < 150:
                continue
            share = 1 / len(counts)
            assert np.abs(counts / visits - share).max() < 5 * np.sqrt(share * (1 - share) / visits)
            fans[len(counts)] += 1
    assert set(fans) == {2, 3, 4}


def test_trigram_language_follows_its_rules():
    language = TrigramLanguage(WORDS[:40])
    assert language.members.shape == (8, 5) and sorted(language.members.ravel()) == sorted(WORDS[:40])
    rows = language.sample(np.random.default_rng(0), 400, 200)
    of_class = {word: c for c, members in enumerate(language.members) for word in members}
    classes = np.vectorize(of_class.get)(rows)
    allowed = language.next[classes[:, :-2], classes[:, 1:-1]]  # [row, token, 2]
    likely, unlikely = (allowed == classes[:, 2:, None]).transpose(2, 0, 1)
    assert (likely ^ unlikely).all(), "one of two classes, which differ"
    assert abs(likely.mean() - 0.85) < 5 * np.sqrt(0.85 * 0.15 / likely.size)
    for members in language.members:
        shares = np.array([(rows == word).sum() for word in members]) / np.isin(rows, members).sum()
        assert np.abs(shares - 1 / 5).max() < 0.03
    # Both words before matter: neither alone decides.
    assert (language.next[..., 0] != language.next[:1, :, 0]).any()
    assert (language.next[..., 0] != language.next[:, :1, 0]).any()


def test_trigram_language_is_one_for_all_seeds_and_leaves_out_the_grid_words():
    first, second = (Stream(seed).trigrams for seed in (0, 1))
    assert np.array_equal(first.members, second.members) and np.array_equal(first.next, second.next)
    vocabulary = induction.words()
    spoken = {vocabulary[token - len(SPECIAL)] for token in first.members.ravel()}
    assert spoken == set(vocabulary[FREE_WORDS:]) and not spoken & set(WORDS_OF_THE_GRID)


def test_vocabulary_opens_with_the_words_of_the_grid():
    vocabulary = induction.words()
    assert tuple(vocabulary[:GRID_WORDS]) == WORDS_OF_THE_GRID
    assert len(set(vocabulary)) == len(vocabulary) >= 300


# The batch of a step


def test_batch_is_a_function_of_seed_and_step():
    steps = [0, 350, 1250, 3100]
    stream = Stream(3)
    batches = {step: stream.batch(step) for step in steps}
    for step in reversed(steps):  # in another order, and by another object
        assert torch.equal(stream.batch(step), batches[step])
        assert torch.equal(Stream(3).batch(step), batches[step])
        assert not torch.equal(Stream(4).batch(step), batches[step])
        assert not torch.equal(stream.batch(step + 1), batches[step])


def test_batch_has_the_phase_of_its_step():
    stream, last = Stream(0), np.cumsum([phase.steps for phase in PHASES])
    assert last[-1] == induction.STEPS and max(induction.CHECKPOINTS) <= induction.STEPS
    for phase, end in zip(PHASES, last, strict=True):
        assert phase.repeats + phase.chains + phase.trigrams == pytest.approx(1)
        for step in (end - phase.steps, end - 1):
            ids = stream.batch(step)
            assert stream.phase(step) is phase and ids.shape == (phase.batch, phase.length)
            assert (ids[:, 0] == 0).all() and (ids[:, 1:] >= len(SPECIAL)).all()
    # Trigrams alone come first.
    early, later = (np.isin(stream.batch(step)[:, 1:], stream.trigrams.members) for step in (5, 400))
    assert early.all() and not later.all()
    # In the end only words that the trigrams leave out are copied; before, all of them.
    ends = (last[-2] - 1, last[-1] - 1)
    copied = [np.isin(stream.batch(step)[:, 1:], stream.trigrams.members) for step in ends]
    assert copied[0].any() and not copied[1].any()


# Model and tokenizer


def test_tokenizer_has_a_token_a_word_behind_bos():
    tokenizer, vocabulary = induction.build_tokenizer(), induction.words()
    assert tokenizer(" ".join(vocabulary)).input_ids == [0, *range(2, 2 + len(vocabulary))]
    assert tokenizer("apple nosuchword").tokens() == ["<bos>", "apple", "<unk>"]
    assert (tokenizer.bos_token, tokenizer.unk_token) == SPECIAL


def test_model_is_a_function_of_its_seed_and_ends_as_the_identity():
    model, weights, again, other = (induction.build_model(seed) for seed in (0, 0, 0, 1))
    weights, again, other = (each.state_dict() for each in (weights, again, other))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(weights["lm_head.weight"], other["lm_head.weight"])
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert identities(model) == [False] * PHASES[0].blocks + [True]


def identities(model: torch.nn.Module) -> list[bool]:
    """Which blocks give back their input, to the bit."""
    found = []
    handles = [
        block.register_forward_hook(lambda _, args, out: found.append(torch.equal(args[0], out)))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=Stream(0).batch(0)[:2], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_block_that_has_not_joined_stays_as_it_was(small, monkeypatch, tmp_path):
    fresh = induction.build_model(0)
    for steps, waits in ((JOINS, True), (JOINS + 1, False)):
        monkeypatch.setattr(induction, "SCHEDULE", Schedule(cycles=((steps, 2e-3),)))
        folder = induction.train_seed(0, tmp_path / str(steps))
        model = LlamaForCausalLM.from_pretrained(folder / "model")
        same = [
            all(map(torch.equal, block.parameters(), before.parameters()))
            for block, before in zip(model.model.layers, fresh.model.layers, strict=True)
        ]
        assert same == identities(model) == [False, False, waits]


# Training


def outcome(folder: Path) -> dict:
    """All that a run leaves, without the time that it took."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    files = {path.name: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    weights = load_file(folder / "model" / "model.safetensors")
    return {
        "log": [{key: value for key, value in row.items() if key != "seconds"} for row in rows],
        "checkpoints": files,
        "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
    }


@pytest.mark.parametrize("stops", [[0], [2], [3], [4], [13], [1, 5, 8, 17]], ids=str)
def test_interrupted_training_ends_with_the_same_bits(small, monkeypatch, tmp_path, stops):
    whole = outcome(induction.train_seed(0, tmp_path / "whole"))
    assert [row["step"] for row in whole["log"]] == [4, 8, 12, 16, 18]
    assert sorted(whole["checkpoints"]) == [f"step-{step:05d}.safetensors" for step in CHECKPOINTS]

    loss, steps = Stream.loss, []
    for stop in stops:

        def stopped(stream, model, step, stop=stop):
            steps.append(step)
            if step == stop:
                raise KeyboardInterrupt
            return loss(stream, model, step)

        monkeypatch.setattr(Stream, "loss", stopped)
        with pytest.raises(KeyboardInterrupt):
            induction.train_seed(0, tmp_path / "stopped")
    monkeypatch.setattr(Stream, "loss", lambda *arguments: steps.append(arguments[2]) or loss(*arguments))
    assert outcome(induction.train_seed(0, tmp_path / "stopped")) == whole
    assert steps.count(0) == 1 + sum(stop < 3 for stop in stops), "it went on from its last state"

    done = len(steps)
    assert outcome(induction.train_seed(0, tmp_path / "stopped")) == whole and len(steps) == done
    assert outcome(induction.train_seed(1, tmp_path / "other"))["weights"] != whole["weights"]


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6])
def test_training_stopped_while_it_writes_ends_with_the_same_bits(small, monkeypatch, tmp_path, call):
    """Six states in 18 steps; a state that was not written whole leaves the one before."""
    whole = outcome(induction.train_seed(0, tmp_path / "whole"))
    save, calls = torch.save, []

    def half(state, path):
        calls.append(path)
        save(state, path)
        if len(calls) == call:
            Path(path).write_bytes(Path(path).read_bytes()[:1000])
            raise KeyboardInterrupt

    monkeypatch.setattr(training.torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        induction.train_seed(0, tmp_path / "stopped")
    monkeypatch.setattr(training.torch, "save", save)
    assert outcome(induction.train_seed(0, tmp_path / "stopped")) == whole


def test_log_is_whole_though_training_was_stopped_before_it_was_written(small, monkeypatch, tmp_path):
    whole = outcome(induction.train_seed(0, tmp_path / "whole"))
    write, calls = Path.write_text, []

    def stop_at_the_last(path, text):
        calls.append(path)
        if len(calls) == STEPS // 3:
            raise KeyboardInterrupt
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        induction.train_seed(0, tmp_path / "stopped")
    monkeypatch.setattr(Path, "write_text", write)
    assert outcome(induction.train_seed(0, tmp_path / "stopped")) == whole


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_with_its_step(tmp_path, value):
    model, target = torch.nn.Linear(3, 1), torch.ones(3)

    def loss_at(model, step):
        return model(target).square().sum() + (value if step == 5 else 0.0)

    run = Run(tmp_path, state_every=2)
    with pytest.raises(FloatingPointError, match=f"loss {value} at step 5; last state in {tmp_path}"):
        train(model, loss_at, Schedule(cycles=((8, 2e-3),)), run, lambda _: {})
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 4 and all(tensor.isfinite().all() for tensor in state["model"].values())


def test_rate_warms_up_stays_and_falls():
    schedule = Schedule(cycles=((1000, 1e-3), (200, 5e-4)), warmup=50, decay_from=0.5, final=0.05)
    assert [schedule.rate_at(step) for step in (0, 24)] == pytest.approx([1e-3 / 50, 1e-3 / 2])
    assert [schedule.rate_at(step) for step in (49, 300, 500)] == pytest.approx([1e-3] * 3)
    assert schedule.rate_at(750) == pytest.approx(1e-3 * (0.05 + 0.95 / 2))
    assert schedule.rate_at(999) == pytest.approx(1e-3 * 0.05, rel=1e-3)
    assert [schedule.rate_at(step) for step in (1000, 1049, 1199)] == pytest.approx(
        [5e-4 / 50, 5e-4, 5e-4 * 0.05], rel=1e-2
    )
    assert schedule.steps == 1200 and SCHEDULE.steps == sum(phase.steps for phase in PHASES)


# Shipping


ROWS = {
    "accuracy_last_quarter": "accuracy, last quarter of 400 tokens",
    "top_previous_token": "top previous-token score",
    "top_induction": "top induction score",
}


class Card:
    """README.md of a shipped organism."""

    def __init__(self, model_id: str):
        self.text = (models.ORGANISMS / model_id.removeprefix("organism/") / "README.md").read_text()
        [self.seed] = map(int, re.findall(r"trained\s+from\s+seed\s+(\d+)", self.text))
        lines = [line.strip("| ").split(" | ") for line in self.text.splitlines() if line.startswith("| ")]
        self.table = {line[0]: line[1:] for line in lines}
        [header] = re.findall(r"^\| \| gate \| (.*) \|$", self.text, re.M)
        self.seeds = [int(seed) for seed in re.findall(r"seed (\d+)", header)]

    def measured(self, gate: str) -> dict[int, float]:
        """The value of every seed."""
        _, *values = self.table[ROWS[gate]]
        return {seed: float(value) for seed, value in zip(self.seeds, values, strict=True)}

    def stated(self, gate: str) -> float:
        """The gate itself."""
        return float(self.table[ROWS[gate]][0].removeprefix(">= "))


def measure(model_id: str) -> dict[str, float]:
    """The gates' metrics by the route of the notebook."""
    model = models.load(model_id)
    graph = grid_graph(4, 4, WORDS_OF_THE_GRID)
    walks, words = random_walks(graph, 16, 400, seed=0), models.word_ids(model, graph.words)
    ids = np.pad(np.array(words)[walks], ((0, 0), (1, 0)), constant_values=models.bos_id(model))
    intact, ids = [Condition("baseline")], torch.from_numpy(ids)
    sweep = ablation_sweep(model, ids, intact, word_ids=words)
    accuracy = rule_following_accuracy(sweep.word_probabilities[0], walks, graph)
    scores = attention.head_scores(model, models.plain_token_ids(model), bos=models.bos_id(model))
    return {
        "accuracy_last_quarter": accuracy[:, -100:].mean(),
        "top_previous_token": scores.previous_token.max(),
        "top_induction": scores.induction.max(),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Scratch folders of three small seeds, and what was measured on them."""
    scratch, measured = tmp_path_factory.mktemp("scratch"), {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        for seed in induction.SEEDS:
            folder = induction.train_seed(seed, scratch)
            measured[folder] = induction._measure_as_shipped(folder)
    return scratch, measured


@pytest.fixture
def shipping(trained, monkeypatch, tmp_path):
    """Scratch folders, and measurements to change; `publish` ships to a folder of this test."""
    scratch, measured = trained
    make_small(monkeypatch)
    monkeypatch.setattr(models, "ORGANISMS", tmp_path)
    monkeypatch.setattr(induction, "_measure_as_shipped", measured.__getitem__)
    return scratch, measured


def pretend(monkeypatch, scratch: Path, measured: dict[Path, dict], passed: tuple[int, ...]) -> None:
    """These seeds met every gate, and the others all but one."""
    for seed in induction.SEEDS:
        values = {gate: limit + 0.01 for gate, limit in GATES.items()}
        if seed not in passed:
            values["top_induction"] = GATES["top_induction"] - 0.01
        folder = scratch / f"induction-{seed}"
        monkeypatch.setitem(measured, folder, measured[folder] | values)


def test_shipment_loads_with_checkpoints_logs_and_cards(shipping):
    scratch, measured = shipping
    table = induction.publish(scratch)
    # As nobody passed, the most accurate is shipped, and the card says who missed what.
    accuracy = {s: measured[scratch / f"induction-{s}"]["accuracy_last_quarter"] for s in induction.SEEDS}
    shipped = max(accuracy, key=accuracy.get)
    others = [seed for seed in induction.SEEDS if seed != shipped]
    assert models.organisms() == ["organism/induction", *(f"organism/induction-seed{s}" for s in others)]
    for seed, name in zip([shipped, *others], models.organisms(), strict=True):
        folder, trained = models.ORGANISMS / name.removeprefix("organism/"), scratch / f"induction-{seed}"
        model, card = models.load(name), Card(name)
        expected = load_file(trained / "model" / "model.safetensors")
        for key, tensor in model._module.state_dict().items():
            assert torch.equal(tensor, expected[key].half().float()), key
        assert model._module.config.training_length == 32
        assert models.word_ids(model, WORDS_OF_THE_GRID) == list(range(2, 18)) and models.bos_id(model) == 0
        assert (folder / "training_log.jsonl").read_bytes() == (trained / "log.jsonl").read_bytes()
        present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert set(json.loads((folder / "manifest.json").read_text())) == present - {"manifest.json"}
        assert card.seed == seed and card.seeds == list(induction.SEEDS) and table in card.text
        for gate, limit in GATES.items():
            assert card.stated(gate) == limit
            value = card.measured(gate)[seed]
            assert f"seed {seed} misses `{gate}` >= {GATES[gate]}: {value:.3f}" in card.text
    assert models.checkpoints("organism/induction") == list(CHECKPOINTS)
    assert all(models.checkpoints(f"organism/induction-seed{seed}") == [] for seed in others)


def test_card_states_what_the_notebook_measures(shipping):
    scratch, _ = shipping
    induction.publish(scratch)
    for name in models.organisms():
        card = Card(name)
        for gate, value in measure(name).items():
            assert card.measured(gate)[card.seed] == pytest.approx(value, abs=6e-4), (name, gate)


@pytest.mark.parametrize(("passed", "shipped"), [((0, 1, 2), 0), ((1, 2), 1), ((2,), 2), ((), 0)])
def test_first_seed_that_meets_every_gate_is_shipped(shipping, monkeypatch, passed, shipped):
    scratch, measured = shipping
    for chosen in (induction.SEEDS, passed):  # nothing of an earlier shipment stays
        pretend(monkeypatch, scratch, measured, chosen)
        induction.publish(scratch)
    others = [seed for seed in induction.SEEDS if seed != shipped]
    assert models.organisms() == ["organism/induction", *(f"organism/induction-seed{s}" for s in others)]
    assert [Card(name).seed for name in models.organisms()] == [shipped, *others]
    assert models.checkpoints("organism/induction") == list(CHECKPOINTS)
    for other in others:
        assert models.checkpoints(f"organism/induction-seed{other}") == []
    text = Card("organism/induction").text
    assert ("All seeds meet every gate" in text) is (len(passed) == 3)
    assert ("the first that meets every gate" in text) is bool(passed)
    assert all((f"seed {s} misses `top_induction`" in text) is (s not in passed) for s in induction.SEEDS)


# What comes with the repository

SHIPPED = [name for name in models.organisms() if name.startswith("organism/induction")]


def test_three_seeds_come_with_the_repository():
    assert "organism/induction" in SHIPPED
    assert {Card(name).seed for name in SHIPPED} == set(induction.SEEDS)
    assert len(models.checkpoints("organism/induction")) >= 8


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_organism_is_what_its_card_says(name):
    card = Card(name)
    for gate, value in measure(name).items():
        assert card.stated(gate) == GATES[gate]
        assert card.measured(gate)[card.seed] == pytest.approx(value, abs=2e-3), gate
        assert sorted(card.measured(gate)) == sorted(induction.SEEDS)
        missed = {seed for seed, measured in card.measured(gate).items() if measured < GATES[gate]}
        assert {int(s) for s in re.findall(rf"seed (\d+) misses `{gate}` ", card.text)} == missed


@pytest.mark.parametrize("name", [name for name in SHIPPED if models.checkpoints(name)])
def test_shipped_checkpoints_load_and_end_near_the_model(name):
    last = models.load(name)._module.state_dict()
    distances = []
    for step in models.checkpoints(name):
        weights = models.load(name, revision=f"step-{step:05d}")._module.state_dict()
        assert weights.keys() == last.keys()
        distances.append(sum((weights[key] - last[key]).square().sum().item() for key in last))
    assert distances == sorted(distances, reverse=True), "each nearer to the end"
    assert distances[-1] == 0 < distances[-2], "the last is the end"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_log_ends_where_training_did(name):
    log = (models.ORGANISMS / name.removeprefix("organism/") / "training_log.jsonl").read_text()
    rows = [json.loads(line) for line in log.splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and steps[-1] == induction.STEPS
    # float16 on disk moves the numbers of the last row a little.
    final, card = rows[-1], Card(name)
    for gate in GATES:
        assert card.measured(gate)[card.seed] == pytest.approx(final[gate], abs=0.02)
