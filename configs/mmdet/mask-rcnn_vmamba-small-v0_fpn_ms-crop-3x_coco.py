# Published by its authors: 49.7 / 44.0 box / mask AP on val2017.
_base_ = "_base_/mask-rcnn_fpn_ms-crop-3x_coco.py"
model = dict(
    backbone=dict(model_name="vmamba_small_v0", drop_path_rate=0.3), neck=dict(in_channels=[96, 192, 384, 768])
)
