"""What the benchmark of the scan runs: our two functions, and what they are compared with, on the same numbers."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from vssm.engine.op_rivals import cuda_scan, official_composition
from vssm.engine.op_shapes import OpShape
from vssm.scan_order import gather, scatter
from vssm_kernels import directional_scan, selective_scan, use_backend
from vssm_kernels.reference import selective_scan_ref

RIVALS = ("loop", "torch", "mamba_ssm", "official")
PHASES = ("forward", "backward", "forward_backward")

_logger = logging.getLogger(__name__)
_STEP_RANGE = (1e-3, 1e-1)


class Subject(NamedTuple):
    """One implementation on one set of inputs.

    Args:
        name: How records call it.
        call: Computes the result, in a layout of its own.
        inputs: What the result is differentiated by.
        as_tokens: Brings the result to (b, l, d), directions summed.
        context: In which forward and backward run.
        facts: What else its record says.
    """

    name: str
    call: Callable[[], Tensor]
    inputs: list[Tensor]
    as_tokens: Callable[[Tensor], Tensor]
    context: Callable[[], AbstractContextManager] = nullcontext
    facts: dict[str, str] = {}  # noqa: RUF012  never written to


SubjectsOf = Callable[..., Iterator[Subject]]  # of a shape, the device, the dtype and names of rivals


class TokenInputs(NamedTuple):
    """Inputs of ``directional_scan``; ``dt``, ``B`` and ``C`` are views of one projection, as models make them.

    x (b, l, d), dt (b, l, k, r), A (k, d, n), B and C (b, l, k, n), D (k, d), dt_weight (k, d, r), dt_bias (k, d).
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_weight: Tensor
    dt_bias: Tensor


def subjects(
    shape: OpShape, device: torch.device, dtype: torch.dtype, against: Sequence[str] = ()
) -> Iterator[Subject]:
    """Yields ``directional_scan``, ``selective_scan`` and the rivals that can run here, in that order.

    Args:
        shape: Sizes and scan order.
        device: Where to compute.
        dtype: Of x, dt, B and C; the parameters are float32.
        against: Names of `RIVALS`. One that cannot run is left out, see :func:`log_left_out`.
    """
    tokens, order = token_inputs(shape, device, dtype), shape.table(device)
    yield directional_subject(tokens, order)
    sequences = _sequence_inputs(tokens, order)
    yield _sequence_subject("selective_scan", selective_scan, sequences, order)
    for name in against:
        if name == "loop":
            yield _sequence_subject("loop", selective_scan_ref, sequences, order)
        elif name == "torch":
            yield directional_subject(tokens, order)._replace(name="torch", context=lambda: use_backend("torch"))
        elif name == "mamba_ssm" and (scan := cuda_scan(device)) is not None:
            yield _sequence_subject("mamba_ssm", scan, sequences, order)
        elif name == "official" and (shape.order == "cross" or shape.k == 1):
            yield _official_subject(shape, tokens, order)


def compiled_subjects(against: Sequence[str] = ()) -> list[str]:
    """Names of the subjects that run kernels of Triton: our two functions, and the composition around one of them."""
    return ["directional_scan", "selective_scan", *(name for name in against if name == "official")]


def phase_calls(subject: Subject) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """What is timed of a subject, by the names of `PHASES`: calls that return the result, or the gradients."""

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return [subject.call()]

    result = subject.call()
    upstream = torch.randn_like(result)

    def backward() -> Sequence[Tensor]:
        return torch.autograd.grad(result, subject.inputs, upstream, retain_graph=True)

    def forward_backward() -> Sequence[Tensor]:
        return torch.autograd.grad(subject.call(), subject.inputs, upstream)

    return dict(zip(PHASES, (forward, backward, forward_backward), strict=True))


def log_left_out(shapes: Sequence[OpShape], device: torch.device, against: Sequence[str]) -> None:
    """Says in the log which rivals :func:`subjects` leaves out, and why."""
    if "mamba_ssm" in against and cuda_scan(device) is None:
        _logger.warning("mamba_ssm is left out: its selective_scan_cuda cannot be imported, or runs on no %s", device)
    orders = sorted({shape.order for shape in shapes if shape.k > 1 and shape.order != "cross"})
    if "official" in against and orders:
        _logger.warning("official is left out for %s: it is known for cross and for k = 1 only", ", ".join(orders))


