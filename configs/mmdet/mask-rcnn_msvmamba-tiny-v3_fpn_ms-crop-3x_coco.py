# Published by its authors: 48.7 / 43.4 box / mask AP on val2017.
_base_ = "_base_/mask-rcnn_fpn_ms-crop-3x_coco.py"
model = dict(
    backbone=dict(model_name="msvmamba_tiny_v3", drop_path_rate=0.1), neck=dict(in_channels=[96, 192, 384, 768])
)
