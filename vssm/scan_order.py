"""Scan orders: in which order each direction of a selective scan visits the tokens of an image.

An order is a table ``(k, l)``: direction i visits token ``order[i, s]`` at step s, tokens being numbered in raster
order (row by row). A new way to walk an image is one function of the grid of token numbers, listed in `BUILDERS`.
"""

import difflib
import os
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vssm_kernels.tables import cached


def _row(grid: Tensor) -> Tensor:
    """Row after row: raster order itself."""
    return grid.reshape(1, -1)


def _column(grid: Tensor) -> Tensor:
    """Column after column, each from the top."""
    return grid.T.reshape(1, -1)


def _bidirectional(grid: Tensor) -> Tensor:
    """Raster order and its reversal (Vim)."""
    return _and_reversed(_row(grid))


def _cross(grid: Tensor) -> Tensor:
    """Rows, columns, rows reversed, columns reversed (VMamba)."""
    return _and_reversed(torch.cat([_row(grid), _column(grid)]))


def _cross_rest(grid: Tensor) -> Tensor:
    """What the cross scan adds to raster order: rows reversed, columns, columns reversed (MSVMamba)."""
    return torch.cat([_row(grid).flip(1), _and_reversed(_column(grid))])


def _atrous(grid: Tensor) -> Tensor:
    """Four grids of every second row and column, by rows and by columns in turn (EfficientVMamba).

    They begin at rows and columns (0, 0), (1, 0), (0, 1) and (1, 1); each direction visits its own quarter of the
    tokens.
    """
    return torch.cat([_row(grid[::2, ::2]), _column(grid[1::2, ::2]), _row(grid[::2, 1::2]), _column(grid[1::2, 1::2])])


def _alternating(grid: Tensor) -> Tensor:
    """Rows, columns, rows, columns: the atrous scan as seen in cells of 2×2 tokens, one for each direction."""
    return torch.cat([_row(grid), _column(grid)]).repeat(2, 1)


def _snake(grid: Tensor) -> Tensor:
    """Rows with every second one backwards, that reversed, and both over columns (PlainMamba).

    Consecutive tokens of a snake are neighbours in the image.
    """
    rows, columns = _alternate(grid), _alternate(grid.T)
    return torch.cat([_and_reversed(rows), _and_reversed(columns)])


