# Published by its authors: 37.5 box AP on val2017; they left no settings.
_base_ = "_base_/retinanet_fpn_1x_coco.py"
model = dict(
    backbone=dict(model_name="efficientvmamba_tiny", drop_path_rate=0.1), neck=dict(in_channels=[96, 192, 384])
)
