"""What a piece of work would allocate, found by running it on tensors that have shapes and no contents.

`Rehearsal` builds a model from its configuration alone and runs functions of `lib` on it as they are, under
torch's fake tensors. Every storage is counted when an operation makes it and when the last reference to it
goes, so the highest sum is the peak that the same work has with contents, whatever the model's family.
"""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast, masking_utils

from lib.models import TransformersModel, wrap


class Peak(NamedTuple):
    """Most bytes that were in use at a time, where the model lies and in host memory.

    On a CPU all is host memory, and `device` is 0.
    """

    device: int
    host: int


class Rehearsal:
    """A model without contents, on which work is counted instead of done.

    Attributes:
        model: answers to the names of `lib.models`; use it within `peak` only.
        weights: bytes of its weights, those that are tied once.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, device: str):
        """
        Args:
            config: of a causal language model.
            dtype: of the weights.
            device: kind of device, "cpu" or an accelerator; the latter is taken for a CUDA one.
        """
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        # Meta stands for the accelerator, so that a plan for one needs none.
        self._device = "cpu" if device == "cpu" else "meta"
        with self._fake, torch.device(self._device):
            module = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa"
            )
        module.eval().requires_grad_(False)
        module.hf_device_map = {"": self._device}  # else transformers would move it, which meta cannot
        self.weights = sum(p.numel() * p.element_size() for p in module.parameters())
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"": 0}, unk_token="")))
        self.model = wrap(module, tokenizer)

    def peak(self, work: Callable[[TransformersModel], object]) -> Peak:
        """Peak of some work above the weights; tensors that it is given from outside are not counted."""
        gc.collect()
        counter = _Counter(self._device)
        counter.ignore(self.model._module)
        with _as_if_real(), self._fake, torch.no_grad(), counter, _Substitutes():
            work(self.model)
        found = counter.most
        return Peak(0, found["cpu"]) if self._device == "cpu" else Peak(found["meta"], found["cpu"])


def activations(
    config: PreTrainedConfig, dtype: torch.dtype, rows: int, length: int, attention: str = "sdpa"
) -> int:
    """Peak bytes of the blocks' forward on an accelerator, without the unembedding.

    Args:
        config: of the model.
        dtype: of its weights.
        rows: sequences in the batch.
        length: tokens of each.
        attention: implementation, "sdpa" or "eager".
    """
    return _activations(config.to_json_string(use_diff=False), type(config), dtype, rows, length, attention)


@lru_cache(maxsize=256)
def _activations(
    settings: str, kind: type[PreTrainedConfig], dtype: torch.dtype, rows: int, length: int, attention: str
) -> int:
    rehearsal = _rehearsal(settings, kind, dtype)
    module, ids = rehearsal.model._module, torch.zeros(rows, length, dtype=torch.long)
    module.set_attn_implementation(attention)

    def blocks(model: TransformersModel) -> None:
        with model.trace(ids.to("meta"), use_cache=False) as tracer:
            # From the second on all are alike, and what one allocates is gone in the next.
            model.layers[min(2, len(model.layers) - 1)].output  # noqa: B018
            tracer.stop()

    return rehearsal.peak(blocks).device


@lru_cache(maxsize=4)
def _rehearsal(settings: str, kind: type[PreTrainedConfig], dtype: torch.dtype) -> Rehearsal:
    return Rehearsal(kind.from_dict(json.loads(settings)), dtype, "cuda")


@contextmanager
def _as_if_real() -> Iterator[None]:
    """Keep torch and transformers from treating tensors without contents apart."""
    autocast, is_tracing = torch.autocast, masking_utils.is_tracing
    # Where autocast is turned off, meta need not be told, and cannot be.
    torch.autocast = lambda device, *args, **kwargs: (
        nullcontext() if device == "meta" else autocast(device, *args, **kwargs)
    )
    # A tracer would have to keep the causal mask that a run leaves to the kernel.
    masking_utils.is_tracing = lambda *tensors: False
    try:
        yield
    finally:
        torch.autocast, masking_utils.is_tracing = autocast, is_tracing


class _Counter(TorchDispatchMode):
    """Bytes of the storages that operations make, by device, while they live."""

    def __init__(self, device: str):
        super().__init__()
        self._known = weakref.WeakSet()
        self._now = {"cpu": 0, "meta": 0}
        self.most = {"cpu": 0, "meta": 0}

    def ignore(self, module: torch.nn.Module) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # transformers asks whether there is no padding and one sequence a row: there is none, and one.
            assert args[0].dtype == torch.bool, "a value that a rehearsal cannot know"
            return True
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage, where = tensor.untyped_storage(), tensor.device.type
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._now[where] += size
        self.most[where] = max(self.most[where], self._now[where])
        weakref.finalize(storage, self._free, where, size)

    def _free(self, where: str, size: int) -> None:
        self._now[where] -= size


class _Substitutes(TorchFunctionMode):
    """What has to be told about tensors without contents: their values, and which kernel attends."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attend(func, *args, **kwargs)
        if func is torch.Tensor.numpy and isinstance(args[0], FakeTensor):
            return np.broadcast_to(np.zeros((), str(args[0].dtype).removeprefix("torch.")), args[0].shape)
        if func is torch.Tensor.tolist and isinstance(args[0], FakeTensor):
            assert args[0].dtype == torch.bool, "values that a rehearsal cannot know"
            return np.ones(args[0].shape, dtype=bool).tolist()  # every layer has heads to ablate
        if func is torch.Tensor.is_meta.__get__:
            return False  # as on the device that meta stands for
        return func(*args, **kwargs)


def _attend(func, query, key, value, attn_mask=None, enable_gqa=False, **others) -> torch.Tensor:
    """Output of the kernel that torch would choose: scores are formed by its math path only."""
    batch, heads, length, _ = query.shape
    if not _is_fused(query, key, attn_mask, enable_gqa):
        return func(query, key, value, attn_mask=attn_mask, enable_gqa=enable_gqa, **others)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    query.new_empty(batch, heads, length, dtype=torch.float32)  # the rows' log-sum-exp, dropped with the call
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


def _is_fused(query, key, mask, enable_gqa: bool) -> bool:
    device = query.device.type
    if device == "meta" and torch.cuda.is_available():
        device = "cuda"
    if device == "meta":
        # As torch 2.13 chooses on CUDA: flash attention in half precision without a mask, memory-efficient
        # attention otherwise, which knows no groups of query heads.
        return not enable_gqa or (query.dtype != torch.float32 and mask is None and query.shape[-1] <= 256)
    q, k = (torch.empty(1, t.shape[1], 16, t.shape[3], dtype=t.dtype, device=device) for t in (query, key))
    m = None if mask is None else torch.ones(1, 1, 16, 16, device=device).to(mask.dtype)
    with torch._C._DisableTorchDispatch():
        return torch._fused_sdp_choice(q, k, k, m, is_causal=m is None, enable_gqa=enable_gqa) != 0
