"""LocalMamba, whose blocks scan an image along rows, columns and windows, as a search found best for each block.

There are two kinds: LocalVim, a plain stack of blocks over patches, and LocalVMamba, a hierarchy of stages.

Paper: Huang et al., "LocalMamba: Visual State Space Model with Windowed Selective Scan", 2024,
    https://arxiv.org/abs/2403.09338
Official code: https://github.com/hunto/LocalMamba (classification/lib/models), Apache-2.0; no licence is stated for the
    weights.

What differs from the official code: directions are one scan; LocalVMamba's padding cells are no steps of it, but
counted as gaps, over which the state decays; LocalVim adds the residual after the mixer and turns the sum by its rotary
positions, which is the same function. On maps that are not square, the official code puts columns back at wrong
places; here they come back to their own. An oddity of the official LocalVim is kept: see `LastDecaySSM`.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from vssm.layers.block import MixerBlock
from vssm.layers.conv import CausalTokenConv
from vssm.layers.init import init_linear_layers, init_ssm_as_linear
from vssm.layers.squeeze_excite import TokenSqueezeExcite
from vssm.layers.ss2d import SS2D
from vssm.layers.ssm import SelectiveSSM
from vssm.layers.stem import PaddedPatchStem, PatchStem
from vssm.models import _official_keys
from vssm.models._base import GridBackbone, TokenBackbone, make_stages
from vssm.models._builder import build_backbone, imagenet_cfg, quarters
from vssm.scan_order import cached, check_local_directions, gather, local_order, local_sequences

_ROTARY_GRID = 14  # rows and columns whose positions the rotary tables hold before they are resized


class ChannelGate(TokenSqueezeExcite):
    """Gate of channels by the mean of all normed tokens; directions (b, l, k, d) are gated each by its own mean.

    Args:
        dim: Channels of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, norm_layer=nn.LayerNorm, act_layer=nn.GELU)


class LastDecaySSM(SelectiveSSM):
    """State-space model whose directions all decay with the A of the last one.

    The official LocalVim takes A from a variable that holds the last direction's by then, and trained weights rely on
    it. The other rows of ``A_log`` are in its checkpoints, but change nothing.
    """

    def _state_matrix(self) -> Tensor:
        return super()._state_matrix()[-1:].expand(self.directions, -1, -1)


