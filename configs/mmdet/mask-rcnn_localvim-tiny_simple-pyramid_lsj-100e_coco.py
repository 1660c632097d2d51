# Published by its authors: 45.3 / 39.9 box / mask AP on val2017, for a cascade; what they released has no cascade. Their
# norms were LayerNorms there, not RMSNorms.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "_base_/lsj-100e_coco.py"]
norm = dict(type="VSSMLayerNorm2d")
model = dict(
    data_preprocessor=dict(batch_augments=[dict(type="BatchFixedSizePad", size=(1024, 1024), pad_mask=True)]),
    backbone=dict(
        _delete_=True,
        type="VSSMBackbone",
        model_name="localvim_tiny",
        pretrained=True,
        img_size=1024,
        drop_path_rate=0.1,
        out_indices=(19,),
        out_norm=True,
        source="mixer",
    ),
    neck=dict(_delete_=True, type="VSSMSimplePyramid", in_channels=[192]),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm),
        mask_head=dict(norm_cfg=norm),
    ),
)
optim_wrapper = dict(clip_grad=dict(max_norm=35))
