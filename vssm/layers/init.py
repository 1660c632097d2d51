"""Initialisation that several families share."""

from timm.layers import trunc_normal_
from torch import nn

from vssm.layers.ssm import SelectiveSSM


def init_linear_layers(model: nn.Module, *, std: float = 0.02) -> None:
    """Draws the weights of linear layers from a truncated normal distribution and zeroes their biases.

    Those inside a `SelectiveSSM` keep its own initialisation.

    Args:
        model: Whole model.
        std: Standard deviation.
    """
    projections = {module.x_proj for module in model.modules() if isinstance(module, SelectiveSSM)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in projections:
            for name, parameter in module.named_parameters():
                nn.init.zeros_(parameter) if name == "bias" else trunc_normal_(parameter, std=std)
