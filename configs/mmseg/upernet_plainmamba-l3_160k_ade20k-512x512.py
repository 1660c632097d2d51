# Published by its authors: 49.1 mIoU on the validation part. All four maps have stride 16.
_base_ = "_base_/upernet_160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model_name="plainmamba_l3", final_norm=True, norm_eps=1e-6),
    decode_head=dict(in_channels=[448] * 4),
    auxiliary_head=dict(in_channels=448, in_index=3),
)
