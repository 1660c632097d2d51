"""Vim, a plain stack of bidirectional state-space blocks over image patches with a class token in the middle.

Paper: Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
    ICML 2024, https://arxiv.org/abs/2401.09417
Official code: https://github.com/hustvl/Vim (vim/models_mamba.py), Apache-2.0; no licence is stated for the weights.

What differs from the official code: short names; both directions are one scan with one parameter set per direction;
the residual stream is added after the mixer instead of before the next norm, which is the same function; positions are
resized with the class token's entry where it is, in the middle, while the official fine-tuning takes the first one.
"""

import math
import re
from functools import partial
from typing import Any, cast

import torch
from timm.layers import DropPath, calculate_drop_path_rates, lecun_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vssm.layers.conv import CausalTokenConv
from vssm.layers.ssm import SelectiveSSM
from vssm.layers.stem import PatchStem
from vssm.models import _official_keys
from vssm.models._base import TokenBackbone
from vssm.models._builder import build_backbone, imagenet_cfg, quarters
from vssm.scan_order import scan_order


class VimMixer(nn.Module):
    """Token mixer: out_proj(½·Σ_i SSM_i(silu(conv_i(x)))·silu(z)), [x | z] = in_proj(input), i forward and backward.

    Args:
        d_model: Channels of the tokens.
        d_state: State size of the scan.
        d_conv: Taps of the causal convolutions.
        expand: d_inner/d_model.
    """

    token_prunable = True

    def __init__(self, d_model: int, *, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        d_inner = expand * d_model
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv = CausalTokenConv(d_inner, d_conv, reverse=(False, True), activation=True)
        self.ssm = SelectiveSSM(d_inner, d_state=d_state, dt_rank=math.ceil(d_model / 16), directions=2)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes tokens (b, l, c) along their sequence."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        order = scan_order("bidirectional", 1, x.shape[1], device=x.device)
        y = self.ssm(self.conv(x), order=order, z=z)
        return self.out_proj(y) / 2  # the mean over directions: out_proj has no bias, and its output is narrower


class VimBlock(nn.Module):
    """x + mixer(norm1(x)), with stochastic depth.

    Args:
        mixer: Token mixer.
        norm: Norm before it.
        drop_path: Probability of leaving the mixer out for a sample in training.
    """

    token_prunable = True

    def __init__(self, mixer: VimMixer, *, norm: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = norm
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) to tokens; the patch grid's ``size`` plays no part, Vim reads a sequence."""
        return x + self.drop_path(self.mixer(self.norm1(x)))


class Vim(TokenBackbone):
    """Vision Mamba.

    Args:
        img_size: Height and width of the images, in pixels.
        dynamic_img_size: Take images of any size, with positions resized to their grid; else ``img_size`` only.
        patch_size: Side of a patch, in pixels.
        stride: Distance of neighbouring patches, in pixels; ``patch_size`` when not given.
        in_chans: Channels of the images.
        num_classes: Classes of the classifier; 0 for none.
        class_token: Whether there is a class token, in the middle of the sequence.
        global_pool: What the classifier sees: ``"token"`` the class token, ``"avg"`` the mean of the patch tokens,
            ``""`` each token.
        embed_dim: Channels of the tokens.
        depth: Number of blocks.
        d_state: State size of the scan.
        d_conv: Taps of the causal convolutions.
        expand: Width of the scan over that of the tokens.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        dynamic_img_size: bool = False,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        class_token: bool = True,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        norm_layer = partial(nn.RMSNorm, embed_dim, eps=1e-5)
        rates = cast("list[float]", calculate_drop_path_rates(drop_path_rate, depth))
        super().__init__(
            stem=PatchStem(in_chans, embed_dim, patch_size=patch_size, stride=stride),
            blocks=[
                VimBlock(
                    VimMixer(embed_dim, d_state=d_state, d_conv=d_conv, expand=expand),
                    norm=norm_layer(),
                    drop_path=rate,
                )
                for rate in rates
            ],
            norm=norm_layer(),
            embed_dim=embed_dim,
            img_size=img_size,
            dynamic_img_size=dynamic_img_size,
            class_token=class_token,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """The official initialisation, where it is not that of the layers themselves."""
        lecun_normal_(self.stem.get_parameter("proj.weight"))
        nn.init.zeros_(self.stem.get_parameter("proj.bias"))
        for module in self.modules():
            if isinstance(module, VimMixer):
                module.out_proj.weight.div_(math.sqrt(len(self.blocks)))
                module.ssm.dt_bias[1].zero_()  # the official code zeroes the bias of the backward steps, like any other


_cfg = partial(
    imagenet_cfg,
    fixed_input_size=True,
    first_conv="stem.proj",
    classifier="head",
    license="apache-2.0",
    origin_url="https://github.com/hustvl/Vim",
    paper_ids="arXiv:2401.09417",
    paper_name="Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
)


_HUB = "https://huggingface.co/hustvl"

default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.in1k": _cfg(f"{_HUB}/Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth"),
        "vim_tiny_patch16_stride8_224.in1k": _cfg(
            f"{_HUB}/Vim-tiny-midclstok/resolve/main/vim_t_midclstok_ft_78p3acc.pth"
        ),
        "vim_small_patch16_224.in1k": _cfg(f"{_HUB}/Vim-small-midclstok/resolve/main/vim_s_midclstok_80p5acc.pth"),
        "vim_small_patch16_stride8_224.in1k": _cfg(
            f"{_HUB}/Vim-small-midclstok/resolve/main/vim_s_midclstok_ft_81p6acc.pth"
        ),
        "vim_base_patch16_224.in1k": _cfg(f"{_HUB}/Vim-base-midclstok/resolve/main/vim_b_midclstok_81p9acc.pth"),
        "test_vim": _cfg(input_size=(3, 96, 96)),
    }
)


_RENAMED = {
    "patch_embed.proj.weight": "stem.proj.weight",
    "patch_embed.proj.bias": "stem.proj.bias",
    "norm_f.weight": "norm.weight",
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
}
_RENAMED_IN_BLOCK = {
    "norm.weight": "norm1.weight",
    "mixer.in_proj.weight": "mixer.in_proj.weight",
    "mixer.out_proj.weight": "mixer.out_proj.weight",
}
# Per part of the mixer, the official keys of the forward and of the backward direction.
_DIRECTIONS = {
    "conv.weight": ("conv1d.weight", "conv1d_b.weight"),
    "conv.bias": ("conv1d.bias", "conv1d_b.bias"),
    "ssm.x_proj.weight": ("x_proj.weight", "x_proj_b.weight"),
    "ssm.dt_weight": ("dt_proj.weight", "dt_proj_b.weight"),
    "ssm.dt_bias": ("dt_proj.bias", "dt_proj_b.bias"),
    "ssm.A_log": ("A_log", "A_b_log"),
    "ssm.D": ("D", "D_b"),
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Vim) -> dict[str, Tensor]:
    """Brings an official state dict to this model's keys; one that has them already keeps them.

    Positions of another, square grid are resized to the model's. A model without a class token drops that of the
    checkpoint.

    Raises:
        ValueError: If there is a key that the official models of this file do not have, or a direction is missing.
    """
    ours = dict(state_dict) if "stem.proj.weight" in state_dict else _convert(state_dict)
    if "pos_embed" in ours:
        ours["pos_embed"] = model.adapt_pos_embed(ours["pos_embed"], class_token="cls_token" in ours)
    if model.cls_token is None:
        ours.pop("cls_token", None)
    return ours


def _convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    left = dict(state_dict)
    ours = {new: left.pop(old) for old, new in _RENAMED.items() if old in left}
    for i in sorted({int(match[1]) for match in (re.match(r"layers\.(\d+)\.", key) for key in left) if match}):
        theirs, block = f"layers.{i}.", f"blocks.{i}."
        ours |= {block + new: left.pop(theirs + old) for old, new in _RENAMED_IN_BLOCK.items() if theirs + old in left}
        for part, names in _DIRECTIONS.items():
            pair = [left.pop(f"{theirs}mixer.{name}", None) for name in names]
            if pair[0] is None or pair[1] is None:
                missing = names[0] if pair[0] is None else names[1]
                raise ValueError(f"vim: the checkpoint has no {theirs}mixer.{missing}, expected two scan directions")
            ours[f"{block}mixer.{part}"] = _official_keys.join_directions(part, [pair[0], pair[1]])
    if left:
        raise ValueError(
            f"vim: unknown key {next(iter(left))!r} in the checkpoint ({len(left)} in all), expected those of an "
            "official Vim with its class token in the middle, such as 'layers.0.mixer.in_proj.weight'"
        )
    return ours


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> Vim:
    return build_backbone(
        Vim,
        variant,
        pretrained,
        checkpoint_filter_fn=checkpoint_filter_fn,
        levels=quarters(kwargs["depth"]),
        **kwargs,
    )


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti: 24 blocks of width 192, patches of 16 pixels."""
    model_args = {"embed_dim": 192, "depth": 24}
    return _create_vim("vim_tiny_patch16_224", pretrained, **(model_args | kwargs))


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti+: Vim-Ti with patches that overlap by half."""
    model_args = {"embed_dim": 192, "depth": 24, "stride": 8}
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained, **(model_args | kwargs))


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S: 24 blocks of width 384, patches of 16 pixels."""
    model_args = {"embed_dim": 384, "depth": 24}
    return _create_vim("vim_small_patch16_224", pretrained, **(model_args | kwargs))


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S+: Vim-S with patches that overlap by half."""
    model_args = {"embed_dim": 384, "depth": 24, "stride": 8}
    return _create_vim("vim_small_patch16_stride8_224", pretrained, **(model_args | kwargs))


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B: 24 blocks of width 768, patches of 16 pixels."""
    model_args = {"embed_dim": 768, "depth": 24}
    return _create_vim("vim_base_patch16_224", pretrained, **(model_args | kwargs))


@register_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:  # noqa: PT028  a model, not a test
    """A small Vim for tests and demonstrations, without published weights."""
    model_args = {"embed_dim": 64, "depth": 4}
    return _create_vim("test_vim", pretrained, **(model_args | kwargs))
