"""A2Mamba, stages whose blocks attend to two windows around each token and mix the states of a scan by the weights.

Paper: Lou et al., "A2Mamba: Attention-augmented State Space Models for Visual Recognition", 2025,
    https://arxiv.org/abs/2507.16624
Official code: https://github.com/LMMMEng/A2Mamba (models/a2mamba.py); no licence is stated for code or weights.

What differs from the official code: neighbourhood attention is a Triton kernel on GPUs and written out in tiles of
tokens elsewhere, and needs no compiled extension; the scan hands out its states, which the official kernel is modified
for; linear layers on tokens take the place of 1×1 convolutions; a stage starts with its downsampling.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, ConvNormAct, DropPath, apply_rot_embed, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vssm.layers.conv import TokenConv
from vssm.layers.init import init_linear_layers
from vssm.layers.neighborhood import attend_to_neighborhood
from vssm.layers.ssm import SelectiveSSM
from vssm.models import _official_keys
from vssm.models._base import GridBackbone, make_stages
from vssm.models._builder import build_backbone, imagenet_cfg
from vssm.scan_order import cached
from vssm_kernels import directional_scan

_STRIDES = (4, 8, 16, 32)


@cached
def rotary_table(height: int, width: int, dim: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sine and cosine, each (l, 1, dim), by which rotary embedding turns pairs of channels of a head.

    The first half of the channels turns with the row, the other with the column, in angles per token that fall from 1
    to 1/10000.
    """
    speeds = 10000 ** -torch.linspace(0, 1, dim // 4, device=device)
    speeds = speeds.repeat_interleave(2)
    rows = torch.arange(height, device=device)[:, None, None] * speeds  # (h, 1, dim/2)
    columns = torch.arange(width, device=device)[:, None] * speeds  # (w, dim/2)
    angles = torch.cat(torch.broadcast_tensors(rows, columns), dim=-1).flatten(0, 1)[:, None]
    return angles.sin(), angles.cos()


class _Windows(NamedTuple):
    """How the two halves of the heads average values, (b, l, heads/2, e), over the windows they attend to."""

    near: Callable[[Tensor], Tensor]
    far: Callable[[Tensor], Tensor]

    def aggregate(self, values: Tensor) -> Tensor:
        """Averages (b, l, heads, e) over each token's neighbours."""
        near, far = values.chunk(2, dim=2)
        return torch.cat([self.near(near), self.far(far)], dim=2)


class StateAggregationSSM(SelectiveSSM):
    """State-space model of one state a channel whose states are mixed over space before they are read.

    h_s = exp(step·A)·h_{s−1} + step·B·x in raster order, y = C·aggregate(h) + D·x.

    Args:
        d_inner: Channels d of the scan.
        dt_rank: Rank r of the step's projection.
    """

    def __init__(self, d_inner: int, *, dt_rank: int) -> None:
        super().__init__(d_inner, d_state=1, dt_rank=dt_rank)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  without the mixing it would be another model
        self, x: Tensor, aggregate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Scans tokens in raster order.

        Args:
            x: Tokens (b, l, d).
            aggregate: Maps all states (b, l, d), in float32 whatever the inputs, to what C multiplies.

        Returns:
            (b, l, d).
        """
        dt, B, C = self._project(x)
        states = directional_scan(
            x,
            dt,
            self._state_matrix(),
            B,
            None,
            dt_weight=self.dt_weight,
            dt_bias=self.step_bias,
            out_dtype=torch.promote_types(x.dtype, torch.float32),
        )
        return C.squeeze(2) * aggregate(cast(Tensor, states)) + self.D * x


class LinearNormAct(nn.Module):
    """silu(norm(proj(x))) with batch norm over all but the channels.

    Args:
        dim: Channels before.
        dim_out: Channels after.
    """

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim_out)
        self.norm = nn.BatchNorm1d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., dim) to (..., dim_out)."""
        x = self.proj(x)
        return F.silu(self.norm(x.flatten(0, -2)).view(x.shape))


class AttentionMixer(nn.Module):
    """Token mixer: out_proj(proj_norm((out_norm(refine(y)) + lepe(v))·gate(x))), y from attention to two windows.

    The first half of the heads attends to the window around each token, o₁. The other half attends to a window of as
    many tokens spread over the map, and to o₁: its values are v₂ + o₁; y is both. Queries and keys have rotary position
    embeddings, and weights a bias for each relative position, the same in both halves.

    Args:
        d_model: Channels of the tokens.
        num_heads: Heads of the attention, an even number.
        window: Side of a window in tokens, odd.
    """

    def __init__(self, d_model: int, *, num_heads: int, window: int) -> None:
        super().__init__()
        if num_heads % 2 or d_model % (4 * num_heads):
            raise ValueError(
                f"AttentionMixer: expected an even number of heads, each of a multiple of 4 channels, got {num_heads} "
                f"heads for {d_model} channels"
            )
        self.num_heads = num_heads
        self.window = window
        self.gate = LinearNormAct(d_model, d_model)
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.lepe = TokenConv(d_model, 5)
        self.rel_pos_bias = nn.Parameter(torch.empty(num_heads // 2, 2 * window - 1, 2 * window - 1))
        self.out_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.proj_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.out_proj = nn.Linear(d_model, d_model)
        trunc_normal_(self.rel_pos_bias, std=0.02)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mixes tokens (b, l, c) in raster order of a grid ``size`` = (h, w)."""
        gate = self.gate(x)
        qkv = self.in_proj(x)
        lepe = self.lepe(qkv.chunk(3, dim=-1)[2], size)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # each (b, l, heads, e)
        sin, cos = rotary_table(*size, q.shape[-1], device=x.device)
        q, k = apply_rot_embed(q, sin, cos) * q.shape[-1] ** -0.5, apply_rot_embed(k, sin, cos)
        y, windows = self.attend(q, k, v, size=size)
        y = self.refine(y, q, k, windows=windows, size=size)
        return self.out_proj(self.proj_norm((self.out_norm(y) + lepe) * gate))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, size: tuple[int, int]) -> tuple[Tensor, _Windows]:
        """Attention to the two windows.

        Args:
            q: Queries (b, l, heads, e), turned and scaled.
            k: Keys, turned.
            v: Values.
            size: Rows and columns (h, w) of the grid.

        Returns:
            (b, l, heads, e), and what averages other values by the same weights.
        """
        spread = min(size[0] // self.window, self.window), min(size[1] // self.window, self.window)
        (near_q, far_q), (near_k, far_k), (near_v, far_v) = (each.chunk(2, dim=2) for each in (q, k, v))
        bias, window = self.rel_pos_bias, self.window
        near = attend_to_neighborhood(near_q, near_k, bias, size=size, window=window)
        far = attend_to_neighborhood(far_q, far_k, bias, size=size, window=window, dilation=spread)
        near_y = near(near_v)
        return torch.cat([near_y, far(far_v + near_y)], dim=2), _Windows(near, far)

    def refine(self, y: Tensor, q: Tensor, k: Tensor, *, windows: _Windows, size: tuple[int, int]) -> Tensor:
        """Mixes further what attention to the windows gave, (b, l, heads, e); returns tokens (b, l, c)."""
        raise NotImplementedError


class MASS(AttentionMixer):
    """Attention to two windows, then a scan whose states are mixed by the same attention weights.

    refine(y) = SSM(silu(conv(y))) with aggregate(h) = state_fusion(Σ over the neighbours of weight·h); ``state_fusion``
    mixes the heads.

    Args:
        d_model: Channels of the tokens.
        num_heads: Heads of the attention, an even number.
        window: Side of a window in tokens, odd.

    Reference:
        Lou et al., "A2Mamba", 2025, section 3, https://arxiv.org/abs/2507.16624: the multi-scale attention-augmented
        state-space model
    """

    def __init__(self, d_model: int, *, num_heads: int, window: int) -> None:
        super().__init__(d_model, num_heads=num_heads, window=window)
        self.conv = TokenConv(d_model, 5)
        self.ssm = StateAggregationSSM(d_model, dt_rank=math.ceil(d_model / 16))
        self.state_fusion = nn.Conv2d(num_heads, num_heads, kernel_size=1)  # of "maps" of tokens and head channels

    def refine(self, y: Tensor, q: Tensor, k: Tensor, *, windows: _Windows, size: tuple[int, int]) -> Tensor:
        """The scan of what attention to the windows gave, (b, l, heads, e); returns tokens (b, l, c)."""

        def aggregate(states: Tensor) -> Tensor:
            mixed = windows.aggregate(states.unflatten(-1, (self.num_heads, -1)))
            return self.state_fusion(mixed.to(y.dtype).transpose(1, 2)).transpose(1, 2).flatten(2)

        return self.ssm(F.silu(self.conv(y.flatten(2), size)), aggregate)


class GlobalAttentionMixer(AttentionMixer):
    """Attention to two windows, then of each token to the whole map with the same queries and keys.

    Args:
        d_model: Channels of the tokens.
        num_heads: Heads of the attention, an even number.
        window: Side of a window in tokens, odd.
        grid_size: Rows and columns of the grid for which the biases of pairs of tokens are learnt; for another grid
            their table is resized.
    """

    def __init__(self, d_model: int, *, num_heads: int, window: int, grid_size: tuple[int, int]) -> None:
        super().__init__(d_model, num_heads=num_heads, window=window)
        tokens = grid_size[0] * grid_size[1]
        self.global_pos_bias = nn.Parameter(torch.empty(1, num_heads, tokens, tokens))
        trunc_normal_(self.global_pos_bias, std=0.02)

    def refine(self, y: Tensor, q: Tensor, k: Tensor, *, windows: _Windows, size: tuple[int, int]) -> Tensor:
        """Attention to the whole map with values (b, l, heads, e); returns tokens (b, l, c)."""
        q, k, y = (each.transpose(1, 2) for each in (q, k, y))
        y = F.scaled_dot_product_attention(q, k, y, attn_mask=self._bias(y.shape[2]).to(q.dtype), scale=1.0)
        return y.transpose(1, 2).flatten(2)

    def _bias(self, tokens: int) -> Tensor:
        bias = self.global_pos_bias
        if not torch.compiler.is_exporting() and tokens == bias.shape[-1]:  # an exported program must take either way
            return bias
        return F.interpolate(bias.float(), size=(tokens, tokens), mode="bicubic")


class ConvMlp(nn.Module):
    """Feed-forward network fc2(v + conv(v)), v = gelu(fc1(x)), with a depthwise 3×3 convolution.

    Args:
        dim: Channels of the tokens.
        hidden_dim: Channels in between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.conv = TokenConv(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens."""
        x = self.act(self.fc1(x))
        return self.fc2(x + self.conv(x, size))


class ChannelAffine(nn.Module):
    """weight·x + bias of each channel.

    Args:
        dim: Channels.
        init: The weight at the start of training.
    """

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), init))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., c) to (..., c)."""
        return self.weight * x + self.bias


def _affine(dim: int, init: float | None) -> nn.Module:
    return nn.Identity() if init is None else ChannelAffine(dim, init)


class A2MambaBlock(nn.Module):
    """x + cpe1(x), then res_scale1(x) + layer_scale1(mixer(norm1(x))), and the same again with cpe2 and an MLP.

    Args:
        dim: Channels of the tokens.
        mixer: Maps tokens (b, l, c) and their grid's ``size`` to tokens.
        mlp: As well.
        layer_scale: Initial weight of an affine map of each branch's result; none when not given.
        res_scale: Initial weight of an affine map of what is added to a branch; none when not given.
        drop_path: Probability of leaving a branch out for a sample in training.
    """

    def __init__(
        self,
        dim: int,
        mixer: AttentionMixer,
        *,
        mlp: ConvMlp,
        layer_scale: float | None = None,
        res_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.cpe1 = TokenConv(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.layer_scale1, self.res_scale1 = _affine(dim, layer_scale), _affine(dim, res_scale)
        self.cpe2 = TokenConv(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        self.layer_scale2, self.res_scale2 = _affine(dim, layer_scale), _affine(dim, res_scale)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens."""
        x = x + self.cpe1(x, size)
        x = self.res_scale1(x) + self.drop_path(self.layer_scale1(self.mixer(self.norm1(x), size)))
        x = x + self.cpe2(x, size)
        return self.res_scale2(x) + self.drop_path(self.layer_scale2(self.mlp(self.norm2(x), size)))


class A2Stem(nn.Module):
    """Four 3×3 convolutions with batch norm, the first and the third of stride 2, and a GELU between them.

    Args:
        in_chans: Channels of the images.
        embed_dim: Channels of the tokens; half as many in the first two.
    """

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        layer = partial(ConvNormAct, kernel_size=3, act_layer=nn.GELU)
        self.conv1 = layer(in_chans, embed_dim // 2, stride=2)
        self.conv2 = layer(embed_dim // 2, embed_dim // 2)
        self.conv3 = layer(embed_dim // 2, embed_dim, stride=2)
        self.conv4 = layer(embed_dim, embed_dim, apply_act=False)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds images (b, in_chans, H, W) as a map (b, ceil(H/4), ceil(W/4), embed_dim)."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self.conv4(self.conv3(self.conv2(self.conv1(x)))).permute(0, 2, 3, 1)


class A2Downsample(nn.Module):
    """Halves the resolution by a 3×3 convolution of stride 2, followed by batch norm.

    Args:
        dim: Channels before.
        dim_out: Channels after.
    """

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.conv = ConvNormAct(dim, dim_out, kernel_size=3, stride=2, apply_act=False)
        self.conv.to(memory_format=torch.channels_last)  # as its maps are: else each call would reorder the weight

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, h, w, dim) to (b, ceil(h/2), ceil(w/2), dim_out)."""
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class A2Head(ClassifierHead):
    """Linear layer, batch norm and SiLU of each token, then pooling, dropout and the classifier.

    Args:
        dim: Channels of the last map.
        num_classes: Classes of the classifier; 0 for none.
        hidden_dim: Channels that are pooled.
        pool_type: Pooling, as timm names it.
        drop_rate: Dropout before the classifier.
        input_fmt: Layout of the map.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        hidden_dim: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        input_fmt: str = "NHWC",
    ) -> None:
        super().__init__(hidden_dim, num_classes, pool_type=pool_type, drop_rate=drop_rate, input_fmt=input_fmt)
        self.proj = LinearNormAct(dim, hidden_dim)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps (b, h, w, dim) to (b, num_classes), or to pooled (b, hidden_dim)."""
        return super().forward(self.proj(x), pre_logits=pre_logits)


class A2Mamba(GridBackbone):
    """A2Mamba: stages of attention to windows and a scan; in the last one attention to the whole map is its place.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the classifier; 0 for none.
        global_pool: Pooling before the classifier, as timm names it.
        img_size: Height and width of the images, in pixels, for whose last map biases of pairs of tokens are learnt.
            Images of other sizes have them resized.
        dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        windows: Side of a window in tokens, for each stage.
        mlp_ratios: Width of a block's MLP over that of the tokens, for each stage.
        layer_scale: Initial weight of an affine map of each branch's result, for each stage; None for none.
        res_scale: Initial weight of an affine map of what is added to a branch, for each stage; None for none.
        head_dim: Channels that are pooled.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        dims: Sequence[int] = (32, 64, 128, 192),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (2, 2, 4, 8),
        windows: Sequence[int] = (11, 9, 7, 7),
        mlp_ratios: Sequence[float] = (4.0, 4.0, 3.0, 3.0),
        layer_scale: Sequence[float | None] = (None, None, None, None),
        res_scale: Sequence[float | None] = (None, None, None, None),
        head_dim: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        strides = _STRIDES[: len(depths)]
        height, width = (int(side) for side in to_2tuple(img_size))
        grid_size = math.ceil(height / strides[-1]), math.ceil(width / strides[-1])

        def make_block(stage: int, drop_path: float) -> A2MambaBlock:
            dim, last = dims[stage], stage == len(depths) - 1
            mixer_layer = partial(GlobalAttentionMixer, grid_size=grid_size) if last else MASS
            return A2MambaBlock(
                dim,
                mixer_layer(dim, num_heads=num_heads[stage], window=windows[stage]),
                mlp=ConvMlp(dim, int(dim * mlp_ratios[stage])),
                layer_scale=layer_scale[stage],
                res_scale=res_scale[stage],
                drop_path=drop_path,
            )

        super().__init__(
            stem=A2Stem(in_chans, dims[0]),
            stages=make_stages(
                make_block, dims=dims, depths=depths, downsample_layer=A2Downsample, drop_path_rate=drop_path_rate
            ),
            dims=dims,
            strides=strides,
            norm=nn.Identity(),
            head_layer=partial(A2Head, hidden_dim=head_dim),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        init_linear_layers(self)


_cfg = partial(
    imagenet_cfg,
    pool_size=(7, 7),
    crop_pct=0.9,
    first_conv="stem.conv1.conv",
    classifier="head.fc",
    license="unknown",
    origin_url="https://github.com/LMMMEng/A2Mamba",
    paper_ids="arXiv:2507.16624",
    paper_name="A2Mamba: Attention-augmented State Space Models for Visual Recognition",
)


_HUB = "https://huggingface.co/LMMM2025/A2Mamba/resolve/main/a2mamba_pretrained_weights"

default_cfgs = generate_default_cfgs(
    {
        "a2mamba_nano.in1k": _cfg(f"{_HUB}/a2mamba_nano.pth"),
        "a2mamba_tiny.in1k": _cfg(f"{_HUB}/a2mamba_tiny.pth"),
        "a2mamba_small.in1k": _cfg(f"{_HUB}/a2mamba_small.pth"),
        "a2mamba_base.in1k": _cfg(f"{_HUB}/a2mamba_base.pth", crop_pct=0.95),
        "a2mamba_large.in1k": _cfg(f"{_HUB}/a2mamba_large.pth", crop_pct=0.975),
        "test_a2mamba": _cfg(input_size=(3, 96, 96), pool_size=(6, 6)),
    }
)


# Official name below a block to ours.
_BLOCK = {
    "cpe1": "cpe1.conv",
    "cpe2": "cpe2.conv",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.dwconv": "mlp.conv.conv",
    "mlp.fc2": "mlp.fc2",
    "token_mixer.gate.0": "mixer.gate.proj",
    "token_mixer.gate.1": "mixer.gate.norm",
    "token_mixer.qkv": "mixer.in_proj",
    "token_mixer.lepe": "mixer.lepe.conv",
    "token_mixer.norm": "mixer.out_norm",
    "token_mixer.proj.0": "mixer.proj_norm",
    "token_mixer.proj.1": "mixer.out_proj",
    "token_mixer.ssm.conv2d": "mixer.conv.conv",
    "token_mixer.ssm.state_fusion": "mixer.state_fusion",
    "token_mixer.ssm.x_proj_weight": "mixer.ssm.x_proj.weight",
    "token_mixer.ssm.dt_projs_weight": "mixer.ssm.dt_weight",
    "token_mixer.ssm.dt_projs_bias": "mixer.ssm.dt_bias",
    "token_mixer.ssm.A_logs": "mixer.ssm.A_log",
    "token_mixer.ssm.Ds": "mixer.ssm.D",
    "token_mixer.rpb.1": "mixer.rel_pos_bias",
    "token_mixer.rpb.2": "mixer.global_pos_bias",
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: A2Mamba) -> dict[str, Tensor]:
    """Brings an official state dict to this model's keys; one that has them already keeps them.

    Left out are tables that are computed here, and ``rpb.0``, another name of ``rpb.1``.

    Raises:
        ValueError: If there is a key that the official models of this file do not have.
    """
    if any(key.startswith("stem.") for key in state_dict):
        return dict(state_dict)
    needed = {key: value for key, value in state_dict.items() if not key.endswith((".rpb.0", ".rope.angle"))}
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    renamed = _official_keys.rename(needed, _patterns(shapes), family="a2mamba")
    return {  # 1×1 convolutions are linear layers here, and the scan has an axis for its one direction
        key: value.reshape(shapes[key]) if key in shapes and shapes[key].numel() == value.numel() else value
        for key, value in renamed.items()
    }


def _patterns(own_keys: Mapping[str, Any]) -> dict[str, str]:
    """Official keys as `_official_keys.rename` takes them; those of stages are numbered among their downsamplings."""
    patterns = {r"classifier\.0\.(\w+)": r"head.proj.proj.\1", r"classifier\.1\.(\w+)": r"head.proj.norm.\1"}
    patterns[r"classifier\.4\.(\w+)"] = r"head.fc.\1"
    for i in range(4):
        patterns[rf"patch_embed\.{3 * i}\.(\w+)"] = rf"stem.conv{i + 1}.conv.\1"
        patterns[rf"patch_embed\.{3 * i + 1}\.(\w+)"] = rf"stem.conv{i + 1}.bn.\1"
        patterns[rf"layers\.{2 * i + 1}\.0\.(\w+)"] = rf"stages.{i + 1}.downsample.conv.conv.\1"
        patterns[rf"layers\.{2 * i + 1}\.1\.(\w+)"] = rf"stages.{i + 1}.downsample.conv.bn.\1"
        block = rf"layers\.{2 * i}\.blocks\.(\d+)\."
        for theirs, ours in _BLOCK.items():
            patterns[block + theirs.replace(".", r"\.") + r"(\.\w+)?"] = rf"stages.{i}.blocks.\1.{ours}\2"
        scale = "res_scale" if f"stages.{i}.blocks.0.res_scale1.weight" in own_keys else "layer_scale"
        patterns[block + r"layer_scale(\d)\.(\w+)"] = rf"stages.{i}.blocks.\1.{scale}\2.\3"
    return patterns


def _create_a2mamba(variant: str, pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    levels = range(len(kwargs["depths"]))
    return build_backbone(
        A2Mamba, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn, levels=levels, **kwargs
    )


@register_model
def a2mamba_nano(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """A2Mamba-N: widths 32 to 192, 8 blocks in the third stage."""
    model_args = {"dims": (32, 64, 128, 192), "depths": (2, 2, 8, 2), "num_heads": (2, 2, 4, 8)}
    return _create_a2mamba("a2mamba_nano", pretrained, **(model_args | kwargs))


@register_model
def a2mamba_tiny(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """A2Mamba-T: widths 48 to 448, 10 blocks in the third stage."""
    model_args = {"dims": (48, 96, 256, 448), "depths": (2, 2, 10, 2), "num_heads": (2, 4, 8, 16)}
    return _create_a2mamba("a2mamba_tiny", pretrained, **(model_args | kwargs))


@register_model
def a2mamba_small(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """A2Mamba-S: widths 64 to 512, 12 blocks in the third stage, scaled residuals in the last two."""
    model_args = {
        "dims": (64, 128, 320, 512),
        "depths": (2, 4, 12, 4),
        "num_heads": (2, 4, 10, 16),
        "res_scale": (None, None, 1.0, 1.0),
    }
    return _create_a2mamba("a2mamba_small", pretrained, **(model_args | kwargs))


@register_model
def a2mamba_base(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """A2Mamba-B: widths 96 to 512, 12 blocks in the third stage, scaled branches."""
    model_args = {
        "dims": (96, 192, 384, 512),
        "depths": (4, 6, 12, 6),
        "num_heads": (4, 8, 12, 16),
        "mlp_ratios": (4.0, 4.0, 3.75, 3.75),
        "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
    }
    return _create_a2mamba("a2mamba_base", pretrained, **(model_args | kwargs))


@register_model
def a2mamba_large(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """A2Mamba-L: widths 96 to 672, 18 blocks in the third stage, scaled branches."""
    model_args = {
        "dims": (96, 192, 448, 672),
        "depths": (4, 6, 18, 6),
        "num_heads": (4, 8, 16, 24),
        "mlp_ratios": (4.0, 4.0, 4.0, 4.0),
        "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
    }
    return _create_a2mamba("a2mamba_large", pretrained, **(model_args | kwargs))


@register_model
def test_a2mamba(pretrained: bool = False, **kwargs: Any) -> A2Mamba:  # noqa: PT028  a model, not a test
    """A small A2Mamba for tests, without published weights."""
    model_args = {
        "img_size": 96,
        "dims": (16, 32, 32),
        "depths": (1, 1, 1),
        "num_heads": (2, 2, 2),
        "windows": (3, 3, 3),
        "mlp_ratios": (2.0, 2.0, 2.0),
        "res_scale": (None, 1.0, None),
        "layer_scale": (None, None, 1.0),
        "head_dim": 48,
    }
    return _create_a2mamba("test_a2mamba", pretrained, **(model_args | kwargs))
