"""ViM2, whose mixers scan tokens and then, inside each token, channels, and read weighted averages of earlier features.

Paper: Behrouz, Santacatterina and Zabih, "MambaMixer: Efficient Selective State Space Models with Dual Token and
    Channel Selection", 2024, https://arxiv.org/abs/2403.19888
There is no official code of the vision model, and there are no weights: this is a reading of the paper, which leaves
much open. What is stated and what was chosen here is listed in the model card.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from vssm.layers.conv import CausalTokenConv
from vssm.layers.init import init_linear_layers
from vssm.layers.ss2d import SS2D
from vssm.layers.ssm import SelectiveSSM
from vssm.layers.stem import PatchStem
from vssm.models._base import GridBackbone, Stage
from vssm.models._builder import build_backbone, imagenet_cfg
from vssm.scan_order import scan_order
from vssm_kernels import causal_conv, directional_scan

_DIRECTIONS = 2


class ChannelConv(CausalTokenConv):
    """Causal convolutions along the channels of each token, forwards and backwards, followed by SiLU.

    All tokens share the taps.

    Args:
        kernel_size: Taps w.
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__(1, kernel_size, reverse=(False, True), activation=True)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves channels (b, c, l) of l tokens; returns (b, c, 2, l)."""
        weight, bias = self.weight.expand(-1, x.shape[2], -1), self.bias.expand(-1, x.shape[2])
        return causal_conv(x, weight, bias, reverse=self.reverse, activation=self.activation)


class ChannelSSM(SelectiveSSM):
    """Selective state-space model that scans the channels of each token, forwards and backwards.

    A channel is a step with one number u, so that step = softplus(dt_weight·w_dt·u + dt_bias), B = w_B·u and C = w_C·u
    are multiples of it, [w_dt | w_B | w_C] being the weight of ``x_proj``. Then B·u = w_B·u² and C·h = u·(w_C·h): the
    scan runs over u² with constant B and C, tokens being its channels, and what it gives is multiplied by u.

    Args:
        d_state: State size n.
    """

    def __init__(self, *, d_state: int = 16) -> None:
        super().__init__(1, d_state=d_state, dt_rank=1, directions=_DIRECTIONS)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  channels have one pair of orders
        self, x: Tensor
    ) -> Tensor:
        """Scans channels (b, c, 2, l) of l tokens, for each direction its own; returns their sum, (b, c, l)."""
        tokens = x.shape[-1]
        dt, B, C = self.x_proj.weight.view(_DIRECTIONS, -1).split([1, self.d_state, self.d_state], dim=-1)
        y = directional_scan(
            x.square(),
            x * (dt * self.dt_weight[:, :, 0]),
            self._state_matrix().expand(-1, tokens, -1),
            B,
            C,
            dt_bias=self.step_bias.expand(-1, tokens),
            order=scan_order("bidirectional", 1, x.shape[1], device=x.device),
            merge=False,
        )
        return (x * (cast(Tensor, y) + self.D)).sum(2)


class ChannelMixer(nn.Module):
    """Selective channel mixer: out_proj(SSM(conv(u))·silu(z)), [u | z] = in_proj(input), along the channels of a token.

    Each token is mixed by itself, with the same parameters.

    Args:
        d_model: Channels of the tokens.
        d_inner: Channels that are scanned.
        d_state: State size of the scan.
        d_conv: Taps of the convolution along the channels.

    Reference:
        Behrouz et al., "MambaMixer", 2024, https://arxiv.org/abs/2403.19888: the selective channel mixer
    """

    def __init__(self, d_model: int, *, d_inner: int, d_state: int = 16, d_conv: int = 4) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv = ChannelConv(d_conv)
        self.ssm = ChannelSSM(d_state=d_state)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mixes the channels of tokens (b, l, c), whatever their grid's ``size``."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        y = self.ssm(self.conv(u.transpose(1, 2))).transpose(1, 2)
        return self.out_proj(y * F.silu(z))


class FeatureAverage(nn.Module):
    """Σ_i weight_i·feature_i, with scalars that are learnt.

    The features of a stage are its input, twice, as the paper counts it as an output of either kind of mixer, and the
    outputs of its mixers so far. At first all weights are 1, but 0 for the first copy of the input: a sum of residuals.

    Args:
        earlier: Number of mixers before.

    Reference:
        Behrouz et al., "MambaMixer", 2024, https://arxiv.org/abs/2403.19888: weighted averaging of earlier features
    """

    def __init__(self, earlier: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2 + earlier))
        with torch.no_grad():
            self.weight[0] = 0

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Averages the stage's input and the outputs of all earlier mixers, tokens (b, l, c)."""
        first, *weights = self.weight.unbind()
        average = first * features[0]
        for weight, feature in zip(weights, features, strict=True):
            average = average + weight * feature
        return average


class AveragingBlock(nn.Module):
    """mixer(norm1(average(features))): a mixer whose input is a weighted average instead of a residual stream.

    Args:
        dim: Channels of the tokens.
        mixer: Maps tokens (b, l, c) and their grid's ``size`` to tokens.
        earlier: Number of mixers before it in the stage.
        drop_path: Probability of leaving its output out for a sample in training.
    """

    def __init__(self, dim: int, mixer: nn.Module, *, earlier: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.average = FeatureAverage(earlier)
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, size: tuple[int, int], *features: Tensor) -> Tensor:
        """Maps the stage's input and the outputs of all earlier mixers, tokens (b, l, c), to one more output."""
        return self.drop_path(self.mixer(self.norm1(self.average(features)), size))


