# As ViTDet trains: squares of 1,024 pixels out of images scaled by 0.1 to 2, 100 epochs of 64 of them a step.
_base_ = "mmdet::common/lsj-100e_coco-instance.py"
custom_imports = dict(imports=["vssm.openmmlab"], allow_failed_imports=False)
custom_hooks = [dict(type="VSSMChannelCheck")]
train_dataloader = dict(batch_size=8)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(1024, 1024), keep_ratio=True),
    dict(type="Pad", size=(1024, 1024), pad_val=dict(img=(114, 114, 114))),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(
    _delete_=True,
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=25, milestones=[22, 24], gamma=0.1),
]
