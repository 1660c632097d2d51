"""Scan orders against walks written out cell by cell, and their gather, scatter and restriction by brute force."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vssm.scan_order import (
    BUILDERS,
    check_local_directions,
    gather,
    local_order,
    local_sequences,
    restrict,
    scan_moves,
    scan_order,
    scatter,
)

GRIDS = [(1, 1), (1, 7), (7, 1), (2, 2), (4, 5), (5, 5), (7, 7)]
EVEN_GRIDS = [(2, 2), (2, 6), (8, 2), (4, 6), (6, 4)]


def walk_rows(height, width):
    return [(y, x) for y in range(height) for x in range(width)]


def walk_columns(height, width):
    return [(y, x) for x in range(width) for y in range(height)]


def walk_row_snake(height, width):
    cells = []
    for y in range(height):
        cells += [(y, x) for x in (range(width) if y % 2 == 0 else reversed(range(width)))]
    return cells


def walk_column_snake(height, width):
    return [(y, x) for x, y in walk_row_snake(width, height)]


def walk_windows(height, width, window):
    cells = []
    for top in range(0, height, window):
        for left in range(0, width, window):
            cells += [
                (y, x) for y in range(top, min(top + window, height)) for x in range(left, min(left + window, width))
            ]
    return cells


def walk_every_second(height, width, top, left, walk):
    return [(top + 2 * y, left + 2 * x) for y, x in walk(height // 2, width // 2)]


WALKS = {
    "row": lambda h, w: [walk_rows(h, w)],
    "column": lambda h, w: [walk_columns(h, w)],
    "bidirectional": lambda h, w: [walk_rows(h, w), walk_rows(h, w)[::-1]],
    "cross": lambda h, w: [walk_rows(h, w), walk_columns(h, w), walk_rows(h, w)[::-1], walk_columns(h, w)[::-1]],
    "cross_rest": lambda h, w: [walk_rows(h, w)[::-1], walk_columns(h, w), walk_columns(h, w)[::-1]],
    "atrous": lambda h, w: [
        walk_every_second(h, w, 0, 0, walk_rows),
        walk_every_second(h, w, 1, 0, walk_columns),
        walk_every_second(h, w, 0, 1, walk_rows),
        walk_every_second(h, w, 1, 1, walk_columns),
    ],
    "alternating": lambda h, w: [walk_rows(h, w), walk_columns(h, w), walk_rows(h, w), walk_columns(h, w)],
    "snake": lambda h, w: [
        walk_row_snake(h, w),
        walk_row_snake(h, w)[::-1],
        walk_column_snake(h, w),
        walk_column_snake(h, w)[::-1],
    ],
}


def as_table(walks, width):
    return torch.tensor([[y * width + x for y, x in walk] for walk in walks], dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "grid"), [(name, grid) for name in WALKS for grid in (EVEN_GRIDS if name == "atrous" else GRIDS)], ids=str
)
def test_order_equals_written_out_walk(name, grid):
    order = scan_order(name, *grid)
    assert order.dtype == torch.int32
    assert torch.equal(order, as_table(WALKS[name](*grid), grid[1]))


@pytest.mark.parametrize("window", [1, 2, 3, 7])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_window_order_equals_written_out_walk(grid, window):
    order = scan_order("window", *grid, window=window)
    assert order.dtype == torch.int32
    assert torch.equal(order, as_table([walk_windows(*grid, window)], grid[1]))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ["snake", "row"])
def test_moves_equal_those_of_the_written_out_walk(name, grid):
    numbers = {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}  # rows down, columns to the right
    moves = scan_moves(name, *grid)
    assert moves.dtype == torch.int32
    assert moves is scan_moves(name, *grid)
    for walk, row in zip(WALKS[name](*grid), moves.tolist(), strict=True):
        assert row[0] == 0
        for (y0, x0), (y1, x1), move in zip(walk, walk[1:], row[1:], strict=False):
            along_row = (x1 > x0) - (x1 < x0)
            assert move == numbers[0 if along_row else y1 - y0, along_row]


LOCAL_DIRECTIONS = ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w3", "w7_flip")


def local_walk(direction, height, width):
    """Cells of the grid padded at the right and bottom to whole windows, padding included."""
    name, _, flip = direction.partition("_")
    walk = {"h": walk_rows, "v": walk_columns}.get(name)
    if walk is None:
        window = int(name[1:])
        height, width = (-(-side // window) * window for side in (height, width))
        cells = walk_windows(height, width, window)
    else:
        cells = walk(height, width)
    return cells[::-1] if flip else cells


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_local_order_counts_the_padding_before_each_step(grid):
    height, width = grid
    order, gap = local_order(LOCAL_DIRECTIONS, height, width)
    assert order.dtype == gap.dtype == torch.int32
    assert local_order(LOCAL_DIRECTIONS, height, width)[0] is order
    for direction, tokens, gaps in zip(LOCAL_DIRECTIONS, order.tolist(), gap.tolist(), strict=True):
        expected, skipped = [], 0
        for y, x in local_walk(direction, height, width):
            if y < height and x < width:
                expected.append((y * width + x, skipped))
                skipped = 0
            else:
                skipped += 1
        assert list(zip(tokens, gaps, strict=True)) == expected


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_local_sequences_hold_the_padding_and_the_class_token(grid, class_token):
    height, width = grid
    tokens, middle = height * width + class_token, height * width // 2
    order, place = local_sequences(LOCAL_DIRECTIONS, height, width, class_token)
    assert order.dtype == place.dtype == torch.int32
    longest = 0
    for direction, sequence, steps in zip(LOCAL_DIRECTIONS, order.tolist(), place.tolist(), strict=True):
        expected = []
        for y, x in local_walk(direction, height, width):
            number = y * width + x
            inside = y < height and x < width
            expected.append(number + (class_token and number >= middle) if inside else tokens)
        if class_token:
            expected.insert(middle, middle)
        longest = max(longest, len(expected))
        assert sequence == expected + [tokens] * (len(sequence) - len(expected))
        assert [sequence[step] for step in steps] == list(range(tokens))
    assert order.shape == (8, longest)


def test_unknown_local_directions_are_named():
    check_local_directions(LOCAL_DIRECTIONS)
    for wrong in ("w0", "hflip", "v_flip_flip", "w", "x"):
        with pytest.raises(ValueError, match=f"scan_order: unknown direction '{wrong}', expected 'h', 'v' or a window"):
            check_local_directions(("h", wrong))


def test_every_builder_has_a_walk_to_compare_with():
    assert set(BUILDERS) == {*WALKS, "window"}


@pytest.mark.parametrize("grid", [(6, 9), (14, 14)], ids=str)
@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "atrous"])
def test_each_row_is_a_permutation(name, grid):
    order = scan_order(name, *grid, window=7 if name == "window" else None)
    assert torch.equal(order.sort(1).values, torch.arange(grid[0] * grid[1], dtype=torch.int32).expand_as(order))


def test_atrous_rows_visit_every_token_once_together():
    order = scan_order("atrous", 6, 10)
    assert order.shape == (4, 15)
    assert torch.equal(order.flatten().sort().values, torch.arange(60, dtype=torch.int32))


def test_padded_windows_are_a_restriction_of_the_padded_grid():
    """LocalMamba pads a grid to whole windows; leaving the padding out gives the order here and says where it was."""
    height, width, window, padded_height, padded_width = 5, 4, 3, 6, 6
    padded = scan_order("window", padded_height, padded_width, window=window)
    real = torch.arange(padded_height * padded_width).view(padded_height, padded_width)[:height, :width].flatten()
    order, gap = restrict(padded, real)
    assert torch.equal(order, scan_order("window", height, width, window=window))
    assert gap[0].tolist() == [0] * 9 + [0, 2, 2] + [2] + [0] * 5 + [3, 2]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("snakes", 2, 2), {}, r"unknown order 'snakes', expected one of snake, .*cross"),
        (("croos", 2, 2), {}, r"unknown order 'croos', expected one of cross, .*snake"),
        (("cross", 0, 7), {}, r"height and width must be at least 1, got 0 and 7"),
        (("cross", 3, -1), {}, r"height and width must be at least 1, got 3 and -1"),
        (("window", 4, 4), {}, r"'window' needs window, .* got None"),
        (("window", 4, 4), {"window": 0}, r"'window' needs window, .* got 0"),
        (("cross", 4, 4), {"window": 2}, r"got window=2 for 'cross'"),
        (("atrous", 4, 5), {}, r"'atrous' needs even height and width, got 4 and 5; pad the grid"),
        (("atrous", 3, 4), {}, r"'atrous' needs even height and width, got 3 and 4"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=f"^scan_order: .*{message}"):
        scan_order(*arguments, **options)


def test_tables_are_built_once():
    assert scan_order("cross", 3, 11) is scan_order("cross", 3, 11, device="cpu")
    assert scan_order("cross", 3, 11) is not scan_order("cross", 11, 3)
    assert scan_order("window", 3, 11, window=2) is not scan_order("window", 3, 11, window=3)


def test_device_follows_torch_default_device():
    on_cpu = scan_order("snake", 3, 12)
    with torch.device("meta"):
        assert scan_order("snake", 3, 12).is_meta
    assert scan_order("snake", 3, 12) is on_cpu


def test_table_first_built_in_inference_mode_serves_training_later():
    with torch.inference_mode():
        order = scan_order("cross", 2, 13)
    assert scan_order("cross", 2, 13) is order
    x = torch.randn(1, 26, 3, requires_grad=True)
    (x.index_select(1, order[1]) ** 2).sum().backward()  # saves the table itself
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_values_are_checked_on_every_device_when_asked(device, monkeypatch):
    x, order = torch.zeros(1, 3, 2, device=device), torch.tensor([[0, 3]], device=device)
    monkeypatch.setenv("VSSM_CHECK", "1")
    with pytest.raises(ValueError, match="gather: order must hold tokens from 0 to 2, got values from 0 to 3"):
        gather(x, order)
    assert gather(x.to("meta"), order.to("meta")).shape == (1, 2, 1, 2)  # which has no values to check


def test_fake_tensors_stay_out_of_the_cache():
    with FakeTensorMode():
        assert type(scan_order("cross", 2, 17)) is not torch.Tensor
    real = scan_order("cross", 2, 17)
    assert type(real) is torch.Tensor
    with FakeTensorMode():
        assert type(scan_order("cross", 2, 17)) is not torch.Tensor


class ReadInOrder(torch.nn.Module):
    """Tokens of a map (b, h, w, d) read in scan order, weighted by their step, and put back."""

    def __init__(self, name, window=None):
        super().__init__()
        self.name, self.window = name, window

    def forward(self, x):
        height, width = x.shape[1:3]
        order = scan_order(self.name, height, width, x.device, window=self.window)
        steps = gather(x.flatten(1, 2), order)
        weight = torch.arange(1, order.shape[1] + 1, dtype=x.dtype)[:, None, None]
        return scatter(steps * weight, order, height * width)


def multiple_of(name):
    """What the sides of a grid must be multiples of."""
    return 2 if name == "atrous" else 1


@pytest.mark.parametrize("name", BUILDERS)
def test_compiles_with_dynamic_sizes_in_one_graph(name):
    module = ReadInOrder(name, window=3 if name == "window" else None)
    torch.compiler.reset()
    compiled = torch.compile(module, dynamic=True, fullgraph=True, backend="aot_eager")
    for height, width in [(4, 5), (7, 7), (6, 11)]:
        x = torch.randn(2, height * multiple_of(name), width * multiple_of(name), 3)
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", BUILDERS)
def test_exports_with_dynamic_height_and_width(name, strict):
    module = ReadInOrder(name, window=3 if name == "window" else None)
    unit = multiple_of(name)
    sizes = {1: unit * torch.export.Dim("height", min=2, max=64), 2: unit * torch.export.Dim("width", min=2, max=64)}
    example = (torch.randn(2, 4 * unit, 5 * unit, 3),)
    exported = torch.export.export(module, example, dynamic_shapes=(sizes,), strict=strict)
    for height, width in [(4, 5), (9, 3), (16, 16)]:
        x = torch.randn(2, height * unit, width * unit, 3)
        torch.testing.assert_close(exported.module()(x), module(x))


def random_order(directions, steps, tokens, batch=None):
    """Random distinct tokens in each row, (k, t) or (b, k, t)."""
    rows = torch.stack([torch.randperm(tokens)[:steps] for _ in range(directions * (batch or 1))])
    return rows.view(directions, steps) if batch is None else rows.view(batch, directions, steps)


@pytest.mark.parametrize("per_direction", [False, True], ids=["shared", "per-direction"])
@pytest.mark.parametrize("batch", [None, 2], ids=["one-order", "per-sample"])
@pytest.mark.parametrize("steps", [12, 5], ids=["full", "partial"])
def test_gather_and_scatter_by_hand(per_direction, batch, steps):
    b, l, k, d = 2, 12, 3, 4
    order = random_order(k, steps, l, batch).int()
    x = torch.randn((b, l, k, d) if per_direction else (b, l, d))
    read = gather(x, order)
    written = scatter(read, order, l)
    expected = torch.zeros(b, l, k, d)
    for sample in range(b):
        for direction in range(k):
            row = order[direction] if batch is None else order[sample, direction]
            for step, token in enumerate(row.tolist()):
                source = x[sample, token, direction] if per_direction else x[sample, token]
                assert torch.equal(read[sample, step, direction], source)
                expected[sample, token, direction] = source
    assert torch.equal(written, expected)
    assert torch.equal(gather(written, order), read)


def test_scatter_undoes_gather_and_merges_by_sum():
    x = torch.randn(2, 20, 4, 3)
    order = scan_order("snake", 4, 5)
    assert torch.equal(scatter(gather(x, order), order, 20), x)
    torch.testing.assert_close(scatter(gather(x[:, :, 0], order), order, 20).sum(2), 4 * x[:, :, 0])


def test_gather_and_scatter_have_right_gradients():
    order = random_order(2, 4, 6)
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scatter(gather(x, order) ** 2, order, 6), (x,))


def brute_force_restriction(order, keep):
    """Walks every direction, counting dropped tokens since the last kept one."""
    kept_orders, gaps = [], []
    for row in order.tolist():
        kept_order, gap, dropped = [], [], 0
        for token in row:
            if token in keep:
                kept_order.append(keep.index(token))
                gap.append(dropped)
                dropped = 0
            else:
                dropped += 1
        kept_orders.append(kept_order)
        gaps.append(gap)
    return torch.tensor(kept_orders, dtype=torch.int32), torch.tensor(gaps, dtype=torch.int32)


@pytest.mark.parametrize("name", ["row", "bidirectional", "cross", "snake"])
@pytest.mark.parametrize("kept", [1, 9, 20])
def test_restrict_equals_brute_force(name, kept):
    order = scan_order(name, 4, 5)
    keep = torch.stack([torch.randperm(20)[:kept] for _ in range(3)])
    expected = [brute_force_restriction(order, sample.tolist()) for sample in keep]
    restricted, gap = restrict(order, keep)
    assert restricted.dtype == gap.dtype == torch.int32
    assert torch.equal(restricted, torch.stack([order for order, _ in expected]))
    assert torch.equal(gap, torch.stack([gap for _, gap in expected]))
    for sample, (sample_order, sample_gap) in enumerate(expected):
        one_order, one_gap = restrict(order, keep[sample])
        assert torch.equal(one_order, sample_order)
        assert torch.equal(one_gap, sample_gap)


def test_restrict_takes_orders_of_each_sample():
    orders = random_order(3, 12, 12, batch=2)
    keep = torch.stack([torch.randperm(12)[:5].sort().values for _ in range(2)])
    restricted, gap = restrict(orders, keep)
    shared, shared_gap = restrict(orders, keep[0])
    for sample in range(2):
        expected, expected_gap = brute_force_restriction(orders[sample], keep[sample].tolist())
        assert torch.equal(restricted[sample], expected)
        assert torch.equal(gap[sample], expected_gap)
        expected, expected_gap = brute_force_restriction(orders[sample], keep[0].tolist())
        assert torch.equal(shared[sample], expected)
        assert torch.equal(shared_gap[sample], expected_gap)


def test_restricting_to_everything_changes_nothing():
    order = scan_order("cross", 3, 4)
    restricted, gap = restrict(order, torch.arange(12))
    assert torch.equal(restricted, order)
    assert not gap.any()


def test_restrict_compiles_in_one_graph():
    def restricted_cross(keep):
        return restrict(scan_order("cross", 5, 4), keep)

    torch.compiler.reset()
    keep = torch.stack([torch.randperm(20)[:7] for _ in range(2)])
    compiled = torch.compile(restricted_cross, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(keep), restricted_cross(keep), strict=True):
        assert torch.equal(got, expected)


ORDER = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gather(torch.zeros(1, 3, 2), ORDER), "gather: order must hold tokens from 0 to 2, got .* 0 to 3"),
        (lambda: gather(torch.zeros(1, 4, 2), ORDER - 1), "gather: order must hold tokens from 0 to 3, got .* -1 to 2"),
        (lambda: gather(torch.zeros(4, 2), ORDER), r"gather: x must be \(b, l, d\) or .* got \(4, 2\)"),
        (
            lambda: gather(torch.zeros(1, 4, 3, 2), ORDER),
            r"gather: order must be \(3, t\) or \(1, 3, t\) .* got \(2, 4\)",
        ),
        (lambda: gather(torch.zeros(1, 4, 2), ORDER[0]), r"gather: order must be .* got \(4,\)"),
        (lambda: gather(torch.zeros(3, 4, 2), ORDER.expand(2, 2, 4)), r"gather: order must be .* got \(2, 2, 4\)"),
        (lambda: scatter(torch.zeros(1, 4, 2, 2), ORDER, 3), "scatter: order must hold tokens from 0 to 2"),
        (
            lambda: scatter(torch.zeros(1, 3, 2, 2), ORDER, 4),
            r"scatter: y must be \(b, 4, k, d\) .* got \(1, 3, 2, 2\)",
        ),
        (lambda: restrict(ORDER, torch.tensor([0, 4])), "restrict: keep must hold tokens from 0 to 3, got .* 0 to 4"),
        (lambda: restrict(ORDER, torch.tensor([1, 1])), "restrict: keep must hold distinct tokens"),
        (lambda: restrict(ORDER[:, :3], torch.tensor([1])), "restrict: each row of order must hold every token"),
        (lambda: restrict(ORDER.expand(2, 2, 4), torch.zeros(3, 1).long()), r"restrict: .* \(2, 2, 4\) and \(3, 1\)"),
    ],
)
def test_tables_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