class AveragingStage(Stage):
    """Blocks of one resolution of which each sees the outputs of all before it; the result is one more average.

    Args:
        blocks: Instances of `AveragingBlock`.
        downsample: Maps (b, h, w, c) to a map of this stage's resolution and channels.
    """

    def __init__(self, blocks: Sequence[AveragingBlock], *, downsample: nn.Module | None = None) -> None:
        super().__init__(blocks, downsample=downsample)
        self.average = FeatureAverage(len(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, h, w, c) to (b, h', w', c')."""
        x = self.downsample(x)
        size = (x.shape[1], x.shape[2])
        features = [x.flatten(1, 2)]
        for block in self.blocks:
            run = partial(checkpoint, block) if self.grad_checkpointing else block
            features.append(run(size, *features))
        return self.average(features).unflatten(1, size)


class ViM2(GridBackbone):
    """ViM2: stages of two token mixers and a channel mixer in turn.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the classifier; 0 for none.
        global_pool: Pooling before the classifier, as timm names it.
        embed_dim: Channels of the first stage; every next one has twice as many.
        depths: Channel mixers of each stage; before each stand two token mixers.
        d_state: State size of the scans.
        expand: Width of the scan of tokens over that of the tokens.
        gate: Whether the token mixers are gated.
        channel_expand: Width of the scan of channels over that of the tokens, for each stage.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last mixer; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 1, 3, 1),
        d_state: int = 16,
        expand: float = 2.0,
        gate: bool = True,
        channel_expand: Sequence[float] = (2.0, 2.0, 2.0, 1.0),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims = [embed_dim * 2**i for i in range(len(depths))]
        rates = cast("list[list[float]]", calculate_drop_path_rates(drop_path_rate, [3 * d for d in depths], True))

        def make_block(stage: int, place: int) -> AveragingBlock:
            dim = dims[stage]
            if place % 3 < 2:
                mixer = SS2D(dim, d_state=d_state, expand=expand, gate=gate)
            else:
                mixer = ChannelMixer(dim, d_inner=int(channel_expand[stage] * dim), d_state=d_state)
            return AveragingBlock(dim, mixer, earlier=place, drop_path=rates[stage][place])

        stem = PatchStem(in_chans, embed_dim, patch_size=4, norm_layer=nn.LayerNorm)
        super().__init__(
            stem=stem,
            stages=[
                AveragingStage(
                    [make_block(i, place) for place in range(3 * depth)],
                    downsample=PatchMerging(dims[i - 1], dims[i]) if i > 0 else None,
                )
                for i, depth in enumerate(depths)
            ],
            dims=dims,
            strides=[stem.stride * 2**i for i in range(len(depths))],
            norm=nn.LayerNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        init_linear_layers(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put every parameter into the group of its block, or of its stage if ``coarse``."""
        groups = super().group_matcher(coarse)
        lasts = [len(cast(Stage, stage).blocks) - 1 for stage in self.stages]
        averages = [(rf"^stages\.{i}\.average", (i,) if coarse else (i, last)) for i, last in enumerate(lasts)]
        return groups | {"blocks": [*averages, *groups["blocks"]]}


_cfg = partial(
    imagenet_cfg,
    pool_size=(7, 7),
    first_conv="stem.proj",
    classifier="head.fc",
    license="apache-2.0",
    origin_url="https://arxiv.org/abs/2403.19888",
    paper_ids="arXiv:2403.19888",
    paper_name="MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection",
)


default_cfgs = generate_default_cfgs(
    {
        "vim2_tiny": _cfg(),
        "vim2_small": _cfg(),
        "vim2_base": _cfg(),
        "test_vim2": _cfg(input_size=(3, 96, 96), pool_size=(12, 12)),
    }
)


def _same_keys(state_dict: dict[str, Tensor], model: ViM2) -> dict[str, Tensor]:
    """There are no official files with other keys."""
    return state_dict


def _create_vim2(variant: str, pretrained: bool = False, **kwargs: Any) -> ViM2:
    levels = range(len(kwargs["depths"]))
    return build_backbone(ViM2, variant, pretrained, checkpoint_filter_fn=_same_keys, levels=levels, **kwargs)


@register_model
def vim2_tiny(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-T: width 96, 6 token mixers and 3 channel mixers in the third stage."""
    model_args = {"embed_dim": 96, "depths": (1, 1, 3, 1)}
    return _create_vim2("vim2_tiny", pretrained, **(model_args | kwargs))


@register_model
def vim2_small(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-S: width 96, 18 token mixers and 9 channel mixers in the third stage."""
    model_args = {"embed_dim": 96, "depths": (1, 1, 9, 1)}
    return _create_vim2("vim2_small", pretrained, **(model_args | kwargs))


@register_model
def vim2_base(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-B: width 128, 18 token mixers and 9 channel mixers in the third stage."""
    model_args = {"embed_dim": 128, "depths": (1, 1, 9, 1)}
    return _create_vim2("vim2_base", pretrained, **(model_args | kwargs))


@register_model
def test_vim2(pretrained: bool = False, **kwargs: Any) -> ViM2:  # noqa: PT028  a model, not a test
    """A small ViM2 for tests."""
    model_args = {"embed_dim": 16, "depths": (1, 1), "d_state": 4, "channel_expand": (2.0, 1.0)}
    return _create_vim2("test_vim2", pretrained, **(model_args | kwargs))
