# Published by its authors: 47.6 / 42.9 box / mask AP on val2017.
# They released no settings: these are VMamba's, with the drop path of the classifier.
_base_ = "_base_/mask-rcnn_fpn_1x_coco.py"
model = dict(
    backbone=dict(model_name="groupmamba_tiny", drop_path_rate=0.05), neck=dict(in_channels=[64, 128, 348, 448])
)
