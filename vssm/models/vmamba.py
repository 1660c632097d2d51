"""VMamba, a hierarchy of stages whose blocks scan the map along rows and columns, both ways.

Paper: Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024, https://arxiv.org/abs/2401.10166
Official code: https://github.com/MzeroMiko/VMamba (classification/models/vmamba.py), MIT; no licence is stated for the
    weights.

What differs from the official code: the four directions read one map through a table of orders instead of four
permuted copies, and their projections are one linear layer in raster order; a stage starts with its downsampling
instead of ending with the next one's. The models of the paper's first version, there called vanilla, end in ``_v0``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import Mlp
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from vssm.layers.block import MixerBlock, MixerMlpBlock
from vssm.layers.downsample import ConvDownsample
from vssm.layers.init import init_linear_layers
from vssm.layers.ss2d import SS2D
from vssm.layers.stem import ConvStem, PatchStem
from vssm.models import _official_keys
from vssm.models._base import GridBackbone, make_stages
from vssm.models._builder import build_backbone, imagenet_cfg


class VMamba(GridBackbone):
    """VMamba.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the classifier; 0 for none.
        global_pool: Pooling before the classifier, as timm names it.
        embed_dim: Channels of the first stage; every next one has twice as many.
        depths: Blocks of each stage.
        d_state: State size of the scan.
        expand: Width of the scan over that of the tokens.
        gate: Whether the mixer's result is gated.
        conv_bias: Whether the mixer's convolution has a bias.
        mlp_ratio: Width of a block's MLP over that of the tokens; 0 for blocks without one.
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
        depths: Sequence[int] = (2, 2, 8, 2),
        d_state: int = 1,
        expand: float = 1.0,
        gate: bool = False,
        conv_bias: bool = False,
        mlp_ratio: float = 4.0,
        stem_layer: Callable[[int, int], ConvStem | PatchStem] = ConvStem,
        downsample_layer: Callable[[int, int], nn.Module] = ConvDownsample,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims = [embed_dim * 2**i for i in range(len(depths))]
        mixer_layer = partial(SS2D, d_state=d_state, expand=expand, gate=gate, conv_bias=conv_bias)
        stem = stem_layer(in_chans, embed_dim)
        super().__init__(
            stem=stem,
            stages=make_stages(
                lambda stage, rate: _block(dims[stage], mixer_layer, mlp_ratio=mlp_ratio, drop_path=rate),
                dims=dims,
                depths=depths,
                downsample_layer=downsample_layer,
                drop_path_rate=drop_path_rate,
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


def _block(dim: int, mixer_layer: Callable[[int], SS2D], *, mlp_ratio: float, drop_path: float) -> MixerBlock:
    mixer, norm1 = mixer_layer(dim), nn.LayerNorm(dim)
    if mlp_ratio == 0:
        return MixerBlock(mixer, norm1, drop_path=drop_path)
    mlp = Mlp(dim, int(mlp_ratio * dim))
    return MixerMlpBlock(mixer, norm1, mlp=mlp, norm2=nn.LayerNorm(dim), drop_path=drop_path)


_cfg = partial(
    imagenet_cfg,
    pool_size=(7, 7),
    first_conv="stem.conv1",
    classifier="head.fc",
    license="mit",
    origin_url="https://github.com/MzeroMiko/VMamba",
    paper_ids="arXiv:2401.10166",
    paper_name="VMamba: Visual State Space Model",
)


_V2 = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls"
_V0 = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls"

default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny_s1l8.in1k": _cfg(f"{_V2}/vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        "vmamba_tiny_s2l5.in1k": _cfg(f"{_V2}/vssm_tiny_0230_ckpt_epoch_262.pth"),
        "vmamba_small_s2l15.in1k": _cfg(f"{_V2}/vssm_small_0229_ckpt_epoch_222.pth"),
        "vmamba_small_s1l20.in1k": _cfg(f"{_V2}/vssm1_small_0229s_ckpt_epoch_240.pth"),
        "vmamba_base_s2l15.in1k": _cfg(f"{_V2}/vssm_base_0229_ckpt_epoch_237.pth"),
        "vmamba_base_s1l20.in1k": _cfg(f"{_V2}/vssm1_base_0229s_ckpt_epoch_225.pth"),
        "vmamba_tiny_v0.in1k": _cfg(f"{_V0}/vssmtiny_dp01_ckpt_epoch_292.pth", first_conv="stem.proj"),
        "vmamba_small_v0.in1k": _cfg(f"{_V0}/vssmsmall_dp03_ckpt_epoch_238.pth", first_conv="stem.proj"),
        "vmamba_base_v0.in1k": _cfg(f"{_V0}/vssmbase_dp06_ckpt_epoch_241.pth", first_conv="stem.proj"),
        "test_vmamba": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: VMamba) -> dict[str, Tensor]:
    """Brings an official state dict to this model's keys; one that has them already keeps them.

    Raises:
        ValueError: If there is a key that the official models of this file do not have.
    """
    return _official_keys.convert(state_dict, model, family="vmamba")


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    levels = range(len(kwargs["depths"]))
    return build_backbone(
        VMamba, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn, levels=levels, **kwargs
    )


_V0_ARGS = {
    "d_state": 16,
    "expand": 2.0,
    "gate": True,
    "conv_bias": True,
    "mlp_ratio": 0.0,
    "stem_layer": partial(PatchStem, patch_size=4, norm_layer=nn.LayerNorm),
    "downsample_layer": PatchMerging,
}


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T: scan as wide as the tokens, 8 blocks in the third stage."""
    model_args = {"embed_dim": 96, "depths": (2, 2, 8, 2), "expand": 1.0}
    return _create_vmamba("vmamba_tiny_s1l8", pretrained, **(model_args | kwargs))


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T with a scan twice as wide as the tokens, 5 blocks in the third stage."""
    model_args = {"embed_dim": 96, "depths": (2, 2, 5, 2), "expand": 2.0}
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, **(model_args | kwargs))


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S: scan twice as wide as the tokens, 15 blocks in the third stage."""
    model_args = {"embed_dim": 96, "depths": (2, 2, 15, 2), "expand": 2.0}
    return _create_vmamba("vmamba_small_s2l15", pretrained, **(model_args | kwargs))


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S with a scan as wide as the tokens, 20 blocks in the third stage."""
    model_args = {"embed_dim": 96, "depths": (2, 2, 20, 2), "expand": 1.0}
    return _create_vmamba("vmamba_small_s1l20", pretrained, **(model_args | kwargs))


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B: width 128, scan twice as wide as the tokens, 15 blocks in the third stage."""
    model_args = {"embed_dim": 128, "depths": (2, 2, 15, 2), "expand": 2.0}
    return _create_vmamba("vmamba_base_s2l15", pretrained, **(model_args | kwargs))


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B with a scan as wide as the tokens, 20 blocks in the third stage."""
    model_args = {"embed_dim": 128, "depths": (2, 2, 20, 2), "expand": 1.0}
    return _create_vmamba("vmamba_base_s1l20", pretrained, **(model_args | kwargs))


