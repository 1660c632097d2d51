# Published by its authors: 48.2 mIoU on the validation part.
_base_ = "upernet_mambavision-tiny_160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model_name="mambavision_small", window_sizes=(160, 56)),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5))
