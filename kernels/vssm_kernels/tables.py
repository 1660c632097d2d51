"""Index tables that depend on sizes alone are made once."""

import functools
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

_Table = TypeVar("_Table")


def cached(build: Callable[..., _Table]) -> Callable[..., _Table]:
    """Decorates a function of sizes and a ``device`` that makes tables: it runs once for each of its arguments.

    The tables are shared: do not write into them. In a compiled graph, whose sizes may be symbols, and among fake
    tensors nothing is kept.
    """

    @functools.lru_cache(maxsize=128)
    def build_once(*arguments: Hashable, device: torch.device) -> _Table:
        with torch.inference_mode(False):  # a table made in inference mode could not be saved for backward later
            return build(*arguments, device=device)

    @functools.wraps(build)
    def tables(*arguments: Hashable, device: torch.device | str | None = None) -> _Table:
        if torch.compiler.is_compiling():  # sizes may be symbols, which a cache cannot hash
            return build(*arguments, device=device)
        probe = torch.empty(0, device=device)
        if type(probe) is not Tensor:  # a fake tensor must not stay in the cache, nor a real one come out of it
            return build(*arguments, device=device)
        return build_once(*arguments, device=probe.device)

    return tables
