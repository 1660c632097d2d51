# Published by its authors: 51.5 / 45.3 box / mask AP on val2017.
# They released no settings: these are VMamba's, with the drop path of the classifier.
_base_ = "_base_/mask-rcnn_fpn_ms-crop-3x_coco.py"
model = dict(backbone=dict(model_name="a2mamba_small", drop_path_rate=0.2), neck=dict(in_channels=[64, 128, 320, 512]))
