"""Tiny random models of the real architectures, saved to disk in the layout of the hub."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

WORDS = ("apple", "bird", "car", "egg", "house", "milk", "plane", "opera", "box", "sand", "sun", "mango")
VOCABULARY = 40

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}

CONFIGS = {
    "llama": LlamaConfig(**_GROUPED, tie_word_embeddings=False),
    "mistral": MistralConfig(**_GROUPED, sliding_window=None),
    "qwen2": Qwen2Config(**_GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=12),  # head_dim apart from d_model / n_heads
    "gemma": GemmaConfig(**_GROUPED, head_dim=12),
    "phi3": Phi3Config(**_COMMON),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=96, bos_token_id=0, eos_token_id=1
    ),
}
FAMILIES = tuple(CONFIGS)


def save_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """A model of the family with weights large enough that every head matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    names = ["<bos>", "<unk>", *WORDS]
    vocabulary = {name: i for i, name in enumerate(names + [f"w{i}" for i in range(len(names), VOCABULARY)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>")
