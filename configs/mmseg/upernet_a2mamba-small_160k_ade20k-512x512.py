# Published by its authors: 51.6 mIoU, 52.0 at several scales on the validation part.
# They released no settings: these are VMamba's, with the drop path of the classifier.
_base_ = "_base_/upernet_160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model_name="a2mamba_small", drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
