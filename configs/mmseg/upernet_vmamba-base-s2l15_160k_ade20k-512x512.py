# Published by its authors: 51.0 mIoU, 51.6 at several scales on the validation part.
_base_ = "_base_/upernet_160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model_name="vmamba_base_s2l15", drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
