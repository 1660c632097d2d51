# Published by its authors: 52.1 box AP on val2017.
# Cost: 300 epochs are 35 million images of 640 pixels.
_base_ = "_base_/yolo_pafpn_300e_coco.py"
model = dict(
    backbone=dict(model_name="mambayolo_large"),
    neck=dict(in_channels=[192, 384, 576], mixers=2),
    bbox_head=dict(in_channels=[192, 384, 576]),
)
