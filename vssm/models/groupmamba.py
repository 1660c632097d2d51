"""GroupMamba, whose mixers scan each quarter of the channels in a direction of its own.

Paper: Shaker et al., "GroupMamba: Efficient Group-Based Visual State Space Model", CVPR 2025,
    https://arxiv.org/abs/2407.13772
Official code: https://github.com/Amshaker/GroupMamba (classification/models/groupmamba.py), MIT; no licence is stated
    for the weights.

What differs from the official code: the four groups of a mixer are one module, whose directions are one scan; a stage
ends in its norm; the token that is classified does not carry the others along. As in timm's distilled models the two
classifiers' mean is the result in training, too, unless `GroupMamba.set_distilled_training` asks for both.
"""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, ConvNormAct, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vssm.layers.block import MixerFfnBlock, MixerMlpBlock
from vssm.layers.conv import TokenConv
from vssm.layers.downsample import ConvDownsample
from vssm.layers.ffn import ConvFFN
from vssm.layers.group_linear import GroupLinear
from vssm.layers.init import init_linear_layers
from vssm.layers.squeeze_excite import TokenSqueezeExcite
from vssm.layers.ssm import SelectiveSSM
from vssm.models import _official_keys
from vssm.models._base import GridBackbone, Stage, make_stages
from vssm.models._builder import build_backbone, imagenet_cfg
from vssm.scan_order import scan_order

_GROUPS = 4  # one for each direction of the cross scan
_norm = partial(nn.LayerNorm, eps=1e-6)  # around mixers; inside, and in stem and downsampling, it is PyTorch's 1e-5


class TokenGroupNorm(nn.GroupNorm):
    """A layer norm of each group of channels of each token, with weights and biases of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Norms tokens (b, l, c)."""
        return super().forward(input.flatten(0, 1)).view(input.shape)


class GroupMixer(nn.Module):
    """Token mixer: proj(norm(gate·skip_scale·n·scan_groups(n))), n = norm(x), with one norm at either end.

    The gate is one number for each channel, made of the mean of n over all tokens. See `scan_groups` for the rest.

    Args:
        dim: Channels c of the tokens, a multiple of 4.
        d_state: State size of the scan.
        se_reduction: ``dim`` over the channels in which the gate is made.

    Reference:
        Shaker et al., "GroupMamba", 2024, section 3.2, https://arxiv.org/abs/2407.13772
    """

    def __init__(self, dim: int, *, d_state: int = 1, se_reduction: int = 16) -> None:
        super().__init__()
        if dim % _GROUPS:
            raise ValueError(f"GroupMixer: dim must be a multiple of {_GROUPS}, the groups of channels, got {dim}")
        d_inner = dim // _GROUPS
        self.norm = nn.LayerNorm(dim)
        self.se = TokenSqueezeExcite(dim, reduction=se_reduction)
        self.in_proj = GroupLinear(_GROUPS, d_inner, 2 * d_inner)
        self.conv = TokenConv(dim)
        self.ssm = SelectiveSSM(d_inner, d_state=d_state, dt_rank=math.ceil(d_inner / 16), directions=_GROUPS)
        self.out_norm = TokenGroupNorm(_GROUPS, dim)
        self.out_proj = GroupLinear(_GROUPS, d_inner, d_inner)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mixes tokens (b, l, c) in raster order of a grid ``size`` = (h, w)."""
        x = self.norm(x)
        y = self.scan_groups(x, size) * self.skip_scale * x * self.se.gate(x)
        return self.proj(self.norm(y))

    def scan_groups(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """out_proj(out_norm(SSM(silu(conv(u))))·silu(z)), [u | z] = in_proj(x), of each quarter of the channels.

        The first quarter is scanned along rows, the second along columns, the others likewise from the end.

        Args:
            x: Tokens (b, l, c) in raster order.
            size: Rows and columns (h, w) of their grid.

        Returns:
            (b, l, c).
        """
        u, z = self.in_proj(x.unflatten(-1, (_GROUPS, -1))).chunk(2, dim=-1)  # (b, l, 4, c/4) each
        u = F.silu(self.conv(u.flatten(2), size)).unflatten(-1, (_GROUPS, -1))
        y = self.ssm(u, scan_order("cross", *size, device=x.device), merge=False)
        y = self.out_norm(y.flatten(2)).unflatten(-1, (_GROUPS, -1))
        return self.out_proj(y * F.silu(z)).flatten(2)


class ClassBlock(MixerMlpBlock):
    """x + norm1(mixer(x)), then x + mlp(norm2(x)): the first norm follows its branch."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens."""
        x = x + self.norm1(self.mixer(x, size))
        return x + self.feed(x, size)


