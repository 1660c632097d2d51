# Published by its authors: 53.0 / 46.8 box / mask AP on val2017.
# They released no settings: these are VMamba's, with the drop path of the classifier.
_base_ = "_base_/mask-rcnn_fpn_ms-crop-3x_coco.py"
model = dict(backbone=dict(model_name="a2mamba_large", drop_path_rate=0.5), neck=dict(in_channels=[96, 192, 448, 672]))
