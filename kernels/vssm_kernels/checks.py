"""Argument checks of the public functions: what was expected with the actual numbers, and what came.

Shapes, dtypes and devices are checked on every call, without touching a value. Values are checked inside the op,
by :func:`check_values`, where that costs no device synchronisation.
"""

import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def check_directional_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    order: Tensor | None,
    params: str,
    chain: bool,
    gap: Tensor | None,
    z: Tensor | None,
    merge: bool,
    *,
    softplus: bool,
    return_last_state: bool,
    out_dtype: torch.dtype | None,
) -> None:
    """Raises ValueError if the arguments of ``directional_scan`` do not fit together."""
    expect = _Expectation("directional_scan")
    expect.tensors({"x": x, "dt": dt, "A": A, "B": B})
    optional = {"C": C, "D": D, "dt_weight": dt_weight, "dt_bias": dt_bias, "order": order, "gap": gap, "z": z}
    expect.tensors({name: tensor for name, tensor in optional.items() if tensor is not None})
    expect.flags({"softplus": softplus, "chain": chain, "merge": merge, "return_last_state": return_last_state})
    if out_dtype is not None and out_dtype not in FLOATS:
        raise ValueError(
            f"directional_scan: out_dtype must be float32, bfloat16, float16 or None, got {_shown(out_dtype)}"
        )
    expect.kinds({"x": x, "dt": dt, "B": B, "C": C, "D": D, "dt_weight": dt_weight, "dt_bias": dt_bias, "z": z}, A)
    expect.same_device(x, {"dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_weight": dt_weight, "dt_bias": dt_bias})
    expect.same_device(x, {"order": order, "gap": gap, "z": z})
    if params not in ("token", "step"):
        raise ValueError(f"directional_scan: params must be 'token' or 'step', got {params!r}")
    if x.ndim not in (3, 4):
        raise ValueError(f"directional_scan: x must be (b, l, d) or (b, l, k, d), got {tuple(x.shape)}")
    expect.ndim("A", A, 3, "(k, d, n)")

    b, l, d = x.shape[0], x.shape[1], x.shape[-1]
    n = A.shape[-1]
    if order is not None:
        expect.integers("order", order)
        expect.ndim("order", order, (2, 3), "(k, t) or (b, k, t)")
        k, t = order.shape[-2:]
    else:
        k, t = (x.shape[2] if x.ndim == 4 else A.shape[0]), l
    p = 1 if chain else k  # parameter sets
    expect.context = lambda: f"for {k} directions, {l} tokens and width {d}"
    if t > l:
        raise ValueError(f"directional_scan: order has {t} steps for {l} tokens; a direction visits a token once")
    expect.shape("A", A, (p, d, n))
    expect.shape("x", x, (b, l, d), (b, l, k, d))
    if order is not None:
        expect.shape("order", order, (k, t), (b, k, t))
    if gap is not None:
        expect.integers("gap", gap)
        expect.shape("gap", gap, (k, t), (b, k, t))
    if dt_weight is None:
        expect.shape("dt", dt, (b, l, p, d))
    else:
        expect.ndim("dt_weight", dt_weight, 3, "(k, d, r)")
        expect.shape("dt_weight", dt_weight, (p, d, dt_weight.shape[-1]))
        expect.shape("dt", dt, (b, l, p, dt_weight.shape[-1]))
    expect.shape("B", B, (b, l, p, n), (p, n), (p, d, n))
    if C is not None:
        expect.shape("C", C, (b, l, p, n), (p, n), (p, d, n))
    elif n != 1:
        raise ValueError(f"directional_scan: C=None returns the state, which needs n = 1, got n = {n}")
    for name, tensor in (("D", D), ("dt_bias", dt_bias)):
        if tensor is not None:
            expect.shape(name, tensor, (p, d))
    if z is not None:
        expect.shape("z", z, (b, l, d) if merge else (b, l, k, d))


def check_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    *,
    delta_softplus: bool,
    return_last_state: bool,
) -> None:
    """Raises ValueError if the arguments of ``selective_scan`` do not fit together."""
    expect = _Expectation("selective_scan")
    expect.tensors({"u": u, "delta": delta, "A": A, "B": B, "C": C})
    optional = {"D": D, "z": z, "delta_bias": delta_bias}
    expect.tensors({name: tensor for name, tensor in optional.items() if tensor is not None})
    expect.flags({"delta_softplus": delta_softplus, "return_last_state": return_last_state})
    expect.kinds({"u": u, "delta": delta, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}, A)
    expect.same_device(u, {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias})
    expect.ndim("u", u, 3, "(b, d, l)")
    expect.ndim("A", A, 2, "(d, n)")
    b, d, l = u.shape
    n = A.shape[-1]
    groups = next((m.shape[1] for m in (B, C) if m.ndim == 4), 1)
    expect.context = lambda: f"for {d} channels and {l} tokens" + (f" in {groups} groups" if groups > 1 else "")
    if groups < 1 or d % groups:
        raise ValueError(f"selective_scan: B has {groups} groups, which must divide the {d} channels")
    expect.shape("A", A, (d, n))
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None:
            expect.shape(name, tensor, (b, d, l))
    for name, tensor in (("B", B), ("C", C)):
        shapes = [(b, groups, n, l), (d, n)] + ([(b, n, l)] if groups == 1 else [])
        expect.shape(name, tensor, *shapes)
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None:
            expect.shape(name, tensor, (d,))


