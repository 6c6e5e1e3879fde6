"""The ablation sweep of study 1 four ways, side by side in one run: `python -m benchmarks.induction_sweep`.

* ours: `lib.core.sweeps.ablation_sweep`, without its cache;
* straightforward: one condition and one walk at a time, plain hooks, softmax over the
  whole vocabulary, a Python loop over positions;
* floor: as many bare forwards of the unablated model without its unembedding, with nothing measured;
* TransformerLens: as straightforward, with its hooks; left out where it is not installed (extra bench-lens).

Every way but the floor takes accuracy in the window, the last tokens of the walks, and there the class means
at every layer.
"""

from __future__ import annotations

import json
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks.side_by_side import METHODS, Round, main, measured, print_table, random_llama

LENS = "TransformerLens"
CASES = {
    "Qwen2.5-Coder-0.5B-Instruct": {
        "n_walks": 1,
        "length": 400,
        "window": 80,
        "k_values": [1, 2, 5, 10, 20, 32],
        "n_draws": 2,
    },
    "organism/induction": {
        "n_walks": 16,
        "length": 400,
        "window": 200,
        "k_values": [1, 2, 4, 8],
        "n_draws": 4,
    },
    "random 12-layer Llama, 32k vocabulary": {
        "n_walks": 2,
        "length": 1000,
        "window": 200,
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
        f"\n{case}, {first['dtype']}: {first['conditions']} conditions x {settings['n_walks']} walks x "
        f"{settings['length']} tokens, of which the last {settings['window']} are read"
    )
    print_table(rounds)
    for method in ("straightforward", LENS):
        if "accuracy" in rounds[0].get(method, {}):
            most = max(abs(r["ours"]["accuracy"] - r[method]["accuracy"]) for r in rounds)
            print(f"largest difference in mean accuracy, ours against {method}: {most:.1e}")


def measure(case: str, method: str, folder: Path) -> dict:
    """Run one method once in this process: seconds, megabytes above the weights, mean accuracy."""
    if method == LENS and not find_spec("transformer_lens"):
        return {"missing": "not installed: pip install -e '.[bench-lens]'"}
    run = {"ours": ours, "straightforward": straightforward, "floor": floor, LENS: lens}[method]
    model, ids, walks, graph, word_ids, conditions = _task(case, folder)
    window = CASES[case]["window"]
    # Warm up on a single short row: kernels, allocator, nnsight's own caches.
    run(model, ids[:1, :64], walks[:1, :63], graph, word_ids, conditions[:2], window)
    accuracy, cost = measured(lambda: run(model, ids, walks, graph, word_ids, conditions, window))
    dtype = str(model._module.dtype).removeprefix("torch.")
    return cost | {"accuracy": accuracy, "conditions": len(conditions), "dtype": dtype}


def _task(case: str, folder: Path):
    import numpy as np

    from lib.core import attention, families, models, tokens
    from lib.induction.parameters import GRID_WORDS

    settings = {name: value for name, value in CASES[case].items() if name != "window"}
    if case.startswith("random "):
        model = models.load(str(random_llama(folder, **LLAMA)))
        sizes, word_ids = families.shape(model), list(range(100, 116))
        # A random model has no head types: heads anywhere, as the published lists are.
        order = np.random.default_rng(0).permutation(sizes.n_layers * sizes.n_heads)
        heads = [divmod(int(i), sizes.n_heads) for i in order]
        return model, *protocol(
            model, word_ids, {"induction": heads[:16], "previous": heads[16:32]}, **settings
        )
    model = models.load(case, dtype="auto")
    if not (kept := folder / "heads.json").exists():
        scores = attention.head_scores(
            model, tokens.plain_token_ids(model), bos=tokens.bos_id(model), n_sequences=8
        )
        ranked = {"induction": scores.induction, "previous": scores.previous_token}
        kept.write_text(json.dumps({name: attention.top_heads(score) for name, score in ranked.items()}))
    ranked = {name: [tuple(head) for head in heads] for name, heads in json.loads(kept.read_text()).items()}
    return model, *protocol(model, tokens.word_ids(model, GRID_WORDS), ranked, **settings)


def protocol(model, word_ids, ranked, *, n_walks, length, k_values, n_draws):
    """Walks on the grid of study 1 as token ids and nodes, the graph, its words' ids, and the conditions.

    Args:
        ranked: heads by falling score, by name of the list.
        n_walks, length, k_values: of the study.
        n_draws: random sets, of the largest size alone.
    """
    import numpy as np

    from lib.core import families, interventions, tokens
    from lib.induction.parameters import GRID_WORDS
    from lib.induction.walks import grid_graph, random_walks

    graph, sizes = grid_graph(4, 4, GRID_WORDS), families.shape(model)
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
    return tokens.with_bos(model, np.array(word_ids)[walks]), walks, graph, word_ids, conditions


def ours(model, ids, walks, graph, word_ids, conditions, window) -> float:
    import numpy as np

    from lib.core import sweeps
    from lib.induction.walks import rule_following_accuracy

    positions = np.arange(walks.shape[1])[-window:]
    labels = np.where(np.arange(walks.shape[1]) >= positions[0], walks, -1)
    sweep = sweeps.ablation_sweep(
        model, ids, conditions, word_ids=word_ids, positions=positions, labels=labels, n_classes=graph.n_nodes
    )
    sweep.class_means()
    return float(rule_following_accuracy(sweep.word_probabilities, walks[:, positions], graph).mean())


def straightforward(model, ids, walks, graph, word_ids, conditions, window) -> float:
    import numpy as np
    import torch

    module = model._module
    blocks, n_heads = module.model.layers, module.config.num_attention_heads

    def ablate(args, heads):
        z = args[0].clone()
        d_head = z.shape[-1] // n_heads
        for head in heads:
            z[..., head * d_head : (head + 1) * d_head] = 0
        return (z,)

    def one_condition(condition) -> float:
        streams = {index: [] for index in range(len(blocks) + 1)}
        handles = []
        for index, block in enumerate(blocks):
            heads = [head for layer, head in condition.heads if layer == index]
            handles.append(
                block.self_attn.o_proj.register_forward_pre_hook(
                    lambda _, args, heads=heads: ablate(args, heads) if heads else None
                )
            )
            handles.append(
                block.register_forward_pre_hook(lambda _, args, index=index: streams[index].append(args[0]))
            )
        handles.append(blocks[-1].register_forward_hook(lambda *args: streams[len(blocks)].append(args[-1])))
        accuracies = []
        for walk, row in zip(walks, ids, strict=True):
            with torch.no_grad():
                logits = module(input_ids=row[None].to(module.device), use_cache=False).logits
            accuracies += _accuracies(logits, walk, graph, word_ids, window)
        for handle in handles:
            handle.remove()
        _class_means(streams.values(), walks, graph, window)
        return float(np.mean(accuracies))

    return float(np.mean([one_condition(condition) for condition in conditions]))


def lens(model, ids, walks, graph, word_ids, conditions, window) -> float:
    import numpy as np
    import torch

    bridge, n_layers = _bridge(model), model._module.config.num_hidden_layers

    def ablate(z, hook, heads):
        z[:, :, heads] = 0
        return z

    def one_condition(condition) -> float:
        streams = {index: [] for index in range(n_layers + 1)}
        hooks = []
        for index in range(n_layers):
            heads = [head for layer, head in condition.heads if layer == index]
            if heads:
                hooks.append((f"blocks.{index}.attn.hook_z", partial(ablate, heads=heads)))
            hooks.append((f"blocks.{index}.hook_resid_pre", partial(keep, streams=streams[index])))
        hooks.append((f"blocks.{n_layers - 1}.hook_resid_post", partial(keep, streams=streams[n_layers])))
        accuracies = []
        for walk, row in zip(walks, ids, strict=True):
            with torch.no_grad():
                logits = bridge.run_with_hooks(row[None], fwd_hooks=hooks)
            accuracies += _accuracies(logits, walk, graph, word_ids, window)
        _class_means(streams.values(), walks, graph, window)
        return float(np.mean(accuracies))

    def keep(stream, hook, streams):
        streams.append(stream)

    return float(np.mean([one_condition(condition) for condition in conditions]))


@cache
def _bridge(model):
    """TransformerLens' model of the same weights."""
    from transformer_lens.model_bridge import TransformerBridge

    module = model._module
    return TransformerBridge.boot_transformers(
        module.config._name_or_path, hf_model=module, tokenizer=model.tokenizer, dtype=module.dtype
    )


def _accuracies(logits, walk, graph, word_ids, window) -> list[float]:
    """Of one walk, from all its logits [1, prefix + token, vocabulary]."""
    import numpy as np

    probabilities, found = logits[0].float().softmax(-1), []
    for t in range(len(walk))[-window:]:
        neighbours = [word_ids[n] for n in np.flatnonzero(graph.adjacency[walk[t]])]
        found.append(probabilities[t + 1, neighbours].sum().item())
    return found


def _class_means(streams, walks, graph, window) -> list:
    """Of every layer, from its streams of all walks."""
    import torch

    nodes = torch.from_numpy(walks[:, -window:]).flatten()
    means = []
    for each in streams:
        stream = torch.cat(each)[:, 1:][:, -window:].flatten(0, 1)
        means.append([stream[nodes == node].mean(0) for node in range(graph.n_nodes)])
    return means


def floor(model, ids, walks, graph, word_ids, conditions, window) -> float:
    import torch

    from lib.core.batches import Batches, auto_batch_size

    def run(batch) -> None:
        with torch.no_grad():
            model._module.model(input_ids=batch.to(model.device), use_cache=False)

    for _ in Batches(auto_batch_size(model, ids.shape[1])).map(run, ids.repeat(len(conditions), 1)):
        pass
    return 0.0


if __name__ == "__main__":
    main("benchmarks.induction_sweep", __doc__.splitlines()[0], CASES, measure, report, (*METHODS, LENS))
