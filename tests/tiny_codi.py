"""Tiny random CODI models on disk, in the embedded layout and in the official one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tiny import random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

D_MODEL, N_LAYERS, N_HEADS, N_POSITIONS = 32, 3, 4, 64
WORDS = (
    "Ann Bob has buys loses pears nuts more a box holds it rains how many he she The answer is . ? : ; "
    "<< >> + - * ="
).split()
SPECIAL = ("<pad>", "<unk>", "<eos>", "<bot>", "<eot>")
PROBLEMS = (
    {
        "id": "a",
        "question": "Ann has 14 pears . a box holds 9 nuts . she buys 5 more . how many ?",
        "cot": "<<14+5=19>>",
        "answer": "19",
    },
    {
        "id": "b",
        "question": "Bob has 8 nuts . he buys 3 more . it rains . he loses 4 . how many pears ?",
        "cot": "<<8+3=11>> <<11-4=7>>",
        "answer": "7",
        "twin": "c",
    },
    {
        "id": "c",
        "question": "Bob has 20 nuts . he buys 2 more . it rains . he loses 6 . how many pears ?",
        "cot": "<<20+2=22>> <<22-6=16>>",
        "answer": "16",
        "twin": "b",
    },
    {
        "id": "d",
        "question": "a box holds 12 nuts . Ann has 6 . she buys 10 more . he loses 3 pears . ?",
        "cot": "<<6+10=16>> <<16-3=13>> <<13*2=26>>",
        "answer": "26",
    },
    {
        "id": "e",
        "question": "it rains . a box holds 30 nuts . Bob loses 13 . how many more nuts has she ?",
        "cot": "<<30-13=17>> <<17+1=18>>",
        "answer": "18",
    },
)


def save_embedded(
    folder: Path, seed: int = 0, *, cot: str = "operators", n_thoughts: int = 6, projection: bool = True
) -> Path:
    """A model folder with projection.safetensors, codi.json and problems.jsonl."""
    made = tokenizer()
    model = _random(_config(len(made)), seed)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    if projection:
        save_file(random_projection(seed), folder / "projection.safetensors")
    settings = {"n_thoughts": n_thoughts, "bot": "<bot>", "eot": "<eot>", "answer_prompt": "The answer is :"}
    (folder / "codi.json").write_text(json.dumps(settings | {"cot": cot}))
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, PROBLEMS)) + "\n")
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word and a number up to 60."""
    names = (*SPECIAL, *map(str, range(61)), *WORDS)
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


