"""MambaVision, convolutions at high resolution, then windows in which blocks scan first and attend later.

Paper: Hatamizadeh and Kautz, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone", CVPR 2025,
    https://arxiv.org/abs/2407.08083
Official code: https://github.com/NVlabs/MambaVision, NVIDIA Source Code License-NC; this is code of our own, written
    from a description of it. The weights are CC-BY-NC-SA-4.0. Neither licence allows commercial use.

What differs from the official code: the two depthwise convolutions of a mixer are one; a stage starts with its
downsampling instead of ending with the next one's. One oddity is kept, for trained weights rely on it: the bias of the
step counts twice.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, ConvNormAct, DropPath, LayerScale, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vssm.layers.conv import TokenConv
from vssm.layers.downsample import ConvDownsample
from vssm.layers.grid import pad_or_crop, to_maps, to_tokens
from vssm.layers.init import init_linear_layers
from vssm.layers.ssm import TwiceBiasedSSM
from vssm.models import _official_keys
from vssm.models._base import GridBackbone, Stage
from vssm.models._builder import build_backbone, imagenet_cfg


class MambaVisionMixer(nn.Module):
    """Sequence mixer: out_proj([SSM(x) | z]), [x | z] = silu(conv(in_proj(input))).

    The convolution runs along the sequence, each token seeing the one before and the one after it; z is a branch
    without a scan, not a gate.

    Args:
        d_model: Channels of the tokens, an even number; half of them are scanned.
        d_state: State size of the scan.
        d_conv: Taps of the convolution, an odd number.

    Reference:
        Hatamizadeh and Kautz, "MambaVision", 2024, section 3.2, https://arxiv.org/abs/2407.08083
    """

    def __init__(self, d_model: int, *, d_state: int = 8, d_conv: int = 3) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, d_model, bias=False)
        self.conv = TokenConv(d_model, (1, d_conv), bias=False)
        self.ssm = TwiceBiasedSSM(d_model // 2, d_state=d_state, dt_rank=math.ceil(d_model / 16))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes sequences (b, l, c)."""
        x, z = F.silu(self.conv(self.in_proj(x), (1, x.shape[1]))).chunk(2, dim=-1)
        return self.out_proj(torch.cat([self.ssm(x), z], dim=-1))


