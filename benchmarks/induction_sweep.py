"""The ablation sweep of study 1 three ways, side by side in one run: `python -m benchmarks.induction_sweep`.

* ours: `lib.interventions.ablation_sweep`, without its cache;
* straightforward: one condition and one walk at a time, plain hooks, softmax over the
  whole vocabulary, a Python loop over positions;
* floor: as many bare forwards of the unablated model, in batches, with nothing measured.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.side_by_side import Round, main, measured, print_table, random_llama

CASES = {
    "organism/induction": {"n_walks": 16, "length": 400, "k_values": [1, 2, 4, 8], "n_draws": 4},
    "random 12-layer Llama, 32k vocabulary": {
        "n_walks": 2,
        "length": 1000,
        "k_values": [1, 2, 4, 8],
        "n_draws": 4,
    },
}
LLAMA = {
    "vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 12,
    "num_attention_heads": 8,
}  # fmt: skip


def report(case: str, rounds: list[Round]) -> None:
    settings, first = CASES[case], rounds[0]["ours"]
    print(
        f"\n{case}: {first['conditions']} conditions x "
        f"{settings['n_walks']} walks x {settings['length']} tokens"
    )
    print_table(rounds)
    differences = [abs(r["ours"]["accuracy"] - r["straightforward"]["accuracy"]) for r in rounds]
    print(f"largest difference in mean accuracy, ours against straightforward: {max(differences):.1e}")


def measure(case: str, method: str, folder: Path) -> dict:
    """Run one method once in this process: seconds, megabytes above the weights, mean accuracy."""
    model, ids, walks, graph, word_ids, conditions = _task(case, folder)
    run = {"ours": ours, "straightforward": straightforward, "floor": floor}[method]
    # Warm up on a single short row: kernels, allocator, nnsight's own caches.
    run(model, ids[:1, :64], walks[:1, :63], graph, word_ids, conditions[:2])
    accuracy, cost = measured(lambda: run(model, ids, walks, graph, word_ids, conditions))
    return cost | {"accuracy": accuracy, "conditions": len(conditions)}


def _task(case: str, folder: Path):
    import numpy as np

    from lib import attention, models
    from lib.parameters import GRID_WORDS

    if case.startswith("organism/"):
        model = models.load(case)
        word_ids = models.word_ids(model, GRID_WORDS)
    else:
        model = models.load(str(random_llama(folder, **LLAMA)))
        word_ids = list(range(100, 116))
    sizes = models.shape(model)
    if case.startswith("organism/"):
        scores = attention.head_scores(model, models.plain_token_ids(model), bos=0, n_sequences=8)
        ranked = {
            "induction": attention.top_heads(scores.induction),
            "previous": attention.top_heads(scores.previous_token),
        }
    else:  # a random model has no head types: heads anywhere, as the published lists are
        order = np.random.default_rng(0).permutation(sizes.n_layers * sizes.n_heads)
        heads = [(int(i) // sizes.n_heads, int(i) % sizes.n_heads) for i in order]
        ranked = {"induction": heads[:16], "previous": heads[16:32]}
    return model, *protocol(model, word_ids, ranked, **CASES[case])


def protocol(model, word_ids, ranked, *, n_walks, length, k_values, n_draws):
    """Walks on the grid of study 1 as token ids and nodes, the graph, its words' ids, and the conditions.

    Args:
        ranked: heads by falling score, by name of the list.
        n_walks, length, k_values: of the study.
        n_draws: random sets, of the largest size alone.
    """
    import numpy as np
    import torch

    from lib import interventions, models
    from lib.parameters import GRID_WORDS
    from lib.walks import grid_graph, random_walks

    graph, sizes = grid_graph(4, 4, GRID_WORDS), models.shape(model)
    walks = random_walks(graph, n_walks, length, seed=0)
    conditions = interventions.ablation_conditions(
        ranked, k_values, n_draws, n_layers=sizes.n_layers, n_heads=sizes.n_heads
    )
    largest = max(k_values)
    conditions = [
        c
        for c in conditions
        if not c.name.startswith("random") or (c.name == "random" and len(c.heads) == largest)
    ]
    ids = torch.from_numpy(np.pad(np.array(word_ids)[walks], ((0, 0), (1, 0))))
    return ids, walks, graph, word_ids, conditions


def ours(model, ids, walks, graph, word_ids, conditions, batch_size=0) -> float:
    from lib import interventions, models
    from lib.parameters import InductionAblation
    from lib.walks import rule_following_accuracy

    layer = InductionAblation().read_layer(models.shape(model).n_layers)
    sweep = interventions.ablation_sweep(
        model, ids, conditions, word_ids=word_ids, labels=walks, n_classes=graph.n_nodes, layer=layer,
        batch_size=batch_size,
    )  # fmt: skip
    return float(rule_following_accuracy(sweep.word_probabilities, walks, graph).mean())


def straightforward(model, ids, walks, graph, word_ids, conditions) -> float:
    import numpy as np

    return float(np.mean([_one_condition(model, ids, walks, graph, word_ids, c) for c in conditions]))


def _one_condition(model, ids, walks, graph, word_ids, condition) -> float:
    import numpy as np
    import torch

    from lib.parameters import InductionAblation

    module = model._module
    n_heads = module.config.num_attention_heads
    layer = InductionAblation().read_layer(module.config.num_hidden_layers)
    streams, accuracies = [], []

    def ablate(args, index):
        z = args[0].clone()
        d_head = z.shape[-1] // n_heads
        for at, head in condition.heads:
            if at == index:
                z[..., head * d_head : (head + 1) * d_head] = 0
        return (z,)

    blocks = module.model.layers
    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args, i=i: ablate(args, i))
        for i, block in enumerate(blocks)
    ]
    handles.append(blocks[layer].register_forward_pre_hook(lambda _, args: streams.append(args[0])))
    for walk, row in zip(walks, ids, strict=True):
        with torch.no_grad():
            row = row[None].to(module.device)
            probabilities = module(input_ids=row, use_cache=False).logits[0].float().softmax(-1)
        for t, node in enumerate(walk):
            neighbours = [word_ids[n] for n in np.flatnonzero(graph.adjacency[node])]
            accuracies.append(probabilities[t + 1, neighbours].sum().item())
    for handle in handles:
        handle.remove()
    means = torch.cat(streams)[:, 1:].flatten(0, 1)
    nodes = torch.from_numpy(walks).flatten().to(means.device)
    [means[nodes == node].mean(0) for node in range(graph.n_nodes)]
    return float(np.mean(accuracies))


def floor(model, ids, walks, graph, word_ids, conditions, batch_size=0) -> float:
    import torch

    from lib.batches import Batches, auto_batch_size

    def run(batch) -> None:
        with torch.no_grad():
            model._module(input_ids=batch.to(model.device), use_cache=False)

    # All logits of a batch at once: of a large vocabulary they would not fit beside a large batch.
    most = max(1, 2**31 // (ids.shape[1] * model._module.config.vocab_size))
    batches = Batches(min(most, batch_size or auto_batch_size(model, ids.shape[1])))
    for _ in batches.map(run, ids.repeat(len(conditions), 1)):
        pass
    return 0.0


if __name__ == "__main__":
    main("benchmarks.induction_sweep", __doc__.splitlines()[0], CASES, measure, report)
