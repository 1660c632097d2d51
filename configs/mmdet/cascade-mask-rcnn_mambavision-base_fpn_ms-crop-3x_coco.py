# Published by its authors: 52.8 / 45.7 box / mask AP on val2017.
# Their networks took no notice of the drop path in their configs, and used 0.2.
_base_ = "_base_/cascade-mask-rcnn_fpn_ms-crop-3x_coco.py"
model = dict(
    backbone=dict(model_name="mambavision_base", window_sizes=(112, 56), drop_path_rate=0.2),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
