# Published by its authors: 52.3 / 45.2 box / mask AP on val2017.
# Their networks took no notice of the drop path in their configs, and used 0.2.
_base_ = "_base_/cascade-mask-rcnn_fpn_ms-crop-3x_coco.py"
model = dict(
    backbone=dict(model_name="mambavision_small", window_sizes=(112, 56), drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
