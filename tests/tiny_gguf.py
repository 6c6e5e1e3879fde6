"""Tiny random models in GGUF files, wheels that carry them in parts, and a registry that knows both."""

from __future__ import annotations

import copy
import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np
import torch
import yaml
from tiny import CONFIGS, WORDS, random_model
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, PreTrainedModel

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}  # fmt: skip
CONTROL, NORMAL, UNUSED = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
CHAT = "{% for message in messages %}{{ '<|im_start|>' + message.content + '<|im_end|>' }}{% endfor %}"


def vocabulary() -> list[str]:
    """Byte-level, as GPT-2's: three marks, bytes, words with their space, two tokens of no use."""
    letters = sorted(ByteLevel.alphabet())
    words = [f"\u0120{word}" for word in WORDS]
    pieces = [word[:n] for word in words for n in range(2, len(word) + 1)]
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return [*marks, *dict.fromkeys([*letters, *pieces]), "[PAD0]", "[PAD1]"]


def write_gguf(
    path: Path, family: str = "llama", kind: str = "F32", seed: int = 0, **metadata
) -> PreTrainedModel:
    """Write a tiny model of the family; returns the model whose weights went in.

    Args:
        kind: "F32", or a quantisation that gguf can write, such as "Q4_1".
        metadata: other values for a few of the file's entries: architecture, chat_template.
    """
    tokens = vocabulary()
    config = copy.deepcopy(CONFIGS[family])
    config.vocab_size, config.intermediate_size, config.tie_word_embeddings = len(tokens), 64, False
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    model = random_model(config, seed)
    architecture = metadata.get("architecture", family)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    kinds = [CONTROL if t.startswith("<|") else UNUSED if t.startswith("[PAD") else NORMAL for t in tokens]
    writer.add_token_types(kinds)
    known = {token: i for i, token in enumerate(tokens)}
    writer.add_token_merges([f"{t[:-1]} {t[-1]}" for t in tokens if len(t) > 1 and t[:-1] in known])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(metadata.get("chat_template", CHAT))
    quantisation = gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        if isinstance(config, LlamaConfig) and ("q_proj" in name or "k_proj" in name):
            n = config.num_key_value_heads if "k_proj" in name else config.num_attention_heads
            tensor = tensor.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)  # llama.cpp's rotary order
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        values = tensor.float().numpy()
        if values.ndim > 1 and kind != "F32":
            writer.add_tensor(name, gguf.quants.quantize(values, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.to(torch.bfloat16)


def write_wheels(folder: Path, data: bytes, n: int = 2, package: str = "tiny-part") -> list[dict]:
    """Wheels that carry `data` in n parts, with a dependency that nobody has; returns their entries."""
    folder.mkdir(parents=True, exist_ok=True)
    step, entries = -(-len(data) // n), []
    for i in range(n):
        part = data[i * step : (i + 1) * step]
        entry = {
            "package": f"{package}{i + 1}",
            "version": "1.0",
            "member": f"tiny_part{i + 1}/data/part.bin",
        }
        write_wheel(folder, entry, {entry["member"]: part})
        entries.append(entry | {"bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()})
    return entries


def write_wheel(folder: Path, entry: dict, members: dict[str, bytes]) -> Path:
    """One wheel with the members given."""
    stem = f"{entry['package'].replace('-', '_')}-{entry['version']}"
    name = f"Metadata-Version: 2.1\nName: {entry['package']}\nVersion: {entry['version']}\n"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{stem}.dist-info/METADATA", name + "Requires-Dist: no-such-package-at-all\n")
        archive.writestr(
            f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return path


def write_registry(path: Path, data: bytes, wheels: list[dict]) -> Path:
    """A models.yaml with one model, `tiny`, of these bytes."""
    file = {
        "name": "tiny.gguf",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "wheels": wheels,
    }
    model = {"name": "tiny", "id": "owner/tiny-GGUF", "revision": "0123456789" * 4, "dtype": "bfloat16",
             "billions": 1e-4, "layers": 3, "gated": False, "licence": "MIT", "file": file,
             "studies": {"01_induction_ablation": {}}}  # fmt: skip
    path.write_text(yaml.safe_dump([model]))
    return path
