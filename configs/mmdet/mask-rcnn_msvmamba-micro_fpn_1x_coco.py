# Published by its authors: 43.8 / 39.9 box / mask AP on val2017.
_base_ = "_base_/mask-rcnn_fpn_1x_coco.py"
model = dict(backbone=dict(model_name="msvmamba_micro", drop_path_rate=0.1), neck=dict(in_channels=[64, 128, 256, 512]))
