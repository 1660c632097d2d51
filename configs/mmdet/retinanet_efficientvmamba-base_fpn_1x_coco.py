# Published by its authors: 42.8 box AP on val2017; they left no settings.
_base_ = "_base_/retinanet_fpn_1x_coco.py"
model = dict(
    backbone=dict(model_name="efficientvmamba_base", drop_path_rate=0.1), neck=dict(in_channels=[192, 384, 768])
)