class LocalVimMixer(nn.Module):
    """Token mixer: out_proj(Σ_i gate(SSM_i(silu(conv_i(x)))·silu(z))), [x | z] = in_proj(input), i four directions.

    Windows are padded with zero tokens before the convolution, along whose sequence they take part in the scan.

    Args:
        d_model: Channels of the tokens.
        directions: Directions, as `local_order` names them.
        class_token: Whether the tokens hold a class token in their middle, which has that place in every direction.
        d_state: State size of the scan.
        d_conv: Taps of the causal convolutions.
        expand: d_inner/d_model.
    """

    def __init__(
        self,
        d_model: int,
        *,
        directions: Sequence[str],
        class_token: bool = False,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
    ) -> None:
        super().__init__()
        check_local_directions(directions)
        d_inner, k = expand * d_model, len(directions)
        self.directions = tuple(directions)
        self.class_token = class_token
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv = CausalTokenConv(d_inner, d_conv, reverse=(False,) * k, activation=True)
        self.ssm = LastDecaySSM(d_inner, d_state=d_state, dt_rank=math.ceil(d_model / 16), directions=k)
        self.channel_gate = ChannelGate(d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mixes tokens (b, l, c): those of a grid ``size`` = (h, w) in raster order, and possibly a class token."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        order, place = local_sequences(self.directions, *size, self.class_token, device=x.device)
        sequences = gather(F.pad(x, (0, 0, 0, 1)), order)  # (b, t, k, d), with the appended zero as padding
        y = gather(self.ssm(self.conv(sequences), merge=False), place)  # (b, l, k, d)
        return self.out_proj(self.channel_gate(y * F.silu(z)[:, :, None]).sum(2))


class RotaryMixerBlock(MixerBlock):
    """x' + mixer(norm1(x')), with stochastic depth, of tokens x' = x turned by their positions.

    Each pair of channels (x1, x2) becomes (x1·cos − x2·sin, x2·cos + x1·sin) of an angle that grows with the row, in
    the first half of the channels, or the column; the pairs of a half differ in how fast it grows.
    """

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens."""
        cos, sin = rotary_tables(x.shape[-1], *size, device=x.device).to(x.dtype)
        x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-x2, x1], dim=-1).flatten(-2)
        return super().forward(x * cos + turned * sin, size)


@cached
def rotary_tables(dim: int, height: int, width: int, *, device: torch.device | str | None = None) -> Tensor:
    """Cosine and sine of each token's angles, (2, height·width, dim): those of a 14×14 grid, resized bicubically.

    Args:
        dim: Channels, a multiple of 4.
        height: Rows of the grid.
        width: Columns of the grid.
        device: Device of the tables, which are cached and shared: do not write into them.
    """
    half, side = dim // 2, _ROTARY_GRID
    frequencies = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    positions = torch.arange(side, dtype=torch.float32, device=device)
    angles = (positions[:, None] * frequencies).repeat_interleave(2, dim=1)  # (14, dim/2)
    rows, columns = angles[:, None].expand(side, side, half), angles[None].expand(side, side, half)
    angles = torch.cat([rows, columns], dim=2).permute(2, 0, 1)  # (dim, 14, 14)
    tables = F.interpolate(torch.stack([angles.cos(), angles.sin()]), size=(height, width), mode="bicubic")
    return tables.flatten(2).transpose(1, 2)


def _rms_norm(dim: int) -> nn.Module:
    return nn.RMSNorm(dim, eps=1e-5)


class LocalVim(TokenBackbone):
    """LocalVim.

    Args:
        img_size: Height and width of the images, in pixels.
        dynamic_img_size: Take images of any size, with positions resized to their grid; else ``img_size`` only.
        patch_size: Side of a patch, in pixels.
        in_chans: Channels of the images.
        num_classes: Classes of the classifier; 0 for none.
        class_token: Whether there is a class token, in the middle of the sequence; there are then no rotary positions.
        global_pool: What the classifier sees: ``"token"`` the class token, ``"avg"`` the mean of the patch tokens,
            ``""`` each token.
        embed_dim: Channels of the tokens, a multiple of 4.
        depth: Number of blocks.
        directions: Those of each block, as `local_order` names them; from the first again where there are more blocks.
        d_state: State size of the scan.
        d_conv: Taps of the causal convolutions.
        expand: Width of the scan over that of the tokens.
        norm_layer: Makes a norm from the channels of the tokens.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        dynamic_img_size: bool = False,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        class_token: bool = False,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 20,
        directions: Sequence[Sequence[str]],
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        norm_layer: Callable[[int], nn.Module] = _rms_norm,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if embed_dim % 4:
            raise ValueError(f"LocalVim: embed_dim must be a multiple of 4 for rotary positions, got {embed_dim}")
        mixer_layer = partial(LocalVimMixer, class_token=class_token, d_state=d_state, d_conv=d_conv, expand=expand)
        block_layer = MixerBlock if class_token else RotaryMixerBlock
        rates = cast("list[float]", calculate_drop_path_rates(drop_path_rate, depth))
        super().__init__(
            stem=PaddedPatchStem(in_chans, embed_dim, patch_size=patch_size),
            blocks=[
                block_layer(mixer_layer(embed_dim, directions=each), norm_layer(embed_dim), drop_path=rate)
                for rate, each in zip(rates, itertools.cycle(directions), strict=False)
            ],
            norm=norm_layer(embed_dim),
            embed_dim=embed_dim,
            in_chans=in_chans,
            num_classes=num_classes,
            img_size=img_size,
            dynamic_img_size=dynamic_img_size,
            class_token=class_token,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """The official initialisation: steps start at ln 2, and what the blocks add is small."""
        init_linear_layers(self)
        init_ssm_as_linear(self)
        for module in self.modules():
            if isinstance(module, LocalVimMixer):
                module.out_proj.reset_parameters()
                module.out_proj.weight.div_(math.sqrt(len(self.blocks)))


class LocalSS2D(SS2D):
    """2D selective scan along rows, columns and windows, with a gate of channels for each direction.

    Args:
        d_model: Channels of the tokens.
        directions: Directions, as `local_order` names them.
        d_state: State size of the scan.
        expand: d_inner/d_model.
    """

    def __init__(self, d_model: int, *, directions: Sequence[str], d_state: int = 16, expand: float = 2.0) -> None:
        check_local_directions(directions)
        super().__init__(d_model, d_state=d_state, expand=expand, directions=len(directions))
        self.directions = tuple(directions)
        self.channel_gate = ChannelGate(self.out_proj.in_features)

    def scan(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Scans tokens (b, l, d) of a grid ``size`` = (h, w); returns the sum of all gated directions, (b, l, d)."""
        order, gap = local_order(self.directions, *size, device=x.device)
        return self.channel_gate(self.ssm(x, order=order, gap=gap, merge=False)).sum(2)


class LocalVMamba(GridBackbone):
    """LocalVMamba.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the classifier; 0 for none.
        global_pool: Pooling before the classifier, as timm names it.
        embed_dim: Channels of the first stage; every next one has twice as many.
        depths: Blocks of each stage.
        directions: Those of each block through all stages, as `local_order` names them; from the first again where
            there are more blocks.
        d_state: State size of the scan.
        expand: Width of the scan over that of the tokens.
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
        depths: Sequence[int] = (2, 2, 9, 2),
        directions: Sequence[Sequence[str]],
        d_state: int = 16,
        expand: float = 2.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims = [embed_dim * 2**i for i in range(len(depths))]
        of_blocks = itertools.cycle(directions)

        def make_block(stage: int, rate: float) -> MixerBlock:
            mixer = LocalSS2D(dims[stage], directions=next(of_blocks), d_state=d_state, expand=expand)
            return MixerBlock(mixer, nn.LayerNorm(dims[stage]), drop_path=rate)

        super().__init__(
            stem=PatchStem(in_chans, embed_dim, patch_size=4, norm_layer=nn.LayerNorm),
            stages=make_stages(
                make_block, dims=dims, depths=depths, downsample_layer=PatchMerging, drop_path_rate=drop_path_rate
            ),
            dims=dims,
            strides=[4 * 2**i for i in range(len(depths))],
            norm=nn.LayerNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        init_linear_layers(self)


_cfg = partial(
    imagenet_cfg,
    license="apache-2.0",
    origin_url="https://github.com/hunto/LocalMamba",
    paper_ids="arXiv:2403.09338",
    paper_name="LocalMamba: Visual State Space Model with Windowed Selective Scan",
    first_conv="stem.proj",
)
_vim_cfg = partial(_cfg, fixed_input_size=True, classifier="head")
_vmamba_cfg = partial(_cfg, pool_size=(7, 7), classifier="head.fc")

_RELEASE = "https://github.com/hunto/LocalMamba/releases/download/v1.0.0"

default_cfgs = generate_default_cfgs(
    {
        "localvim_tiny.in1k": _vim_cfg(f"{_RELEASE}/local_vim_tiny.ckpt"),
        "localvim_tiny_class_token.in1k": _vim_cfg(f"{_RELEASE}/local_vim_tiny_middle_cls_token.ckpt"),
        "localvim_small.in1k": _vim_cfg(f"{_RELEASE}/local_vim_small.ckpt"),
        "localvmamba_tiny": _vmamba_cfg(),
        "localvmamba_small.in1k": _vmamba_cfg(f"{_RELEASE}/local_vssm_small.ckpt"),
        "test_localvim": _vim_cfg(input_size=(3, 96, 96)),
        "test_localvmamba": _vmamba_cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


_RENAMED_IN_LOCALVIM = {
    r"cls_token": "cls_token",
    r"pos_embed": "pos_embed",
    r"patch_embed\.proj\.(.+)": r"stem.proj.\1",
    r"norm_f\.(.+)": r"norm.\1",
    r"head\.(.+)": r"head.\1",
    r"layers\.(\d+)\.norm\.(.+)": r"blocks.\1.norm1.\2",
    r"layers\.(\d+)\.mixer\.((?:in|out)_proj\.weight)": r"blocks.\1.mixer.\2",
    r"layers\.(\d+)\.mixer\.attn\.norm\.(.+)": r"blocks.\1.mixer.channel_gate.norm.\2",
    r"layers\.(\d+)\.mixer\.attn\.global_reduce\.(.+)": r"blocks.\1.mixer.channel_gate.reduce.\2",
    r"layers\.(\d+)\.mixer\.attn\.channel_select\.(.+)": r"blocks.\1.mixer.channel_gate.expand.\2",
    # What there is one of for each direction, whose number follows the @.
    r"layers\.(\d+)\.mixer\.(A_log|D)_(\d)": r"blocks.\1.mixer.ssm.\2@\3",
    r"layers\.(\d+)\.mixer\.conv1d_(\d)\.(weight|bias)": r"blocks.\1.mixer.conv.\3@\2",
    r"layers\.(\d+)\.mixer\.x_proj_(\d)\.weight": r"blocks.\1.mixer.ssm.x_proj.weight@\2",
    r"layers\.(\d+)\.mixer\.dt_proj_(\d)\.(weight|bias)": r"blocks.\1.mixer.ssm.dt_\3@\2",
}
_BLOCK_OF_LOCALVMAMBA = _official_keys.BLOCK | {
    "op.multi_scan.attn.norm": "mixer.channel_gate.norm",
    "op.multi_scan.attn.global_reduce": "mixer.channel_gate.reduce",
    "op.multi_scan.attn.channel_select": "mixer.channel_gate.expand",
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: LocalVim | LocalVMamba) -> dict[str, Tensor]:
    """Brings an official state dict to this model's keys; one that has them already keeps them.

    Positions of another, square grid are resized to the model's. Rotary tables are dropped, for they are computed.

    Raises:
        ValueError: If there is a key that the official models of this kind do not have.
    """
    if isinstance(model, LocalVMamba):
        return _official_keys.convert(state_dict, model, family="localmamba", block=_BLOCK_OF_LOCALVMAMBA)
    ours = dict(state_dict) if "stem.proj.weight" in state_dict else _convert_localvim(state_dict)
    if "pos_embed" in ours:
        ours["pos_embed"] = model.adapt_pos_embed(ours["pos_embed"], class_token="cls_token" in ours)
    return ours


def _convert_localvim(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    official = {key: value for key, value in state_dict.items() if not re.fullmatch(r"rope\.freqs_(cos|sin)", key)}
    ours: dict[str, Tensor] = {}
    of_directions: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in _official_keys.rename(official, _RENAMED_IN_LOCALVIM, family="localmamba").items():
        name, _, direction = key.partition("@")
        if direction:
            of_directions[name][direction] = value
        else:
            ours[name] = value
    for name, tensors in of_directions.items():
        part = name.partition(".mixer.")[2]
        ours[name] = _official_keys.join_directions(part, [tensors[direction] for direction in sorted(tensors)])
    return ours


def _create_localvim(variant: str, pretrained: bool = False, **kwargs: Any) -> LocalVim:
    return build_backbone(
        LocalVim,
        variant,
        pretrained,
        checkpoint_filter_fn=checkpoint_filter_fn,
        levels=quarters(kwargs["depth"]),
        **kwargs,
    )


def _create_localvmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    levels = range(len(kwargs["depths"]))
    return build_backbone(
        LocalVMamba, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn, levels=levels, **kwargs
    )


def _directions(table: str) -> tuple[tuple[str, ...], ...]:
    """Reads one line of directions for each block."""
    return tuple(tuple(line.split()) for line in table.strip().splitlines())


# What the authors' search found.
LOCALVIM_TINY_DIRECTIONS = _directions("""
    h v_flip w7 w7_flip
    h_flip w2_flip w7 w7_flip
    h h_flip v w7
    h h_flip v v_flip
    h h_flip v v_flip
    h h_flip v v_flip
    h_flip v v_flip w7
    h_flip v v_flip w2_flip
    h h_flip v v_flip
    h h_flip v v_flip
    h v v_flip w2
    h v v_flip w2_flip
    h h_flip v_flip w7
    h_flip v v_flip w2
    h h_flip v v_flip
    h v w2 w2_flip
    v v_flip w2 w7
    h h_flip v w2
    h h_flip w2_flip w7
    v v_flip w2 w2_flip
""")
_LOCALVMAMBA_TINY_DIRECTIONS = _directions("""
    h h_flip w7 w7_flip
    h_flip v_flip w2 w2_flip
    h_flip v_flip w2_flip w7
    h_flip v v_flip w2
    h h_flip v_flip w2_flip
    h_flip v_flip w2 w2_flip
    h w2_flip w7 w7_flip
    h h_flip v v_flip
    h v_flip w7 w7_flip
    h_flip v w2 w7_flip
    v v_flip w2 w7_flip
    h h_flip v_flip w2_flip
    v_flip w2_flip w7 w7_flip
    h_flip v_flip w2_flip w7_flip
    h_flip v w7 w7_flip
""")
_LOCALVMAMBA_SMALL_DIRECTIONS = _directions("""
    h v v_flip w7_flip
    h h_flip v w7
    h_flip v v_flip w7
    h_flip v w2_flip w7
    h_flip v w2_flip w7
    h_flip v_flip w2 w7_flip
    h_flip v v_flip w7
    h v v_flip w7
    h v v_flip w7
    h v v_flip w7_flip
    h h_flip v v_flip
    h v v_flip w2
    v v_flip w2_flip w7
    h h_flip v w2
    h_flip v v_flip w7_flip
    h h_flip v v_flip
    h v v_flip w7_flip
    h v v_flip w7_flip
    h h_flip v_flip w7
    h_flip v_flip w2_flip w7
    h_flip v v_flip w7_flip
    v v_flip w7 w7_flip
    h v v_flip w7_flip
    h_flip v v_flip w2
    h v v_flip w2_flip
    h h_flip v w7
    h h_flip w7 w7_flip
    h v_flip w2 w2_flip
    h v_flip w2 w7
    h v v_flip w7_flip
    h_flip v w2_flip w7
    h_flip v_flip w7 w7_flip
    h v w7 w7_flip
""")


@register_model
def localvim_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T: 20 blocks of width 192."""
    model_args = {"embed_dim": 192, "depth": 20, "directions": LOCALVIM_TINY_DIRECTIONS}
    return _create_localvim("localvim_tiny", pretrained, **(model_args | kwargs))


@register_model
def localvim_tiny_class_token(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T with a class token in the middle of the patches, and without rotary positions."""
    model_args = {"embed_dim": 192, "depth": 20, "directions": LOCALVIM_TINY_DIRECTIONS}
    model_args |= {"class_token": True, "global_pool": "token"}
    return _create_localvim("localvim_tiny_class_token", pretrained, **(model_args | kwargs))


@register_model
def localvim_small(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-S: 20 blocks of width 384, all with the same four directions.

    The official code defines this model twice: these directions are those of the second definition, the one that its
    registry holds. The first one, like the authors' detectors, has ``LOCALVIM_TINY_DIRECTIONS``.
    """
    model_args = {"embed_dim": 384, "depth": 20, "directions": (("h", "h_flip", "w2", "w2_flip"),)}
    return _create_localvim("localvim_small", pretrained, **(model_args | kwargs))


@register_model
def localvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-T: width 96, 9 blocks in the third stage. Its weights were never published."""
    model_args = {"embed_dim": 96, "depths": (2, 2, 9, 2), "directions": _LOCALVMAMBA_TINY_DIRECTIONS}
    return _create_localvmamba("localvmamba_tiny", pretrained, **(model_args | kwargs))


@register_model
def localvmamba_small(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-S: width 96, 27 blocks in the third stage."""
    model_args = {"embed_dim": 96, "depths": (2, 2, 27, 2), "directions": _LOCALVMAMBA_SMALL_DIRECTIONS}
    return _create_localvmamba("localvmamba_small", pretrained, **(model_args | kwargs))


@register_model
def test_localvim(pretrained: bool = False, **kwargs: Any) -> LocalVim:  # noqa: PT028  a model, not a test
    """A small LocalVim for tests, without published weights."""
    model_args = {"embed_dim": 64, "depth": 4, "directions": (("h", "v_flip", "w2", "w7_flip"),)}
    return _create_localvim("test_localvim", pretrained, **(model_args | kwargs))


@register_model
def test_localvmamba(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:  # noqa: PT028  a model, not a test
    """A small LocalVMamba for tests, without published weights."""
    model_args = {"embed_dim": 16, "depths": (1, 2, 1, 1), "directions": (("h", "v_flip", "w2", "w7_flip"),)}
    return _create_localvmamba("test_localvmamba", pretrained, **(model_args | kwargs))
