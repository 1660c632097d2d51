"""`VSSMBackbone`: any registered model as a backbone of mmdetection and mmsegmentation."""
# pyright: reportMissingImports=false

import copy
import os
from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from vssm.dense import DenseBackbone


@MODELS.register_module()  # the root, where the registries of mmdet and mmseg look for what they do not know
class VSSMBackbone(DenseBackbone, BaseModule):
    """Maps (b, c_i, h_i, w_i) of several levels of a registered model, for images of any size.

    Its weights have the keys of the classifier after ``model.``. A checkpoint of an official detector or segmentor that
    is loaded into a whole model (``load_from``, ``init_detector``) brings its backbone's keys, which are translated.

    Args:
        model_name: Registered name.
        out_indices: Stages whose maps are returned, or blocks of a model of one stride, counted from 0; every stage, or
            the last block of each quarter, when not given.
        pretrained: True for the published weights of the classifier; else a checkpoint file, or its address. They are
            loaded by ``init_weights``, as Runner calls it, and must fit.
        allow_missing: Weights that ``pretrained`` need not have, with wildcards, such as ``"model.*.bias"``.
        init_cfg: ``dict(type="Pretrained", checkpoint=FILE)`` for the same as ``pretrained=FILE``.
        **kwargs: Arguments of `DenseBackbone` (``out_norm``, ``norm_eps``, ``source``, ``pyramid``, ``frozen_stages``,
            ``norm_eval``, ``with_cp``) and of the model (``drop_path_rate``).

    Attributes:
        out_channels: Channels of each level, for ``neck.in_channels`` or ``decode_head.in_channels``.

    Raises:
        ValueError: If there is no such model, or it cannot give what is asked for.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] | None = None,
        *,
        pretrained: bool | str | os.PathLike | None = False,
        allow_missing: Sequence[str] = (),
        init_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name, out_indices, **kwargs)
        self.init_cfg = copy.deepcopy(init_cfg)
        self.pretrained = pretrained
        self.allow_missing = tuple(allow_missing)
        self.register_load_state_dict_pre_hook(_translate_official_keys)

    def init_weights(self) -> None:
        """Loads the weights that ``pretrained`` or ``init_cfg`` names; else keeps the model's own initialisation.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If weights are missing, unknown or of another shape.
        """
        source = self.pretrained or self._file_of_init_cfg()
        if source is True:
            self.load_pretrained(True, allow_missing=self.allow_missing)
        elif source:
            if "://" not in str(source) and not os.path.isfile(source):
                raise FileNotFoundError(
                    f"VSSMBackbone: no file {str(source)!r} for pretrained; give a checkpoint of {self.model_name}, or "
                    "pretrained=True for the published weights"
                )
            self.load_pretrained(source, allow_missing=self.allow_missing)
        self._is_init = True

    def _file_of_init_cfg(self) -> str | None:
        if not self.init_cfg:
            return None
        if self.init_cfg.get("type") != "Pretrained" or "checkpoint" not in self.init_cfg:
            raise ValueError(
                f"VSSMBackbone: init_cfg must be dict(type='Pretrained', checkpoint=FILE), got {self.init_cfg}"
            )
        return self.init_cfg["checkpoint"]


def _translate_official_keys(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before weights are loaded into a backbone or what is around it: brings its official keys to ours."""
    assert isinstance(module, VSSMBackbone)
    given = {key[len(prefix) :]: key for key in state_dict if key.startswith(prefix)}
    if not given or module.has_keys_of({name: state_dict[key] for name, key in given.items()}):
        return
    official = {name: state_dict.pop(key) for name, key in given.items()}
    ours = module.complete_keys(official, allow_missing=module.allow_missing)
    state_dict.update({prefix + name: value for name, value in ours.items()})
