"""EfficientVMamba, light stages of two kinds: a scan beside a convolution first, inverted residuals later.

Paper: Pei, Huang and Xu, "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba", AAAI 2025,
    https://arxiv.org/abs/2403.09977
Official code: https://github.com/TerryPei/EfficientVMamba (classification/models/vmamba_efficient.py), Apache-2.0 by
    its README; no licence is stated for the weights.

What differs from the official code: the four interleaved grids are one tensor that one scan reads, each direction its
own grid; a stage starts with its downsampling instead of ending with the next one's. The widths and depths are those
of the training logs, which the released weights have; the configuration file of the small model says otherwise.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from vssm.layers.grid import pad_or_crop, to_maps, to_tokens
from vssm.layers.init import init_linear_layers
from vssm.layers.squeeze_excite import TokenSqueezeExcite
from vssm.layers.ss2d import SS2D
from vssm.layers.stem import PatchStem
from vssm.models import _official_keys
from vssm.models._base import GridBackbone, Stage, make_stages
from vssm.models._builder import build_backbone, imagenet_cfg
from vssm.scan_order import scan_order


class AtrousSS2D(SS2D):
    """2D selective scan whose four directions share the tokens out: each scans every second row and column.

    Of rows and columns counted from 0, direction 0 visits the even rows' even columns, row by row; 1 the odd rows' even
    columns, column by column; 2 the even rows' odd columns, row by row; 3 the odd rows' odd columns, column by column.
    This is the order ``"atrous"``. A grid of odd sides is padded with zero tokens, which take part in the scan.
    """

    def scan(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Scans tokens (b, l, d) of a grid ``size`` = (h, w); returns each token's result, (b, l, d)."""
        rows, columns = (size[0] + 1) // 2, (size[1] + 1) // 2
        grid = pad_or_crop(x.unflatten(1, size), 2 * rows, 2 * columns)
        cells = grid.unflatten(2, (columns, 2)).unflatten(1, (rows, 2))  # (b, rows, 2, columns, 2, d)
        cells = cells.permute(0, 1, 3, 4, 2, 5).flatten(3, 4).flatten(1, 2)  # (b, rows·columns, 4, d)
        y = self.ssm(cells, scan_order("alternating", rows, columns, device=x.device), merge=False)
        y = y.unflatten(2, (2, 2)).unflatten(1, (rows, columns)).permute(0, 1, 4, 2, 3, 5)
        return pad_or_crop(y.flatten(3, 4).flatten(1, 2), *size).flatten(1, 2)


class ConvBranch(nn.Module):
    """A depthwise 3×3 convolution with batch norm and GELU, then a pointwise convolution, of tokens on their grid.

    Args:
        dim: Channels of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.act = nn.GELU()
        self.proj = nn.Conv2d(dim, dim, kernel_size=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens."""
        return to_tokens(self.proj(self.act(self.norm(self.conv(to_maps(x, size))))))


