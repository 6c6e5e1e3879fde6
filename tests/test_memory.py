"""Memory is planned before a run: what is planned is what a run takes, whatever the family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from benchmarks import memory_plan
from lib import interventions, memory, models
from lib.batches import auto_batch_size, rows_that_fit
from lib.interventions import Condition
from lib.memory import MemoryPlan, MemoryShortage, Stage
from lib.rehearsal import Rehearsal, activations
from tests.tiny import CONFIGS, save_tiny

LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=False,
)  # fmt: skip
CARD = 24 * 10**9
PUBLISHED = dict(n_walks=16, seq_len=1400, n_words=16, window=200, layer=26)


def published_conditions() -> list[Condition]:
    """17: the baseline, six sizes of two lists, four random sets of the largest size."""
    order = [divmod(int(i), 32) for i in np.random.default_rng(0).permutation(1024)]
    ranked = {"induction": order[:32], "previous token": order[32:64]}
    all_sizes = interventions.ablation_conditions(ranked, [1, 2, 4, 8, 16, 32], 4, n_layers=32, n_heads=32)
    return [c for c in all_sizes if "random" not in c.name or (c.name == "random" and len(c.heads) == 32)]


def test_published_protocol_fits_a_card_of_24_gb():
    conditions = published_conditions()
    assert len(conditions) == 17
    weights = memory.weights_of(LLAMA_8B, torch.bfloat16)
    assert weights == 2 * 8_030_261_248
    free = CARD - weights - memory.CUDA_CONTEXT
    plan = memory.plan(LLAMA_8B, conditions, dtype=torch.bfloat16, device="cuda", free=free, **PUBLISHED)
    assert plan.rows >= 8 and plan.rows == rows_that_fit(LLAMA_8B, torch.bfloat16, "cuda", free, 1401)
    assert plan.total < CARD
    plan.check(device=free)
    with pytest.raises(MemoryShortage, match=r"needs .* GB of device memory .* 0 MB are free.*batch_size"):
        plan.check(device=0)


def test_estimate_holds_within_a_fifth_of_what_is_measured(tmp_path):
    stages = memory_plan.in_child(memory_plan.CASES["mid-size"], str(tmp_path), "cpu", "float32")
    planned, found = (max(column) for column in zip(*stages.values(), strict=True))
    assert found > 150, "MB: too small a case to tell"
    assert 0.8 < planned / found < 1.2, stages


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_can_be_rehearsed(family):
    config = CONFIGS[family]
    module = models.AutoModelForCausalLM.from_config(config)
    for device in ("cpu", "cuda"):
        rehearsal = Rehearsal(config, torch.float32, device)
        assert rehearsal.weights == 4 * sum(p.numel() for p in module.parameters())
    few, many, eager = (
        activations(config, torch.bfloat16, *rest) for rest in ((1, 60), (4, 60), (4, 60, "eager"))
    )
    stream = 60 * config.hidden_size * 2
    assert 3 * stream < few < many < 4.1 * few
    # At least scores and their softmax in float32, of all heads.
    assert eager > 4 * config.num_attention_heads * 60**2 * (2 + 4)


def test_rehearsal_counts_what_lives_at_the_same_time():
    rehearsal = Rehearsal(CONFIGS["llama"], torch.float32, "cuda")

    def work(model):
        first = torch.empty(1000, device=model.device)
        second = first + 1
        del first
        third = second.double()  # second and third: 12000 bytes, at the end 8000
        del second
        return third.cpu().numpy()

    assert rehearsal.peak(work) == (12000, 8000)
    whole = Rehearsal(CONFIGS["llama"], torch.float32, "cpu")
    assert whole.peak(lambda m: torch.empty(1000, device=m.device).cpu().double()) == (0, 12000)
    assert not rehearsal.model._module.training and torch.autocast.__module__.startswith("torch")


def test_kept_streams_are_those_of_the_sweep(monkeypatch, tmp_path):
    model = models.load(str(save_tiny("llama", tmp_path)))
    order = [divmod(int(i), 4) for i in np.random.default_rng(1).permutation(12)]
    conditions = [Condition("baseline"), *(Condition("k", order[:k]) for k in (1, 2, 4)),
                  *(Condition("l", order[4 : 4 + k]) for k in (1, 3))]  # fmt: skip
    seen, release = [], interventions.SweepReader.release

    def counted(reader, batch):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in reader.streams.values()}
        seen.append(sum(storage.nbytes() for storage in storages.values()))
        release(reader, batch)

    monkeypatch.setattr(interventions.SweepReader, "release", counted)
    ids, labels = torch.randint(2, 14, (5, 21)), np.zeros((5, 20), dtype=int)
    interventions.ablation_sweep(
        model, ids, conditions, word_ids=[2, 3], labels=labels, n_classes=2, layer=1, batch_size=5
    )
    _, masks = interventions.distinct_heads(conditions, models.shape(model))
    planned = [kept * 21 * 32 * 4 for _, _, kept in memory._batches(interventions.SweepPlan(masks), 5, 5)]
    assert planned == seen and max(planned) > 0


def test_batches_on_a_cpu_are_of_8_mb_and_on_a_gpu_what_fits(tmp_path):
    model = models.load(str(save_tiny("llama", tmp_path)))
    for length in (1, 50, 1000, 10**6):
        row = length * (8 * 32 + 4 * 48) * 4
        assert auto_batch_size(model, length) == 1 << min(6, max(1, 2**23 // row).bit_length() - 1)
    config = CONFIGS["llama"]
    for free in (0, 10**5, 10**6, 10**7, 10**9):
        n = rows_that_fit(config, torch.bfloat16, "cuda", free, 60)
        assert n == 1 or activations(config, torch.bfloat16, n, 60) <= free * 3 // 4
        assert n == 64 or activations(config, torch.bfloat16, 2 * n, 60) > free * 3 // 4


def test_shortage_names_stage_need_free_and_remedy():
    stages = (Stage("head scores", 10**9, 2 * 10**9), Stage("ablation sweeps", 7 * 10**9, 10**9))
    plan = MemoryPlan(stages, 16 * 10**9, "cuda", 32)
    plan.check()
    plan.check(device=7 * 10**9, host=2 * 10**9)
    with pytest.raises(MemoryShortage, match="ablation sweeps needs 7.0 GB of device .* 900 MB are free"):
        plan.check(device=9 * 10**8)
    with pytest.raises(MemoryShortage, match=r"scores needs 2.0 GB of host .*batch_size \(now 32\), seq"):
        plan.check(host=10**9)
    assert plan.largest.name == "ablation sweeps" and plan.total == 23 * 10**9 + memory.CUDA_CONTEXT
    on_cpu = MemoryPlan(stages, 16 * 10**9, "cpu", 32)
    assert on_cpu.largest.name == "head scores" and on_cpu.total == 18 * 10**9


def test_of_a_remote_model_the_host_keeps_the_results_alone():
    conditions = [Condition("baseline"), *(Condition("a", [(2, head)]) for head in range(4))]
    size = dict(n_walks=8, seq_len=60, n_words=4, window=10, layer=1)
    there = Rehearsal(CONFIGS["llama"], torch.float32, "NDIF").model  # its weights are on meta, too
    far = memory.plan(there, conditions, **size)
    near = memory.plan(CONFIGS["llama"], conditions, device="cuda", free=10**9, **size)
    assert far.device == "NDIF" and far.where == "device" and f"NDIF {memory._amount(far.peak)}" in str(far)
    hosts = {stage.name: stage.host for stage in far.stages}
    kept = {stage.name: stage.host - hosts[stage.name] for stage in near.stages}
    assert kept["ablation sweeps"] >= 8 * 61 * 32 * 4, "here streams are kept for other conditions"
    assert kept["head scores"] == kept["class sums of all layers"] == 0


def test_command_needs_a_configuration_and_no_weights(tmp_path, capsys):
    config = dict(vocab_size=500_000, hidden_size=64, intermediate_size=96, num_attention_heads=8)
    LlamaConfig(num_hidden_layers=4, max_position_embeddings=500, **config).save_pretrained(tmp_path)
    assert memory.main([str(tmp_path), "--card", "0.6", "--seq-len", "200", "--batch-size", "1"]) == 1
    out = capsys.readouterr()
    assert "weights: 128 MB" in out.out and "of device memory beside the weights, and" in out.err
    assert memory.main([str(tmp_path / "none")]) == 1
    assert "no config.json" in capsys.readouterr().err


def test_command_plans_an_embedded_model_on_this_machine(capsys):
    assert memory.main(["organism/induction", "--device", "cpu", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "ablation sweeps" in out and "together" in out
    model = models.load("organism/induction")
    free = memory.free(model)
    assert free.keys() <= {"host"} and all(10**8 < n < 10**14 for n in free.values())
