"""Rows of a measurement in batches that fit into memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from lib.models import TransformersModel
from lib.progress import counting

Rows = TypeVar("Rows")  # whatever has a length and slices: a tensor, a list, a range
Result = TypeVar("Result")


class Batches:
    """Runs rows in batches, smaller ones once memory ran out.

    Attributes:
        size: rows a batch at most; halved, for all that follows too, whenever memory runs out.
    """

    def __init__(self, size: int):
        self.size = size

    def map(self, run: Callable[[Rows], Result], rows: Rows) -> Iterator[Result]:
        """Results of consecutive batches of rows, in order.

        Raises:
            what `run` raises, but for want of memory with more than one row.
        """
        with counting(_measured_by(run), len(rows)) as count:
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
    """Rows a forward whose activations take half of a GPU's free memory, or on a CPU 8 MB.

    More rows make no forward faster on a CPU once there are some hundred tokens in it: they only leave
    its cache.
    """
    config = model._module.config
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    parameter = next(model._module.parameters())
    row_bytes = length * (8 * config.hidden_size + 4 * width) * parameter.element_size()
    budget = 2**23
    if parameter.device.type == "cuda":
        budget = torch.cuda.mem_get_info(parameter.device)[0] // 2
    # Powers of two: free memory that varies a little does not make other batches, which no cache holds.
    return 1 << min(6, max(1, budget // row_bytes).bit_length() - 1)


def out_of_memory(error: Exception) -> bool:
    """Whether an error of torch says that memory ran out, on a GPU or on the CPU."""
    text = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in text
        or "can't allocate memory" in text
    )


def _measured_by(run: Callable) -> str:
    """What a function measures, in words: the name of the outermost function that it is part of."""
    return getattr(run, "__qualname__", "batches").split(".")[0].strip("_").replace("_", " ")
