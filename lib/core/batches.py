"""Rows of a measurement in batches that fit into memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from nnsight import TransformersModel
from transformers import PreTrainedConfig

from lib.core.families import shape
from lib.core.progress import counting

Rows = TypeVar("Rows")  # whatever has a length and slices: a tensor, a list, a range
Result = TypeVar("Result")

_ON_NDIF = 2**31  # bytes of a batch: others share its GPUs, and every batch waits in a queue


class Batches:
    """Runs rows in batches, smaller ones once memory ran out.

    Attributes:
        size: rows a batch at most; halved, for all that follows too, whenever memory runs out.
    """

    def __init__(self, size: int):
        self.size = size

    def map(self, run: Callable[[Rows], Result], rows: Rows, *, what: str = "batches") -> Iterator[Result]:
        """Results of consecutive batches of rows, in order.

        Args:
            what: `run` measures, in a few words, for the line that shows how far it has come.

        Raises:
            what `run` raises, but for want of memory with more than one row.
        """
        with counting(what, len(rows)) as count:
            done = 0
            while done < len(rows):
                # A trace leaves cycles that hold its tensors. They are young: this takes under a millisecond.
                gc.collect(1)
                batch = rows[done : done + self.size]
                try:
                    result = run(batch)
                except Exception as error:
                    if len(batch) == 1 or not out_of_memory(error):
                        raise
                    self.size = len(batch) // 2
                else:
                    count(len(batch))
                    yield result
                    done += len(batch)
                    continue
                # Only here is the error gone, whose traceback held what the forward had allocated.
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()


def auto_batch_size(model: TransformersModel, length: int) -> int:
    """Rows to start with: those whose activations take a quarter of a GPU's free memory, on a CPU 8 MB, on
    NDIF 2 GB; 64 at most.

    More rows make no forward faster on a CPU once there are some hundred tokens in it: they only leave
    its cache.

    Args:
        model: from `lib.core.models.load`.
        length: tokens of a row.

    Returns:
        A power of two: free memory that varies a little does not make other batches, which no cache holds.
    """
    parameter = next(model._module.parameters())
    row_bytes = length * _token_bytes(model._module.config, parameter.dtype)
    return _rows(_budget(parameter.device, on_cpu=2**23, share=4) // row_bytes, most=64)


def auto_rows(model: TransformersModel, length: int) -> int:
    """Rows a forward that suit short prompts, and answers written over a key-value cache: those that take up
    half of a GPU's free memory, on a CPU 256 MB, on NDIF 2 GB; 256 at most.

    Counts the activations of one block at `length` tokens, and twice the cache.
    """
    sizes, parameter = shape(model), next(model._module.parameters())
    kept = 4 * sizes.n_layers * sizes.n_key_value_heads * sizes.d_head
    row_bytes = length * _token_bytes(model._module.config, parameter.dtype, kept)
    return _rows(_budget(parameter.device, on_cpu=2**28, share=2) // row_bytes, most=256)


def _budget(device: torch.device, *, on_cpu: int, share: int) -> int:
    """Bytes that a batch may take on a device; on a GPU this part of what is free."""
    if device.type == "cuda":
        return free_memory(device) // share
    return _ON_NDIF if device.type == "meta" else on_cpu


def _rows(fitting: int, most: int) -> int:
    """The largest power of two that fits, at least 1."""
    return 1 << max(1, min(most, fitting)).bit_length() - 1


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a GPU: free ones, and those that torch holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def out_of_memory(error: Exception) -> bool:
    """Whether an error of torch says that memory ran out, on a GPU or on the CPU."""
    text = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in text
        or "can't allocate memory" in text
    )


def _token_bytes(config: PreTrainedConfig, dtype: torch.dtype, kept: int = 0) -> int:
    """What the activations of one block take for a token, with `kept` values besides."""
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return (8 * config.hidden_size + 4 * width + kept) * dtype.itemsize