def directional_subject(inputs: TokenInputs, order: Tensor) -> Subject:
    """``directional_scan`` on tokens, with a low-rank step and merged directions."""
    x, dt, A, B, C, D, dt_weight, dt_bias = inputs

    def call() -> Tensor:
        y = directional_scan(x, dt, A, B, C, D, dt_weight=dt_weight, dt_bias=dt_bias, order=order)
        return cast(Tensor, y)  # the last state, a second result, is not asked for

    return Subject("directional_scan", call, list(inputs), lambda y: y)


def token_inputs(shape: OpShape, device: torch.device, dtype: torch.dtype) -> TokenInputs:
    """Random inputs with the values that a model starts from: A = −(1 … n), steps log-uniform in [0.001, 0.1]."""
    b, k, d, n, l, r, _ = shape
    generator = torch.Generator(device).manual_seed(0)
    random = {"generator": generator, "device": device}
    x = torch.randn(b, l, d, **random).to(dtype)
    projected = torch.randn(b, l, k * (r + 2 * n), **random).to(dtype)
    dt, B, C = projected.unflatten(-1, (k, -1)).split([r, n, n], dim=-1)
    smallest, largest = (math.log(step) for step in _STEP_RANGE)
    step = torch.empty(k, d, device=device).uniform_(smallest, largest, generator=generator).exp()
    dt_weight = torch.empty(k, d, r, device=device).uniform_(-(r**-0.5), r**-0.5, generator=generator)
    A = -torch.arange(1.0, n + 1, device=device).expand(k, d, n).contiguous()
    inputs = (x, dt, A, B, C, torch.ones(k, d, device=device), dt_weight, torch.log(torch.expm1(step)))
    return TokenInputs(*(tensor.detach().requires_grad_() for tensor in inputs))


def _sequence_inputs(inputs: TokenInputs, order: Tensor) -> list[Tensor]:
    """The same numbers as ``selective_scan`` takes them: u, delta, A, B, C, D and the bias, k groups of channels."""
    x, dt, A, B, C, D, dt_weight, dt_bias = (tensor.detach() for tensor in inputs)

    def sequence(rows: Tensor) -> Tensor:  # (b, l, k, c) -> (b, k, c, l)
        return gather(rows, order).permute(0, 2, 3, 1)

    delta = torch.einsum("bkrl,kdr->bkdl", sequence(dt), dt_weight.to(dt.dtype))
    made = (
        sequence(x).flatten(1, 2),
        delta.flatten(1, 2),
        A.flatten(0, 1),
        sequence(B),
        sequence(C),
        D.flatten(),
        dt_bias.flatten(),
    )
    return [tensor.contiguous().requires_grad_() for tensor in made]


def _sequence_subject(
    name: str, scan: Callable[..., Tensor | tuple[Tensor, Tensor]], inputs: list[Tensor], order: Tensor
) -> Subject:
    u, delta, A, B, C, D, bias = inputs

    def call() -> Tensor:
        return cast(Tensor, scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True))

    def as_tokens(y: Tensor) -> Tensor:
        steps = y.unflatten(1, (len(order), -1)).permute(0, 3, 1, 2)
        return scatter(steps, order, y.shape[-1]).sum(2, dtype=torch.float32)

    return Subject(name, call, inputs, as_tokens)


def _official_subject(shape: OpShape, inputs: TokenInputs, order: Tensor) -> Subject:
    """The composition around a scan of sequences, from the map and the projections as its authors' code has them."""
    x, dt, A, B, C, D, dt_weight, dt_bias = (tensor.detach() for tensor in inputs)
    projected = gather(torch.cat([dt, B, C], dim=-1), order).permute(0, 2, 3, 1).contiguous()
    views = projected.split([shape.r, shape.n, shape.n], dim=2)
    if shape.k > 1:
        x = x.mT.contiguous().unflatten(-1, (math.isqrt(shape.l), -1))  # (b, d, h, w)
    made = (x, *views, A.flatten(0, 1), D.flatten(), dt_weight.to(dt.dtype), dt_bias.flatten())
    leaves = [tensor.detach().requires_grad_() for tensor in made]
    scan = cuda_scan(x.device)
    facts = {"scan": "vssm" if scan is None else "mamba_ssm"}
    call = partial(official_composition, *leaves, scan=scan or selective_scan)
    return Subject("official", call, leaves, lambda y: y if shape.k == 1 else y.mT, facts=facts)
