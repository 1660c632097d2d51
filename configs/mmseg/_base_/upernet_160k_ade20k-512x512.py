# UPerNet for 160,000 steps of 16 crops, as VMamba and its relatives took it over from Swin.
_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["vssm.openmmlab"], allow_failed_imports=False)
custom_hooks = [dict(type="VSSMChannelCheck")]
model = dict(pretrained=None, backbone=dict(_delete_=True, type="VSSMBackbone", pretrained=True, out_norm=True))
