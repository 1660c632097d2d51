"""Work that shrinks until it fits into memory."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

_logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def halving(work: Callable[[int], _Result], batch_size: int) -> _Result:
    """Does something with the largest of ``batch_size``, its half, its quarter ... that fits into memory.

    Args:
        work: What to do, of a number of images per step. It is begun anew with every number.
        batch_size: First number.

    Returns:
        What ``work`` returns.

    Raises:
        ValueError: One image does not fit.
    """
    while True:
        try:
            return work(batch_size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if batch_size == 1:
            raise ValueError("one image does not fit into memory; take a smaller --img-size")
        batch_size //= 2
        _logger.info("not enough memory: trying %d images per step", batch_size)
        release()


def release() -> None:
    """Gives memory back that nobody uses any more, cycles of objects and torch's reserves on GPUs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is not enough, of a GPU or of the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
