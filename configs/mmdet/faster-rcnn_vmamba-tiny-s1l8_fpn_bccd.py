_base_ = "_base_/faster-rcnn_fpn_bccd.py"
model = dict(backbone=dict(model_name="vmamba_tiny_s1l8", out_norm=True), neck=dict(in_channels=[96, 192, 384, 768]))