class WindowBlock(nn.Module):
    """x + scale1·mixer(norm1(x)), then x + scale2·mlp(norm2(x)), with stochastic depth on either branch.

    Args:
        dim: Channels of the tokens.
        mixer: Maps sequences (b, l, c) to sequences.
        mlp_ratio: Width of the MLP over that of the tokens.
        layer_scale: What both scales, one number for each channel, start from; no scales when not given.
        drop_path: Probability of leaving a branch out for a sample in training.
    """

    def __init__(
        self,
        dim: int,
        mixer: MambaVisionMixer | Attention,
        *,
        mlp_ratio: float,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps windows (b, l, c) to windows; their ``size`` plays no part, a window is read as a sequence."""
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class ConvBlock(nn.Module):
    """x + norm2(conv2(gelu(norm1(conv1(x))))) by 3×3 convolutions of tokens on their grid, with batch norms.

    Args:
        dim: Channels of the tokens.
        drop_path: Probability of leaving the branch out for a sample in training.
    """

    def __init__(self, dim: int, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.norm1 = nn.BatchNorm2d(dim)
        self.act = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens."""
        maps = self.act(self.norm1(self.conv1(to_maps(x, size))))
        return x + self.drop_path(to_tokens(self.norm2(self.conv2(maps))))


class WindowStage(Stage):
    """A stage whose blocks run on square windows, each a sequence of its own in raster order.

    The map is padded with zero tokens at the right and bottom to whole windows; these take part in all blocks.

    Args:
        blocks: Modules that map windows (b, window², c) and their size to windows.
        window: Side of a window, in tokens.
        downsample: Maps (b, h, w, c) to a map of this stage's resolution and channels.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, window: int, downsample: nn.Module | None = None) -> None:
        super().__init__(blocks, downsample=downsample)
        self.window = window

    def run_blocks(self, x: Tensor) -> Tensor:
        """Maps (b, h, w, c) to a map of the same shape."""
        height, width, side = x.shape[1], x.shape[2], self.window
        rows, columns = (height + side - 1) // side, (width + side - 1) // side
        grid = pad_or_crop(x, rows * side, columns * side)
        windows = grid.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3).flatten(0, 2)
        windows = super().run_blocks(windows)  # (b·rows·columns, side, side, c)
        grid = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return pad_or_crop(grid, height, width)


class MambaVisionStem(nn.Module):
    """Two 3×3 convolutions of stride 2, each with batch norm and ReLU.

    Args:
        in_chans: Channels of the images.
        embed_dim: Channels of the tokens.
        dim: Channels in between.
    """

    stride = 4

    def __init__(self, in_chans: int, embed_dim: int, *, dim: int) -> None:
        super().__init__()
        eps = {"eps": 1e-4}
        self.conv1 = ConvNormAct(in_chans, dim, 3, stride=2, norm_kwargs=eps)
        self.conv2 = ConvNormAct(dim, embed_dim, 3, stride=2, norm_kwargs=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds images (b, in_chans, H, W) as a map (b, ceil(H/4), ceil(W/4), embed_dim)."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self.conv2(self.conv1(x)).permute(0, 2, 3, 1)


class MapBatchNorm(nn.BatchNorm2d):
    """Batch norm of maps whose channels come last."""

    def forward(self, input: Tensor) -> Tensor:
        """Norms maps (b, h, w, c)."""
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


_downsample = partial(ConvDownsample, bias=False, norm_layer=nn.Identity)


class MambaVision(GridBackbone):
    """MambaVision: stages of convolutions, then stages of windows in whose first half blocks scan, later ones attend.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the classifier; 0 for none.
        global_pool: Pooling before the classifier, as timm names it.
        stem_dim: Channels between the stem's convolutions.
        embed_dim: Channels of the first stage; every next one has twice as many.
        depths: Blocks of each stage; of an odd number in a stage of windows, one more scans than attends.
        window_sizes: Sides of the windows in tokens, for each stage of windows, the last ones.
        num_heads: Heads of attention, for each stage of windows.
        d_state: State size of the scan.
        mlp_ratio: Width of a block's MLP over that of the tokens.
        layer_scale: What the scales of branches in windows start from; no scales when not given.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_dim: int = 64,
        embed_dim: int = 80,
        depths: Sequence[int] = (1, 3, 8, 4),
        window_sizes: Sequence[int] = (14, 7),
        num_heads: Sequence[int] = (8, 16),
        d_state: int = 8,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims = [embed_dim * 2**i for i in range(len(depths))]
        rates = iter(cast("list[float]", calculate_drop_path_rates(drop_path_rate, sum(depths))))
        block_layer = partial(WindowBlock, mlp_ratio=mlp_ratio, layer_scale=layer_scale)
        attention_layer = partial(Attention, qkv_bias=True)
        convs = len(depths) - len(window_sizes)  # stages of convolutions

        def make_stage(i: int) -> Stage:
            dim, drop_paths = dims[i], [next(rates) for _ in range(depths[i])]
            downsample = _downsample(dims[i - 1], dim) if i > 0 else None
            if i < convs:
                return Stage([ConvBlock(dim, drop_path=rate) for rate in drop_paths], downsample=downsample)
            scanning = math.ceil(depths[i] / 2)
            mixers = [
                MambaVisionMixer(dim, d_state=d_state) if j < scanning else attention_layer(dim, num_heads[i - convs])
                for j in range(depths[i])
            ]
            blocks = [block_layer(dim, mixer, drop_path=rate) for mixer, rate in zip(mixers, drop_paths, strict=True)]
            return WindowStage(blocks, window=window_sizes[i - convs], downsample=downsample)

        super().__init__(
            stem=MambaVisionStem(in_chans, embed_dim, dim=stem_dim),
            stages=[make_stage(i) for i in range(len(depths))],
            dims=dims,
            strides=[MambaVisionStem.stride * 2**i for i in range(len(depths))],
            norm=MapBatchNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        init_linear_layers(self)


_cfg = partial(
    imagenet_cfg,
    pool_size=(7, 7),
    crop_pct=1.0,
    first_conv="stem.conv1.conv",
    classifier="head.fc",
    license="cc-by-nc-sa-4.0",
    origin_url="https://github.com/NVlabs/MambaVision",
    paper_ids="arXiv:2407.08083",
    paper_name="MambaVision: A Hybrid Mamba-Transformer Vision Backbone",
)


_HUB = "https://huggingface.co/nvidia"

default_cfgs = generate_default_cfgs(
    {
        "mambavision_tiny.in1k": _cfg(f"{_HUB}/MambaVision-T-1K/resolve/main/mambavision_tiny_1k.pth.tar"),
        "mambavision_tiny2.in1k": _cfg(f"{_HUB}/MambaVision-T2-1K/resolve/main/mambavision_tiny2_1k.pth.tar"),
        "mambavision_small.in1k": _cfg(
            f"{_HUB}/MambaVision-S-1K/resolve/main/mambavision_small_1k.pth.tar", crop_pct=0.93
        ),
        "mambavision_base.in1k": _cfg(f"{_HUB}/MambaVision-B-1K/resolve/main/mambavision_base_1k.pth.tar"),
        "mambavision_large.in1k": _cfg(f"{_HUB}/MambaVision-L-1K/resolve/main/mambavision_large_1k.pth.tar"),
        "mambavision_large2.in1k": _cfg(f"{_HUB}/MambaVision-L2-1K/resolve/main/mambavision_large2_1k.pth.tar"),
        "test_mambavision": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


# Official keys to ours; but for the two convolutions of a mixer, which are joined beforehand.
_RENAMED = {
    r"patch_embed\.conv_down\.0\.(.+)": r"stem.conv1.conv.\1",
    r"patch_embed\.conv_down\.1\.(.+)": r"stem.conv1.bn.\1",
    r"patch_embed\.conv_down\.3\.(.+)": r"stem.conv2.conv.\1",
    r"patch_embed\.conv_down\.4\.(.+)": r"stem.conv2.bn.\1",
    r"levels\.(\d+)\.blocks\.(\d+)\.(norm[12]|conv[12]|mlp\.fc[12])\.(.+)": r"stages.\1.blocks.\2.\3.\4",
    r"levels\.(\d+)\.blocks\.(\d+)\.gamma_([12])": r"stages.\1.blocks.\2.scale\3.gamma",
    r"levels\.(\d+)\.blocks\.(\d+)\.mixer\.((?:in_proj|out_proj|qkv|proj)\..+)": r"stages.\1.blocks.\2.mixer.\3",
    r"levels\.(\d+)\.blocks\.(\d+)\.mixer\.(A_log|D|x_proj\.weight)": r"stages.\1.blocks.\2.mixer.ssm.\3",
    r"levels\.(\d+)\.blocks\.(\d+)\.mixer\.dt_proj\.(weight|bias)": r"stages.\1.blocks.\2.mixer.ssm.dt_\3",
    r"levels\.(\d+)\.blocks\.(\d+)\.mixer\.conv1d\.weight": r"stages.\1.blocks.\2.mixer.conv.conv.weight",
    r"norm\.(.+)": r"norm.\1",
    r"head\.(.+)": r"head.fc.\1",
}
_OF_ONE_SET = ("A_log", "D", "dt_weight", "dt_bias")  # which here have a first axis for the parameter sets


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: MambaVision) -> dict[str, Tensor]:
    """Brings an official state dict to this model's keys; one that has them already keeps them.

    Raises:
        ValueError: If there is a key that the official models do not have.
    """
    if "stem.conv1.conv.weight" in state_dict:
        return state_dict
    official = _of_encoder(state_dict) or state_dict
    ours = _official_keys.rename(_joined(official), _patterns(len(model.stages)), family="mambavision")
    return {key: value[None] if key.endswith(_OF_ONE_SET) else value for key, value in ours.items()}


def _of_encoder(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the encoder, of a file that says so of them."""
    prefix = "encoder."
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def _joined(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official weights with the two convolutions of a mixer as one of two dimensions, along a grid of one row."""
    joined = dict(state_dict)
    for key in state_dict:
        other = key.replace("conv1d_x", "conv1d_z")
        if "conv1d_x" in key and other in state_dict:
            both = torch.cat([joined.pop(key), joined.pop(other)])
            joined[key.replace("conv1d_x", "conv1d")] = both.unsqueeze(2)
    return joined


def _patterns(stages: int) -> dict[str, str]:
    """Patterns of official keys; the downsamplings belong to the stage after them here."""
    return _RENAMED | {
        rf"levels\.{i}\.downsample\.reduction\.0\.(.+)": rf"stages.{i + 1}.downsample.conv.\1"
        for i in range(stages - 1)
    }


def _create_mambavision(variant: str, pretrained: bool = False, **kwargs: Any) -> MambaVision:
    levels = range(len(kwargs["depths"]))
    return build_backbone(
        MambaVision, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn, levels=levels, **kwargs
    )


@register_model
def mambavision_tiny(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T: width 80, 8 and 4 blocks in windows."""
    model_args = {"stem_dim": 32, "embed_dim": 80, "depths": (1, 3, 8, 4)}
    return _create_mambavision("mambavision_tiny", pretrained, **(model_args | kwargs))


@register_model
def mambavision_tiny2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T2: width 80, 11 and 4 blocks in windows."""
    model_args = {"stem_dim": 32, "embed_dim": 80, "depths": (1, 3, 11, 4)}
    return _create_mambavision("mambavision_tiny2", pretrained, **(model_args | kwargs))


@register_model
def mambavision_small(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-S: width 96, 7 and 5 blocks in windows."""
    model_args = {"embed_dim": 96, "depths": (3, 3, 7, 5)}
    return _create_mambavision("mambavision_small", pretrained, **(model_args | kwargs))


@register_model
def mambavision_base(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-B: width 128, 10 and 5 blocks in windows, with layer scale."""
    model_args = {"embed_dim": 128, "depths": (3, 3, 10, 5), "layer_scale": 1e-5}
    return _create_mambavision("mambavision_base", pretrained, **(model_args | kwargs))


@register_model
def mambavision_large(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L: width 196, 10 and 5 blocks in windows, with layer scale."""
    model_args = {"embed_dim": 196, "depths": (3, 3, 10, 5), "num_heads": (16, 32), "layer_scale": 1e-5}
    return _create_mambavision("mambavision_large", pretrained, **(model_args | kwargs))


@register_model
def mambavision_large2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L2: width 196, 12 and 5 blocks in windows, with layer scale."""
    model_args = {"embed_dim": 196, "depths": (3, 3, 12, 5), "num_heads": (16, 32), "layer_scale": 1e-5}
    return _create_mambavision("mambavision_large2", pretrained, **(model_args | kwargs))


@register_model
def test_mambavision(pretrained: bool = False, **kwargs: Any) -> MambaVision:  # noqa: PT028  a model, not a test
    """A small MambaVision for tests, without published weights."""
    model_args = {"stem_dim": 8, "embed_dim": 12, "depths": (1, 1, 2, 2), "window_sizes": (4, 2), "num_heads": (2, 4)}
    return _create_mambavision("test_mambavision", pretrained, **(model_args | {"mlp_ratio": 2.0} | kwargs))
