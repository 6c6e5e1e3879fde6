"""Embedded models: what they are trained on, that training resumes to the bit, and what is shipped."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lib.core import attention, embedded, models, tokens
from lib.core.interventions import Condition
from lib.core.statistics import Estimate
from lib.core.sweeps import ablation_sweep
from lib.induction.parameters import GRID_WORDS as WORDS_OF_THE_GRID
from lib.induction.walks import grid_graph, random_walks, rule_following_accuracy
from lib.organisms import cards, command, induction, refusal, training, word_problems
from lib.organisms.cards import Measured, OrganismRecord, gate
from lib.organisms.induction import FREE_WORDS, GATES, GRID_WORDS, PHASES, SCHEDULE, SPECIAL, Phase, Stream
from lib.organisms.shipping import Organism, publish
from lib.organisms.streams import TrigramLanguage, chains, repeats
from lib.organisms.training import Run, Schedule, train

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


def measure(model_id: str) -> dict[str, float]:
    """The gates' metrics by the route of the notebook."""
    model = models.load(model_id)
    graph = grid_graph(4, 4, WORDS_OF_THE_GRID)
    walks, words = random_walks(graph, 16, 400, seed=0), tokens.word_ids(model, graph.words)
    ids = np.pad(np.array(words)[walks], ((0, 0), (1, 0)), constant_values=tokens.bos_id(model))
    intact, ids = [Condition("baseline")], torch.from_numpy(ids)
    sweep = ablation_sweep(model, ids, intact, word_ids=words)
    accuracy = rule_following_accuracy(sweep.word_probabilities[0], walks, graph)
    scores = attention.head_scores(model, tokens.plain_token_ids(model), bos=tokens.bos_id(model))
    return {
        "accuracy_last_quarter": accuracy[:, -100:].mean(),
        "top_previous_token": scores.previous_token.max(),
        "top_induction": scores.induction.max(),
    }


def folder_of(name: str) -> Path:
    return embedded.ORGANISMS / name.removeprefix("organism/")


def test_shipment_loads_with_checkpoints_log_record_and_card(monkeypatch, tmp_path, capsys):
    make_small(monkeypatch)
    monkeypatch.setattr(embedded, "ORGANISMS", tmp_path / "organisms")
    monkeypatch.setitem(command.ORGANISMS, "induction", induction.ORGANISM._replace(seeds=(0, 1)))
    scratch = tmp_path / "scratch"
    threads = str(torch.get_num_threads())
    command.main(["induction", "--scratch", str(scratch), "--threads", threads])
    printed = capsys.readouterr().out
    table = printed[printed.index("Gates were fixed") :]
    assert embedded.organisms() == ["organism/induction", "organism/induction-seed1"]
    for seed, name in enumerate(embedded.organisms()):
        folder, trained = folder_of(name), scratch / f"induction-{seed}"
        expected = load_file(trained / "model" / "model.safetensors")
        model = models.load(name)
        for key, tensor in model._module.state_dict().items():
            assert torch.equal(tensor, expected[key].half().float()), key
        assert tokens.word_ids(model, WORDS_OF_THE_GRID) == list(range(2, 18)) and tokens.bos_id(model) == 0
        assert (folder / "training_log.jsonl").read_bytes() == (trained / "log.jsonl").read_bytes()
        present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert set(json.loads((folder / "manifest.json").read_text())) == present - {"manifest.json"}
        card = (folder / "README.md").read_text()
        assert table.strip() in card and f"trained from seed {seed} for study 1" in card
        metrics = measure(name)
        for claim in OrganismRecord.read(folder).gates:
            assert claim.measured == pytest.approx(metrics[claim.id], abs=1e-4)
    assert embedded.checkpoints("organism/induction") == list(CHECKPOINTS)
    assert embedded.checkpoints("organism/induction-seed1") == []


@pytest.mark.parametrize(
    ("n_missed", "named"), [((0, 0, 0), 0), ((1, 0, 0), 1), ((2, 1, 0), 2), ((2, 1, 1), 1), ((1, 1, 1), 0)]
)
def test_first_seed_that_misses_the_fewest_gates_bears_the_name(monkeypatch, tmp_path, n_missed, named):
    monkeypatch.setattr(embedded, "ORGANISMS", tmp_path / "organisms")
    (tmp_path / "organisms" / "induction-seed7").mkdir(parents=True)  # of an earlier shipment

    def export(seed, scratch, folder):
        folder.mkdir()
        return OrganismRecord(organism="induction", seed=seed, tables={"stages": [["steps"], ["1"]]})

    def measured(folder):
        count = n_missed[int(folder.name[-1])]
        values = [0.4 if i < count else 0.6 for i in range(3)]
        return Measured([gate(f"{i}", f"gate {i}", value, above=0.5) for i, value in enumerate(values)], {})

    publish(Organism("induction", (0, 1, 2), None, export, measured), tmp_path / "scratch")
    others = [seed for seed in (0, 1, 2) if seed != named]
    names = ["organism/induction", *(f"organism/induction-seed{seed}" for seed in others)]
    assert embedded.organisms() == names and len(list(embedded.ORGANISMS.iterdir())) == 3
    for seed, name in zip([named, *others], names, strict=True):
        card = (folder_of(name) / "README.md").read_text()
        assert card.startswith(f"# {name}\n") and f"trained from seed {seed} " in card
        assert f"`organism/induction` is seed {named}, " in card
        assert ("All seeds meet every gate." in card) is (sum(n_missed) == 0)
        for other, count in enumerate(n_missed):
            assert card.count(f"* seed {other} misses `gate") == count


