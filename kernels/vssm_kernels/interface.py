"""The two public functions: argument checks and adaptation to the one registered op."""

import torch
from torch import Tensor

from vssm_kernels import library  # noqa: F401  registers torch.ops.vssm.scan
from vssm_kernels.checks import check_directional_scan, check_selective_scan


def directional_scan(
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
    """Selective scans of one token map in k directions, without a permuted copy of it.

    Direction i visits token ``order[i, s]`` at step s and computes, in float32 whatever the inputs,

        h_s = exp(step·A) h_{s−1} + step·B·x,    y = (C·h_s + D·x)·silu(z).

    Results lie at the tokens' own places; a token that a direction does not visit gets 0 from it. Tensors may have
    any strides and mixed floating dtypes; float64 inputs are computed in float64. b is the batch, l the number of
    tokens, d the width, n the state size, k the number of directions, t ≤ l the steps of a direction.

    Args:
        x: Tokens, (b, l, d), read by all directions, or (b, l, k, d), one map each.
        dt: Low-rank step (b, l, k, r) with ``dt_weight``, else the step itself before bias and softplus, (b, l, k, d).
        A: (k, d, n), float32 or float64, not above 0.
        B: (b, l, k, n), or a constant (k, n) or (k, d, n).
        C: As B; ``None`` with n = 1 returns the state itself.
        D: Skip connection, (k, d).
        dt_weight: (k, d, r): the step is softplus(dt_weight·dt + dt_bias).
        dt_bias: (k, d).
        softplus: If false, the step is dt_weight·dt + dt_bias as it is.
        order: int32 or int64 (k, t), or (b, k, t) if samples differ; distinct tokens in each row; raster order if None.
        params: ``"token"``: dt, B and C belong to the visited token. ``"step"``: to row s, whatever token is visited.
        chain: The k rows of ``order`` run as one sequence, the state carried over the joints. There is one parameter
            set: k is 1 in A, D, dt, B, C, dt_weight and dt_bias.
        gap: Integers (k, t) or (b, k, t): tokens dropped just before step s. The decay, not the input, then uses
            step + gap·softplus(dt_bias), which is what that many zero tokens would have done to the state.
        z: Gate of the result, (b, l, d), or (b, l, k, d) if not merged.
        merge: Sum over directions; if false, the result keeps them apart.
        return_last_state: Also return the state after the last step.
        out_dtype: Dtype of the result; that of ``x`` if None.

    Returns:
        (b, l, d), or (b, l, k, d) with ``merge=False``, contiguous. With ``return_last_state`` also (b, k, d, n),
        or (b, 1, d, n) with ``chain``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If a shape, dtype, device or value does not fit. Values of ``A`` and ``order`` are checked on the
            CPU, and on every device under ``VSSM_CHECK=1``.

    Reference:
        Gu and Dao, "Mamba", 2023, algorithm 2, https://arxiv.org/abs/2312.00752; scan directions after
        Liu et al., "VMamba", 2024, section 4, https://arxiv.org/abs/2401.10166
    """
    check_directional_scan(
        x, dt, A, B, C, D, dt_weight, dt_bias, order, params, chain, gap, z, merge,
        softplus=softplus, return_last_state=return_last_state, out_dtype=out_dtype,
    )  # fmt: skip
    y, state = torch.ops.vssm.scan(
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_weight,
        dt_bias,
        z,
        order,
        gap,
        softplus,
        params,
        chain,
        merge,
        return_last_state,
        out_dtype,
    )
    return (y, state) if return_last_state else y


def selective_scan(
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
    """Selective scan with the signature and the (b, d, l) layout of ``mamba_ssm``'s function.

    Args:
        u: Input, (b, d, l).
        delta: Step before bias and softplus, (b, d, l).
        A: (d, n), float32 or float64, not above 0. Complex A is not supported.
        B: (b, n, l), (b, g, n, l) with channel i in group i // (d/g), or a constant (d, n).
        C: As B, with as many groups.
        D: Skip connection, (d,).
        z: Gate, (b, d, l): the result is multiplied by silu(z).
        delta_bias: (d,), added to ``delta``.
        delta_softplus: Apply softplus to the biased step.
        return_last_state: Also return the state after the last token.

    Returns:
        (b, d, l), contiguous, dtype of ``u``; with ``return_last_state`` also (b, d, n) in float32.

    Raises:
        ValueError: If a shape, dtype, device or value does not fit.

    Reference:
        Gu and Dao, "Mamba", 2023, algorithm 2, https://arxiv.org/abs/2312.00752
    """
    check_selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus, return_last_state=return_last_state
    )
    groups = next((m.shape[1] for m in (B, C) if m.ndim == 4), 1)

    def rows(tensor: Tensor | None) -> Tensor | None:  # (b, d, l) -> (b, l, g, d/g): groups are directions
        return None if tensor is None else tensor.unflatten(1, (groups, -1)).permute(0, 3, 1, 2)

    def matrix(tensor: Tensor) -> Tensor:
        if tensor.ndim == 2:
            return tensor.unflatten(0, (groups, -1))  # (g, d/g, n)
        return (tensor if tensor.ndim == 4 else tensor[:, None]).permute(0, 3, 1, 2)  # (b, l, g, n)

    def channels(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.unflatten(0, (groups, -1))

    y, state = torch.ops.vssm.scan(
        rows(u), rows(delta), channels(A), matrix(B), matrix(C), channels(D), None, channels(delta_bias), rows(z), None,
        None, delta_softplus, "token", False, False, return_last_state, None,
    )  # fmt: skip
    y = y.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    return (y, state.flatten(1, 2)) if return_last_state else y
