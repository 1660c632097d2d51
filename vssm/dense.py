"""Backbones of detectors and segmentors: any registered model as a source of maps of several strides.

`DenseBackbone` is what `vssm.detection` and `vssm.openmmlab` have in common. The model inside keeps the keys it has as
a classifier; what no classifier has, norms of the levels and a pyramid, stands beside it.
"""

import os
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import vssm
from vssm import checkpoint
from vssm.layers.stem import PatchStem
from vssm.models._base import TokenBackbone
from vssm.models._builder import quarters

_SCALES = (4.0, 2.0, 1.0, 0.5)  # of a pyramid's levels, relative to the map they are made of
# What official dense backbones call their additions: VMamba and its relatives, PlainMamba, LocalVim, Vim.
_OFFICIAL_ADDITIONS = {
    r"outnorm(\d+)\.(.+)": "norms.{index}.{rest}",
    r"norm_layer(\d+)\.(.+)": "norms.{index}.{rest}",
    r"outnorm_(\d+)\.(.+)": "norms.{level_index}.{rest}",
    r"fpn([1-4])\.(.+)": "pyramid.{level}.{rest}",
}


class DenseBackbone(nn.Module):
    """Maps (b, c_i, h_i, w_i) of several levels of a registered model, for images of any size.

    Args:
        model_name: Registered name.
        out_indices: Stages whose maps are returned, or blocks of a model of one stride, counted from 0; every stage, or
            the last block of each quarter, when not given. What comes after the last of them is removed.
        out_norm: Put a LayerNorm over channels behind every level, as most official detectors have it.
        final_norm: Put the model's own norm behind the last level, which must be the last block of a model of one
            stride; it comes with the classifier's weights.
        norm_eps: What ``out_norm`` adds to the variance.
        source: ``"stream"`` for the maps after blocks; ``"mixer"`` for what the mixers of these blocks add to them,
            which some official backbones of one stride return.
        pyramid: Bring up to four levels of one stride s to the last of s/4, s/2, s and 2s by transposed convolutions
            and pooling.
        frozen_stages: Stages, or blocks of a model of one stride, that are not trained, counted from the front, with
            the stem; 0 for the stem alone, −1 for none.
        norm_eval: Keep batch norms in evaluation mode.
        with_cp: Recompute blocks in the backward pass instead of storing their activations.
        **model_kwargs: Arguments of the model, such as ``drop_path_rate``.

    Attributes:
        out_channels: Channels of each level.
        out_strides: Pixels per map cell of each level.

    Raises:
        ValueError: If there is no such model, or the model cannot give what is asked for.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] | None = None,
        *,
        out_norm: bool = False,
        final_norm: bool = False,
        norm_eps: float = 1e-5,
        source: Literal["stream", "mixer"] = "stream",
        pyramid: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        **model_kwargs: Any,
    ) -> None:
        super().__init__()
        self.model_name = model_name
        self.model_kwargs = {"global_pool": "", **model_kwargs}
        # Typed loosely, for it may be a model of timm, which has the same methods.
        self.model: Any = vssm.create_model(model_name, **{**self.model_kwargs, "num_classes": 0})
        if isinstance(self.model, TokenBackbone):
            self.model.dynamic_img_size = True
        self.out_indices = self._checked_indices(out_indices)
        self.source = self._checked_source(source)
        self.norm_eval = norm_eval

        info = [self.model.feature_info[i] for i in self.out_indices]
        channels, strides = [each["num_chs"] for each in info], [each["reduction"] for each in info]
        self._check_final_norm(final_norm)
        self.final_norm = final_norm
        self.model.prune_intermediate_layers(list(self.out_indices), prune_norm=not final_norm, prune_head=True)
        normed = self.out_indices[: -1 if final_norm else None] if out_norm else ()
        self.norms = nn.ModuleDict(
            {
                str(i): LayerNorm2d(dim, eps=norm_eps)
                for i, dim in zip(self.out_indices, channels, strict=True)
                if i in normed
            }
        )
        self.pyramid = _make_pyramid(channels, strides) if pyramid else None
        scales = _SCALES[-len(strides) :] if pyramid else [1.0] * len(strides)
        self.out_channels = channels
        self.out_strides = [int(stride / scale) for stride, scale in zip(strides, scales, strict=True)]
        if with_cp:
            self.model.set_grad_checkpointing(True)
        self._frozen = self._freeze(frozen_stages)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps images (b, in_chans, H, W) to one map (b, c_i, h_i, w_i) per level.

        Images whose right or bottom border would be left out by the stem are padded with zeros.
        """
        images = self._padded(images)
        maps = self._mixer_maps(images) if self.source == "mixer" else self._stream_maps(images)
        if self.final_norm:
            maps[-1] = self.model.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        keys = [str(i) for i in self.out_indices]
        maps = [self.norms[key](each) if key in self.norms else each for key, each in zip(keys, maps, strict=True)]
        if self.pyramid is not None:
            maps = [level(each) for level, each in zip(self.pyramid, maps, strict=True)]
        return tuple(maps)

    def train(self, mode: bool = True) -> "DenseBackbone":
        """Sets the mode of all parts but the frozen ones, and batch norms under ``norm_eval``, which only evaluate."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def load_pretrained(self, source: Literal[True] | str | os.PathLike, *, allow_missing: Sequence[str] = ()) -> None:
        """Loads published weights, or those of a file.

        Args:
            source: True for the published weights of the model's name; else a checkpoint of a classifier or of a whole
                detector or segmentor, the authors' or ours: a file, or its address on the web.
            allow_missing: As for `load`.

        Raises:
            ConnectionError: If a file cannot be fetched.
            FileNotFoundError: If there is no such file.
            ValueError: If there are no published weights, or weights are missing, unknown or of another shape.
        """
        if source is True:
            whole = vssm.create_model(self.model_name, pretrained=True, **{**self.model_kwargs, "num_classes": 0})
            self.load(whole.state_dict(), allow_missing=allow_missing)
        else:
            on_web = str(source).startswith(("http://", "https://"))
            file = checkpoint.download(str(source)) if on_web else source
            self.load(checkpoint.read(file), allow_missing=allow_missing)

    def load(self, state_dict: Mapping[str, Tensor], *, allow_missing: Sequence[str] = ()) -> None:
        """Loads the weights of a classifier or of a dense backbone, under official keys or ours.

        The additions to the classifier keep their values if the state dict has none of them. Weights of parts that were
        removed, such as the classifier's head, are left out.

        Args:
            state_dict: Weights.
            allow_missing: Keys of this module that may be absent besides, with wildcards, such as ``"model.*.bias"``.

        Raises:
            ValueError: If weights are missing, unknown or of another shape.
        """
        self.load_state_dict(self.complete_keys(state_dict, allow_missing=allow_missing), strict=False)

    def complete_keys(
        self, state_dict: Mapping[str, Tensor], *, allow_missing: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """Weights under the keys of this module, after a check of their completeness; as `load`, but loads nothing."""
        ours = self.to_own_keys(state_dict)
        additions = {key for key in self.state_dict() if not key.startswith("model.")}
        allowed = set() if additions & ours.keys() else additions
        allowed |= {key for key in self.state_dict() if any(fnmatchcase(key, pattern) for pattern in allow_missing)}
        checkpoint.check(self, ours, adapted=allowed - ours.keys())
        return ours

    def to_own_keys(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Brings the keys of a classifier or of an official dense backbone to those of this module.

        Raises:
            ValueError: If there is a key that neither has.
        """
        if self.has_keys_of(state_dict):
            return dict(state_dict)
        additions = {name: key for key in state_dict if (name := self._own_addition(key)) is not None}
        weights = {key: value for key, value in state_dict.items() if key not in additions.values()}
        with torch.device("meta"):  # with all parts, since official keys are told by them
            whole = vssm.create_model(self.model_name, **self.model_kwargs)
        converted = checkpoint.to_model_keys(weights, whole)
        unknown = sorted(converted.keys() - whole.state_dict().keys())
        if unknown:
            raise ValueError(
                f"{type(self).__name__}: {self.model_name} has no {unknown[0]!r}, which is in the checkpoint "
                f"({len(unknown)} such keys); expected weights of this model"
            )
        kept = self.model.state_dict().keys()
        model = {f"model.{key}": value for key, value in converted.items() if key in kept}
        return model | {name: state_dict[key] for name, key in additions.items()}

    def has_keys_of(self, state_dict: Mapping[str, Tensor]) -> bool:
        """Whether a state dict has keys of this module, not official ones; those of a detector may begin alike."""
        return not self.state_dict().keys().isdisjoint(state_dict)

    def _own_addition(self, key: str) -> str | None:
        """Our key for what official dense backbones add to a classifier, None for another key."""
        for pattern, ours in _OFFICIAL_ADDITIONS.items():
            if match := re.fullmatch(pattern, key):
                number = int(match[1])
                level_index = self.out_indices[number] if number < len(self.out_indices) else number
                return ours.format(index=number, level=number - 1, level_index=level_index, rest=match[2])
        return None

    def _stream_maps(self, images: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(images, indices=list(self.out_indices), intermediates_only=True)

    def _mixer_maps(self, images: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        mixers = [self.model.blocks[i].mixer for i in self.out_indices]
        handles = [mixer.register_forward_hook(lambda _module, _inputs, y: outputs.append(y)) for mixer in mixers]
        try:
            self.model.forward_features(images)
        finally:
            for handle in handles:
                handle.remove()
        size = self.model.stem.grid_size(images.shape[2], images.shape[3])
        patches = [self._without_class_token(each).unflatten(1, size) for each in outputs]
        return [each.permute(0, 3, 1, 2).contiguous() for each in patches]

    def _without_class_token(self, tokens: Tensor) -> Tensor:
        place = self.model.class_token_index(tokens.shape[1])
        return tokens if place is None else torch.cat([tokens[:, :place], tokens[:, place + 1 :]], dim=1)

    def _padded(self, images: Tensor) -> Tensor:
        stem = getattr(self.model, "stem", None)
        if not isinstance(stem, PatchStem):
            return images
        height, width = images.shape[2:]
        right, bottom = (
            max(stem.patch_size - side, 0) or -(side - stem.patch_size) % stem.stride for side in (width, height)
        )
        return F.pad(images, (0, right, 0, bottom))

    def _checked_indices(self, indices: Sequence[int] | None) -> tuple[int, ...]:
        if indices is None:
            return usual_indices(self.model)
        count = len(self.model.feature_info)
        kind = "blocks" if has_one_stride(self.model) else "stages"
        in_range = len(indices) > 0 and all(0 <= each < count for each in indices)
        if not in_range or list(indices) != sorted(set(indices)):
            raise ValueError(
                f"{type(self).__name__}: out_indices must be increasing numbers of {kind} from 0 to {count - 1} of "
                f"{self.model_name}, got {tuple(indices)}"
            )
        return tuple(indices)

    def _checked_source(self, source: str) -> Literal["stream", "mixer"]:
        allowed = ("stream", "mixer") if isinstance(self.model, TokenBackbone) else ("stream",)
        if source not in allowed:
            raise ValueError(
                f"{type(self).__name__}: source of {self.model_name} must be {' or '.join(map(repr, allowed))}, "
                f"got {source!r}"
            )
        return cast('Literal["stream", "mixer"]', source)

    def _check_final_norm(self, final_norm: bool) -> None:
        last = len(self.model.feature_info) - 1
        if final_norm and not (isinstance(self.model, TokenBackbone) and self.out_indices[-1] == last):
            raise ValueError(
                f"{type(self).__name__}: final_norm needs a model of one stride whose last block is in out_indices, "
                f"got {self.model_name} with {self.out_indices}"
            )

    def _freeze(self, count: int) -> list[nn.Module]:
        """Stops the training of the stem and the first stages or blocks; returns their modules."""
        if count < 0:
            return []
        name = next((each for each in ("stages", "blocks") if hasattr(self.model, each)), None)
        trained = [] if name is None else list(getattr(self.model, name))
        if count > len(trained):
            raise ValueError(
                f"{type(self).__name__}: frozen_stages of {self.model_name} must be at most {len(trained)}, got {count}"
            )
        before = [part for child, part in self.model.named_children() if child not in (name, "norm")]
        frozen = [*before, *trained[:count]]
        embeddings = [parameter for _, parameter in self.model.named_parameters(recurse=False)]
        for parameter in [*embeddings, *(each for part in frozen for each in part.parameters())]:
            parameter.requires_grad = False
        return frozen


def has_one_stride(model: Any) -> bool:
    """Whether all blocks of a model have maps of the same size."""
    return len({each["reduction"] for each in model.feature_info}) == 1


def usual_indices(model: Any) -> tuple[int, ...]:
    """Every stage of a model, or the last block of each quarter of one of a single stride."""
    count = len(model.feature_info)
    return tuple(quarters(count) if has_one_stride(model) else range(count))


def _make_pyramid(channels: Sequence[int], strides: Sequence[int]) -> nn.ModuleList:
    """Levels of strides s/4, s/2, s and 2s, or the last of these, as in Vim's official segmentation backbone."""
    if len(strides) > len(_SCALES) or len(set(strides)) != 1:
        raise ValueError(
            f"DenseBackbone: pyramid needs up to {len(_SCALES)} levels of one stride, got strides {list(strides)}; "
            "models of several stages have a pyramid already"
        )
    return nn.ModuleList(_rescale(dim, scale) for dim, scale in zip(channels, _SCALES[-len(strides) :], strict=True))


def _rescale(dim: int, scale: float) -> nn.Module:
    """Makes a map (b, dim, h, w) 4, 2, 1 or ½ times as large along each side."""
    if scale < 1:
        return nn.MaxPool2d(2, 2, ceil_mode=True)
    if scale == 1:
        return nn.Identity()
    double = nn.ConvTranspose2d(dim, dim, 2, 2)
    if scale == 2:
        return nn.Sequential(double)
    return nn.Sequential(double, nn.BatchNorm2d(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2))
