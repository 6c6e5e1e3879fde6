"""Tiny random models of the real architectures, saved to disk in the layout of the hub."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from huggingface_hub import constants
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
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
    "gpt_neox": GPTNeoXConfig(**_COMMON, tie_word_embeddings=False),
}
FAMILIES = tuple(CONFIGS)


def save_tiny(
    family: str, folder: Path, seed: int = 0, *, chat: bool = False, tied: bool | None = None
) -> Path:
    """A model of the family with weights large enough that every head matters.

    Args:
        chat: give its tokenizer a chat template and a pad token.
        tied: whether embedding and unembedding are one matrix; None is the family's way.
    """
    config = copy.deepcopy(CONFIGS[family])
    if tied is not None:
        config.tie_word_embeddings = tied
    random_model(config, seed).save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder


def add_to_hub_cache(folder: Path, cache: Path, model_id: str, commit: str, *, branch: str = "main") -> Path:
    """Put a model folder into a hub cache as a download of it would lie there; returns its snapshot."""
    repository = cache / f"models--{model_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for each in (snapshot, repository / "blobs", repository / "refs"):
        each.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    (repository / "refs" / branch).write_text(commit)
    return snapshot


def use_hub(monkeypatch, cache: Path, endpoint: str = "") -> None:
    """Take a folder for the hub's cache and a server for the hub; without one, be offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint or "http://127.0.0.1:9")
    # Made at its first use, with the endpoint of that time; it lists files.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + template)


def blocks(module: PreTrainedModel) -> torch.nn.ModuleList:
    """The blocks of a transformers model, under its own names."""
    backbone = module.base_model
    return backbone.h if hasattr(backbone, "h") else backbone.layers


def output_projection(block: torch.nn.Module) -> torch.nn.Module:
    """The output projection of a block's attention, under its own names."""
    own = dict(block.named_modules())
    names = ("self_attn.o_proj", "attn.c_proj", "attention.dense")
    return next(own[name] for name in names if name in own)


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    names = ["<bos>", "<unk>", *WORDS]
    vocabulary = {name: i for i, name in enumerate(names + [f"w{i}" for i in range(len(names), VOCABULARY)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>")
    if chat:
        made.pad_token = f"w{VOCABULARY - 1}"
        made.chat_template = "{{ bos_token }} {{ messages[0].content }} w30"
    return made


class ChatModel(NamedTuple):
    """Stand-in for a published chat model: its architecture and the layout of its prompts."""

    config: PreTrainedConfig
    special: dict[str, str]  # role of the token in the tokenizer -> token
    ends: tuple[str, ...]  # tokens at which its generation settings end an answer
    template: str


_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_THINKING = "{%- if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
_SYSTEM = "<|im_start|>system\nbox sand<|im_end|>\n"
_GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ message.role }}\n{{ message.content }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_PHI3 = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_QWEN_TOKENS = {"pad": "<|endoftext|>", "eos": "<|im_end|>", "start": "<|im_start|>"}
_LLAMA3_TOKENS = {
    "bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "text_end": "<|end_of_text|>",
    "header": "<|start_header_id|>", "header_end": "<|end_header_id|>",
}  # fmt: skip
_LLAMA3_ENDS = ("<|end_of_text|>", "<|eot_id|>")
_CHAT = _GROUPED | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))

CHAT_MODELS = {
    "Qwen3-1.7B": ChatModel(
        Qwen3Config(**_CHAT, head_dim=12, tie_word_embeddings=True),
        _QWEN_TOKENS | {"think": "<think>", "think_end": "</think>"},
        ("<|im_end|>", "<|endoftext|>"),
        _CHATML + _THINKING,
    ),
    "Qwen-1.8B-Chat": ChatModel(
        Qwen2Config(**_CHAT, tie_word_embeddings=False),
        _QWEN_TOKENS,
        ("<|im_end|>",),
        _SYSTEM + _CHATML,
    ),
    "gemma-2b-it": ChatModel(
        GemmaConfig(**(_CHAT | {"num_key_value_heads": 1}), head_dim=16),
        {
            "bos": "<bos>",
            "eos": "<eos>",
            "pad": "<pad>",
            "start": "<start_of_turn>",
            "end": "<end_of_turn>",
        },
        ("<eos>", "<end_of_turn>"),
        _GEMMA,
    ),
    "Llama-3.1-8B-Instruct": ChatModel(
        LlamaConfig(**_CHAT, tie_word_embeddings=False), _LLAMA3_TOKENS, _LLAMA3_ENDS, _LLAMA3
    ),
    "Phi-3-mini-4k-instruct": ChatModel(
        Phi3Config(**(_CHAT | {"num_key_value_heads": 4}), sliding_window=64),
        {
            "bos": "<s>",
            "eos": "<|endoftext|>",
            "pad": "<|endoftext|>",
            "user": "<|user|>",
            "assistant": "<|assistant|>",
            "end": "<|end|>",
        },
        ("<|endoftext|>", "<|assistant|>", "<|end|>"),
        _PHI3,
    ),
    "Llama-3.2-1B-Instruct": ChatModel(
        LlamaConfig(**_CHAT, tie_word_embeddings=True), _LLAMA3_TOKENS, _LLAMA3_ENDS, _LLAMA3
    ),
    "Llama-3.2-3B-Instruct": ChatModel(
        LlamaConfig(**_CHAT, head_dim=16, tie_word_embeddings=True), _LLAMA3_TOKENS, _LLAMA3_ENDS, _LLAMA3
    ),
}


def save_chat(name: str, folder: Path, seed: int = 0) -> Path:
    """A tiny random stand-in for a chat model, with short own templates of the published layout."""
    chat = CHAT_MODELS[name]
    made, model = _chat_tokenizer(chat), random_model(copy.deepcopy(chat.config), seed)
    model.generation_config.eos_token_id = made.convert_tokens_to_ids(list(chat.ends))
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def _chat_tokenizer(chat: ChatModel) -> PreTrainedTokenizerFast:
    special = list(dict.fromkeys(chat.special.values()))
    words = ["<unk>", "\n", "\n\n", "user", "model", "assistant", "system", *WORDS]
    names = special + words
    names += [f"w{i}" for i in range(len(names), chat.config.vocab_size)]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    # Line breaks are tokens, as in the published tokenizers: prompts end in one.
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\\n+"), "isolated"),
            pre_tokenizers.Split(" ", "removed"),
        ]
    )
    roles = {f"{role}_token": chat.special[role] for role in ("bos", "eos", "pad") if role in chat.special}
    # transformers reads any tokenizer of a Qwen2 model as byte-level BPE; added tokens survive that.
    added = special + words[1:] if isinstance(chat.config, Qwen2Config) else special
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", additional_special_tokens=added, **roles
    )
    made.chat_template = chat.template
    return made


def random_model(config: PreTrainedConfig, seed: int = 0, std: float = 0.2) -> PreTrainedModel:
    """A model whose weights are large enough that every head, and every gain of a norm, matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    gains = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                gains.append(parameter)
        for gain in gains:  # where 1 is no change, or 0 (Gemma)
            gain.add_(0.8 * (torch.rand_like(gain) - 0.5))
    return model