def random_projection(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of a projection, as the official code numbers its layers."""
    torch.manual_seed(seed)
    first, second, norm = nn.Linear(D_MODEL, 48), nn.Linear(48, D_MODEL), nn.LayerNorm(D_MODEL)
    layers = {"1": first, "3": second, "ln": norm}
    tensors = {f"{n}.{key}": t.clone() for n, m in layers.items() for key, t in m.state_dict().items()}
    return tensors | {"ln.bias": 0.1 * torch.randn(D_MODEL)}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's: a number of two digits is two tokens, but for 13 and 60."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "1"), ("1", "3"), ("Ġ", "6"), ("Ġ6", "0"), ("<", "<"), (">", ">"), ("Ġ", "m")]
    names = [*letters, *("".join(pair) for pair in merges), "<|endoftext|>"]
    inner = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )


def official_tensors(n_words: int, seed: int = 0, rank: int = 128) -> dict[str, torch.Tensor]:
    """A checkpoint as CODI's trainer writes it: bfloat16 base under float32 adapters, and the projection."""
    model = _random(_config(n_words + 3), seed)
    tensors = {}
    for name, tensor in model.state_dict().items():
        owner, _, kind = name.rpartition(".")
        adapted = owner.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc")
        key = (
            f"codi.base_model.model.{owner}.base_layer.{kind}" if adapted else f"codi.base_model.model.{name}"
        )
        tensors[key] = tensor.to(torch.bfloat16).clone()
        if adapted and kind == "weight":
            n_in, n_out = tensor.shape
            sizes = {"A": (rank, n_in), "B": (n_out, rank)}
            for side, size in sizes.items():
                lora = f"codi.base_model.model.{owner}.lora_{side}.default.weight"
                tensors[lora] = 0.1 * torch.randn(size)
    return tensors | {f"prj.{name}": tensor for name, tensor in random_projection(seed).items()}


def save_official(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """pytorch_model.bin alone, as on the hub, and beside it `base` with GPT-2's config and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    made = byte_tokenizer()
    torch.save(official_tensors(len(made)) if tensors is None else tensors, folder / "pytorch_model.bin")
    _config(len(made)).save_pretrained(folder / "base")
    made.save_pretrained(folder / "base")
    return folder


def _config(n_words: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=n_words, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=N_POSITIONS,
        bos_token_id=None, eos_token_id=2,
    )  # fmt: skip


def _random(config: GPT2Config, seed: int) -> PreTrainedModel:
    return random_model(config, seed, std=0.3).eval()  # large enough that answers depend on the question


# -- the same with the bare transformers model, one question at a time -----------------------------


def plain_loop(
    codi,
    question: str,
    n_thoughts: int = 6,
    replaced: dict | None = None,
    n_tokens: int = 8,
    prompt: str = "",
):
    """One question, no cache, no batch: z [n + 1, d] before replacement, and greedy tokens behind <eot> and
    a prompt."""
    module, projection = codi.model._module, codi.projection
    embed = module.transformer.wte
    with torch.no_grad():
        stream = embed(torch.tensor([[*codi.ids(question), codi.bot]]))
        zs = []
        for k in range(n_thoughts + 1):
            z = module.transformer(inputs_embeds=stream, use_cache=False).last_hidden_state[:, -1:]
            zs.append(z[0, 0])
            if k < n_thoughts:
                if replaced and k in replaced:
                    z = torch.from_numpy(replaced[k])[None, None]
                stream = torch.cat([stream, projection(z)], dim=1)
        stream = torch.cat([stream, embed(torch.tensor([[codi.eot, *codi.ids(prompt)]]))], dim=1)
        tokens = []
        for _ in range(n_tokens):
            logits = module(inputs_embeds=stream, use_cache=False).logits[0, -1]
            logits[[codi.bot, codi.eot]] = -torch.inf
            token = int(logits.argmax())
            if token == codi.model.tokenizer.eos_token_id:
                break
            tokens.append(token)
            stream = torch.cat([stream, embed(torch.tensor([[token]]))], dim=1)
    return torch.stack(zs).numpy(), tokens


def plain_texts(codi, questions, replaced: dict[int, np.ndarray] | None = None, **options) -> list[str]:
    """Answers of the plain loop, with z_k of each question replaced by a row of replaced[k]."""
    found = []
    for i, question in enumerate(questions):
        own = {k: values[i] for k, values in (replaced or {}).items()}
        found.append(codi.model.tokenizer.decode(plain_loop(codi, question, replaced=own, **options)[1]))
    return found


def plain_maps(codi, embeddings: torch.Tensor) -> tuple[np.ndarray, tuple[torch.Tensor, ...]]:
    """All attention maps of one sequence [layer, head, query, key], and the hidden states."""
    module = codi.model._module
    module.set_attn_implementation("eager")
    with torch.no_grad():
        out = module(
            inputs_embeds=embeddings, output_attentions=True, output_hidden_states=True, use_cache=False
        )
    module.set_attn_implementation("sdpa")
    return torch.stack(out.attentions)[:, 0].numpy(), out.hidden_states


def whole_sequence(codi, question: str, z: np.ndarray) -> torch.Tensor:
    embed = codi.model._module.transformer.wte
    with torch.no_grad():
        return torch.cat(
            [
                embed(torch.tensor([[*codi.ids(question), codi.bot]])),
                codi.projection(torch.from_numpy(z[None, :-1])),
                embed(torch.tensor([[codi.eot, *codi.ids(codi.answer_prompt)]])),
            ],
            dim=1,
        )
