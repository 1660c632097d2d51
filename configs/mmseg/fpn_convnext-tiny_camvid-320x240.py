# timm's ConvNeXt-T, to compare with.
_base_ = "_base_/fpn_camvid-320x240.py"
model = dict(backbone=dict(model_name="convnext_tiny"), neck=dict(in_channels=[96, 192, 384, 768]))
