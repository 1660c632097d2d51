# Published by its authors: 51.1 / 44.3 box / mask AP on val2017.
# Their networks took no notice of the drop path in their configs, and used 0.2.
_base_ = "_base_/cascade-mask-rcnn_fpn_ms-crop-3x_coco.py"
model = dict(
    backbone=dict(model_name="mambavision_tiny", window_sizes=(112, 56), drop_path_rate=0.2),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
