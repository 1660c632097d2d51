"""Our backbones in mmdetection and mmsegmentation.

A config that says ``custom_imports = dict(imports=["vssm.openmmlab"])`` can name them: ``type="VSSMBackbone"``.
Importing this package registers them, and makes up for what mmcv-lite and mmengine lack beside a current torch. It
needs the extra ``mm``, or the frameworks with a compiled mmcv.
"""

from importlib.util import find_spec

if find_spec("mmengine") is None or find_spec("mmcv") is None:
    raise ImportError('vssm.openmmlab needs mmengine and mmcv, which are not installed: pip install "vssm[mm]"')

from vssm.openmmlab.checkpoints import read_own_checkpoints
from vssm.openmmlab.mmcv_ops import provide_operators

provide_operators()
read_own_checkpoints()

from vssm.openmmlab.backbone import VSSMBackbone  # noqa: E402  the operators come first
from vssm.openmmlab.hooks import VSSMChannelCheck  # noqa: E402
from vssm.openmmlab.optim import VSSMLayerDecay  # noqa: E402
from vssm.openmmlab.pyramid import VSSMSimplePyramid  # noqa: E402

__all__ = ["VSSMBackbone", "VSSMChannelCheck", "VSSMLayerDecay", "VSSMSimplePyramid"]