class EVSSBlock(nn.Module):
    """x + se(mixer(n)) + se(conv_branch(n)) with n = norm1(x): one gate of channels for both, stochastic depth on both.

    Args:
        dim: Channels of the tokens.
        mixer: Token mixer.
        drop_path: Probability of leaving the branches out for a sample in training.
    """

    def __init__(self, dim: int, mixer: AtrousSS2D, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.conv_branch = ConvBranch(dim)
        self.se = TokenSqueezeExcite(dim, norm_layer=nn.LayerNorm, act_layer=nn.GELU)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens."""
        normed = self.norm1(x)
        return x + self.drop_path(self.se(self.mixer(normed, size)) + self.se(self.conv_branch(normed, size)))


class InvertedResidualBlock(nn.Module):
    """timm's inverted residual with squeeze-and-excite, for tokens on their grid.

    Args:
        dim: Channels of the tokens.
        exp_ratio: Width of the depthwise convolution over that of the tokens.
        drop_path: Probability of leaving the residual out for a sample in training.
    """

    def __init__(self, dim: int, *, exp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        se_layer = cast("type[nn.Module]", partial(SqueezeExcite, rd_ratio=1 / 8))  # timm calls it, and no more
        self.residual = InvertedResidual(dim, dim, exp_ratio=exp_ratio, se_layer=se_layer, drop_path_rate=drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens."""
        return to_tokens(self.residual(to_maps(x, size)))


class EfficientVMamba(GridBackbone):
    """EfficientVMamba: two stages of scans and convolutions, and inverted residuals in those after them.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the classifier; 0 for none.
        global_pool: Pooling before the classifier, as timm names it.
        embed_dim: Channels of the first stage; every next one has twice as many.
        depths: Blocks of each stage.
        scan_stages: Number of stages, the first ones, whose blocks scan.
        d_state: State size of the scan.
        expand: Width of the scan over that of the tokens.
        exp_ratio: Width of the inverted residuals' depthwise convolutions over that of the tokens.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 48,
        depths: Sequence[int] = (2, 2, 4, 2),
        scan_stages: int = 2,
        d_state: int = 16,
        expand: float = 2.0,
        exp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims = [embed_dim * 2**i for i in range(len(depths))]

        def make_block(stage: int, drop_path: float) -> nn.Module:
            if stage >= scan_stages:
                return InvertedResidualBlock(dims[stage], exp_ratio=exp_ratio, drop_path=drop_path)
            mixer = AtrousSS2D(dims[stage], d_state=d_state, expand=expand)
            return EVSSBlock(dims[stage], mixer, drop_path=drop_path)

        stem = PatchStem(in_chans, embed_dim, patch_size=4, norm_layer=nn.LayerNorm)
        super().__init__(
            stem=stem,
            stages=make_stages(
                make_block, dims=dims, depths=depths, downsample_layer=PatchMerging, drop_path_rate=drop_path_rate
            ),
            dims=dims,
            strides=[stem.stride * 2**i for i in range(len(depths))],
            norm=nn.LayerNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        init_linear_layers(self)


_cfg = partial(
    imagenet_cfg,
    pool_size=(7, 7),
    first_conv="stem.proj",
    classifier="head.fc",
    license="apache-2.0",
    origin_url="https://github.com/TerryPei/EfficientVMamba",
    paper_ids="arXiv:2403.09977",
    paper_name="EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba",
)


_HUB = "https://huggingface.co/TerryPei"

default_cfgs = generate_default_cfgs(
    {
        "efficientvmamba_tiny.in1k": _cfg(f"{_HUB}/EfficientVMamba-Tiny/resolve/main/efficient_vmamba_tiny.ckpt"),
        "efficientvmamba_small.in1k": _cfg(f"{_HUB}/EfficientVMamba-Small/resolve/main/efficient_vmamba_small.ckpt"),
        "efficientvmamba_base.in1k": _cfg(f"{_HUB}/EfficientVMamba-Base/resolve/main/efficient_vmamba_base.ckpt"),
        "test_efficientvmamba": _cfg(input_size=(3, 96, 96), pool_size=(6, 6)),
    }
)


# Official name below a block to ours.
_BLOCK = {
    **_official_keys.BLOCK,
    "conv_branch.0": "conv_branch.conv",
    "conv_branch.1": "conv_branch.norm",
    "conv_branch.3": "conv_branch.proj",
    "se.norm": "se.norm",
    "se.global_reduce": "se.reduce",
    "se.channel_select": "se.expand",
    "conv_pw.0": "residual.conv_pw",
    "conv_pw.1": "residual.bn1",
    "conv_dw.0": "residual.conv_dw",
    "conv_dw.1": "residual.bn2",
    "se.conv_reduce": "residual.se.conv_reduce",
    "se.conv_expand": "residual.se.conv_expand",
    "conv_pw2.0": "residual.conv_pwl",
    "conv_pw2.1": "residual.bn3",
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: EfficientVMamba) -> dict[str, Tensor]:
    """Brings an official state dict to this model's keys; one that has them already keeps them.

    Raises:
        ValueError: If there is a key that the official models of this file do not have.
    """
    named = {_like_scan_stages(key, model): value for key, value in state_dict.items()}
    return _official_keys.convert(named, model, family="efficientvmamba", block=_BLOCK)


def _like_scan_stages(key: str, model: EfficientVMamba) -> str:
    """An official key with blocks and downsampling named as they are in the stages that scan.

    The other stages are plain sequences there: a change of layout, the blocks, a change back, the downsampling.
    """
    match = re.fullmatch(r"layers\.(\d+)\.(\d+)\.(.+)", key)
    if match is None:
        return key
    stage, place = int(match[1]), int(match[2])
    depth = len(cast(Stage, model.stages[stage]).blocks) if stage < len(model.stages) else 0
    if 1 <= place <= depth:
        return f"layers.{stage}.blocks.{place - 1}.{match[3]}"
    if place == depth + 2 and stage + 1 < len(model.stages):
        return f"layers.{stage}.downsample.{match[3]}"
    return key


def _create_efficientvmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    return build_backbone(
        EfficientVMamba,
        variant,
        pretrained,
        checkpoint_filter_fn=checkpoint_filter_fn,
        levels=range(len(kwargs["depths"])),
        **kwargs,
    )


@register_model
def efficientvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-T: width 48, 4 inverted residuals in the third stage."""
    model_args = {"embed_dim": 48, "depths": (2, 2, 4, 2)}
    return _create_efficientvmamba("efficientvmamba_tiny", pretrained, **(model_args | kwargs))


@register_model
def efficientvmamba_small(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-S: width 64, 4 inverted residuals in the third stage."""
    model_args = {"embed_dim": 64, "depths": (2, 2, 4, 2)}
    return _create_efficientvmamba("efficientvmamba_small", pretrained, **(model_args | kwargs))


@register_model
def efficientvmamba_base(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-B: width 96, 9 inverted residuals in the third stage."""
    model_args = {"embed_dim": 96, "depths": (2, 2, 9, 2)}
    return _create_efficientvmamba("efficientvmamba_base", pretrained, **(model_args | kwargs))


@register_model
def test_efficientvmamba(
    pretrained: bool = False,  # noqa: PT028  a model, not a test
    **kwargs: Any,
) -> EfficientVMamba:
    """A small EfficientVMamba for tests, without published weights."""
    model_args = {"embed_dim": 16, "depths": (1, 1, 1), "d_state": 4}
    return _create_efficientvmamba("test_efficientvmamba", pretrained, **(model_args | kwargs))
