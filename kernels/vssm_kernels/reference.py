"""The scan as the papers write it: a loop over tokens in plain differentiable torch. The oracle of the tests.

Nothing here is fast and nothing here is shared with the backends: float64 inputs give float64 results,
and gradients come from autograd.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan over (b, d, l) tensors, token by token; arguments and results of :func:`selective_scan`.

    Reference:
        Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, algorithm 2,
        https://arxiv.org/abs/2312.00752
    """
    batch, channels, length = u.shape
    dtype = _compute_dtype(u, A)
    step = delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        step = F.softplus(step)

    def tokens_first(matrix: Tensor) -> Tensor:  # -> (l, b, d, n), or (l, b, 1, n) if all channels share it
        if matrix.ndim == 2:
            return matrix.to(dtype).expand(length, batch, -1, -1)
        grouped = (matrix if matrix.ndim == 4 else matrix[:, None]).to(dtype).permute(3, 0, 1, 2)
        groups = grouped.shape[2]
        return grouped if groups == 1 else grouped.repeat_interleave(channels // groups, dim=2)

    inputs = u.to(dtype).permute(2, 0, 1)
    step = step.permute(2, 0, 1)
    y, state = scan_loop(inputs, step, step, A.to(dtype), tokens_first(B), tokens_first(C))
    y = y.permute(1, 2, 0)
    if D is not None:
        y = y + D.to(dtype)[:, None] * u.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, state) if return_last_state else y


def scan_loop(u: Tensor, step: Tensor, decay_step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence h = exp(decay_step·A) h + step·B·u, y = C·h, from a zero state, token by token.

    Args:
        u: Input, (l, b, d).
        step: Step size of the input term, (l, b, d).
        decay_step: Step size of the decay, (l, b, d).
        A: Negative, (d, n).
        B: (l, b, d, n), or (l, b, 1, n) if all channels share it.
        C: As B.

    Returns:
        y (l, b, d) and the last state (b, d, n).
    """
    state = u.new_zeros(*u.shape[1:], A.shape[-1])
    outputs = []
    for u_s, step_s, decay_s, B_s, C_s in zip(*(t.unbind(0) for t in (u, step, decay_step, B, C)), strict=True):
        state = torch.exp(decay_s[..., None] * A) * state + (step_s * u_s)[..., None] * B_s
        outputs.append((state * C_s).sum(-1))
    return torch.stack(outputs), state


def directional_scan_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    order: Tensor | None = None,
    params: str = "token",
    chain: bool = False,
    gap: Tensor | None = None,
    z: Tensor | None = None,
    merge: bool = True,
    return_last_state: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Directional scan by gather, :func:`scan_loop` and scatter; arguments and results of :func:`directional_scan`."""
    batch, tokens, width = x.shape[0], x.shape[1], x.shape[-1]
    if order is not None:
        directions = order.shape[-2]
    else:
        directions = x.shape[2] if x.ndim == 4 else A.shape[0]
        order = torch.arange(tokens, device=x.device).expand(directions, tokens)
    order = order.long().expand(batch, directions, -1)  # (b, k, t)
    steps = order.shape[-1]
    dtype = _compute_dtype(x, A)
    A, B = A.to(dtype), B.to(dtype)
    C = torch.ones_like(A[:, 0]) if C is None else C.to(dtype)

    raw = dt.to(dtype)
    if dt_weight is not None:
        raw = torch.einsum("blkr,kdr->blkd", raw, dt_weight.to(dtype))
    bias = torch.zeros_like(A[..., 0]) if dt_bias is None else dt_bias.to(dtype)  # (k or 1, d)
    activation = F.softplus if softplus else torch.Tensor.clone
    step, idle_step = activation(raw + bias), activation(bias)

    def rows(tensor: Tensor, direction: int, index: Tensor) -> Tensor:
        """Rows ``index`` (b, t) of a (b, l, k, ...) tensor in one direction; a single direction serves all."""
        picked = tensor[:, :, direction if tensor.shape[2] > 1 else 0]  # (b, l, c)
        return picked.gather(1, index[..., None].expand(-1, -1, picked.shape[-1]))

    def matrix(tensor: Tensor, direction: int, index: Tensor) -> Tensor:  # -> (b, t, d, n)
        if tensor.ndim == 4:
            return rows(tensor, direction, index)[:, :, None].expand(-1, -1, width, -1)
        constant = tensor[direction if tensor.shape[0] > 1 else 0]
        return constant.expand(batch, steps, width, constant.shape[-1])

    inputs = (x if x.ndim == 4 else x[:, :, None]).to(dtype)
    visits = []  # per direction: u, step, decay step (b, t, d), B, C (b, t, d, n)
    for i in range(directions):
        index = order[:, i]
        where = index if params == "token" else torch.arange(steps, device=x.device).expand(batch, steps)
        u_i, step_i = rows(inputs, i, index), rows(step, i, where)
        idle = idle_step[i if idle_step.shape[0] > 1 else 0]
        dropped = 0 if gap is None else gap.expand(batch, directions, steps)[:, i, :, None].to(dtype)
        visits.append((u_i, step_i, step_i + dropped * idle, matrix(B, i, where), matrix(C, i, where)))

    def run(visit: tuple[Tensor, ...], A_i: Tensor) -> tuple[Tensor, Tensor]:
        u_i, step_i, decay_i, B_i, C_i = (part.transpose(0, 1) for part in visit)
        y, state = scan_loop(u_i, step_i, decay_i, A_i, B_i, C_i)
        return y.transpose(0, 1), state  # (b, t, d), (b, d, n)

    if chain:
        y, state = run(tuple(torch.cat(parts, dim=1) for parts in zip(*visits, strict=True)), A[0])
        results, states = list(y.split(steps, dim=1)), [state]
    else:
        results, states = map(list, zip(*(run(v, A[i]) for i, v in enumerate(visits)), strict=True))

    placed = []
    for i, y in enumerate(results):
        if D is not None:
            y = y + D.to(dtype)[i if D.shape[0] > 1 else 0] * visits[i][0]
        index = order[:, i, :, None].expand(-1, -1, width)
        placed.append(torch.zeros(batch, tokens, width, dtype=dtype, device=x.device).scatter(1, index, y))
    result = torch.stack(placed, dim=2)
    if merge:
        result = result.sum(2)
    if z is not None:
        result = result * F.silu(z.to(dtype))
    result = result.to(x.dtype if out_dtype is None else out_dtype)
    return (result, torch.stack(states, dim=1)) if return_last_state else result


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
