# Published by its authors: 49.1 mIoU on the validation part.
_base_ = "upernet_mambavision-tiny_160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model_name="mambavision_base"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
