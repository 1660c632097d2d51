"""Random argument combinations of ``directional_scan``, drawn so that every option meets every other."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Relative error of a tensor, against the norm of the reference in float64. Half precision rounds the result itself.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@dataclass
class Case:
    """One call: tensors in float64, and options."""

    tensors: dict[str, Tensor | None]
    options: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    strided: bool = False

    def arguments(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict:
        """Leaf tensors holding the same values in ``dtype`` (A, D and dt_bias at least in float32), and the options."""
        leaves = {}
        for name, tensor in self.tensors.items():
            if tensor is None or not tensor.is_floating_point():
                leaves[name] = None if tensor is None else tensor.to(device)
                continue
            # Round to the dtype under test first, so that reference and candidate see the same numbers.
            rounded = tensor.to(torch.float32 if name in ("A", "D", "dt_bias") else self.dtype)
            wide = dtype if dtype == torch.float64 else rounded.dtype
            leaves[name] = _strided(rounded.to(wide).to(device)) if self.strided else rounded.to(wide).to(device)
            leaves[name].requires_grad_()
        return leaves | self.options

    def dtype_of(self, name: str, arguments: dict) -> torch.dtype:
        """The dtype of a result of :func:`outputs_and_gradients`, which its tolerance depends on."""
        leaf = arguments.get(name.removeprefix("d"))
        if isinstance(leaf, Tensor):
            return leaf.dtype
        return torch.float32 if name == "last state" else self.options["out_dtype"] or self.dtype


def _strided(tensor: Tensor) -> Tensor:
    """The same values with every other element of a wider buffer between them, axes stored in reverse."""
    buffer = torch.full(
        (*reversed(tensor.shape[:-1]), tensor.shape[-1] * 2), float("nan"), dtype=tensor.dtype, device=tensor.device
    )
    view = buffer[..., ::2].permute(*reversed(range(tensor.ndim - 1)), tensor.ndim - 1)
    with torch.no_grad():
        view.copy_(tensor)
    return view.detach()


def random_case(seed: int, sizes: int | None = None) -> Case:
    """The argument combination number ``seed``.

    Args:
        seed: Number of the combination.
        sizes: Number of the batch, length and width to call it with, of those that one compiled variant of a kernel
            serves; small ones, or now and then a long one, when not given.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed if sizes is None else 1000 * seed + sizes)
    n = rng.choice([1, 3, 16, 64])
    l = 3001 if seed % 40 == 0 else rng.choice([1, 2, 7, 33, 130])
    b, k, d = (1, 2, 3) if l == 3001 else (rng.choice([1, 2, 3]), rng.choice([1, 2, 4]), rng.choice([1, 5, 16]))
    if sizes is not None:
        b, l, d = _sizes(seed, sizes)
    chain, shared = rng.random() < 0.25, rng.random() < 0.5
    ordered = rng.random() < 0.7
    if not ordered and chain and shared:
        k = 1  # nothing says how many rows there are
    p = 1 if chain else k
    t = rng.choice([l, max(1, l // 2)]) if ordered else l

    def table() -> tuple[int, ...]:
        return (b, k, t) if rng.random() < 0.5 else (k, t)

    def matrix() -> Tensor:
        return 1 + torch.randn(*rng.choice([(b, l, p, n), (b, l, p, n), (p, n), (p, d, n)]), dtype=torch.float64)

    merge, low_rank, softplus = rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.8
    step_scale = 1.0 if softplus else 0.1
    maybe = lambda chance, *shape: torch.randn(*shape, dtype=torch.float64) if rng.random() < chance else None  # noqa: E731
    tensors = {
        # Not centred on 0, nor are B, C and the cotangents: a sum of terms that cancel says nothing about a kernel.
        "x": 1 + torch.randn(*((b, l, d) if shared else (b, l, k, d)), dtype=torch.float64),
        "dt": torch.randn(b, l, p, 5 if low_rank else d, dtype=torch.float64) * step_scale,
        "A": -2 * torch.rand(p, d, n, dtype=torch.float64),
        "B": matrix(),
        "C": None if n == 1 and rng.random() < 0.5 else matrix(),
        "D": maybe(0.6, p, d),
        "dt_weight": torch.randn(p, d, 5, dtype=torch.float64) * step_scale if low_rank else None,
        "dt_bias": maybe(0.7, p, d),
        "z": maybe(0.5, *((b, l, d) if merge else (b, l, k, d))),
        "order": torch.rand(*table()[:-1], l).argsort(-1)[..., :t].int() if ordered else None,
        "gap": torch.randint(0, 3, table(), dtype=torch.int32) if rng.random() < 0.4 else None,
    }
    if not softplus:  # a step is positive
        for name in ("dt", "dt_weight", "dt_bias"):
            tensors[name] = None if tensors[name] is None else tensors[name].abs() * step_scale
    options = {
        "softplus": softplus,
        "params": rng.choice(["token", "step"]),
        "chain": chain,
        "merge": merge,
        "return_last_state": rng.random() < 0.5,
        "out_dtype": rng.choice([None, None, torch.float32]),
    }
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    return Case(tensors, options, dtype, strided=rng.random() < 0.4)


def _sizes(seed: int, sizes: int) -> tuple[int, int, int]:
    """Batch, length and width. Width is or is not made of whole blocks of channels, as the seed has it.

    Lengths are no multiples of the 16 steps of a tile, nor are their halves or their multiples by up to 4 directions.
    """
    rng = random.Random(1000 * seed + sizes)
    length = rng.choice([length for length in range(40, 260) if length % 4 and length // 2 % 4])
    width = 32 * rng.randint(1, 3) if seed % 2 else rng.choice([width for width in range(17, 96) if width % 32])
    return rng.randint(1, 4), length, width


def outputs_and_gradients(function, arguments: dict) -> dict[str, Tensor]:
    """Calls ``function`` and backpropagates a fixed random cotangent; everything in float64 on the CPU, by name."""
    outputs = function(**arguments)
    outputs = dict(zip(("y", "last state"), outputs if isinstance(outputs, tuple) else (outputs,), strict=False))
    generator = torch.Generator().manual_seed(7)
    cotangents = (
        torch.randint(-2, 9, out.shape, generator=generator) / 8 for out in outputs.values()
    )  # exact in any dtype
    loss = sum(
        (out.double().cpu() * cotangent).sum() for out, cotangent in zip(outputs.values(), cotangents, strict=True)
    )
    leaves = {name: t for name, t in arguments.items() if isinstance(t, Tensor) and t.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    results = outputs | {
        f"d{name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), gradients, strict=True)
    }
    return {name: tensor.detach().double().cpu() for name, tensor in results.items()}


def relative_error(result: Tensor, reference: Tensor) -> float:
    """‖result − reference‖ / ‖reference‖; a NaN counts as infinite."""
    error = ((result - reference).norm() / reference.norm().clamp_min(1e-12)).item()
    return error if error == error else float("inf")