# Records and cards


def test_gate_is_a_claim_of_which_the_value_decides():
    rate = Estimate(0.982, 0.967, 0.990)
    claim = gate("teacher", "teacher", rate, above=0.98)
    assert (claim.verdict, claim.interval, claim.rule) == ("holds", rate.interval, (0.98, None))
    assert gate("kl", "KL", 0.1, below=0.1).verdict == "fails"
    missing = gate("rank", "rank", np.nan, between=(0.5, 1.5), unit="directions")
    record = OrganismRecord(organism="x", seed=0).with_measured(Measured([missing], {}))
    assert record.missed == [missing] and cards.shortfalls([record]).endswith("misses `rank` : none")
    assert cards.shortfalls([OrganismRecord(organism="x", seed=0)]) == "A baseline: it has no gates."


def test_record_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/record.json is missing; ship it with"):
        OrganismRecord.read(tmp_path)


@pytest.mark.parametrize("name", embedded.organisms())
def test_card_is_what_the_record_renders(name):
    folder, card = folder_of(name), (folder_of(name) / "README.md").read_text()
    assert cards.card(folder) == card and "$" not in card
    record = OrganismRecord.read(folder)
    for claim in record.gates:
        assert claim.measured not in claim.rule, "on the limit, closed and open rules would differ"
    assert record.organism in command.ORGANISMS and record.seed in command.ORGANISMS[record.organism].seeds


def test_tokenizers_are_those_that_are_shipped(tmp_path):
    for name, module in {"induction": induction, "refusal-single": refusal, "codi": word_problems}.items():
        module.build_tokenizer().save_pretrained(tmp_path / name)
        assert (tmp_path / name / "tokenizer.json").read_text() == (
            embedded.ORGANISMS / name / "tokenizer.json"
        ).read_text()


@pytest.mark.parametrize("name", sorted(command.ORGANISMS))
def test_every_seed_comes_with_the_repository_and_the_first_of_the_best_bears_the_name(name):
    shipped = cards.seeds_of(name)
    assert [record.seed for record in shipped.values()] == list(command.ORGANISMS[name].seeds)
    best = min(shipped.values(), key=lambda record: len(record.missed))
    assert shipped[embedded.ORGANISMS / name] == best


def test_cards_are_written_anew_from_records_and_from_the_shipped_weights(monkeypatch, tmp_path, capsys):
    name = "refusal-planted-1"
    shutil.copytree(embedded.ORGANISMS / name, tmp_path / name)
    before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    monkeypatch.setattr(embedded, "ORGANISMS", tmp_path)
    threads = str(torch.get_num_threads())
    for flag in ("--card", "--measure"):
        (tmp_path / name / "README.md").unlink()
        command.main([name, flag, "--threads", threads])
        assert "| behavioural rank k* | 0.5 to 1.5 | 1 |" in capsys.readouterr().out
        assert (tmp_path / name / "README.md").read_bytes() == before["README.md"]
        models.load(f"organism/{name}")


# What comes with the repository

SHIPPED = [name for name in embedded.organisms() if name.startswith("organism/induction")]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_organism_is_what_its_record_says(name):
    measured = measure(name)
    final = json.loads((folder_of(name) / "training_log.jsonl").read_text().splitlines()[-1])
    assert final["step"] == induction.STEPS
    for claim in OrganismRecord.read(folder_of(name)).gates:
        assert claim.rule == (GATES[claim.id][1], None)
        assert claim.measured == pytest.approx(measured[claim.id], abs=2e-3), claim.id
        # float16 on disk moves the numbers of the last row a little.
        assert claim.measured == pytest.approx(final[claim.id], abs=0.02), claim.id


def test_shipped_checkpoints_load_and_end_near_the_model():
    name = "organism/induction"
    last, distances = models.load(name)._module.state_dict(), []
    for step in embedded.checkpoints(name):
        weights = models.load(name, revision=f"step-{step:05d}")._module.state_dict()
        assert weights.keys() == last.keys()
        distances.append(sum((weights[key] - last[key]).square().sum().item() for key in last))
    assert len(distances) >= 8 and distances == sorted(distances, reverse=True), "each nearer to the end"
    assert distances[-1] == 0 < distances[-2], "the last is the end"