@register_model
def vmamba_tiny_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T of the paper's first version: 16 states, a gate, no MLP, 9 blocks in the third stage."""
    model_args = {"embed_dim": 96, "depths": (2, 2, 9, 2)} | _V0_ARGS
    return _create_vmamba("vmamba_tiny_v0", pretrained, **(model_args | kwargs))


@register_model
def vmamba_small_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S of the paper's first version: 16 states, a gate, no MLP, 27 blocks in the third stage."""
    model_args = {"embed_dim": 96, "depths": (2, 2, 27, 2)} | _V0_ARGS
    return _create_vmamba("vmamba_small_v0", pretrained, **(model_args | kwargs))


@register_model
def vmamba_base_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B of the paper's first version: width 128, 16 states, a gate, no MLP, 27 blocks in the third stage."""
    model_args = {"embed_dim": 128, "depths": (2, 2, 27, 2)} | _V0_ARGS
    return _create_vmamba("vmamba_base_v0", pretrained, **(model_args | kwargs))


@register_model
def test_vmamba(pretrained: bool = False, **kwargs: Any) -> VMamba:  # noqa: PT028  a model, not a test
    """A small VMamba for tests, without published weights."""
    model_args = {"embed_dim": 16, "depths": (1, 2, 1, 1), "mlp_ratio": 2.0}
    return _create_vmamba("test_vmamba", pretrained, **(model_args | kwargs))
