"""A check before a run: that neck and heads expect the channels that the backbone gives."""
# pyright: reportMissingImports=false

from collections.abc import Iterator
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from vssm.openmmlab.backbone import VSSMBackbone


@HOOKS.register_module()
class VSSMChannelCheck(Hook):
    """Refuses a model whose neck or heads want other channels than its `VSSMBackbone` gives, before the run starts.

    OpenMMLab does not connect the two, and torch's message on the first batch does not say which setting is wrong.
    """

    def before_run(self, runner: Any) -> None:
        """Checks the runner's model.

        Raises:
            ValueError: If a part expects other channels; the message has the right ones.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        backbone = getattr(model, "backbone", None)
        if not isinstance(backbone, VSSMBackbone):
            return
        for setting, expected, given in _connections(model, backbone.out_channels):
            if expected != given:
                raise ValueError(
                    f"VSSMChannelCheck: {setting} is {expected}, but {backbone.model_name} gives {given}; "
                    f"set {setting}={given} in the config's model"
                )


def _connections(model: Any, channels: list[int]) -> Iterator[tuple[str, Any, Any]]:
    """Settings that have to fit a backbone's channels: name, value, and what it should be."""
    neck = getattr(model, "neck", None)
    if neck is not None:
        if isinstance(getattr(neck, "in_channels", None), list | tuple):
            yield "neck.in_channels", list(neck.in_channels), channels
        return
    for name in ("decode_head", "auxiliary_head"):
        head = getattr(model, name, None)
        index = getattr(head, "in_index", None)
        if head is None or getattr(head, "input_transform", None) == "resize_concat":
            continue
        if isinstance(index, int):
            yield f"{name}.in_channels", head.in_channels, channels[index]
        elif isinstance(index, list | tuple):
            yield f"{name}.in_channels", list(head.in_channels), [channels[each] for each in index]
