"""ViTDet's pyramid: all levels of a detector from one map."""
# pyright: reportMissingImports=false

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import ConvNormAct, LayerNorm2d
from torch import Tensor, nn

# Norms over channels at each place, for heads of mmdetection too: norm_cfg=dict(type="VSSMLayerNorm2d").
MODELS.register_module(name="VSSMLayerNorm2d", module=LayerNorm2d)


@MODELS.register_module()
class VSSMSimplePyramid(BaseModule):
    """Levels of strides s/4, s/2, s and 2s from a map of stride s, and coarser ones by leaving out rows and columns.

    As in "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv:2203.16527), section 3: transposed
    convolutions and pooling, then a convolution of one place and one of 3 × 3 at each level, each with a norm.

    Args:
        in_channels: Channels of the backbone's one map.
        out_channels: Channels of every level.
        num_outs: Number of levels, at least 4.
        init_cfg: As mmengine has it.

    Raises:
        ValueError: If there is not one map, or fewer than four levels are asked for.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        *,
        num_outs: int = 5,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if len(in_channels) != 1 or num_outs < 4:
            raise ValueError(
                f"VSSMSimplePyramid: expected in_channels of one map and num_outs of 4 or more, got "
                f"{list(in_channels)} and {num_outs}; give the backbone one number in out_indices"
            )
        self.in_channels = list(in_channels)
        self.num_outs = num_outs
        (dim,) = in_channels
        dims = (dim // 4, dim // 2, dim, dim)
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(dim, dim // 2, 2, 2),
                    LayerNorm2d(dim // 2),
                    nn.GELU(),
                    nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2),
                ),
                nn.ConvTranspose2d(dim, dim // 2, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, 2),
            ]
        )
        conv = partial(ConvNormAct, norm_layer=LayerNorm2d, apply_act=False)
        self.convs = nn.ModuleList(
            nn.Sequential(conv(each, out_channels, 1), conv(out_channels, out_channels, 3)) for each in dims
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps one (b, c, h, w) in a sequence to ``num_outs`` levels (b, out_channels, h_i, w_i), finest first."""
        (x,) = maps
        levels = [conv(scale(x)) for scale, conv in zip(self.scales, self.convs, strict=True)]
        while len(levels) < self.num_outs:
            levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return tuple(levels)
