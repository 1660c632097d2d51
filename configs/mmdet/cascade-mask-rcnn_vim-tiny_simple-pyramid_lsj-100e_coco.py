# Published by its authors: 45.7 / 39.2 box / mask AP on val2017, trained with detectron2, from earlier weights than those
# that pretrained=True loads. What they do not say is ViTDet's.
_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py", "_base_/lsj-100e_coco.py"]
norm = dict(type="VSSMLayerNorm2d")
deviations = ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
model = dict(
    data_preprocessor=dict(batch_augments=[dict(type="BatchFixedSizePad", size=(1024, 1024), pad_mask=True)]),
    backbone=dict(
        _delete_=True,
        type="VSSMBackbone",
        model_name="vim_tiny_patch16_224",
        pretrained=True,
        img_size=1024,
        class_token=False,
        out_indices=(23,),
    ),
    neck=dict(_delete_=True, type="VSSMSimplePyramid", in_channels=[192]),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=[
            dict(
                type="Shared4Conv1FCBBoxHead",
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                norm_cfg=norm,
                reg_class_agnostic=True,
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=each),
                loss_cls=dict(type="CrossEntropyLoss"),
                loss_bbox=dict(type="SmoothL1Loss"),
            )
            for each in deviations
        ],
        mask_head=dict(norm_cfg=norm),
    ),
)
optim_wrapper = dict(
    constructor="VSSMLayerDecay",
    optimizer=dict(weight_decay=0.1),
    paramwise_cfg=dict(layer_decay=0.837),
)
