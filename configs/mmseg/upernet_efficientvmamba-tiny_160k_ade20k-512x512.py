# Published by its authors: 38.9 mIoU, 39.3 at several scales on the validation part.
_base_ = "_base_/upernet_160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model_name="efficientvmamba_tiny", drop_path_rate=0.1),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192),
)
