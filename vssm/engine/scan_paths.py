"""How the scans of a block walk an image, with their steps and decays, read from what the op is given."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vssm.layers.ssm import SelectiveSSM
from vssm.layers.stem import TokenStem
from vssm.models._base import GridBackbone, TokenBackbone
from vssm.models.localmamba import LocalVimMixer
from vssm.models.vim2 import ChannelSSM
from vssm.scan_order import local_sequences
from vssm_kernels.scan_call import ScanCall


@dataclass(frozen=True)
class ScanPath:
    """One direction of one scan over the patches of an image.

    Args:
        cells: At each step the patch visited, numbered in raster order, (t,); −1 for none, a class token or padding.
        size: Rows and columns of the patches.
        step: Step sizes by which the state decays, (t, d).
        A: State matrix (d, n).
    """

    cells: Tensor
    size: tuple[int, int]
    step: Tensor
    A: Tensor


def visit_times(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """When each patch is visited.

    Args:
        cells: The patch at each step, numbered in raster order, (t,); −1 for none.
        size: Rows and columns of the patches.

    Returns:
        The step, counted from 0, (h, w); −1 where a patch is not visited.
    """
    times = torch.full((size[0] * size[1],), -1)
    steps = (cells >= 0).nonzero()[:, 0]
    times[cells[steps].long()] = steps
    return times.unflatten(0, size)


@torch.no_grad()
def scan_paths(model: nn.Module, image: Tensor, block: int) -> list[ScanPath]:
    """The paths of all scans over tokens in a block, in the order in which they run.

    Args:
        model: Of vssm, in evaluation mode.
        image: Normalised as the model expects it, (c, H, W).
        block: Its number, counted from 1 through all stages.

    Returns:
        A path for each direction. Of rows that a scan runs as one sequence, each is a path of its own.

    Raises:
        ValueError: There is no such block, it does not scan tokens, or not those of the grid.
    """
    name, module = _block(model, block)
    scans = [each for each in module.modules() if isinstance(each, SelectiveSSM) and not isinstance(each, ChannelSSM)]
    if not scans:
        raise ValueError(f"scan_paths: expected a block that scans tokens, block {block}, {name}, does not")
    size, calls = _record(model, image, scans, stage=name.rpartition(".blocks.")[0])
    mixer = next((each for each in module.modules() if isinstance(each, LocalVimMixer)), None)
    paths = []
    for call in calls:
        if mixer is None:
            cells, grid = _cells(model, call, size, name=name)
        else:
            cells, grid = _cells_of_windows(model, call, size, mixer=mixer), size
        paths += [ScanPath(each, grid, *_decay(call, row)) for row, each in enumerate(cells)]
    return paths


def _block(model: nn.Module, number: int) -> tuple[str, nn.Module]:
    """A block and its name."""
    if not isinstance(model, GridBackbone | TokenBackbone):
        raise ValueError(f"scan_paths: expected a model of vssm, got {type(model).__name__}")
    stages = [f"stages.{i}.blocks" for i in range(len(model.stages))] if isinstance(model, GridBackbone) else ["blocks"]
    blocks = [f"{stage}.{name}" for stage in stages for name, _ in model.get_submodule(stage).named_children()]
    if not 1 <= number <= len(blocks):
        raise ValueError(f"scan_paths: expected a block from 1 to {len(blocks)}, got {number}")
    return blocks[number - 1], model.get_submodule(blocks[number - 1])


def _record(
    model: nn.Module, image: Tensor, scans: list[SelectiveSSM], *, stage: str
) -> tuple[tuple[int, int], list[ScanCall]]:
    """Rows and columns of the map of a stage, "" for a model without stages, and the calls that some modules make."""
    sizes: list[tuple[int, int]] = []
    if isinstance(model, TokenBackbone):
        sizes.append(cast(TokenStem, model.stem).grid_size(*image.shape[1:]))
        hooks = []
    else:
        hooks = [
            model.get_submodule(stage).register_forward_hook(
                lambda module, inputs, output: sizes.append((output.shape[1], output.shape[2]))
            )
        ]
    with _Recorder() as recorder:
        for scan in scans:
            hooks += [scan.register_forward_pre_hook(recorder.enter), scan.register_forward_hook(recorder.leave)]
        try:
            model(image[None])
        finally:
            for hook in hooks:
                hook.remove()
    return sizes[0], recorder.calls


class _Recorder(TorchDispatchMode):
    """Keeps what the op is given while a module runs that calls `enter` before and `leave` after itself."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[ScanCall] = []
        self._running = False

    def enter(self, *_: Any) -> None:
        """Begins to keep calls."""
        self._running = True

    def leave(self, *_: Any) -> None:
        """Keeps no more calls."""
        self._running = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._running and func is torch.ops.vssm.scan.default:
            self.calls.append(ScanCall(*args))
        return func(*args, **(kwargs or {}))


def _cells(model: Any, call: ScanCall, size: tuple[int, int], *, name: str) -> tuple[Tensor, tuple[int, int]]:
    """The patch at each step of each direction (k, t), and the rows and columns of these patches.

    A scan of a quarter of the tokens, or of a map of half the sides, walks a grid of half the sides, rounded up.
    """
    half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    classes = isinstance(model, TokenBackbone) and model.cls_token is not None
    grid = next((each for each in (size, half) if each[0] * each[1] + classes == call.tokens), None)
    if grid is None or call.batch != 1:
        raise ValueError(
            f"scan_paths: expected one sequence of the {size[0]}x{size[1]} tokens of the map, {name} scans "
            f"{call.batch} of {call.tokens}: windows have paths of their own; choose an image size that is one window"
        )
    order = torch.arange(call.tokens).expand(call.directions, -1) if call.order is None else call.order
    return _numbers(model, call.tokens)[order.long()], grid


def _cells_of_windows(model: Any, call: ScanCall, size: tuple[int, int], *, mixer: LocalVimMixer) -> Tensor:
    """The patch at each step (k, t) of LocalVim's directions, whose sequences hold padding."""
    _, place = local_sequences(mixer.directions, *size, mixer.class_token, device="cpu")  # (k, l)
    cells = torch.full((len(place), call.tokens), -1)
    return cells.scatter(1, place.long(), _numbers(model, place.shape[1]).expand_as(place))


def _numbers(model: Any, tokens: int) -> Tensor:
    """The number of the patch of each token, −1 for a class token."""
    place = model.class_token_index(tokens) if isinstance(model, TokenBackbone) else None
    numbers = torch.arange(tokens)
    if place is None:
        return numbers
    numbers = numbers - (numbers > place).long()
    numbers[place] = -1
    return numbers


def _decay(call: ScanCall, row: int) -> tuple[Tensor, Tensor]:
    """Step sizes by which the state decays (t, d) and the state matrix (d, n), of one row of the order."""
    direction = 0 if call.chain else row
    step = call.dt[0, :, direction]
    if call.dt_weight is not None:
        step = step @ call.dt_weight[direction].T
    bias = step.new_zeros(step.shape[-1]) if call.dt_bias is None else call.dt_bias[direction]
    step = F.softplus(step + bias) if call.softplus else step + bias
    if call.order is not None and call.params == "token":
        step = step[call.order[row].long()]
    if call.gap is not None:
        step = step + call.gap[row, :, None] * F.softplus(bias)
    return step, call.A[direction]