class GroupMambaStem(nn.Module):
    """A 7×7 convolution of stride 2, two of 3×3, each with batch norm and ReLU, and a downsampling.

    Args:
        in_chans: Channels of the images.
        embed_dim: Channels of the tokens.
        dim: Channels of the convolutions.
    """

    stride = 4

    def __init__(self, in_chans: int, embed_dim: int, *, dim: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            ConvNormAct(in_chans, dim, kernel_size=7, stride=2), ConvNormAct(dim, dim, 3), ConvNormAct(dim, dim, 3)
        )
        self.downsample = ConvDownsample(dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds images (b, in_chans, H, W) as a map (b, ceil(H/4), ceil(W/4), embed_dim)."""
        x = self.convs(x.contiguous(memory_format=torch.channels_last))
        return self.downsample(x.permute(0, 2, 3, 1))


class DistilledHead(ClassifierHead):
    """Pooling and two classifiers, of which one learns from labels and the other from a teacher.

    Args:
        in_features: Channels of the map.
        num_classes: Classes; 0 for no classifiers.
        pool_type: Pooling, as timm names it; none when empty.
        drop_rate: Dropout before the classifiers.
    """

    def __init__(self, in_features: int, num_classes: int, *, pool_type: str = "avg", drop_rate: float = 0.0) -> None:
        super().__init__(in_features, num_classes, pool_type=pool_type, drop_rate=drop_rate, input_fmt="NHWC")
        self.fc_dist = _another(self.fc)
        self.distilled_training = False

    def reset(self, *arguments: Any, **keywords: Any) -> None:
        """Replaces the classifiers; takes the arguments of `timm.layers.ClassifierHead.reset`."""
        super().reset(*arguments, **keywords)
        self.fc_dist = _another(self.fc)

    def classify(self, x: Tensor, *, pre_logits: bool) -> Tensor | tuple[Tensor, Tensor]:
        """Dropout and, unless ``pre_logits``, the mean of both classifiers, of vectors (..., c).

        In training after `GroupMamba.set_distilled_training`, both results instead of their mean.
        """
        x = self.drop(x)
        if pre_logits:
            return x
        logits, distilled = self.fc(x), self.fc_dist(x)
        if self.distilled_training and self.training:
            return logits, distilled
        return (logits + distilled) / 2


def _another(layer: nn.Module) -> nn.Module:
    """A layer of the same shape, drawn anew if it is linear."""
    other = copy.deepcopy(layer)
    if isinstance(other, nn.Linear):
        other.reset_parameters()
    return other


class GroupMamba(GridBackbone):
    """GroupMamba.

    The mean token of the last map passes through a block of its own, the norm and two classifiers. Maps of all stages
    but the last are normed.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the classifiers; 0 for none.
        global_pool: Pooling before the classifiers, as timm names it, one that keeps the number of channels; without
            any, each token is classified by itself.
        stem_dim: Channels of the stem's convolutions.
        dims: Channels of each stage, multiples of 4.
        depths: Blocks of each stage.
        mlp_ratios: Width of the feed-forward networks over that of the tokens, for each stage.
        d_state: State size of the scan.
        se_reduction: Channels of a mixer over those in which its gate is made.
        drop_rate: Dropout before the classifiers.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    head: DistilledHead

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_dim: int = 64,
        dims: Sequence[int] = (64, 128, 348, 448),
        depths: Sequence[int] = (3, 4, 9, 3),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        d_state: int = 1,
        se_reduction: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        _check_pool(global_pool)
        mixer_layer = partial(GroupMixer, d_state=d_state, se_reduction=se_reduction)

        def make_block(stage: int, drop_path: float) -> MixerFfnBlock:
            dim = dims[stage]
            no_norm = nn.Identity()  # the mixer norms its input itself
            mlp, norm2 = ConvFFN(dim, int(mlp_ratios[stage] * dim)), _norm(dim)
            return MixerFfnBlock(mixer_layer(dim), no_norm, mlp=mlp, norm2=norm2, drop_path=drop_path)

        stem = GroupMambaStem(in_chans, dims[0], dim=stem_dim)
        stages = make_stages(
            make_block, dims=dims, depths=depths, downsample_layer=ConvDownsample, drop_path_rate=drop_path_rate
        )
        for stage, dim in zip(stages[:-1], dims[:-1], strict=True):
            stage.norm = _norm(dim)
        super().__init__(
            stem=stem,
            stages=stages,
            dims=dims,
            strides=[stem.stride * 2**i for i in range(len(depths))],
            norm=_norm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        mlp = Mlp(dims[-1], int(mlp_ratios[-1] * dims[-1]))
        class_block = ClassBlock(mixer_layer(dims[-1]), _norm(dims[-1]), mlp=mlp, norm2=_norm(dims[-1]))
        self.class_stage = Stage([class_block])
        self.head = DistilledHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """The official initialisation, where it is not that of the layers themselves."""
        init_linear_layers(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                module.weight.normal_(std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    module.bias.zero_()

    def forward_head(  # pyright: ignore[reportIncompatibleMethodOverride]  two results, where they are asked for
        self, x: Tensor, pre_logits: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pooling, the class block, norm, dropout and, unless ``pre_logits``, classifiers, of a map (b, h, w, c)."""
        pooled = self.head.global_pool(x)  # (b, c), or (b, h, w, c) without pooling
        tokens = self.class_stage(pooled.reshape(-1, 1, 1, pooled.shape[-1]))
        return self.head.classify(self.norm(tokens.view(pooled.shape)), pre_logits=pre_logits)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what maps of the given stages do not need; returns their indices counted from the front."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if self.num_classes == 0:
            self.class_stage = nn.Identity()
            self.head = DistilledHead(self.num_features, 0, pool_type="")
        return taken

    def set_distilled_training(self, enable: bool = True) -> None:
        """Lets the model return the results of both classifiers in training, (b, num_classes) each, not their mean."""
        self.head.distilled_training = enable

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The two last linear layers, that of labels first; identities if there are none."""
        return self.head.fc, self.head.fc_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifiers; ``num_classes`` 0 removes them, ``global_pool`` None keeps the pooling."""
        _check_pool(global_pool)
        super().reset_classifier(num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put every parameter into the group of its block, or of its stage if ``coarse``."""
        matcher = super().group_matcher(coarse)
        matcher["blocks"].append((r"^class_stage", (len(self.stages),)))
        return matcher


def _check_pool(global_pool: str | None) -> None:
    if global_pool == "catavgmax":
        raise ValueError("GroupMamba: global_pool must keep the number of channels, such as 'avg', got 'catavgmax'")


_cfg = partial(
    imagenet_cfg,
    pool_size=(7, 7),
    first_conv="stem.convs.0.conv",
    classifier=("head.fc", "head.fc_dist"),
    license="mit",
    paper_ids="arXiv:2407.13772",
    paper_name="GroupMamba: Efficient Group-Based Visual State Space Model",
)


_HUB = "https://huggingface.co/Abdelrahman-shaker"

default_cfgs = generate_default_cfgs(
    {
        "groupmamba_tiny.in1k": _cfg(origin_url=f"{_HUB}/GroupMamba-Tiny"),
        "groupmamba_small.in1k": _cfg(origin_url=f"{_HUB}/GroupMamba-Small"),
        "groupmamba_base.in1k": _cfg(origin_url=f"{_HUB}/GroupMamba-Base"),
        "test_groupmamba": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


# Official name below a block to ours, the four groups of a mixer being stacked as ``attn.groups`` beforehand.
_LAYERS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.dwconv.dwconv": "mlp.conv.conv",
    "attn.norm": "mixer.norm",
    "attn.fc1": "mixer.se.reduce",
    "attn.fc2": "mixer.se.expand",
    "attn.proj": "mixer.proj",
    "attn.groups.in_proj": "mixer.in_proj",
    "attn.groups.conv2d": "mixer.conv.conv",
    "attn.groups.out_norm": "mixer.out_norm",
    "attn.groups.out_proj": "mixer.out_proj",
}
_PARAMETERS = {
    "attn.skip_scale": "mixer.skip_scale",
    "attn.groups.x_proj_weight": "mixer.ssm.x_proj.weight",
    "attn.groups.dt_projs_weight": "mixer.ssm.dt_weight",
    "attn.groups.dt_projs_bias": "mixer.ssm.dt_bias",
    "attn.groups.A_logs": "mixer.ssm.A_log",
    "attn.groups.Ds": "mixer.ssm.D",
}
_CONVS = {0: "0.conv", 1: "0.bn", 3: "1.conv", 4: "1.bn", 6: "2.conv", 7: "2.bn"}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: GroupMamba) -> dict[str, Tensor]:
    """Brings an official state dict to this model's keys; one that has them already keeps them.

    Raises:
        ValueError: If there is a key that the official models do not have, or a mixer has not all of its groups.
    """
    if "stem.convs.0.conv.weight" in state_dict:
        return state_dict
    ours = _official_keys.rename(_stack_groups(state_dict), _patterns(len(model.stages)), family="groupmamba")
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    for key, value in ours.items():
        if ".mixer." in key and key in shapes and shapes[key].numel() == value.numel():
            ours[key] = value.reshape(shapes[key])
    return ours


def _stack_groups(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official weights with those of a mixer's four groups stacked along a new first axis."""
    stacked: dict[str, Tensor] = {}
    groups: dict[str, dict[int, Tensor]] = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(r"(.+\.attn)\.mamba_g([1-4])\.(.+)", key):
            groups.setdefault(f"{match[1]}.groups.{match[3]}", {})[int(match[2])] = value
        else:
            stacked[key] = value
    for key, values in groups.items():
        if len(values) != _GROUPS:
            raise ValueError(
                f"groupmamba: expected {_GROUPS} groups, mamba_g1 to mamba_g{_GROUPS}, for "
                f"{key.replace('groups', 'mamba_g*')!r} in the checkpoint, got {len(values)}"
            )
        stacked[key] = torch.stack([values[group] for group in sorted(values)])
    return stacked


def _patterns(stages: int) -> dict[str, str]:
    """Patterns of official keys, and what they become."""
    patterns = {
        r"head\.(.+)": r"head.fc.\1",
        r"dist_head\.(.+)": r"head.fc_dist.\1",
        rf"norm{stages}\.(.+)": r"norm.\1",
        **{rf"patch_embed1\.conv\.{i}\.(.+)": rf"stem.convs.{name}.\1" for i, name in _CONVS.items()},
        **_block_patterns(r"post_network\.(\d+)\.", r"class_stage.blocks.\1."),
    }
    for i in range(stages):
        downsample = f"stages.{i}.downsample" if i > 0 else "stem.downsample"
        patterns |= {
            rf"patch_embed{i + 1}\.proj\.(.+)": rf"{downsample}.conv.\1",
            rf"patch_embed{i + 1}\.norm\.(.+)": rf"{downsample}.norm.\1",
            **_block_patterns(rf"block{i + 1}\.(\d+)\.", rf"stages.{i}.blocks.\1."),
        }
    return patterns | {rf"norm{i + 1}\.(.+)": rf"stages.{i}.norm.\1" for i in range(stages - 1)}


def _block_patterns(theirs: str, ours: str) -> dict[str, str]:
    layers = {rf"{theirs}{re.escape(name)}\.(weight|bias)": rf"{ours}{mine}.\2" for name, mine in _LAYERS.items()}
    return layers | {rf"{theirs}{re.escape(name)}": f"{ours}{mine}" for name, mine in _PARAMETERS.items()}


def _create_groupmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    levels = range(len(kwargs["depths"]))
    return build_backbone(
        GroupMamba, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn, levels=levels, **kwargs
    )


@register_model
def groupmamba_tiny(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """GroupMamba-T: 9 blocks of width 348 in the third stage."""
    model_args = {"stem_dim": 32, "dims": (64, 128, 348, 448), "depths": (3, 4, 9, 3)}
    return _create_groupmamba("groupmamba_tiny", pretrained, **(model_args | kwargs))


@register_model
def groupmamba_small(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """GroupMamba-S: 16 blocks of width 348 in the third stage."""
    model_args = {"stem_dim": 64, "dims": (64, 128, 348, 512), "depths": (3, 4, 16, 3)}
    return _create_groupmamba("groupmamba_small", pretrained, **(model_args | kwargs))


@register_model
def groupmamba_base(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """GroupMamba-B: 21 blocks of width 424 in the third stage."""
    model_args = {"stem_dim": 64, "dims": (96, 192, 424, 512), "depths": (3, 6, 21, 3)}
    return _create_groupmamba("groupmamba_base", pretrained, **(model_args | kwargs))


@register_model
def test_groupmamba(pretrained: bool = False, **kwargs: Any) -> GroupMamba:  # noqa: PT028  a model, not a test
    """A small GroupMamba for tests, without published weights."""
    model_args = {
        "stem_dim": 16,
        "dims": (32, 36, 52, 72),
        "depths": (1, 1, 2, 1),
        "mlp_ratios": (2.0,) * 4,
        "se_reduction": 2,
    }
    return _create_groupmamba("test_groupmamba", pretrained, **(model_args | kwargs))
