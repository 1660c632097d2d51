# Published by its authors: 55.6 / 48.1 box / mask AP on val2017.
# They released no settings: these are MambaVision's, with the drop path of the classifier.
_base_ = "_base_/cascade-mask-rcnn_fpn_ms-crop-3x_coco.py"
model = dict(backbone=dict(model_name="a2mamba_large", drop_path_rate=0.5), neck=dict(in_channels=[96, 192, 448, 672]))
