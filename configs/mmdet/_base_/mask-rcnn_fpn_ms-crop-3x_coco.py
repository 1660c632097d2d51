# Mask R-CNN for 36 epochs with 16 images a step of varying size, as VMamba and its relatives took it over from Swin.
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
custom_imports = dict(imports=["vssm.openmmlab"], allow_failed_imports=False)
custom_hooks = [dict(type="VSSMChannelCheck")]
model = dict(backbone=dict(_delete_=True, type="VSSMBackbone", pretrained=True, out_norm=True))
