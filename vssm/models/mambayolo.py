"""The backbone of Mamba-YOLO: blocks that convolve, scan the map in four directions, and gate their channels.

Paper: Wang et al., "Mamba YOLO: A Simple Baseline for Object Detection with State Space Model", AAAI 2025,
    https://arxiv.org/abs/2406.05835
Official code: https://github.com/HZAI-ZJNU/Mamba-YOLO, AGPL-3.0; this is code of our own, written from a description of
    it. No weights were published.

The neck and the head of the detector are in `vssm.yolo`. What differs from the official code: the four phases of a map
that a downsampling joins are a convolution of 2×2 cells; maps whose sides are odd are padded, where the official code
fails. The classifier is an addition: the authors train the detector from scratch.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from timm.layers import ConvNormAct
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vssm.layers.block import MixerFfnBlock
from vssm.layers.conv import TokenConv
from vssm.layers.grid import pad_or_crop, to_maps, to_tokens
from vssm.layers.ss2d import SS2D
from vssm.layers.ssm import SelectiveSSM
from vssm.models import _official_keys
from vssm.models._base import GridBackbone, Stage, make_stages
from vssm.models._builder import build_backbone

# Which the official framework sets on every batch norm of a detector.
BATCH_NORM: dict[str, Any] = {"eps": 1e-3, "momentum": 0.03}
conv_norm_silu = partial(ConvNormAct, norm_kwargs=BATCH_NORM, act_layer=nn.SiLU)


class GeluSS2D(SS2D):
    """The 2D scan of VMamba's first version with GELU in place of SiLU."""

    def activate(self, x: Tensor) -> Tensor:
        """The activation of the scan's input and of the gate."""
        return F.gelu(x)


class LocalSpatialBlock(nn.Module):
    """x + fc2(gelu(fc1(norm(conv(x))))) with a depthwise 3×3 convolution and a batch norm.

    Args:
        dim: Channels of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = TokenConv(dim)
        self.norm = nn.BatchNorm2d(dim, **BATCH_NORM)
        self.fc1 = nn.Linear(dim, dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens."""
        normed = to_tokens(self.norm(to_maps(self.conv(x, size), size)))
        return x + self.fc2(self.act(self.fc1(normed)))


class ResidualGatedFFN(nn.Module):
    """Feed-forward network fc2(gelu(x + conv(x))·v), [x | v] = fc1(input), with a depthwise 3×3 convolution.

    Args:
        dim: Channels of the tokens.
        hidden_dim: Channels of x and of v.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden_dim)
        self.conv = TokenConv(hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens."""
        x, v = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.act(x + self.conv(x, size)) * v)


