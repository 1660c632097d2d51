_base_ = "_base_/fpn_camvid-320x240.py"
model = dict(backbone=dict(model_name="vmamba_tiny_s1l8"), neck=dict(in_channels=[96, 192, 384, 768]))
