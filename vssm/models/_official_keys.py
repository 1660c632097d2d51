"""Keys of official checkpoints and what they are called here.

`convert` knows those of VMamba's code base, which its relatives took over; `rename` takes a table.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from timm.models.swin_transformer import PatchMerging
from torch import Tensor

from vssm.layers.downsample import ConvDownsample
from vssm.layers.stem import ConvStem, PatchStem
from vssm.models._base import GridBackbone

# Official name below ``patch_embed.`` and below ``layers.i.downsample.`` to ours, by the kind of layer.
STEM: dict[type, dict[str, str]] = {
    ConvStem: {"0": "conv1", "2": "norm1", "5": "conv2", "7": "norm2"},
    PatchStem: {"0": "proj", "2": "norm", "proj": "proj", "norm": "norm"},
}
DOWNSAMPLE: dict[type, dict[str, str]] = {
    ConvDownsample: {"1": "conv", "3": "norm"},
    PatchMerging: {"norm": "norm", "reduction": "reduction", "1": "norm", "2": "reduction"},
}
# Official name below ``layers.i.blocks.j.`` to ours: of the 2D scan (`SS2D`) and of what stands around it.
SS2D = {
    "x_proj_weight": "ssm.x_proj.weight",
    "x_proj": "ssm.x_proj",
    "dt_projs_weight": "ssm.dt_weight",
    "dt_projs.weight": "ssm.dt_weight",
    "dt_projs_bias": "ssm.dt_bias",
    "A_logs": "ssm.A_log",
    "Ds": "ssm.D",
    "in_proj": "in_proj",
    "conv2d": "conv.conv",
    "out_norm": "out_norm",
    "out_proj": "out_proj",
}
BLOCK = {"norm": "norm1", "ln_1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"} | {
    f"{op}.{theirs}": f"mixer.{ours}" for op in ("op", "self_attention") for theirs, ours in SS2D.items()
}
_TOP = {"classifier.norm": "norm", "norm": "norm", "classifier.head": "head.fc", "head": "head.fc"}
# Parts whose tensors some versions keep flat over directions, stacked, or as 1×1 convolutions.
_RESHAPED = re.compile(r"stages\.\d+\.blocks\.\d+\.(mixer|mlp)\.")


def rename(state_dict: Mapping[str, Tensor], patterns: Mapping[str, str], *, family: str) -> dict[str, Tensor]:
    """Renames the keys of an official state dict.

    Args:
        state_dict: Weights by official key.
        patterns: Regular expression of a whole official key to what it becomes, a template of `re.Match.expand`.
        family: Name of the family, for the message.

    Returns:
        The same weights by new key.

    Raises:
        ValueError: If a key matches no pattern.
    """
    renamed, unknown = {}, []
    for key, value in state_dict.items():
        match = next((found for pattern in patterns if (found := re.fullmatch(pattern, key))), None)
        if match is None:
            unknown.append(key)
        else:
            renamed[match.expand(patterns[match.re.pattern])] = value
    if unknown:
        raise ValueError(
            f"{family}: unknown key {unknown[0]!r} in the checkpoint ({len(unknown)} in all), expected those of an "
            "official model of this family"
        )
    return renamed


def join_directions(part: str, tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of what is one for each direction in the official models of sequences.

    Args:
        part: Our name of it below the mixer.
        tensors: Those of the directions, in their order.

    Returns:
        (k, ...), but (k·rows, d) for the one linear layer that projects for all directions.
    """
    if part == "ssm.x_proj.weight":
        return torch.cat(list(tensors))
    stacked = torch.stack(list(tensors))
    return stacked.squeeze(2) if part == "conv.weight" else stacked  # (k, d, 1, w) -> (k, d, w)


def convert(
    state_dict: Mapping[str, Tensor], model: GridBackbone, *, family: str, block: Mapping[str, str] = BLOCK
) -> dict[str, Tensor]:
    """Brings an official state dict to the keys and shapes of a model; one that has its keys already keeps them.

    Args:
        state_dict: Weights.
        model: Model with one of the stems and one of the downsamplings above.
        family: Name for messages.
        block: Official name of a module or parameter in a block to ours.

    Returns:
        Weights under the model's keys.

    Raises:
        ValueError: If there is a key that the official models of this kind do not have.
    """
    if any(key.startswith("stem.") for key in state_dict):
        return dict(state_dict)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    ours = {}
    for key, value in state_dict.items():
        name = _our_name(key, model, block)
        if name is None:
            raise ValueError(
                f"{family}: unknown key {key!r} in the checkpoint, expected those of an official model with "
                f"{type(model.stem).__name__}, such as 'layers.0.blocks.0.op.in_proj.weight'"
            )
        fits = _RESHAPED.match(name) and name in shapes and shapes[name].numel() == value.numel()
        ours[name] = value.reshape(shapes[name]) if fits else value
    return ours


def _our_name(key: str, model: GridBackbone, block: Mapping[str, str]) -> str | None:
    if match := re.fullmatch(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)", key):
        return _below(f"stages.{match[1]}.blocks.{match[2]}.", match[3], block)
    if match := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", key):
        kind = type(model.stages[-1].downsample)
        return _below(f"stages.{int(match[1]) + 1}.downsample.", match[2], DOWNSAMPLE.get(kind, {}))
    if match := re.fullmatch(r"patch_embed\.(.+)", key):
        return _below("stem.", match[1], STEM[type(model.stem)])
    return _below("", key, _TOP)


def _below(prefix: str, name: str, table: Mapping[str, str]) -> str | None:
    """Our key for a parameter that the table names, by itself or through its module."""
    module, _, kind = name.rpartition(".")
    if name in table:
        return prefix + table[name]
    return f"{prefix}{table[module]}.{kind}" if module in table else None
