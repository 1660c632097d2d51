# Published by its authors: 49.1 box AP on val2017, of a network whose printed size is smaller than that of their code.
# Cost: 300 epochs are 35 million images of 640 pixels.
_base_ = "_base_/yolo_pafpn_300e_coco.py"
model = dict(
    backbone=dict(model_name="mambayolo_base"),
    neck=dict(in_channels=[128, 256, 512]),
    bbox_head=dict(in_channels=[128, 256, 512]),
)
