"""The detector Mamba-YOLO in plain torch: neck, head, losses, and all of it around its backbone.

`vssm.openmmlab.yolo` registers the parts for mmdetection; weights of either fit the other.
"""

from vssm.yolo.detector import MambaYoloDetector
from vssm.yolo.head import YoloHead
from vssm.yolo.loss import Objects
from vssm.yolo.neck import MambaYoloNeck

__all__ = ["MambaYoloDetector", "MambaYoloNeck", "Objects", "YoloHead"]
