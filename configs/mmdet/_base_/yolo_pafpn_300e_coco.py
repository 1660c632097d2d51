# Mamba-YOLO for 300 epochs from scratch with 512 images a step, on 8 GPUs. Its authors trained with mixed precision (the
# option --amp of mmdet's tool) and, for three epochs, with rates of biases that fall from 0.1, which mmengine has not.
_base_ = "mmdet::yolox/yolox_s_8xb8-300e_coco.py"
custom_imports = dict(imports=["vssm.openmmlab", "vssm.openmmlab.yolo"], allow_failed_imports=False)
grey = 114
model = dict(
    _delete_=True,
    type="SingleStageDetector",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[0, 0, 0],
        std=[255, 255, 255],
        bgr_to_rgb=True,
        pad_size_divisor=32,
        pad_value=grey / 255,
    ),
    backbone=dict(type="VSSMBackbone", out_indices=(1, 2, 3)),
    neck=dict(type="VSSMYoloNeck"),
    bbox_head=dict(type="VSSMYoloHead", num_classes=80),
    test_cfg=dict(score_thr=0.001, nms_pre=30000, nms=dict(type="nms", iou_threshold=0.7), max_per_img=300),
)
img_scale = (640, 640)
train_dataloader = dict(
    batch_size=64,
    dataset=dict(
        dataset=dict(
            pipeline=[
                dict(type="LoadImageFromFile"),
                dict(type="LoadAnnotations", with_bbox=True),
                dict(type="Resize", scale=img_scale, keep_ratio=True),
            ]
        ),
        pipeline=[
            dict(type="Mosaic", img_scale=img_scale, pad_val=float(grey)),
            dict(type="VSSMScaleShift", size=img_scale),
            dict(type="VSSMColourGains"),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackDetInputs"),
        ],
    ),
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=img_scale, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.01, momentum=0.937, nesterov=True, weight_decay=4e-3),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0, custom_keys={"dt_bias": dict(decay_mult=0)}),
    clip_grad=dict(max_norm=10),
)
warmup = dict(begin=0, end=3, by_epoch=True, convert_to_iter_based=True)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, **warmup),
    dict(type="LinearMomentum", start_factor=0.8 / 0.937, **warmup),
    dict(type="LinearLR", start_factor=1, end_factor=0.01, begin=0, end=300, by_epoch=True),
]
custom_hooks = [
    dict(type="VSSMChannelCheck"),
    # No mosaics in the last ten epochs, of which this hook counts but nine.
    dict(type="YOLOXModeSwitchHook", num_last_epochs=9, skip_type_keys=("Mosaic",), priority=48),
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=1e-4, gamma=2000, update_buffers=True, priority=49),
]
auto_scale_lr = dict(base_batch_size=512)
