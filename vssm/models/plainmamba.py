"""PlainMamba, a plain stack of blocks that scan patches along snakes and know which way each step of a snake goes.

Paper: Yang et al., "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", BMVC 2024,
    https://arxiv.org/abs/2403.17695
Official code: https://github.com/ChenhongyiYang/PlainMamba (mmcls/plain_mamba_dev), Apache-2.0; no licence is stated
    for the weights.

What differs from the official code: one scan with one parameter set k the four snakes, whose tables are kept
instead of being rebuilt in every block; images are refused that do not have the size the model was built for, unless it
is built with ``dynamic_img_size=True``, which the official code always is.

Two oddities of the official code are kept, for trained weights rely on them: a snake reorders the scan's input only, so
that at step s it meets dt, B and C of the token s in raster order; and the bias of the step counts twice.
"""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vssm.layers.block import MixerBlock
from vssm.layers.conv import TokenConv
from vssm.layers.init import init_linear_layers, init_ssm_as_linear
from vssm.layers.ssm import TwiceBiasedSSM
from vssm.layers.stem import TokenStem
from vssm.models import _official_keys
from vssm.models._base import TokenBackbone
from vssm.models._builder import build_backbone, imagenet_cfg, quarters
from vssm.scan_order import scan_moves, scan_order
from vssm_kernels import directional_scan

_MOVES = 5  # none at the first step, right, left, up, down


class PlainMambaStem(TokenStem):
    """A 7×7 convolution of stride 2, 3×3 convolutions, and patches of 8×8 of what these make of an image.

    Maps are zero-padded at the right and bottom to whole patches, so that an image of side s gives ceil(s/16) of them.

    Args:
        in_chans: Channels of the images.
        embed_dim: Channels of the tokens.
        dim: Channels of the convolutions.
        convs: Number of 3×3 convolutions.
    """

    stride = 16

    def __init__(self, in_chans: int, embed_dim: int, *, dim: int = 64, convs: int = 1) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            ConvNormAct(in_chans, dim, kernel_size=7, stride=2), *(ConvNormAct(dim, dim, 3) for _ in range(convs))
        )
        self.proj = nn.Conv2d(dim, embed_dim, kernel_size=8, stride=8)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image whose sides are given in pixels."""
        return math.ceil(height / self.stride), math.ceil(width / self.stride)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds images (b, in_chans, H, W) as a map (b, ceil(H/16), ceil(W/16), embed_dim)."""
        x = F.pad(self.convs(x), (0, 7, 0, 7))  # what is more than whole patches is left out by the stride
        return self.proj(x).permute(0, 2, 3, 1)


class SnakeSSM(TwiceBiasedSSM):
    """State-space model that scans tokens in several directions with one parameter set, and knows their moves.

    At step s of a direction it computes h_s = exp(step_s·A)·h_{s−1} + step_s·(B_s + move_B[m])·x, y = C_s·h_s + D·x
    with x the token visited, m the move that led to it, and step, B and C those of token s in raster order.

    Args:
        d_inner: Channels d of the scan.
        d_state: State size n of a channel.
        dt_rank: Rank r of the step's projection.
    """

    def __init__(self, d_inner: int, *, d_state: int = 16, dt_rank: int) -> None:
        super().__init__(d_inner, d_state=d_state, dt_rank=dt_rank)
        self.move_B = nn.Parameter(torch.empty(_MOVES, d_state))
        trunc_normal_(self.move_B, std=0.02)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  the moves cannot be left out
        self, x: Tensor, order: Tensor, moves: Tensor, *, gap: Tensor | None = None, idle: Tensor | None = None
    ) -> Tensor:
        """Scans tokens and sums the directions.

        Args:
            x: Tokens (b, l, d).
            order: Scan order (k, l), or (b, k, l) if samples differ.
            moves: Moves that lead to each step, as `scan_moves` numbers them; of the shape of ``order``.
            gap: Tokens dropped before each step, of the shape of ``order``; see `directional_scan`.
            idle: What would stand in the place of dropped tokens, (d,), for the length of their steps alone; zeros when
                not given.

        Returns:
            (b, l, d), each token at its own place.
        """
        dt, B, C = self._project(x)  # (b, l, 1, ·)
        dt, dt_bias = (dt, self.step_bias) if idle is None else self._count_from(idle, dt)
        k = order.shape[-2]
        y = directional_scan(
            x,
            dt.expand(-1, -1, k, -1),
            self._state_matrix().expand(k, -1, -1),
            B + F.embedding(moves.transpose(-1, -2), self.move_B),
            C.expand(-1, -1, k, -1),
            self.D.expand(k, -1),
            dt_weight=self.dt_weight.expand(k, -1, -1),
            dt_bias=dt_bias.expand(k, -1),
            order=order,
            params="step",
            gap=gap,
        )
        return cast(Tensor, y)  # the last state, a second result, is not asked for