def check_values(tokens: int, A: Tensor, order: Tensor | None, gap: Tensor | None) -> None:
    """Raises ValueError for a positive ``A``, an ``order`` outside its tokens or a negative ``gap``.

    Reading values waits for the device, so this runs on the CPU, and on other devices only under ``VSSM_CHECK=1``,
    which also looks for a token that a direction visits twice.
    """
    thorough = os.environ.get("VSSM_CHECK", "") not in ("", "0")
    if A.device.type != "cpu" and not thorough:
        return
    if A.numel() and (highest := A.max().item()) > 0:
        raise ValueError(
            f"scan: A must not be above 0, or the state grows without bound, got {highest:.4g}; pass -exp(A_log)"
        )
    if order is not None and order.numel():
        low, high = (int(v) for v in order.aminmax())
        if low < 0 or high >= tokens:
            raise ValueError(f"scan: order must hold tokens 0 to {tokens - 1}, got {low} to {high}")
        if thorough and (order.sort(dim=-1).values.diff(dim=-1) == 0).any():
            raise ValueError("scan: order must hold distinct tokens in each row, got a token twice")
    if gap is not None and gap.numel() and (lowest := int(gap.min())) < 0:
        raise ValueError(f"scan: gap must not be below 0, got {lowest}")


class _Expectation:
    """Checks of one call; ``context`` names the sizes that the expected shapes follow from.

    It is a function, for sizes may be symbols: writing one out would bind a compiled graph to its value.
    """

    def __init__(self, function: str) -> None:
        self.function = function
        self.context: Callable[[], str] = lambda: ""

    def tensors(self, values: Mapping[str, object]) -> None:
        for name, value in values.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{self.function}: {name} must be a tensor, got {type(value).__name__}")
            if value.layout != torch.strided:
                raise ValueError(f"{self.function}: {name} must be a dense tensor, got {_short(value.layout)}")

    def flags(self, values: Mapping[str, object]) -> None:
        for name, value in values.items():
            if not isinstance(value, bool):
                raise ValueError(f"{self.function}: {name} must be True or False, got {_shown(value)}")

    def kinds(self, tensors: dict[str, Tensor | None], A: Tensor) -> None:
        for name, tensor in tensors.items():
            if tensor is not None and tensor.dtype not in FLOATS:
                raise ValueError(
                    f"{self.function}: {name} must be float32, bfloat16 or float16, got {_short(tensor.dtype)}"
                )
        if A.is_complex():
            raise ValueError(
                f"{self.function}: A must be real, got {_short(A.dtype)}; complex states are not supported"
            )
        if A.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{self.function}: A must be float32, got {_short(A.dtype)}; pass -exp(A_log.float())")

    def same_device(self, first: Tensor, tensors: dict[str, Tensor | None]) -> None:
        for name, tensor in tensors.items():
            if tensor is not None and tensor.device != first.device:
                raise ValueError(
                    f"{self.function}: all tensors must be on {first.device}, got {name} on {tensor.device}"
                )

    def integers(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in INTEGERS:
            raise ValueError(f"{self.function}: {name} must hold integers, got {_short(tensor.dtype)}")

    def ndim(self, name: str, tensor: Tensor, allowed: int | tuple[int, ...], spelled: str) -> None:
        if tensor.ndim not in (allowed if isinstance(allowed, tuple) else (allowed,)):
            raise ValueError(f"{self.function}: {name} must be {spelled}, got {tuple(tensor.shape)}")

    def shape(self, name: str, tensor: Tensor, *allowed: tuple[int, ...]) -> None:
        # Of tuples of unlike length Python compares the first sizes all the same, which an exported program would fix.
        if all(tensor.ndim != len(shape) or tensor.shape != shape for shape in allowed):
            spelled = " or ".join(str(tuple(int(size) for size in shape)) for shape in allowed)
            raise ValueError(f"{self.function}: {name} must be {spelled} {self.context()}, got {tuple(tensor.shape)}")


def _short(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _shown(value: object) -> str:
    """A value that is not of the type it should be, in a few words of one line."""
    return type(value).__name__ if isinstance(value, Tensor) else " ".join(repr(value).split())
