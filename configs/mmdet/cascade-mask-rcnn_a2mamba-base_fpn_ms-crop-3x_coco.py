# Published by its authors: 55.4 / 47.6 box / mask AP on val2017.
# They released no settings: these are MambaVision's, with the drop path of the classifier.
_base_ = "_base_/cascade-mask-rcnn_fpn_ms-crop-3x_coco.py"
model = dict(backbone=dict(model_name="a2mamba_base", drop_path_rate=0.4), neck=dict(in_channels=[96, 192, 384, 512]))
