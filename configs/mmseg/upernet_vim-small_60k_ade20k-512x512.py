# Published by its authors: 44.9 mIoU on the validation part, from earlier weights than those that pretrained=True loads.
# Their network rotated tokens by their positions before each block, which those weights do not.
_base_ = "upernet_vim-tiny_60k_ade20k-512x512.py"
model = dict(
    backbone=dict(model_name="vim_small_patch16_224", source="stream"),
    decode_head=dict(in_channels=[384] * 4, channels=384),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05), paramwise_cfg=dict(layer_decay=0.95))