class MambaYoloBlock(MixerFfnBlock):
    """x = proj(input), then x + mixer(norm1(local(x))), then x + mlp(norm2(x)).

    Args:
        dim: Channels of the tokens after ``proj``.
        proj: Maps maps (b, c, h, w) to maps of ``dim`` channels.
        mixer: Maps tokens (b, l, dim) and their grid's ``size`` to tokens.
        drop_path: Probability of leaving a branch out for a sample in training.

    Reference:
        Wang et al., "Mamba YOLO", 2024, section 3.3, https://arxiv.org/abs/2406.05835
    """

    def __init__(self, dim: int, *, proj: nn.Module, mixer: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__(
            mixer,
            nn.LayerNorm(dim, eps=1e-6),
            mlp=ResidualGatedFFN(dim, 2 * 4 * dim // 3),
            norm2=nn.LayerNorm(dim, eps=1e-6),
            drop_path=drop_path,
        )
        self.proj = proj
        self.local = LocalSpatialBlock(dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens (b, l, dim)."""
        x = to_tokens(self.proj(to_maps(x, size)))
        x = x + self.drop_path(self.mixer(self.norm1(self.local(x, size)), size))
        return x + self.drop_path(self.feed(x, size))


class MambaYoloStem(nn.Module):
    """Two 3×3 convolutions of stride 2, each with a batch norm, the first with GELU, the second with SiLU.

    Args:
        in_chans: Channels of the images.
        embed_dim: Channels of the tokens; half as many in between.
    """

    stride = 4

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(in_chans, embed_dim // 2, 3, stride=2, norm_kwargs=BATCH_NORM, act_layer=nn.GELU)
        self.conv2 = conv_norm_silu(embed_dim // 2, embed_dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds images (b, in_chans, H, W) as a map (b, ceil(H/4), ceil(W/4), embed_dim)."""
        return self.conv2(self.conv1(x)).permute(0, 2, 3, 1)


class VisionClueMerge(nn.Module):
    """Halves the resolution: joins the cells of each 2×2 patch by a linear layer, with a batch norm and SiLU.

    Args:
        dim: Channels before.
        dim_out: Channels after.
    """

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.conv = conv_norm_silu(dim, dim_out, 2, stride=2, padding=0, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, h, w, dim) to (b, ceil(h/2), ceil(w/2), dim_out); odd sides are padded by zeros."""
        height, width = x.shape[1], x.shape[2]
        x = pad_or_crop(x, height + height % 2, width + width % 2)
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MambaYolo(GridBackbone):
    """The backbone of Mamba-YOLO.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the classifier; 0 for none.
        global_pool: Pooling before the classifier, as timm names it.
        dims: Channels of each stage.
        depths: Blocks of each stage.
        d_state: State size of the scan.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (1, 1, 3, 1),
        d_state: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        def make_block(stage: int, rate: float) -> MambaYoloBlock:
            dim = dims[stage]
            proj, mixer = conv_norm_silu(dim, dim, bias=True), GeluSS2D(dim, d_state=d_state)
            return MambaYoloBlock(dim, proj=proj, mixer=mixer, drop_path=rate)

        super().__init__(
            stem=MambaYoloStem(in_chans, dims[0]),
            stages=make_stages(
                make_block,
                dims=dims,
                depths=depths,
                downsample_layer=VisionClueMerge,
                drop_path_rate=drop_path_rate,
            ),
            dims=dims,
            strides=[MambaYoloStem.stride * 2**i for i in range(len(depths))],
            norm=nn.Identity(),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        init_scans(self)


def init_scans(model: nn.Module) -> None:
    """Starts every `SelectiveSSM` as the official code does: A = −1, steps of normally distributed parameters.

    Args:
        model: Whole model.
    """
    for module in model.modules():
        if isinstance(module, SelectiveSSM):
            nn.init.zeros_(module.A_log)
            nn.init.normal_(module.dt_weight)
            nn.init.normal_(module.dt_bias)


def _cfg(**entries: Any) -> dict[str, Any]:
    """A configuration of weights for images as the detector sees them, in [0, 1] and not normalised."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 640, 640),
        "pool_size": (20, 20),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "stem.conv1.conv",
        "classifier": "head.fc",
        "license": "agpl-3.0",
        "origin_url": "https://github.com/HZAI-ZJNU/Mamba-YOLO",
        "paper_ids": "arXiv:2406.05835",
        "paper_name": "Mamba YOLO: A Simple Baseline for Object Detection with State Space Model",
        **entries,
    }


default_cfgs = generate_default_cfgs(
    {
        "mambayolo_tiny": _cfg(),
        "mambayolo_base": _cfg(),
        "mambayolo_large": _cfg(),
        "test_mambayolo": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)

# Official name of a module below a block to ours.
_BLOCK = {
    "proj_conv.0": "proj.conv",
    "proj_conv.1": "proj.bn",
    "in_proj.0": "proj.conv",
    "in_proj.1": "proj.bn",
    "norm.norm": "norm1",
    "norm2.norm": "norm2",
    "lsblock.fc1": "local.conv.conv",
    "lsblock.norm": "local.norm",
    "lsblock.fc2": "local.fc1",
    "lsblock.fc3": "local.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.dwconv": "mlp.conv.conv",
    "mlp.fc2": "mlp.fc2",
}
# Layers of the official detector's list: those of the backbone, and those of neck and head.
BACKBONE_KEY = re.compile(r"model\.[0-7]\.")
_OTHER_KEY = re.compile(r"model\.([89]|1\d|2[01])\.")
_MERGE_WEIGHT = re.compile(r"stages\.\d+\.downsample\.conv\.conv\.weight")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: MambaYolo) -> dict[str, Tensor]:
    """Brings the state dict of an official detector to this model's keys; one that has them already keeps them.

    Neck and head are left out.

    Raises:
        ValueError: If there is a key that the official models do not have.
    """
    if any(key.startswith("stem.") for key in state_dict):
        return state_dict
    official = {key: value for key, value in state_dict.items() if not _OTHER_KEY.match(key)}
    renamed = _official_keys.rename(official, _patterns(model), family="mambayolo")
    patches = {key: _phases_to_patch(value) for key, value in renamed.items() if _MERGE_WEIGHT.fullmatch(key)}
    return reshape_like(model, renamed | patches)


def block_patterns(official: str, ours: str, *, mixers: Mapping[str, str]) -> dict[str, str]:
    """Patterns of the official keys of a block, for `_official_keys.rename`.

    Args:
        official: Pattern of what comes before the names of the block's parts.
        ours: Template of what it becomes.
        mixers: Pattern of the official name of a mixer to the template of ours.
    """
    patterns = {re.escape(theirs): mine for theirs, mine in _BLOCK.items()}
    for mixer, name in mixers.items():
        patterns |= {rf"{mixer}\.{re.escape(theirs)}": f"{name}.{mine}" for theirs, mine in _official_keys.SS2D.items()}
    return {rf"{official}{theirs}(?P<rest>|\..+)": rf"{ours}{mine}\g<rest>" for theirs, mine in patterns.items()}


def reshape_like(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the shapes of a model's, where they have as many values: linear layers that were convolutions."""
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    return {
        key: value.reshape(shapes[key]) if key in shapes and shapes[key].numel() == value.numel() else value
        for key, value in state_dict.items()
    }


def _patterns(model: MambaYolo) -> dict[str, str]:
    """Patterns of official keys; blocks of a stage have a number only if there are several."""
    patterns = {
        r"model\.0\.conv\.0\.(.+)": r"stem.conv1.conv.\1",
        r"model\.0\.conv\.1\.(.+)": r"stem.conv1.bn.\1",
        r"model\.0\.conv\.3\.(.+)": r"stem.conv2.conv.\1",
        r"model\.0\.conv\.4\.(.+)": r"stem.conv2.bn.\1",
    }
    for i, stage in enumerate(cast("Sequence[Stage]", model.stages)):
        downsample, blocks, ours = rf"model\.{2 * i}\.", rf"model\.{2 * i + 1}\.", f"stages.{i}."
        patterns[rf"{downsample}pw_linear\.0\.(.+)"] = rf"{ours}downsample.conv.conv.\1"
        patterns[rf"{downsample}pw_linear\.1\.(.+)"] = rf"{ours}downsample.conv.bn.\1"
        number, ours_number = (r"(\d+)\.", r"\1") if len(stage.blocks) > 1 else ("", "0")
        patterns |= block_patterns(blocks + number, f"{ours}blocks.{ours_number}.", mixers={"op": "mixer"})
    return patterns


def _phases_to_patch(weight: Tensor) -> Tensor:
    """From the weight (d, 4c, 1, 1) for the cells of a patch, down its columns, that of a convolution, (d, c, 2, 2)."""
    return weight.unflatten(1, (2, 2, -1)).flatten(3).permute(0, 3, 2, 1)


def _create_mambayolo(variant: str, pretrained: bool = False, **kwargs: Any) -> MambaYolo:
    levels = range(len(kwargs["depths"]))
    return build_backbone(
        MambaYolo, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn, levels=levels, **kwargs
    )


@register_model
def mambayolo_tiny(pretrained: bool = False, **kwargs: Any) -> MambaYolo:
    """Backbone of Mamba-YOLO-T: width 32, one block in each stage but 3 in the third."""
    model_args = {"dims": (32, 64, 128, 256), "depths": (1, 1, 3, 1)}
    return _create_mambayolo("mambayolo_tiny", pretrained, **(model_args | kwargs))


@register_model
def mambayolo_base(pretrained: bool = False, **kwargs: Any) -> MambaYolo:
    """Backbone of Mamba-YOLO-B: width 64, one block in each stage but 3 in the third."""
    model_args = {"dims": (64, 128, 256, 512), "depths": (1, 1, 3, 1)}
    return _create_mambayolo("mambayolo_base", pretrained, **(model_args | kwargs))


@register_model
def mambayolo_large(pretrained: bool = False, **kwargs: Any) -> MambaYolo:
    """Backbone of Mamba-YOLO-L: width 96, two blocks in each stage but 6 in the third."""
    model_args = {"dims": (96, 192, 384, 576), "depths": (2, 2, 6, 2)}
    return _create_mambayolo("mambayolo_large", pretrained, **(model_args | kwargs))


@register_model
def test_mambayolo(pretrained: bool = False, **kwargs: Any) -> MambaYolo:  # noqa: PT028  a model, not a test
    """A small backbone of Mamba-YOLO for tests, without published weights."""
    model_args = {"dims": (16, 24, 32, 48), "depths": (1, 1, 2, 1), "d_state": 4}
    return _create_mambayolo("test_mambayolo", pretrained, **(model_args | kwargs))
