"""The sites of a model, by the same names whatever its family: blocks, attention, heads, matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from nnsight import TransformersModel

from lib.core.downloads import ModelError

# GPT-2's and GPT-NeoX's names -> Llama's. Keys that a family lacks are skipped by nnsight.
ALIASES = {
    "model.layers": "layers",
    "model.norm": "norm",
    "model.embed_tokens": "embed_tokens",
    "transformer.h": "layers",
    "transformer.ln_f": "norm",
    "transformer.wte": "embed_tokens",
    "attn": "self_attn",
    "attn.c_proj": "attn.o_proj",
    "gpt_neox.layers": "layers",
    "gpt_neox.final_layer_norm": "norm",
    "gpt_neox.embed_in": "embed_tokens",
    "attention": "self_attn",
    "attention.dense": "attention.o_proj",
}


class ModelShape(NamedTuple):
    """Sizes that every family names differently."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_model: int
    n_vocabulary: int
    n_positions: int


def wrap(module: torch.nn.Module, tokenizer) -> TransformersModel:
    """Wrap a loaded transformers model so that every family answers to the same names."""
    return TransformersModel(module, tokenizer=tokenizer, task="text-generation", rename=ALIASES)


def is_remote(model: TransformersModel) -> bool:
    """Whether the traces of a model run on NDIF, where its weights are."""
    return next(model._module.parameters()).is_meta


def shape(model: TransformersModel) -> ModelShape:
    """The sizes of a model, from its configuration."""
    config = model._module.config
    n_heads = config.num_attention_heads
    return ModelShape(
        n_layers=config.num_hidden_layers,
        n_heads=n_heads,
        n_key_value_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        # Qwen3 and Gemma set head_dim apart from d_model / n_heads.
        d_head=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        d_model=config.hidden_size,
        n_vocabulary=config.vocab_size,
        n_positions=config.max_position_embeddings,
    )


def check_length(model: TransformersModel, length: int, remedy: str = "lower seq_len") -> None:
    """Raise ValueError if sequences of `length` tokens are longer than the model's positions."""
    limit = shape(model).n_positions
    if length > limit:
        raise ValueError(
            f"{length} tokens (BOS included) are more than the {limit} positions of this model; {remedy}"
        )


def check_layer(model: TransformersModel, layer: int) -> None:
    """Raise ModelError if a model has no block of this number."""
    n_layers = shape(model).n_layers
    if not 0 <= layer < n_layers:
        raise ModelError(f"layer {layer}: the model has layers 0 to {n_layers - 1}")


def check_head(sizes: ModelShape, layer: int, head: int, subject: str = "") -> None:
    """Raise ModelError if a model of these sizes has no such head; `subject` says who asks for it."""
    if not (0 <= layer < sizes.n_layers and 0 <= head < sizes.n_heads):
        raise ModelError(
            f"{subject}head {layer}.{head}; the model has layers 0 to {sizes.n_layers - 1} with heads 0 to "
            f"{sizes.n_heads - 1}"
        )


@contextmanager
def eager_attention(model: TransformersModel) -> Iterator[None]:
    """Within the block the model computes attention probabilities that a trace can read.

    The default attention (sdpa) never forms them: `self_attn.output[1]` would be None.
    """
    module = model._module
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)


def output_matrices(model: TransformersModel, layer: int) -> torch.Tensor:
    """What the output projection of a block makes of each head: [head, d_head, d_model], float32.

    A head's output [d_head] times its matrix is what it adds to the stream, the projection's bias apart.
    """
    attention = model._module.get_submodule(model.layers[layer].self_attn.path.removeprefix("model."))
    linear = getattr(attention, "o_proj", None) or getattr(attention, "dense", None)
    # GPT-2's Conv1D keeps [in, out].
    weight = linear.weight.T if linear is not None else attention.c_proj.weight
    return weight.detach().float().cpu().unflatten(0, (shape(model).n_heads, -1))


def ov_matrix(model: TransformersModel, layer: int, head: int) -> torch.Tensor:
    """The OV circuit of a head: what it writes to the stream per unit of (normalised) input.

    Args:
        model: any supported family; grouped-query heads use the value matrix of their group.
        layer: block index.
        head: query-head index.

    Returns:
        W_OV [d_model, d_model], float64, acting on column vectors: output = W_OV @ input.
        Biases and the gain of the layer norm before it are not included.

    Raises:
        ModelError: a head that the model does not have; a remote model, whose weights are not here.
    """
    if is_remote(model):
        raise ModelError(
            "the OV circuit is made of weights, and those of a remote model are on NDIF; load it here"
        )
    sizes = shape(model)
    check_head(sizes, layer, head, "the OV circuit of ")
    attention = model._module.get_submodule(model.layers[layer].self_attn.path.removeprefix("model."))
    d_head, group = sizes.d_head, sizes.n_heads // sizes.n_key_value_heads
    rows = slice(head // group * d_head, (head // group + 1) * d_head)
    if hasattr(attention, "v_proj"):
        value = attention.v_proj.weight  # [n_key_value_heads * d_head, d_model]
    elif hasattr(attention, "qkv_proj"):
        value = attention.qkv_proj.weight[-sizes.n_key_value_heads * d_head :]
    elif hasattr(attention, "query_key_value"):
        # GPT-NeoX: query, key and value of a head, then those of the next one.
        value = attention.query_key_value.weight.unflatten(0, (sizes.n_heads, 3, d_head))[:, 2].flatten(0, 1)
    else:  # GPT-2's Conv1D keeps [in, out]
        value = attention.c_attn.weight[:, -sizes.d_model :].T
    return output_matrices(model, layer)[head].T.double() @ value[rows].double()


# -- checks ---------------------------------------------------------------------------------------
def float_dtype(name: str) -> torch.dtype:
    """A dtype that models may have, by name."""
    allowed = {"float32", "bfloat16", "float16"}
    if name not in allowed:
        raise ModelError(f"dtype {name!r} is not one of {', '.join(sorted(allowed))}")
    return getattr(torch, name)
