"""Checkpoints that mmengine's Runner wrote can be read again beside a current torch."""
# pyright: reportMissingImports=false

import logging
import pickle
from typing import Any

import torch
from mmengine.runner.checkpoint import CheckpointLoader
from safetensors.torch import load_file

_logger = logging.getLogger(__name__)


def read_own_checkpoints() -> None:
    """Lets mmengine read local files that hold more than tensors, as those of its own training do, and safetensors.

    torch refuses the former since version 2.6, for the pickled parts could be code; so read only files that you trust.
    """
    CheckpointLoader.register_scheme(prefixes="", loader=_load, force=True)


def _load(filename: str, map_location: Any = None) -> Any:
    if filename.endswith(".safetensors"):
        return load_file(filename)
    try:
        return torch.load(filename, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        _logger.info("%s holds pickled objects, as training checkpoints of mmengine do; they are loaded", filename)
        return torch.load(filename, map_location=map_location, weights_only=False)
