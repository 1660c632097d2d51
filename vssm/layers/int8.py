"""Linear layers in 8-bit integers, on torch's oneDNN kernel where the CPU multiplies them."""

import functools
import platform
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 127  # of a weight to each side of zero
_LOWEST, _HIGHEST = -128, 127  # of an input
_WHOLE = 1.5 * 2**23  # from here on floats are whole numbers, which a sum rounds to; their last byte counts up from 0


class Int8Linear(nn.Module):
    """y = s_x·s_w·(q_W·(q_x − z)) + bias, with q_x = round(x/s_x) + z and W = s_w·q_W in 8 bits, for inference only.

    One scale s_x and zero point z for all inputs, known beforehand, and one scale s_w for each output. Inputs beyond
    the range that these span are clipped. Sums are exact, in 32 bits.

    Args:
        weight_shape: Of the weights, (c_out, c_in).
        bias: Whether there is a bias, which is not quantised.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    input_zero: Tensor
    bias: Tensor | None

    def __init__(self, weight_shape: Sequence[int], *, bias: bool = False) -> None:
        super().__init__()
        outputs = tuple(weight_shape[:-1])
        self.register_buffer("weight", torch.zeros(tuple(weight_shape), dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(outputs))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_zero", torch.zeros((), dtype=torch.int8))
        self.register_buffer("bias", torch.zeros(outputs) if bias else None)
        self._packed: dict[int | None, Tensor] = {}
        self.register_load_state_dict_post_hook(_forget_packed)

    @torch.no_grad()
    def quantize(self, weight: Tensor, bias: Tensor | None, *, low: float, high: float) -> None:
        """Takes over the weights of a layer in float.

        Args:
            weight: Its weights, of the shape of those here.
            bias: Its bias, if there is one.
            low: Lower end of the range of its inputs; zero is always in the range.
            high: Upper end.
        """
        peak = weight.abs().amax(-1)
        self.weight_scale.copy_(torch.where(peak > 0, peak, 1) / _LEVELS)
        self.weight.copy_((weight / self.weight_scale[..., None]).round())
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / (_HIGHEST - _LOWEST) or 1.0
        self.input_scale.fill_(scale)
        self.input_zero.fill_(round(_LOWEST - low / scale))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., c_in) to (..., c_out), in the type of ``x``.

        Raises:
            ValueError: A gradient is asked for.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("Int8Linear: a quantised layer has no gradient; take the model in float")
        integer = x.device.type == "cpu" and not torch.compiler.is_compiling() and _multiplies_bytes()
        y = self._multiply(self._bytes(x.float())) if integer else self._plain(self._steps(x.float()))
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """What the layer's line in the printed model says."""
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}"

    def _bytes(self, x: Tensor) -> Tensor:
        """q_x + 128, in unsigned bytes."""
        zero = self.input_zero.float() + (_WHOLE - _LOWEST)
        rounded = torch.add(zero, x, alpha=1 / self.input_scale.item()).clamp_(_WHOLE, _WHOLE + _HIGHEST - _LOWEST)
        return rounded.view(torch.int32).to(torch.uint8)

    def _steps(self, x: Tensor) -> Tensor:
        """q_x − z, in float."""
        zero = self.input_zero.float()
        return (x / self.input_scale + zero).round().clamp(_LOWEST, _HIGHEST) - zero

    def _multiply(self, unsigned: Tensor, group: int | None = None) -> Tensor:
        """The layer's result from `_bytes`; that of one group of its outputs, if one is given."""
        weight, scale = self.weight.flatten(0, -2), self.weight_scale.flatten()
        if group is not None:
            weight, scale = self.weight[group], self.weight_scale[group]
        if group not in self._packed:
            self._packed[group] = torch.ops.onednn.qlinear_prepack(weight, None)
        return torch.ops.onednn.qlinear_pointwise(
            unsigned,
            self.input_scale.item(),
            int(self.input_zero) + 128,
            self._packed[group],
            scale,
            torch.zeros_like(scale, dtype=torch.long),  # zero points of the weights
            self.bias,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )

    def _plain(self, steps: Tensor) -> Tensor:
        """The layer's result from `_steps`, by sums in float, which are exact for some 500 inputs and nearly beyond."""
        return F.linear(steps, self.weight.float() * (self.input_scale * self.weight_scale)[..., None], self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Linear":
        self._packed = {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}}  # what is in it cannot be copied or pickled


class Int8GroupLinear(Int8Linear):
    """As `Int8Linear`, for k groups with weights of their own, (k, c_out, c_in), and one scale of their inputs.

    Maps (b, l, c_in), which all groups read, or (b, l, k, c_in), one map for each, to (b, l, k, c_out).
    """

    def _multiply(self, unsigned: Tensor, group: int | None = None) -> Tensor:
        groups = len(self.weight)
        if unsigned.ndim == 3:
            return super()._multiply(unsigned).unflatten(-1, (groups, -1))
        return torch.stack([super(Int8GroupLinear, self)._multiply(unsigned[:, :, i], i) for i in range(groups)], dim=2)

    def _plain(self, steps: Tensor) -> Tensor:
        weight = self.weight.float() * (self.input_scale * self.weight_scale)[..., None]
        return torch.einsum("bld,ked->blke" if steps.ndim == 3 else "blkd,ked->blke", steps, weight)


def _forget_packed(layer: Any, incompatible_keys: Any) -> None:
    """Lets a layer pack its weights anew, which have been loaded."""
    layer._packed = {}


@functools.cache
def _multiplies_bytes() -> bool:
    """Whether the CPU sums products of bytes without overflow (VNNI), as torch's kernel takes for granted."""
    known = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    return known and torch.cpu._is_vnni_supported()
