"""Which blocks can run on some of their tokens only: those that say so, of parts that treat each token by itself."""

import inspect
from collections.abc import Iterator

from timm.layers import DropPath, Mlp
from torch import nn

from vssm.layers.conv import CausalTokenConv, TokenConv
from vssm.layers.ssm import SelectiveSSM

_PROMISE = "token_prunable"
# Modules that treat each token by itself, and which say nothing about it.
_TOKEN_WISE = frozenset(
    {
        nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.Identity, nn.Dropout, DropPath, Mlp, nn.ModuleList,
        nn.Sequential, nn.GELU, nn.SiLU, nn.ReLU,
    }
)  # fmt: skip
# What others do, by the name of their class.
_REASONS = {
    "TokenSqueezeExcite": "gates channels by their mean over all tokens",
    "SqueezeExcite": "gates channels by their mean over all tokens",
    "Attention": "attends between tokens",
    "MultiheadAttention": "attends between tokens",
    "Conv1d": "is a convolution outside of TokenConv, and sees neighbouring tokens",
    "Conv2d": "is a convolution outside of TokenConv, and sees neighbouring tokens",
    "AdaptiveAvgPool1d": "takes a mean over all tokens",
    "AdaptiveAvgPool2d": "takes a mean over all tokens",
}


def check_block(block: nn.Module, name: str, *, conv: str) -> None:
    """Refuses a block that cannot run on some of its tokens.

    A class promises with ``token_prunable = True`` that whatever its own code does besides calling its parts treats
    each token by itself. The promise is not inherited: a subclass may do other things.

    Args:
        block: A block of a backbone.
        name: What to call it.
        conv: What its convolutions are to see, ``"grid"`` or ``"compact"``.

    Raises:
        ValueError: If a part mixes tokens in another way than by convolution and scan, or promises nothing.
    """
    problem = next(_problems(block, conv), None) or _missing_parts(block)
    if problem is not None:
        path, reason = problem
        raise ValueError(f"TokenReducer: {'.'.join(filter(None, (name, path)))} cannot run on fewer tokens: {reason}")


def _problems(block: nn.Module, conv: str) -> Iterator[tuple[str, str]]:
    """Paths and reasons of what cannot be pruned; known reasons come before missing promises."""
    silent = []
    for path, module in _parts(block):
        kind = type(module).__name__
        if isinstance(module, TokenConv) and conv == "compact":
            yield path, f"{kind} convolves a grid, of which tokens left over are none; use conv='grid'"
        elif isinstance(module, TokenConv) and module.conv.stride != (1, 1):
            yield path, f"{kind} has a stride, and so makes a grid of another size"
        elif isinstance(module, SelectiveSSM) and "gap" not in inspect.signature(type(module).forward).parameters:
            yield path, f"{kind} takes no gap between the tokens that it visits"
        elif kind in _REASONS:
            yield path, f"{kind} {_REASONS[kind]}"
        elif not _is_known(module):
            silent.append((path, f"{kind} does not promise to treat each token by itself ({_PROMISE} = True)"))
    yield from silent


def _parts(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and its parts with their paths, but not what is inside of layers that the reducer knows."""
    yield path, module
    if not isinstance(module, SelectiveSSM | TokenConv | CausalTokenConv):
        for name, child in module.named_children():
            yield from _parts(child, f"{path}.{name}" if path else name)


def _is_known(module: nn.Module) -> bool:
    hooked = isinstance(module, SelectiveSSM | TokenConv | CausalTokenConv)
    return hooked or type(module) in _TOKEN_WISE or vars(type(module)).get(_PROMISE, False)


def _missing_parts(block: nn.Module) -> tuple[str, str] | None:
    parts = dict(block.named_modules())
    if isinstance(parts.get("mixer.ssm"), SelectiveSSM) and "mixer.out_proj" in parts:
        return None
    return "", "scores read mixer.ssm, a SelectiveSSM, and what mixer.out_proj reads, which it does not have"
