"""MSVMamba, VMamba's stages with three of the four scans at half resolution.

Paper: Shi, Dong and Xu, "Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model", NeurIPS 2024,
    https://arxiv.org/abs/2405.14174
Official code: https://github.com/YuHengsss/MSVMamba (branches master and v2, classification/models/vmamba.py); no
    licence is stated for code or weights.

What differs from the official code: the three scans at half resolution are one call that reads the map through a table
of orders and carries the state from one to the next; the parameter sets of the two resolutions are modules of their own
instead of rows in an order that differs between the branches; a stage starts with its downsampling instead of ending
with the next one's. Models of branch v2, which is later and changes the block, end in ``_v3``, as its files call them.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from vssm.layers.block import MixerFfnBlock
from vssm.layers.conv import TokenConv
from vssm.layers.downsample import ConvDownsample
from vssm.layers.ffn import ConvFFN
from vssm.layers.grid import to_maps, to_tokens
from vssm.layers.init import init_linear_layers
from vssm.layers.squeeze_excite import TokenSqueezeExcite
from vssm.layers.ss2d import SS2D
from vssm.layers.ssm import SelectiveSSM
from vssm.layers.stem import ConvStem, PatchStem
from vssm.models import _official_keys
from vssm.models._base import GridBackbone, make_stages
from vssm.models._builder import build_backbone, imagenet_cfg
from vssm.scan_order import scan_order


class MultiScaleSS2D(SS2D):
    """2D selective scan whose directions share two resolutions, with a gate of channels after it.

    mix(x) = se(out_norm(SSM(silu(conv(x)))) + up(Σ_i out_norm(SSM_half(silu(conv_half(x))))_i))) with SSM in raster
    order and SSM_half one sequence over rows reversed, columns and columns reversed, i = 0, 1, 2, of a map of half the
    sides, rounded up; up interpolates bilinearly.

    Args:
        d_model: Channels of the tokens.
        d_state: State size of the scan.
        expand: d_inner/d_model.
        gate: Whether there is a gate z.

    Reference:
        Shi et al., "Multi-Scale VMamba", 2024, section 3.2, https://arxiv.org/abs/2405.14174
    """

    def __init__(self, d_model: int, *, d_state: int = 1, expand: float = 2.0, gate: bool = True) -> None:
        super().__init__(d_model, d_state=d_state, expand=expand, gate=gate, directions=1)
        d_inner = int(expand * d_model)
        self.conv_half = TokenConv(d_inner, 7, stride=2)
        self.ssm_half = SelectiveSSM(d_inner, d_state=d_state, dt_rank=math.ceil(d_model / 16))
        self.se = TokenSqueezeExcite(d_inner, bias=False)

    def mix(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps the scans' input (b, l, d) in raster order of a grid ``size`` = (h, w) to what the gate multiplies."""
        half = self.out_norm(self.scan_half(x, size, merge=False)).sum(2)
        return self.se(self.out_norm(self.scan(F.silu(self.conv(x, size)), size)) + _upsample(half, size, "bilinear"))

    def scan(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Scans tokens (b, l, d) in raster order."""
        return self.ssm(x)

    def scan_half(self, x: Tensor, size: tuple[int, int], *, merge: bool) -> Tensor:
        """Convolves and scans at half resolution.

        Args:
            x: Tokens (b, l, d) in raster order of a grid ``size`` = (h, w).
            size: Rows and columns of the grid.
            merge: Sum over the three directions; if false, keep them apart.

        Returns:
            (b, l', d), or (b, l', 3, d) if not merged, of a grid of ceil(h/2) rows and ceil(w/2) columns.
        """
        order = scan_order("cross_rest", *_halved(size), device=x.device)
        return self.ssm_half(F.silu(self.conv_half(x, size)), order, chain=True, merge=merge)


class MultiScaleSS2DV3(MultiScaleSS2D):
    """2D selective scan of two resolutions that merges them before its norm.

    mix(x) = se(out_norm(SSM(silu(conv(x))) + up(Σ_i SSM_half(silu(conv_half(x)))_i))) as in `MultiScaleSS2D`, but up
    repeats the nearest token.
    """

    def mix(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps the scans' input (b, l, d) in raster order of a grid ``size`` = (h, w) to what the gate multiplies."""
        half = self.scan_half(x, size, merge=True)
        return self.se(self.out_norm(self.scan(F.silu(self.conv(x, size)), size) + _upsample(half, size, "nearest")))


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def _upsample(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Tokens (b, l', c) of a grid of half the ``size`` = (h, w), rounded up, as tokens (b, h·w, c)."""
    return to_tokens(F.interpolate(to_maps(x, _halved(size)), size=size, mode=mode))


class ResidualConvFFN(ConvFFN):
    """Feed-forward network fc2(gelu(v + conv(v))), v = fc1(x), with a depthwise 3×3 convolution."""

    def convolve(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps the hidden tokens (b, l, hidden_dim) to what is activated."""
        return x + self.conv(x, size)


class MSVMambaV3Block(MixerFfnBlock):
    """x + mixer(norm1(x)), then x + norm2(mlp(x)): the second norm follows its branch."""

    def feed(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The second branch, norm2(mlp(x)), of tokens (b, l, c) in raster order of a grid ``size`` = (h, w)."""
        return self.norm2(self.mlp(x, size))


_patch_stem = partial(PatchStem, patch_size=4, norm_layer=nn.LayerNorm)


class MSVMamba(GridBackbone):
    """MSVMamba.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the classifier; 0 for none.
        global_pool: Pooling before the classifier, as timm names it.
        embed_dim: Channels of the first stage; every next one has twice as many.
        depths: Blocks of each stage.
        d_state: State size of the scan.
        expand: Width of the scan over that of the tokens.
        gate: Whether the mixer's result is gated by its input.
        mlp_ratio: Width of a block's MLP over that of the tokens.
        mixer_layer: Makes a mixer from the channels of the tokens.
        block_layer: Makes a block from a mixer, an MLP and their norms.
        stem_layer: Makes the stem from ``in_chans`` and ``embed_dim``.
        downsample_layer: Makes the downsampling between stages from the channels before and after.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 2, 9, 2),
        d_state: int = 1,
        expand: float = 2.0,
        gate: bool = True,
        mlp_ratio: float = 2.0,
        mixer_layer: Callable[..., MultiScaleSS2D] = MultiScaleSS2D,
        block_layer: Callable[..., MixerFfnBlock] = MixerFfnBlock,
        stem_layer: Callable[[int, int], ConvStem | PatchStem] = _patch_stem,
        downsample_layer: Callable[[int, int], nn.Module] = PatchMerging,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims = [embed_dim * 2**i for i in range(len(depths))]

        def make_block(stage: int, drop_path: float) -> MixerFfnBlock:
            dim = dims[stage]
            mixer = mixer_layer(dim, d_state=d_state, expand=expand, gate=gate)
            mlp = ResidualConvFFN(dim, int(mlp_ratio * dim))
            return block_layer(mixer, nn.LayerNorm(dim), mlp=mlp, norm2=nn.LayerNorm(dim), drop_path=drop_path)

        stem = stem_layer(in_chans, embed_dim)
        super().__init__(
            stem=stem,
            stages=make_stages(
                make_block, dims=dims, depths=depths, downsample_layer=downsample_layer, drop_path_rate=drop_path_rate
            ),
            dims=dims,
            strides=[stem.stride * 2**i for i in range(len(depths))],
            norm=nn.LayerNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self._init_weights()

    def _init_weights(self) -> None:
        """The official initialisation; the layers of its MLPs are convolutions there, which it leaves as they are."""
        init_linear_layers(self)
        for module in self.modules():
            if isinstance(module, ConvFFN):
                module.fc1.reset_parameters()
                module.fc2.reset_parameters()


_cfg = partial(
    imagenet_cfg,
    pool_size=(7, 7),
    first_conv="stem.proj",
    classifier="head.fc",
    license="unknown",
    paper_ids="arXiv:2405.14174",
    paper_name="Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model",
)

_DRIVE = "https://drive.google.com/drive/folders"
_HUB = "https://huggingface.co/YuhengSSS/MSVMamba"

default_cfgs = generate_default_cfgs(
    {
        "msvmamba_nano.in1k": _cfg(origin_url=f"{_DRIVE}/1J41w3ApitQhp2O3wHmJoOs4U032uqebK"),
        "msvmamba_micro.in1k": _cfg(origin_url=f"{_DRIVE}/1jfl2GmuKcUB8sPwRlyHK_wT0MjqgljYk"),
        "msvmamba_tiny.in1k": _cfg(origin_url=f"{_DRIVE}/1ddNWk89ohcxxMuVEaJ2Y5A6xeBKgA7lU"),
        "msvmamba_tiny_v3.in1k": _cfg(
            f"{_HUB}/resolve/main/msvmambav3_tiny_224.pth", origin_url=_HUB, first_conv="stem.conv1"
        ),
        "msvmamba_small_v3.in1k": _cfg(
            f"{_HUB}/resolve/main/msvmambav3_small_224.pth", origin_url=_HUB, first_conv="stem.conv1"
        ),
        "test_msvmamba": _cfg(input_size=(3, 96, 96), pool_size=(6, 6)),
    }
)


# Official name below a block to ours; the parameter set of the half resolution is renamed to ``half`` beforehand.
_PARAMETER_SET = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
_BLOCK = {
    **_official_keys.BLOCK,
    **{f"half.{name}": f"mixer.ssm_half.{_official_keys.SS2D[name].removeprefix('ssm.')}" for name in _PARAMETER_SET},
    "op.conv2d_b1": "mixer.conv_half.conv",
    "op.se.fc.0": "mixer.se.reduce",
    "op.se.fc.2": "mixer.se.expand",
    "convFFN.linear1": "mlp.fc1",
    "convFFN.dwc": "mlp.conv.conv",
    "convFFN.linear2": "mlp.fc2",
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: MSVMamba) -> dict[str, Tensor]:
    """Brings an official state dict to this model's keys; one that has them already keeps them.

    Raises:
        ValueError: If there is a key that the official models of this file do not have.
    """
    full_first = any(isinstance(module, MultiScaleSS2DV3) for module in model.modules())
    named = _split_parameter_sets(state_dict, full_first=full_first)
    return _official_keys.convert(named, model, family="msvmamba", block=_BLOCK)


def _split_parameter_sets(state_dict: Mapping[str, Tensor], *, full_first: bool) -> dict[str, Tensor]:
    """Official weights with the two resolutions' parameter sets, stacked along the first axis, as tensors each."""
    split = {}
    for key, value in state_dict.items():
        match = re.fullmatch(rf"(.*\.)(?:op|self_attention)\.({'|'.join(_PARAMETER_SET)})", key)
        if match is None:
            split[key] = value
            continue
        first, second = value.chunk(2)
        split[key], split[f"{match[1]}half.{match[2]}"] = (first, second) if full_first else (second, first)
    return split


def _create_msvmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    levels = range(len(kwargs["depths"]))
    return build_backbone(
        MSVMamba, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn, levels=levels, **kwargs
    )


_V3_ARGS = {
    "expand": 1.0,
    "gate": False,
    "mlp_ratio": 4.0,
    "mixer_layer": MultiScaleSS2DV3,
    "block_layer": MSVMambaV3Block,
    "stem_layer": ConvStem,
    "downsample_layer": ConvDownsample,
}


@register_model
def msvmamba_nano(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMamba-N: width 48, 5 blocks in the third stage."""
    model_args = {"embed_dim": 48, "depths": (1, 2, 5, 2)}
    return _create_msvmamba("msvmamba_nano", pretrained, **(model_args | kwargs))


@register_model
def msvmamba_micro(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMamba-M: width 64, 5 blocks in the third stage."""
    model_args = {"embed_dim": 64, "depths": (1, 2, 5, 2)}
    return _create_msvmamba("msvmamba_micro", pretrained, **(model_args | kwargs))


@register_model
def msvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMamba-T as first released: width 96, 9 blocks in the third stage."""
    model_args = {"embed_dim": 96, "depths": (1, 2, 9, 2)}
    return _create_msvmamba("msvmamba_tiny", pretrained, **(model_args | kwargs))


@register_model
def msvmamba_tiny_v3(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMamba-T of the later version: no gate, wider MLPs, 9 blocks in the third stage."""
    model_args = {"embed_dim": 96, "depths": (2, 2, 9, 2)} | _V3_ARGS
    return _create_msvmamba("msvmamba_tiny_v3", pretrained, **(model_args | kwargs))


@register_model
def msvmamba_small_v3(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMamba-S of the later version: no gate, wider MLPs, 20 blocks in the third stage."""
    model_args = {"embed_dim": 96, "depths": (2, 3, 20, 2)} | _V3_ARGS
    return _create_msvmamba("msvmamba_small_v3", pretrained, **(model_args | kwargs))


@register_model
def test_msvmamba(pretrained: bool = False, **kwargs: Any) -> MSVMamba:  # noqa: PT028  a model, not a test
    """A small MSVMamba for tests, without published weights."""
    model_args = {"embed_dim": 16, "depths": (1, 1, 1)}
    return _create_msvmamba("test_msvmamba", pretrained, **(model_args | kwargs))
