# Published by its authors: 41.0 mIoU on the validation part, from earlier weights than those that pretrained=True loads.
# 60,000 steps of 32 crops, on 4 GPUs.
_base_ = "_base_/upernet_160k_ade20k-512x512.py"
model = dict(
    backbone=dict(
        model_name="vim_tiny_patch16_224",
        img_size=512,
        class_token=False,
        source="mixer",
        pyramid=True,
        out_norm=False,
    ),
    decode_head=dict(in_channels=[192] * 4, channels=192),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    constructor="VSSMLayerDecay",
    optimizer=dict(lr=2e-4, weight_decay=0.1),
    paramwise_cfg=dict(_delete_=True, layer_decay=0.92),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=60000, by_epoch=False),
]
train_cfg = dict(max_iters=60000)
train_dataloader = dict(batch_size=8)
