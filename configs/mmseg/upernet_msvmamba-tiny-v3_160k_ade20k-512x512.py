# Published by its authors: 47.9 mIoU, 48.5 at several scales on the validation part.
_base_ = "_base_/upernet_160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model_name="msvmamba_tiny_v3", drop_path_rate=0.1),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
