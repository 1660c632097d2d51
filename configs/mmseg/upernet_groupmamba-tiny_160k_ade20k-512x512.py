# Published by its authors: 48.6 mIoU, 49.2 at several scales on the validation part.
# They released no settings: these are VMamba's, with the drop path of the classifier.
_base_ = "_base_/upernet_160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model_name="groupmamba_tiny", drop_path_rate=0.05),
    decode_head=dict(in_channels=[64, 128, 348, 448]),
    auxiliary_head=dict(in_channels=348),
)
