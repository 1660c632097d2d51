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


def init_ssm_as_linear(model: nn.Module, *, std: float = 0.02) -> None:
    """Draws the projections inside every `SelectiveSSM` as `init_linear_layers` does others; steps start at ln 2.

    Args:
        model: Whole model.
        std: Standard deviation.
    """
    for module in model.modules():
        if isinstance(module, SelectiveSSM):
            trunc_normal_(module.x_proj.weight, std=std)
            trunc_normal_(module.dt_weight, std=std)
            nn.init.zeros_(module.dt_bias)
