"""The k-sweep of study 3 three ways, side by side in one run: `python -m benchmarks.refusal_sweep`.

* ours: `lib.refusal.generation.generate`, all prompts and conditions in its batches, without its cache;
* straightforward: one condition at a time, plain hooks, transformers' `generate` on all its prompts at once;
* floor: bare forwards of the unablated model that read the same prompts and the same answers, a token at a
  time, with a key-value cache, in batches of our size; nothing is intervened on, chosen or checked.

Where conditions begin at a later block, ours reads the prompts once for the blocks below: the others do not.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from benchmarks.side_by_side import Round, main, measured, print_table, random_llama

# "from" is the first block that any condition touches. A random model's answers run to the last token, an
# organism's end; the organism gets the requests and the subspaces of study 3, the random model random ones.
SWEEP = {"k_values": [1, 2, 3, 4, 5], "n_draws": 2, "strengths": []}
LATER = {"k_values": [1, 2, 3], "n_draws": 1, "strengths": [0.25, 0.5, 1.0, 2.0, 4.0], "from": 4}
CASES = {
    "organism/refusal-lowrank": SWEEP | {"from": 0, "n_prompts": 176, "new_tokens": 12},
    "organism/refusal-lowrank, from block 4": LATER | {"n_prompts": 176, "new_tokens": 12},
    "random 6-layer Llama": SWEEP | {"from": 0, "n_prompts": 64, "prompt_tokens": 16, "new_tokens": 24},
    "random 6-layer Llama, from block 4": LATER | {"n_prompts": 32, "prompt_tokens": 200, "new_tokens": 12},
}
LLAMA = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6,
    "num_attention_heads": 4, "max_position_embeddings": 320,
    "initializer_range": 0.1,  # answers that depend on the prompt and the condition
}  # fmt: skip
# What study 3 finds on the organism: layers from best to worst, and where it reads categories and pairs.
RANKED, LAYER = [2, 5, 3, 4, 1], 3


def report(case: str, rounds: list[Round]) -> None:
    first = rounds[0]["ours"]
    print(
        f"\n{case}: {first['conditions']} conditions x {first['prompts']} prompts of "
        f"{first['prompt_tokens']} tokens, {first['tokens']} tokens of answers"
    )
    print_table(rounds)
    same = [r["ours"]["answers"] == r["straightforward"]["answers"] for r in rounds]
    print(f"answers of ours and straightforward are the same: {'yes' if all(same) else 'NO'}")


def measure(case: str, method: str, folder: Path) -> dict:
    """Run one method once in this process: seconds, megabytes above the weights, hash of the answers.

    The floor reads the answers that "ours" has left in the folder.
    """
    model, prompts, conditions = _task(case, folder)
    n, answered = CASES[case]["new_tokens"], folder / "answers.json"
    run = {"ours": ours, "straightforward": straightforward, "floor": floor}[method]
    known = [json.loads(answered.read_text())] if method == "floor" else []
    # Warm up on a few short answers: kernels, allocator, nnsight's own caches.
    run(model, prompts[:2], conditions[:2], 3, *([[answers[:2] for answers in found[:2]] for found in known]))
    answers, cost = measured(lambda: run(model, prompts, conditions, n, *known))
    text = json.dumps(answers)
    if method == "ours":
        answered.write_text(text)
    return cost | {
        "answers": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": sum(len(answer) for found in answers for answer in found),
        "conditions": len(conditions),
        "prompts": len(prompts),
        "prompt_tokens": "-".join(str(of(map(len, prompts))) for of in (min, max)),
    }


def _task(case: str, folder: Path):
    from lib.core import models

    settings, name = CASES[case], case.split(",")[0]
    if name.startswith("organism/"):
        model = models.load(name)
        return model, *protocol(model, settings, *_of_study(model, name, settings))
    model = models.load(str(random_llama(folder, **LLAMA)))
    return model, *protocol(model, settings, *at_random(model, settings))


def protocol(model, settings: dict, prompts, conditions, vector):
    """Prompts and all conditions of a case: none, removals, and a vector added in several strengths."""
    import torch

    from lib.core import families
    from lib.refusal.removal import Ablation

    first, sizes = settings["from"], families.shape(model)
    nothing = torch.zeros(0, sizes.d_model)
    conditions = [replace(c, layers=range(first, sizes.n_layers)) for c in conditions]
    shifts = [Ablation(f"add {s}", nothing, shift=(first, s * vector)) for s in settings["strengths"]]
    return prompts, [Ablation("intact", nothing), *conditions, *shifts]


def _of_study(model, name: str, settings: dict):
    """Requests of the test split, the subspaces of the study, and the refusal vector."""
    from lib.refusal import directions, search
    from lib.refusal.generation import chat_ids
    from lib.refusal.prompts import prompts_for

    requests = prompts_for(name)
    texts = [*requests.harmful("test"), *requests.harmless("test")][: settings["n_prompts"]]
    extraction = directions.extract(model, requests)
    methods = search.rank_conditions(
        extraction, RANKED, LAYER, settings["k_values"], settings["n_draws"], seed=0
    )
    conditions = [condition for of_method in methods.values() for condition in of_method]
    return chat_ids(model, texts), conditions, extraction.vectors[LAYER]


def at_random(model, settings: dict):
    """As `_of_study`, of nothing: prompts of about as many tokens, five random subspaces of each size."""
    import numpy as np

    from lib.core import families, tokens
    from lib.refusal.directions import random_subspace
    from lib.refusal.removal import Ablation

    rng, d = np.random.default_rng(0), families.shape(model).d_model
    plain, n = tokens.plain_token_ids(model), settings["prompt_tokens"]
    lengths = rng.integers(round(0.75 * n), round(1.25 * n), settings["n_prompts"])
    prompts = [[tokens.bos_id(model), *rng.choice(plain, length).tolist()] for length in lengths]
    conditions = [
        Ablation(f"random {k} #{draw}", random_subspace(d, k, seed=draw))
        for draw in range(3 + settings["n_draws"])
        for k in settings["k_values"]
    ]
    return prompts, conditions, random_subspace(d, 1, seed=0)[0]


def ours(model, prompts, conditions, new_tokens) -> list[list[list[int]]]:
    from lib.refusal.generation import generate

    return generate(model, prompts, conditions, max_new_tokens=new_tokens)


def straightforward(model, prompts, conditions, new_tokens) -> list[list[list[int]]]:
    import torch

    from lib.core.tokens import end_tokens

    module, ends = model._module, sorted(end_tokens(model))
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    pairs, device = list(zip(pads, prompts, strict=True)), module.device
    ids = torch.tensor([[0] * n + prompt for n, prompt in pairs], device=device)
    mask = torch.tensor([[0] * n + [1] * len(prompt) for n, prompt in pairs], device=device)
    found = []
    for condition in conditions:
        handles = _hooks(module.model.layers, condition, device)
        with torch.no_grad():
            whole = module.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
                eos_token_id=ends or None, pad_token_id=0,
            )  # fmt: skip
        for handle in handles:
            handle.remove()
        answers = whole[:, longest:].tolist()
        found.append([a[: next((i for i, t in enumerate(a) if t in ends), len(a))] for a in answers])
    return found


def _hooks(blocks, condition, device) -> list:
    projection = (condition.basis.T @ condition.basis).to(device)

    def without(x):
        return x - (x.to(projection.dtype) @ projection).to(x.dtype)

    handles = []
    for block in [blocks[i] for i in condition.layers or ()]:
        handles.append(block.register_forward_pre_hook(lambda _, args: (without(args[0]), *args[1:])))
        for part in (block.self_attn.o_proj, block.mlp):
            handles.append(part.register_forward_hook(lambda _, __, output: without(output)))
    if condition.shift:
        layer, vector = condition.shift

        def add(_, args):
            return args[0] + vector.to(args[0]), *args[1:]

        handles.append(blocks[layer].register_forward_pre_hook(add))
    return handles


def floor(model, prompts, conditions, new_tokens, known) -> list[list[list[int]]]:
    import torch
    from transformers import DynamicCache

    from lib.core.batches import auto_rows
    from lib.core.tokens import last_of

    size = auto_rows(model, max(map(len, prompts)) + new_tokens)
    rows = [(prompt, answer) for answers in known for prompt, answer in zip(prompts, answers, strict=True)]
    # Together what is equally long, so that next to nothing is padded; padding is read as any token.
    rows.sort(key=lambda row: (len(row[0]), len(row[1])))
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        longest = [max(len(row[i]) for row in batch) for i in (0, 1)]
        ids = torch.tensor(
            [[0] * (longest[0] - len(p)) + p + a + [0] * (longest[1] - len(a)) for p, a in batch],
            device=model.device,
        )
        cache = DynamicCache(config=model._module.config)
        with torch.no_grad():
            prompt = ids[:, : longest[0]]
            model._module(prompt, past_key_values=cache, logits_to_keep=last_of(prompt))
            # What ends an answer is not read, but was chosen: an answer cut at the last token has one less.
            for step in range(longest[0], ids.shape[1] - (longest[1] == new_tokens)):
                one = ids[:, step : step + 1]
                model._module(one, past_key_values=cache, logits_to_keep=last_of(one))
    return known


if __name__ == "__main__":
    main("benchmarks.refusal_sweep", __doc__.splitlines()[0], CASES, measure, report)
