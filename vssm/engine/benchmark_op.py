"""Speed and memory of the scan alone, beside the loop over tokens."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vssm.engine.records import environment
from vssm.engine.timing import measure_memory, measure_time
from vssm_kernels import directional_scan, selective_scan
from vssm_kernels.reference import selective_scan_ref

DEFAULT_SHAPES = ((1, 192, 1, 3136), (1, 384, 16, 197))


class _Subject(NamedTuple):
    """One implementation on one set of inputs; ``call`` gives (b, d, l)."""

    name: str
    call: Callable[[], Tensor]
    inputs: list[Tensor]


def benchmark_op(
    shapes: Sequence[tuple[int, int, int, int]] = DEFAULT_SHAPES,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    against_loop: bool = False,
    warmup: int = 3,
    repeats: int = 20,
) -> list[dict]:
    """Times both public functions of the op on random inputs, forward and forward with backward.

    The inputs are those of a block: a step with bias and softplus, input-dependent B and C, a skip connection, no gate.
    ``directional_scan`` gets the same numbers as one direction. Peak memory is that of forward with backward, gradients
    included and inputs not.

    Args:
        shapes: (b, d, n, l) each: batch, channels, states, tokens.
        device: Where to compute.
        dtype: Of the inputs; A, D and the bias are float32.
        against_loop: Also time the reference loop over tokens, and compare results with it.
        warmup: Calls before the timed ones.
        repeats: Timed calls.

    Returns:
        One record per shape and function: ``op``, ``b``, ``d``, ``n``, ``l``, ``dtype``, ``forward_ms``,
        ``forward_p10_ms``, ``forward_p90_ms``, the same for ``forward_backward``, ``peak_memory_mib``,
        ``relative_error`` (to the loop, by norm) and the environment.
    """
    surroundings = environment(device)
    records = []
    for shape in shapes:
        subjects = list(_subjects(shape, device, dtype, against_loop))
        expected = _result(subjects[-1]) if against_loop else None
        for subject in subjects:
            record = {"op": subject.name, **dict(zip("bdnl", shape, strict=True)), "dtype": str(dtype).split(".")[-1]}
            record |= _measure(subject, device, warmup, repeats)
            record["relative_error"] = None if expected is None else _relative_error(_result(subject), expected)
            records.append(record | surroundings)
    return records


def _subjects(
    shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype, against_loop: bool
) -> Iterator[_Subject]:
    sequences = _inputs(shape, device, dtype)
    tokens = _as_tokens(sequences)
    yield _Subject("selective_scan", lambda: _run_sequences(selective_scan, sequences), sequences)
    yield _Subject("directional_scan", lambda: _run_tokens(tokens), tokens)
    if against_loop:
        yield _Subject("loop", lambda: _run_sequences(selective_scan_ref, sequences), sequences)


def _inputs(shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """u, delta, A, B, C, D and the bias of delta, in the layout of ``selective_scan``."""
    b, d, n, l = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    A = -torch.arange(1.0, n + 1).expand(d, n)
    made = [normal(b, d, l), normal(b, d, l), A, normal(b, n, l), normal(b, n, l), torch.ones(d), normal(d) - 4]
    dtypes = [dtype, dtype, torch.float32, dtype, dtype, torch.float32, torch.float32]
    return [_leaf(tensor.to(device, wanted)) for tensor, wanted in zip(made, dtypes, strict=True)]


def _as_tokens(sequences: list[Tensor]) -> list[Tensor]:
    """The same numbers in the layout of ``directional_scan`` with one direction."""
    u, delta, A, B, C, D, bias = sequences
    rows = [u.mT, delta.mT[:, :, None], A[None], B.mT[:, :, None], C.mT[:, :, None], D[None], bias[None]]
    return [_leaf(tensor) for tensor in rows]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_()


def _run_sequences(function: Callable, inputs: list[Tensor]) -> Tensor:
    u, delta, A, B, C, D, bias = inputs
    return function(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)


def _run_tokens(inputs: list[Tensor]) -> Tensor:
    x, dt, A, B, C, D, bias = inputs
    y = directional_scan(x, dt, A, B, C, D, dt_bias=bias)
    assert isinstance(y, Tensor), "without return_last_state there is one result"
    return y.mT


def _measure(subject: _Subject, device: torch.device, warmup: int, repeats: int) -> dict[str, float]:
    def forward() -> None:
        with torch.no_grad():
            subject.call()

    result = _result(subject)
    upstream = torch.ones_like(result)

    def forward_backward() -> None:
        torch.autograd.grad(subject.call(), subject.inputs, upstream)

    record = {}
    for name, call in (("forward", forward), ("forward_backward", forward_backward)):
        times = measure_time(call, device, warmup=warmup, repeats=repeats)
        record |= {f"{name}_ms": times["median"], f"{name}_p10_ms": times["p10"], f"{name}_p90_ms": times["p90"]}
    return record | {"peak_memory_mib": measure_memory(forward_backward, device)}


def _result(subject: _Subject) -> Tensor:
    with torch.no_grad():
        return subject.call()


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
