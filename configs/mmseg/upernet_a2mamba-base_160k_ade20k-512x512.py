# Published by its authors: 53.3 mIoU, 53.9 at several scales on the validation part.
# They released no settings: these are VMamba's, with the drop path of the classifier.
_base_ = "_base_/upernet_160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model_name="a2mamba_base", drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 512]),
    auxiliary_head=dict(in_channels=384),
)
