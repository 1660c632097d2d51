# timm's ResNet-50, to compare with; its first level of stride 2 is left out.
_base_ = "_base_/faster-rcnn_fpn_bccd.py"
model = dict(
    backbone=dict(model_name="resnet50", out_indices=(1, 2, 3, 4)), neck=dict(in_channels=[256, 512, 1024, 2048])
)
