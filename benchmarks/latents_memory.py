"""Reading a thinking model three ways, side by side in one run: `python -m benchmarks.latents_memory`.

* ours: `lib.codi.readings.read_thoughts`, attention rows summed as the layers pass, without its cache;
* straightforward: transformers' `output_attentions`, all maps stacked, then averaged and summed by category
  in a Python loop;
* floor: bare forwards of the same sequences with the same (eager) attention, nothing measured.

The cases differ in layers, then in tokens: maps grow with layers x heads x tokens^2, what ours holds of them
does not grow with the layers. All take the same number of problems a forward.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.side_by_side import Round, main, measured, print_table

BATCH, HEADS, D_MODEL, WORDS = 8, 8, 256, 512
CASES = {
    "6 layers, 250 tokens": {"layers": 6, "tokens": 250},
    "24 layers, 250 tokens": {"layers": 24, "tokens": 250},
    "6 layers, 500 tokens": {"layers": 6, "tokens": 500},
}


def report(case: str, rounds: list[Round]) -> None:
    layers, tokens = CASES[case]["layers"], CASES[case]["tokens"]
    megabytes = BATCH * layers * HEADS * tokens**2 * 4 / 2**20
    print(f"\n{case}, {HEADS} heads: {BATCH} problems, whose maps are {megabytes:.0f} MB")
    print_table(rounds)
    for name in ("attention", "mass"):
        differences = [abs(r["ours"][name] - r["straightforward"][name]) for r in rounds]
        print(f"largest difference in {name}, ours against straightforward: {max(differences):.1e}")


def measure(case: str, method: str, folder: Path) -> dict:
    """Run one method once in this process: seconds, megabytes above the weights, and two sums to compare."""
    from lib.codi.checkpoint import load_codi

    codi = load_codi(str(random_codi(folder, **CASES[case])))
    run = {"ours": ours, "straightforward": straightforward, "floor": floor}[method]
    run(codi, *task(codi, 1, 20))
    (attention, mass), cost = measured(lambda: run(codi, *task(codi, BATCH, CASES[case]["tokens"])))
    return cost | {"attention": attention, "mass": mass}


def task(codi, n_problems: int, tokens: int):
    """Problems whose sequences have so many tokens, and thoughts."""
    import numpy as np

    from lib.codi.problems import Equation, Problem
    from lib.core.families import shape

    sizes = shape(codi.model)
    rng = np.random.default_rng(0)
    length = tokens - 2 - codi.n_thoughts - len(codi.ids(codi.answer_prompt))
    problems = []
    for i in range(n_problems):
        words = [f"w{word}" for word in rng.integers(110, sizes.n_vocabulary, length)]
        words[3], words[length // 2], words[-1] = "5", "7", "9"
        problems.append(Problem(str(i), " ".join(words), (Equation.parse("5+7=12"),), 12.0))
    return problems, rng.normal(size=(n_problems, codi.n_thoughts + 1, sizes.d_model)).astype(np.float32)


def ours(codi, problems, z) -> tuple[float, float]:
    from lib.codi.readings import OPERAND, read_thoughts

    reading = read_thoughts(codi, problems, z, batch_size=len(problems))
    return _weighted(reading.attention), float(reading.mass[..., OPERAND].mean())


def straightforward(codi, problems, z) -> tuple[float, float]:
    import torch

    module = codi.model._module
    module.set_attn_implementation("eager")
    with torch.no_grad():
        out = module(inputs_embeds=_embeddings(codi, problems, z), output_attentions=True, use_cache=False)
    maps = torch.stack(out.attentions, dim=1)  # [problem, layer, head, query, key]
    bot = len(codi.ids(problems[0].question))
    rows = [*range(bot, bot + codi.n_thoughts + 2), maps.shape[-1] - 1]
    attention = [one.mean((0, 1))[rows].cpu().numpy() for one in maps]
    masses = []
    for problem, one in zip(problems, maps, strict=True):
        words = problem.question.split()
        operands = [t for t, word in enumerate(words) if word in ("5", "7")]
        for row, position in enumerate(rows):
            # The one step is that of z_0 and z_1, and of <eot> and the answer.
            at = one[:, :, position, operands].sum(-1) if row in (0, 1, 7, 8) else torch.zeros(1)
            masses.append(float(at.mean()))
    return _weighted(attention), sum(masses) / len(masses)


def floor(codi, problems, z) -> tuple[float, float]:
    import torch

    codi.model._module.set_attn_implementation("eager")
    with torch.no_grad():
        codi.model._module(inputs_embeds=_embeddings(codi, problems, z), use_cache=False, logits_to_keep=1)
    return 0.0, 0.0


def _embeddings(codi, problems, z):
    import torch

    embed, device = codi.model._module.get_input_embeddings(), codi.model.device
    ids = torch.tensor([[*codi.ids(problem.question), codi.bot] for problem in problems], device=device)
    end = torch.tensor([[codi.eot, *codi.ids(codi.answer_prompt)]] * len(problems), device=device)
    thoughts = codi.projection(torch.from_numpy(z[:, :-1]).to(device))
    return torch.cat([embed(ids), thoughts, embed(end)], dim=1)


def _weighted(attention) -> float:
    """A sum that every token and row moves in its own way."""
    import numpy as np

    weights = np.random.default_rng(0).normal(size=attention[0].shape)
    return float(np.mean([(one * weights).sum() for one in attention]))


def random_codi(
    folder: Path, *, layers: int, tokens: int, heads: int = HEADS, d_model: int = D_MODEL, words: int = WORDS
) -> Path:
    """Save a GPT-2 of random weights and a projection as an embedded CODI model; what is there stays."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    if not (folder / "codi.json").exists():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=words, n_embd=d_model, n_layer=layers, n_head=heads, n_positions=tokens,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(folder)
        names = [str(i) if i < 100 else f"w{i}" for i in range(words)]
        names[100:103] = "<bot>", "<eot>", "<unk>"
        tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
        linear = {"weight": torch.randn(d_model, d_model) / d_model**0.5, "bias": torch.zeros(d_model)}
        tensors = {f"{i}.{name}": tensor.clone() for i in (1, 3) for name, tensor in linear.items()}
        tensors |= {"ln.weight": torch.ones(d_model), "ln.bias": torch.zeros(d_model)}
        save_file(tensors, folder / "projection.safetensors")
        settings = {"n_thoughts": 6, "bot": "<bot>", "eot": "<eot>", "answer_prompt": "w200 w201"}
        (folder / "codi.json").write_text(json.dumps(settings | {"cot": "operators"}))
    return folder


if __name__ == "__main__":
    main("benchmarks.latents_memory", __doc__.splitlines()[0], CASES, measure, report)
