"""One small scan with its gradients, by every backend on every device, against the reference in float64."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vssm.scan_order import scan_order
from vssm_kernels import directional_scan, directional_scan_ref, use_backend
from vssm_kernels.backend import backends_on

_TOLERANCE = 1e-5  # of float32, relative to the norm, as in the kernels' own tests
_HEIGHT, _WIDTH = 3, 5  # in tokens
_MOST_TEXT = 200  # characters of a reason


def self_tests(devices: list[torch.device]) -> list[dict[str, Any]]:
    """Tests every backend on every device where it runs; see `self_test` for the records."""
    return [self_test(backend, device) for device in devices for backend in backends_on(device.type)]


def self_test(backend: str, device: torch.device) -> dict[str, Any]:
    """Compares one backend's result and gradients with those of ``directional_scan_ref`` in float64.

    The call has two directions in orders of their own, a low-rank step, a skip and a gate.

    Args:
        backend: One of ``vssm_kernels.available_backends()``.
        device: Where to compute.

    Returns:
        ``device``, ``backend``, ``passed``; ``largest_error`` relative to the norm and ``of``, the tensor that has it,
        or ``reason``, why there are no results; ``seconds`` of the whole test, most of which are compiling, if kernels
        run for the first time.
    """
    record = {"device": str(device), "backend": backend, "passed": False, "largest_error": None, "of": None}
    expected = _outputs_and_gradients(directional_scan_ref, _arguments(torch.float64, torch.device("cpu")))
    start = time.perf_counter()
    try:
        with use_backend(backend):
            found = _outputs_and_gradients(directional_scan, _arguments(torch.float32, device))
    except Exception as error:  # whatever it is that a compiler or driver raises is what the test is to find
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_MOST_TEXT]
        return record | {"reason": reason, "seconds": time.perf_counter() - start}
    errors = {name: _relative_error(found[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    verdict = {"largest_error": errors[worst], "of": worst, "passed": errors[worst] <= _TOLERANCE}
    return record | verdict | {"seconds": time.perf_counter() - start}


def _arguments(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The same values in either dtype, those of float32, as leaves that want a gradient."""
    generator = torch.Generator().manual_seed(0)
    order = scan_order("cross", _HEIGHT, _WIDTH)[1:3]  # by columns, and by rows from the end
    batch, tokens, directions, width, states, rank = 2, order.shape[1], order.shape[0], 8, 4, 3

    def leaf(*shape: int) -> Tensor:
        values = 1 + torch.randn(*shape, generator=generator)  # not centred on 0: sums that cancel hide errors
        return values.to(device, dtype).requires_grad_()

    decays = -2 * torch.rand(directions, width, states, generator=generator)
    return {
        "x": leaf(batch, tokens, width),
        "dt": leaf(batch, tokens, directions, rank),
        "A": decays.to(device, dtype).requires_grad_(),
        "B": leaf(batch, tokens, directions, states),
        "C": leaf(batch, tokens, directions, states),
        "D": leaf(directions, width),
        "dt_weight": leaf(directions, width, rank),
        "dt_bias": leaf(directions, width),
        "z": leaf(batch, tokens, width),
        "order": order.to(device),
    }


def _outputs_and_gradients(scan: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The result and the gradient of every leaf, in float64 on the CPU, by name."""
    leaves = {name: tensor for name, tensor in arguments.items() if tensor.requires_grad}
    result = scan(**arguments)
    weights = torch.linspace(0.5, 1.5, result.numel(), dtype=torch.float64).view(result.shape)
    gradients = torch.autograd.grad((result.cpu().double() * weights).sum(), list(leaves.values()))
    found = {"y": result, **{f"d{name}": each for name, each in zip(leaves, gradients, strict=True)}}
    return {name: tensor.detach().cpu().double() for name, tensor in found.items()}


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what was expected; infinite where a number is not finite."""
    error = float((found - expected).norm() / expected.norm())
    return error if error == error else float("inf")
