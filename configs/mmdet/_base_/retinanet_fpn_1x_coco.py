# RetinaNet for 12 epochs with 16 images a step, on strides 8 to 32; the optimiser is that of Mask R-CNN.
_base_ = "mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py"
custom_imports = dict(imports=["vssm.openmmlab"], allow_failed_imports=False)
custom_hooks = [dict(type="VSSMChannelCheck")]
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", out_indices=(1, 2, 3), pretrained=True, out_norm=True),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)