class PlainMambaMixer(nn.Module):
    """Token mixer: out_proj(Σ_i SSM_i(silu(conv(x)))·silu(z)), [x | z] = in_proj(input), over four snakes i.

    Args:
        d_model: Channels of the tokens.
        d_state: State size of the scan.
        d_conv: Side of the convolution's kernel, in tokens.
        expand: d_inner/d_model.
    """

    token_prunable = True

    def __init__(self, d_model: int, *, d_state: int = 16, d_conv: int = 7, expand: int = 2) -> None:
        super().__init__()
        d_inner = expand * d_model
        self.in_proj = nn.Linear(d_model, 2 * d_inner)
        self.conv = TokenConv(d_inner, d_conv)
        self.ssm = SnakeSSM(d_inner, d_state=d_state, dt_rank=math.ceil(d_model / 16))
        self.out_proj = nn.Linear(d_inner, d_model)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mixes tokens (b, l, c) in raster order of a grid ``size`` = (h, w)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        order = scan_order("snake", *size, device=x.device)
        moves = scan_moves("snake", *size, device=x.device)
        y = self.ssm(F.silu(self.conv(x, size)), order, moves)
        return self.out_proj(y * F.silu(z))


class TokenConvNormAct(nn.Module):
    """gelu(batch_norm(conv(x))) of tokens, by a depthwise 3×3 convolution on their grid.

    Args:
        dim: Channels of the tokens.
    """

    token_prunable = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = TokenConv(dim, 3, bias=False)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Convolves tokens (b, l, c) in raster order of a grid ``size`` = (h, w)."""
        x = self.conv(x, size).transpose(1, 2)
        return F.gelu(self.norm(x).transpose(1, 2))


class MixerConvBlock(MixerBlock):
    """x + mixer(norm1(x)), with stochastic depth, then a convolution without a residual around it.

    Args:
        mixer: Token mixer.
        norm1: Norm before it.
        local_conv: Maps tokens and ``size`` to tokens.
        drop_path: Probability of leaving the mixer out for a sample in training.
    """

    token_prunable = True

    def __init__(self, mixer: nn.Module, norm1: nn.Module, *, local_conv: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__(mixer, norm1, drop_path=drop_path)
        self.local_conv = local_conv

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens."""
        return self.local_conv(super().forward(x, size), size)


