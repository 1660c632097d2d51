# Faster R-CNN from scratch for 300 steps of 8 images on BCCD, 205 photographs of blood cells, at half their size. A
# batch is of one shape always, so that kernels are compiled once.
_base_ = ["mmdet::_base_/models/faster-rcnn_r50_fpn.py", "mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["vssm.openmmlab"], allow_failed_imports=False)
custom_hooks = [dict(type="VSSMChannelCheck")]
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone"),
    # From 16 pixels on; each cell has an anchor of half its area or more in common, so none is matched to a worse one.
    rpn_head=dict(anchor_generator=dict(scales=[4, 5.66])),
    roi_head=dict(bbox_head=dict(num_classes=3)),
    train_cfg=dict(rpn=dict(assigner=dict(pos_iou_thr=0.5, match_low_quality=False))),
)
width, height = 320, 240
dataset = dict(
    type="CocoDataset",
    data_root="data/bccd/",
    metainfo=dict(classes=("RBC", "WBC", "Platelets")),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type="InfiniteSampler"),
    dataset=dict(
        **dataset,
        ann_file="annotations/train.json",
        data_prefix=dict(img="train/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(type="RandomResize", scale=(width, height), ratio_range=(0.8, 1.25), keep_ratio=True),
            dict(type="RandomCrop", crop_size=(width, height)),
            dict(type="RandomFlip", prob=[0.25] * 3, direction=["horizontal", "vertical", "diagonal"]),
            dict(type="Pad", size=(width, height)),
            dict(type="PackDetInputs"),
        ],
    ),
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(width, height), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
evaluation = dict(batch_size=8, num_workers=2, drop_last=False, sampler=dict(type="DefaultSampler", shuffle=False))
val_dataloader = dict(
    **evaluation,
    dataset=dict(
        **dataset,
        ann_file="annotations/val.json",
        data_prefix=dict(img="val/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    **evaluation,
    dataset=dict(
        **dataset,
        ann_file="annotations/test.json",
        data_prefix=dict(img="test/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(type="CocoMetric", ann_file="data/bccd/annotations/val.json", metric="bbox")
test_evaluator = dict(type="CocoMetric", ann_file="data/bccd/annotations/test.json", metric="bbox")
train_cfg = dict(type="IterBasedTrainLoop", max_iters=300, val_interval=300)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=4e-4, weight_decay=0.05),
    constructor="VSSMLayerDecay",
    paramwise_cfg=dict(layer_decay=1.0),
    clip_grad=dict(max_norm=5),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=30, by_epoch=False),
    dict(type="CosineAnnealingLR", begin=30, end=300, T_max=270, eta_min=0, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=300))
log_processor = dict(by_epoch=False)
