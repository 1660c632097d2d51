# Published by its authors: 46.7 / 42.2 box / mask AP on val2017.
_base_ = "_base_/mask-rcnn_fpn_1x_coco.py"
model = dict(
    backbone=dict(model_name="localvmamba_tiny", drop_path_rate=0.2), neck=dict(in_channels=[96, 192, 384, 768])
)
