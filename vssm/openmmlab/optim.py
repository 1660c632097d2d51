"""Parameter groups for fine-tuning: lower learning rates for earlier blocks, no decay where the models want none."""
# pyright: reportMissingImports=false

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.models import group_parameters
from torch import nn

from vssm.openmmlab.backbone import VSSMBackbone


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VSSMLayerDecay(DefaultOptimWrapperConstructor):
    """Layer-wise decay of the learning rate by the backbone's own layer groups.

    The last block's rate is ``layer_decay`` times that of neck and heads, the block's before it ``layer_decay`` times
    that, and so on down to the stem. Weight decay leaves out vectors, and what ``no_weight_decay`` of the model names.
    A config says ``optim_wrapper = dict(constructor="VSSMLayerDecay", paramwise_cfg=dict(layer_decay=0.9), ...)``.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Appends one group for every pair of a learning rate and a weight decay.

        Raises:
            ValueError: If ``paramwise_cfg`` has no ``layer_decay`` in (0, 1], or something else.
        """
        decay = self.paramwise_cfg.get("layer_decay")
        if self.paramwise_cfg.keys() != {"layer_decay"} or not 0 < decay <= 1:
            raise ValueError(
                f"VSSMLayerDecay: expected paramwise_cfg=dict(layer_decay=RATE) with a rate above 0 and at most 1, got "
                f"{self.paramwise_cfg}"
            )
        scales, undecayed = _scales_and_undecayed(module, decay)
        groups: dict[tuple[float, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            scale = scales.get(name, 1.0)
            decayed = parameter.ndim > 1 and name not in undecayed
            if (scale, decayed) not in groups:
                weight_decay = self.base_wd if decayed else 0.0
                groups[scale, decayed] = {"params": [], "lr": self.base_lr * scale, "weight_decay": weight_decay}
            groups[scale, decayed]["params"].append(parameter)
        params.extend(groups.values())


def _scales_and_undecayed(module: nn.Module, decay: float) -> tuple[dict[str, float], set[str]]:
    """By name: factors of the learning rate of backbones' parameters, and which of them weight decay leaves out."""
    scales: dict[str, float] = {}
    undecayed: set[str] = set()
    for path, backbone in module.named_modules():
        if isinstance(backbone, VSSMBackbone):
            prefix = f"{path}.model." if path else "model."
            layers: Any = group_parameters(backbone.model, backbone.model.group_matcher())
            count = max(layers) + 1
            scales |= {prefix + name: decay ** (count - layer) for layer, names in layers.items() for name in names}
            of_model = getattr(backbone.model, "no_weight_decay", tuple)()  # some models of timm name none
            undecayed |= {prefix + name for name in of_model}
    return scales, undecayed
