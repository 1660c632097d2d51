# Published by its authors: 50.0 mIoU, 51.0 at several scales on the validation part.
_base_ = "_base_/upernet_160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model_name="localvmamba_small", drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