class PlainMamba(TokenBackbone):
    """PlainMamba.

    Args:
        img_size: Height and width of the images, in pixels.
        dynamic_img_size: Take images of any size, with positions resized to their grid; else ``img_size`` only.
        in_chans: Channels of the images.
        num_classes: Classes of the classifier; 0 for none.
        global_pool: What the classifier sees: ``"avg"`` the mean of the tokens, ``""`` each token.
        stem_dim: Channels of the stem's convolutions.
        stem_convs: Number of the stem's 3×3 convolutions.
        embed_dim: Channels of the tokens.
        depth: Number of blocks.
        local_convs: Blocks, counted from 0, that end in a convolution.
        d_state: State size of the scan.
        d_conv: Side of the kernel of the mixers' convolutions, in tokens.
        expand: Width of the scan over that of the tokens.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        dynamic_img_size: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_dim: int = 64,
        stem_convs: int = 2,
        embed_dim: int = 192,
        depth: int = 24,
        local_convs: Collection[int] = (),
        d_state: int = 16,
        d_conv: int = 7,
        expand: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        rates = cast("list[float]", calculate_drop_path_rates(drop_path_rate, depth))
        mixer_layer = partial(PlainMambaMixer, d_state=d_state, d_conv=d_conv, expand=expand)
        super().__init__(
            stem=PlainMambaStem(in_chans, embed_dim, dim=stem_dim, convs=stem_convs),
            blocks=[
                _block(embed_dim, mixer_layer, local_conv=i in local_convs, drop_path=rate)
                for i, rate in enumerate(rates)
            ],
            norm=nn.LayerNorm(embed_dim, eps=1e-6),
            embed_dim=embed_dim,
            img_size=img_size,
            dynamic_img_size=dynamic_img_size,
            class_token=False,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """The official initialisation, where it is not that of the layers themselves; steps start at softplus(0)."""
        init_linear_layers(self)
        init_ssm_as_linear(self)
        if self.num_classes:
            self.head.get_parameter("weight").normal_(std=0.01)


def _block(
    dim: int, mixer_layer: Callable[[int], PlainMambaMixer], *, local_conv: bool, drop_path: float
) -> MixerBlock:
    mixer, norm1 = mixer_layer(dim), nn.LayerNorm(dim)
    if not local_conv:
        return MixerBlock(mixer, norm1, drop_path=drop_path)
    return MixerConvBlock(mixer, norm1, local_conv=TokenConvNormAct(dim), drop_path=drop_path)


_cfg = partial(
    imagenet_cfg,
    fixed_input_size=True,
    first_conv="stem.convs.0.conv",
    classifier="head",
    license="apache-2.0",
    origin_url="https://github.com/ChenhongyiYang/PlainMamba",
    paper_ids="arXiv:2403.17695",
    paper_name="PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition",
)


_HUB = "https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main"

default_cfgs = generate_default_cfgs(
    {
        "plainmamba_l1.in1k": _cfg(f"{_HUB}/l1.pth"),
        "plainmamba_l2.in1k": _cfg(f"{_HUB}/l2.pth"),
        "plainmamba_l3.in1k": _cfg(f"{_HUB}/l3.pth"),
        "test_plainmamba": _cfg(input_size=(3, 96, 96)),
    }
)


_RENAMED = {
    r"pos_embed": "pos_embed",
    r"patch_embed\.stem\.0\.(.+)": r"stem.convs.0.conv.\1",
    r"patch_embed\.stem\.1\.(.+)": r"stem.convs.0.bn.\1",
    r"patch_embed\.convs\.0\.(.+)": r"stem.convs.1.conv.\1",
    r"patch_embed\.convs\.1\.(.+)": r"stem.convs.1.bn.\1",
    r"patch_embed\.convs\.3\.(.+)": r"stem.convs.2.conv.\1",
    r"patch_embed\.convs\.4\.(.+)": r"stem.convs.2.bn.\1",
    r"patch_embed\.projection\.(.+)": r"stem.proj.\1",
    r"layers\.(\d+)\.norm\.(.+)": r"blocks.\1.norm1.\2",
    r"layers\.(\d+)\.dw\.0\.(.+)": r"blocks.\1.local_conv.conv.conv.\2",
    r"layers\.(\d+)\.dw\.1\.(.+)": r"blocks.\1.local_conv.norm.\2",
    r"layers\.(\d+)\.mamba\.((?:in|out)_proj\..+)": r"blocks.\1.mixer.\2",
    r"layers\.(\d+)\.mamba\.conv2d\.(.+)": r"blocks.\1.mixer.conv.conv.\2",
    r"layers\.(\d+)\.mamba\.(A_log|D|x_proj\.weight)": r"blocks.\1.mixer.ssm.\2",
    r"layers\.(\d+)\.mamba\.dt_proj\.(weight|bias)": r"blocks.\1.mixer.ssm.dt_\2",
    r"layers\.(\d+)\.mamba\.direction_Bs": r"blocks.\1.mixer.ssm.move_B",
    r"ln1\.(.+)": r"norm.\1",
    r"head\.fc\.(.+)": r"head.\1",
}
_OF_ONE_SET = ("A_log", "D", "dt_weight", "dt_bias")  # which here have a first axis for the parameter sets


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: PlainMamba) -> dict[str, Tensor]:
    """Brings an official state dict to this model's keys; one that has them already keeps them.

    Positions of another, square grid are resized to the model's. Dropped are the shadows of all weights that the
    official moving average leaves in the files of L2 and L3: at the end of an epoch the average is in the weights.

    Raises:
        ValueError: If there is a key that the official models do not have.
    """
    ours = dict(state_dict) if "stem.proj.weight" in state_dict else _convert(state_dict)
    if "pos_embed" in ours:
        ours["pos_embed"] = model.adapt_pos_embed(ours["pos_embed"], class_token=False)
    return ours


def _convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    official = {key.removeprefix("backbone."): value for key, value in state_dict.items() if not key.startswith("ema_")}
    ours = _official_keys.rename(official, _RENAMED, family="plainmamba")
    return {key: value[None] if key.endswith(_OF_ONE_SET) else value for key, value in ours.items()}


def _create_plainmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    return build_backbone(
        PlainMamba,
        variant,
        pretrained,
        checkpoint_filter_fn=checkpoint_filter_fn,
        levels=quarters(kwargs["depth"]),
        **kwargs,
    )


@register_model
def plainmamba_l1(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L1: 24 blocks of width 192, a convolution after the first."""
    model_args = {"embed_dim": 192, "depth": 24, "stem_convs": 1, "local_convs": (0,)}
    return _create_plainmamba("plainmamba_l1", pretrained, **(model_args | kwargs))


@register_model
def plainmamba_l2(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L2: 24 blocks of width 384."""
    model_args = {"embed_dim": 384, "depth": 24}
    return _create_plainmamba("plainmamba_l2", pretrained, **(model_args | kwargs))


@register_model
def plainmamba_l3(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L3: 36 blocks of width 448."""
    model_args = {"embed_dim": 448, "depth": 36}
    return _create_plainmamba("plainmamba_l3", pretrained, **(model_args | kwargs))


@register_model
def test_plainmamba(pretrained: bool = False, **kwargs: Any) -> PlainMamba:  # noqa: PT028  a model, not a test
    """A small PlainMamba for tests and demonstrations, without published weights."""
    model_args = {"embed_dim": 64, "depth": 4, "stem_dim": 32, "stem_convs": 1, "local_convs": (0,)}
    return _create_plainmamba("test_plainmamba", pretrained, **(model_args | kwargs))
