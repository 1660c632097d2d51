# Published by its authors: 53.7 mIoU, 54.1 at several scales on the validation part.
# They released no settings: these are VMamba's, with the drop path of the classifier.
_base_ = "_base_/upernet_160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model_name="a2mamba_large", drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 448, 672]),
    auxiliary_head=dict(in_channels=448),
)