def _window(grid: Tensor, window: int) -> Tensor:
    """Square windows row by row, the tokens of each row by row (LocalMamba).

    Windows at the right and bottom border are smaller where the grid is no multiple of ``window``.
    """
    height, width = grid.shape
    y = torch.arange(height, device=grid.device)[:, None]
    x = torch.arange(width, device=grid.device)
    windows_per_row = (width + window - 1) // window
    rank = (y // window * windows_per_row + x // window) * window**2 + y % window * window + x % window
    return grid.flatten()[rank.flatten().argsort()][None]


def _and_reversed(order: Tensor) -> Tensor:
    return torch.cat([order, order.flip(1)])


def _alternate(grid: Tensor) -> Tensor:
    backwards = torch.arange(grid.shape[0], device=grid.device)[:, None] % 2 == 1
    return torch.where(backwards, grid.flip(1), grid).reshape(1, -1)


BUILDERS: dict[str, Callable[..., Tensor]] = {
    "row": _row,
    "column": _column,
    "bidirectional": _bidirectional,
    "cross": _cross,
    "cross_rest": _cross_rest,
    "atrous": _atrous,
    "alternating": _alternating,
    "snake": _snake,
    "window": _window,
}


def scan_order(
    name: str, height: int, width: int, device: torch.device | str | None = None, *, window: int | None = None
) -> Tensor:
    """Returns the table of a named scan order.

    A sequence is a grid of one row: Vim, whose sequence holds a class token besides its patches, reads
    ``scan_order("bidirectional", 1, tokens)``.

    Args:
        name: One of `BUILDERS`.
        height: Rows of the grid, at least 1.
        width: Columns of the grid, at least 1.
        device: Device of the table; ``None`` is torch's default device.
        window: Side of the windows in tokens; given for the order ``"window"`` and no other.

    Returns:
        Order (k, height·width), int32, each row a permutation; of ``"atrous"`` (4, height·width/4), whose rows visit
        every token once together. Tables are cached and shared: do not write into them.

    Raises:
        ValueError: If the name is unknown, the grid is empty, ``window`` does not suit the order, or ``"atrous"`` is
            asked for a grid that has no equal quarters.
    """
    _check_arguments(name, height, width, window)
    return _table(name, height, width, window, device=device)


@cached
def scan_moves(name: str, height: int, width: int, *, device: torch.device | str | None = None) -> Tensor:
    """Returns where each step of a scan order comes from, for orders that go from neighbour to neighbour.

    Args:
        name: One of `BUILDERS` that take no windows.
        height: Rows of the grid, at least 1.
        width: Columns of the grid, at least 1.
        device: Device of the table; ``None`` is torch's default device.

    Returns:
        Moves (k, height·width), int32: 0 at the first step, then 1 for a move to the right, 2 to the left, 3 up and
        4 down; a move along both axes counts as one along the row. The table is cached and shared: do not write into
        it.
    """
    order = scan_order(name, height, width, device)
    right, down = (order % width).diff(), (order // width).diff()
    moves = torch.where(right > 0, 1, torch.where(right < 0, 2, torch.where(down < 0, 3, 4)))
    return torch.cat([torch.zeros_like(order[:, :1]), moves.to(torch.int32)], dim=1)


@cached
def local_order(
    directions: Sequence[str], height: int, width: int, *, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the orders of LocalMamba's directions, without the cells that pad a grid to whole windows.

    Args:
        directions: Of ``"h"`` for rows, ``"v"`` for columns, ``"w2"`` for windows of 2×2 tokens (or of another side),
            row by row and each row by row within, and these with ``"_flip"``, reversed; padding is at the right and
            bottom.
        height: Rows of the grid, at least 1.
        width: Columns of the grid, at least 1.
        device: Device of the tables; ``None`` is torch's default device.

    Returns:
        Order and gap, (k, height·width), int32: the token at each step, and the number of padding cells just before it.
        The tables are cached and shared: do not write into them.
    """
    tokens = height * width
    walks = [_local_walk(direction, height, width, device) for direction in directions]
    steps = [_steps_at_tokens(walk, tokens) for walk in walks]
    order = torch.stack([walk[each] for walk, each in zip(walks, steps, strict=True)])
    gap = torch.stack([each.diff(prepend=each.new_full((1,), -1)) - 1 for each in steps])
    return order, gap.to(torch.int32)


def _steps_at_tokens(walk: Tensor, tokens: int) -> Tensor:
    """Steps of a walk (t,) that are at tokens, not at padding cells, (tokens,); without sorting, which ONNX cannot."""
    is_token = walk < tokens
    rank = torch.where(is_token, is_token.cumsum(0) - 1, tokens)
    steps = torch.arange(walk.shape[0], device=walk.device)
    return steps.new_zeros(tokens + 1).scatter(0, rank, steps)[:tokens]


@cached
def local_sequences(
    directions: Sequence[str],
    height: int,
    width: int,
    class_token: bool = False,
    *,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns LocalMamba's directions as sequences that hold the padding cells, all as long as the longest.

    Args:
        directions: As of `local_order`.
        height: Rows of the grid, at least 1.
        width: Columns of the grid, at least 1.
        class_token: Whether a class token, in the middle of the tokens, has the same place in every sequence.
        device: Device of the tables; ``None`` is torch's default device.

    Returns:
        Order (k, t), int32, of l tokens and of number l, which stands for a padding cell; and place (k, l), int32, the
        step at which a direction visits each token. The tables are cached and shared: do not write into them.
    """
    patches, middle = height * width, height * width // 2
    tokens = patches + class_token
    walks = [_local_walk(direction, height, width, device) for direction in directions]
    if class_token:
        token = walks[0].new_full((1,), middle)
        walks = [walk + (walk >= middle) for walk in walks]  # which makes the number of padding cells one more, too
        walks = [torch.cat([walk[:middle], token, walk[middle:]]) for walk in walks]
    longest = max(walk.shape[0] for walk in walks)
    # Padded by 0 below a shift, for a compiled graph would keep the value of another one.
    order = torch.stack([F.pad(walk - tokens, (0, longest - walk.shape[0])) for walk in walks]) + tokens
    steps = torch.arange(longest, dtype=torch.int32, device=device).expand_as(order)
    place = order.new_zeros(len(walks), tokens + 1).scatter(1, order.long(), steps)
    return order, place[:, :tokens]


def _local_walk(direction: str, height: int, width: int, device: torch.device | str | None) -> Tensor:
    """Token numbers in the order of one direction, with number height·width for padding cells, (t,)."""
    name, _, flip = direction.partition("_")
    if name == "h":
        walk = torch.arange(height * width, dtype=torch.int32, device=device)
    elif name == "v":
        walk = torch.arange(height * width, dtype=torch.int32, device=device).view(height, width).T.flatten()
    else:
        walk = _padded_windows(int(name[1:]), height, width, device)
    return walk.flip(0) if flip else walk


def _padded_windows(window: int, height: int, width: int, device: torch.device | str | None) -> Tensor:
    vertical, horizontal = ((side + window - 1) // window for side in (height, width))  # numbers of windows
    step = torch.arange(vertical * horizontal * window**2, dtype=torch.int32, device=device)
    number, within = step // window**2, step % window**2
    y = number // horizontal * window + within // window
    x = number % horizontal * window + within % window
    return torch.where((y < height) & (x < width), y * width + x, height * width)


def check_local_directions(directions: Sequence[str]) -> None:
    """Raises ValueError if one of the directions is none of those that `local_order` knows."""
    for direction in directions:
        if not re.fullmatch(r"(h|v|w[1-9]\d*)(_flip)?", direction):
            raise ValueError(
                f"scan_order: unknown direction {direction!r}, expected 'h', 'v' or a window such as 'w7', or one of "
                "them with '_flip'"
            )


def _check_arguments(name: str, height: int, width: int, window: int | None) -> None:
    if name not in BUILDERS:
        by_likeness = sorted(BUILDERS, key=lambda known: -difflib.SequenceMatcher(None, str(name), known).ratio())
        raise ValueError(f"scan_order: unknown order {name!r}, expected one of {', '.join(by_likeness)}")
    if height < 1 or width < 1:
        raise ValueError(f"scan_order: height and width must be at least 1, got {height} and {width}")
    if name == "atrous" and (height % 2 or width % 2):
        raise ValueError(
            f"scan_order: order 'atrous' needs even height and width, got {height} and {width}; pad the grid"
        )
    if name == "window":
        if window is None or window < 1:
            raise ValueError(f"scan_order: order 'window' needs window, its side in tokens, at least 1, got {window}")
    elif window is not None:
        raise ValueError(f"scan_order: window belongs to the order 'window', got window={window} for {name!r}")


@cached
def _table(
    name: str, height: int, width: int, window: int | None, *, device: torch.device | str | None = None
) -> Tensor:
    grid = torch.arange(height * width, dtype=torch.int32, device=device).view(height, width)
    return BUILDERS[name](grid) if window is None else BUILDERS[name](grid, window)


def gather(x: Tensor, order: Tensor) -> Tensor:
    """Reads tokens in scan order.

    Args:
        x: Tokens (b, l, d) read by all directions, or (b, l, k, d) with one set for each.
        order: Order (k, t) or, per sample, (b, k, t).

    Returns:
        Tokens (b, t, k, d) in the order of the steps.

    Raises:
        ValueError: If the shapes do not belong together or, on the CPU, an index lies outside the tokens.
    """
    if x.ndim not in (3, 4):
        raise ValueError(f"gather: x must be (b, l, d) or (b, l, k, d), got {tuple(x.shape)}")
    directions = order.shape[-2] if order.ndim > 1 else 0
    per_direction = x if x.ndim == 4 else x.unsqueeze(2).expand(-1, -1, directions, -1)
    index = _step_index("gather", order, batch=x.shape[0], directions=per_direction.shape[2], tokens=x.shape[1])
    return per_direction.gather(1, index.expand(-1, -1, -1, x.shape[-1]))


def scatter(y: Tensor, order: Tensor, tokens: int) -> Tensor:
    """Puts steps back to the places of their tokens, with zeros at tokens that a direction does not visit.

    This is the inverse of `gather`; its sum over the directions, ``.sum(2)``, merges them.

    Args:
        y: Steps (b, t, k, d).
        order: Order (k, t) or, per sample, (b, k, t), distinct tokens in each row.
        tokens: Number of tokens l.

    Returns:
        Tokens (b, l, k, d).

    Raises:
        ValueError: If the shapes do not belong together or, on the CPU, an index lies outside the tokens.
    """
    if y.ndim != 4 or y.shape[1] != order.shape[-1]:
        raise ValueError(f"scatter: y must be (b, {order.shape[-1]}, k, d) for the order's steps, got {tuple(y.shape)}")
    batch, _, directions, channels = y.shape
    index = _step_index("scatter", order, batch=batch, directions=directions, tokens=tokens)
    return y.new_zeros(batch, tokens, directions, channels).scatter(1, index.expand_as(y), y)


def restrict(order: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Restricts an order to kept tokens.

    The restricted order numbers tokens by their place in ``keep``, as a stream does that holds kept tokens only:
    ``keep[order]`` are the original numbers. ``gap`` lets the state decay over what was left out.

    Args:
        order: Order (k, l) or (b, k, l), each row a permutation.
        keep: Distinct tokens to keep, (t,) or, per sample, (b, t).

    Returns:
        Order and gap, int32, both (k, t), or (b, k, t) if either argument is per sample. ``gap[..., s]`` is the number
        of dropped tokens between steps s − 1 and s, or before the first step.

    Raises:
        ValueError: If the shapes do not belong together or, on the CPU, ``order`` has a row that is no permutation or
            ``keep`` a token that is outside the order or there twice.
    """
    _check_restriction(order, keep)
    tokens = keep.long() if keep.ndim == 1 else keep.long().unsqueeze(1)
    step_of_token = order.argsort(-1)
    if keep.ndim == 2 and order.ndim == 2:
        step_of_token = step_of_token.expand(keep.shape[0], -1, -1)
    steps, place = step_of_token.gather(-1, tokens.expand(*step_of_token.shape[:-1], -1)).sort(-1)
    before_first = steps.new_full((*steps.shape[:-1], 1), -1)
    gap = steps.diff(prepend=before_first) - 1
    return place.to(torch.int32), gap.to(torch.int32)


def _step_index(function: str, order: Tensor, *, batch: int, directions: int, tokens: int) -> Tensor:
    """Checks an order and returns it as an index (b, t, k, 1) along the tokens."""
    steps = order.shape[-1]
    if order.shape not in ((directions, steps), (batch, directions, steps)):
        raise ValueError(
            f"{function}: order must be ({directions}, t) or ({batch}, {directions}, t) for {directions} directions "
            f"and batch {batch}, got {tuple(order.shape)}"
        )
    _check_range(function, "order", order, tokens)
    return order.long().expand(batch, -1, -1).transpose(1, 2).unsqueeze(3)


def _check_restriction(order: Tensor, keep: Tensor) -> None:
    batched = order.ndim == 3 and keep.ndim == 2
    if order.ndim not in (2, 3) or keep.ndim not in (1, 2) or (batched and order.shape[0] != keep.shape[0]):
        raise ValueError(
            f"restrict: expected order (k, l) or (b, k, l) and keep (t,) or (b, t) with one b, "
            f"got {tuple(order.shape)} and {tuple(keep.shape)}"
        )
    tokens = order.shape[-1]
    _check_range("restrict", "keep", keep, tokens)
    if _values_at_hand(order) and (order.sort(-1).values != torch.arange(tokens, device=order.device)).any():
        raise ValueError(f"restrict: each row of order must hold every token from 0 to {tokens - 1} once")
    if _values_at_hand(keep) and (keep.sort(-1).values.diff() == 0).any():
        raise ValueError("restrict: keep must hold distinct tokens, got one twice")


def _check_range(function: str, argument: str, index: Tensor, tokens: int) -> None:
    if not _values_at_hand(index) or index.numel() == 0:
        return
    lowest, highest = (int(value) for value in index.aminmax())
    if lowest < 0 or highest >= tokens:
        raise ValueError(
            f"{function}: {argument} must hold tokens from 0 to {tokens - 1}, got values from {lowest} to {highest}"
        )


def _values_at_hand(index: Tensor) -> bool:
    """Tells whether to look at values: not in a compiled graph, nor where there are none, nor where it means waiting.

    ``VSSM_CHECK=1`` accepts the waiting, here as in the scan itself.
    """
    if torch.compiler.is_compiling() or type(index) is not Tensor or index.is_meta:
        return False
    return index.device.type == "cpu" or os.environ.get("VSSM_CHECK", "") not in ("", "0")
