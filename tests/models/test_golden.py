"""Official keys load strictly, and the networks compute what the official code computes."""

import pytest
import torch

import vssm
from golden import records

RECORDS = {
    "vim/vim_tiny": ("vim_tiny_patch16_224", {}),
    "vim/vim_tiny@160x256": ("vim_tiny_patch16_224", {"img_size": (160, 256)}),
    "vim/vim_tiny_stride8": ("vim_tiny_patch16_stride8_224", {}),
    "plain_mamba/plain_mamba_l1": ("plainmamba_l1", {}),
    "plain_mamba/plain_mamba_l1@160x256": ("plainmamba_l1", {"dynamic_img_size": True}),
    "local_mamba/local_vim_tiny": ("localvim_tiny", {}),
    "local_mamba/local_vim_tiny@160x256": ("localvim_tiny", {"dynamic_img_size": True}),
    "local_mamba/local_vim_tiny@256x256": ("localvim_tiny", {"dynamic_img_size": True}),
    "local_mamba/local_vim_tiny_middle_cls_token": ("localvim_tiny", {"class_token": True, "global_pool": "token"}),
}

# Models of several stages.
GRID_RECORDS = {
    "vmamba/vmamba_tiny_s1l8": "vmamba_tiny_s1l8",
    "vmamba/vmamba_tiny_s1l8@160x256": "vmamba_tiny_s1l8",
    "vmamba/vmamba_tiny_s1l8@200x136": "vmamba_tiny_s1l8",
    "vmamba/vmamba_tiny_s2l5": "vmamba_tiny_s2l5",
    "vmamba/vmamba_tiny_s2l5@160x256": "vmamba_tiny_s2l5",
    "vmamba/vanilla_vmamba_tiny": "vmamba_tiny_v0",
    "vmamba/vanilla_vmamba_tiny@160x256": "vmamba_tiny_v0",
    "msvmamba/msvmamba_nano": "msvmamba_nano",
    "msvmamba/msvmamba_nano@160x256": "msvmamba_nano",
    "msvmamba/msvmamba_nano@200x136": "msvmamba_nano",
    "msvmamba/msvmamba_tiny": "msvmamba_tiny",
    "msvmamba/msvmamba_tiny@160x256": "msvmamba_tiny",
    "msvmamba/msvmambav3_tiny": "msvmamba_tiny_v3",
    "msvmamba/msvmambav3_tiny@160x256": "msvmamba_tiny_v3",
    "efficient_vmamba/efficient_vmamba_tiny": "efficientvmamba_tiny",
    "efficient_vmamba/efficient_vmamba_tiny@160x256": "efficientvmamba_tiny",
    "efficient_vmamba/efficient_vmamba_tiny@200x136": "efficientvmamba_tiny",
    "local_mamba/local_vssm_tiny": "localvmamba_tiny",
    "local_mamba/local_vssm_tiny@160x256": "localvmamba_tiny",
}
# Models whose records count stages from 1: all that is recorded.
STAGE_RECORDS = {
    "group_mamba/groupmamba_tiny": "groupmamba_tiny",
    "group_mamba/groupmamba_tiny@160x256": "groupmamba_tiny",
    "mamba_vision/mamba_vision_T": "mambavision_tiny",
    "mamba_vision/mamba_vision_T@160x256": "mambavision_tiny",
    "a2mamba/a2mamba_n": "a2mamba_nano",
    "a2mamba/a2mamba_n@224x320": "a2mamba_nano",
    "a2mamba/a2mamba_t": "a2mamba_tiny",
}
# Whole detectors, of which this is the backbone; `test_yolo` has the rest.
DETECTOR_RECORDS = {
    "mamba_yolo/mamba_yolo_t": "mambayolo_tiny",
    "mamba_yolo/mamba_yolo_t@160x256": "mambayolo_tiny",
}


@pytest.mark.parametrize("name", RECORDS)
def test_classifier_computes_the_official_outputs(name, device):
    record = records.load(name)
    model_name, arguments = RECORDS[name]
    model = vssm.create_model(model_name, **arguments).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == record.num_params
    vssm.checkpoint.load(model, record.state_dict)
    model, images = model.to(device), record.images.to(device)

    blocks = record.blocks()
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(images, indices=blocks)
        (last,) = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        record.check("logits", model.forward_head(tokens))

    if "cls" in record.arrays:
        record.check("cls", tokens[:, model.class_token_index(tokens.shape[1])])
    record.check("stage0", last)
    assert len(blocks) == 4
    for block, each in zip(blocks, maps, strict=True):
        record.check(f"block{block}", each)


@pytest.mark.parametrize("name", GRID_RECORDS)
def test_classifier_of_stages_computes_the_official_outputs(name, device):
    record = records.load(name)
    model = vssm.create_model(GRID_RECORDS[name]).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == record.num_params
    vssm.checkpoint.load(model, record.state_dict)
    model, images = model.to(device), record.images.to(device)

    with torch.no_grad():
        features, maps = model.forward_intermediates(images)
        if "stem_mean" in record.arrays:
            record.check("stem", model.stem(images).permute(0, 3, 1, 2))
        record.check("logits", model.forward_head(features))
    for stage, each in enumerate(maps):
        record.check(f"stage{stage}", each)


@pytest.mark.parametrize("name", STAGE_RECORDS)
def test_classifier_of_numbered_stages_computes_the_official_outputs(name, device):
    record = records.load(name)
    model = vssm.create_model(STAGE_RECORDS[name]).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == record.num_params
    vssm.checkpoint.load(model, record.state_dict)
    model, images = model.to(device), record.images.to(device)

    with torch.no_grad():
        features, maps = model.forward_intermediates(images)
        (normed,) = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        record.check("logits", model.forward_head(features))
    for stage, each in enumerate(maps, start=1):
        record.check(f"stage{stage}", each)
    if "stage4_norm_mean" in record.arrays:
        record.check("stage4_norm", normed)


@pytest.mark.parametrize("name", DETECTOR_RECORDS)
def test_backbone_of_a_detector_computes_the_official_maps(name, device):
    record = records.load(name)
    model = vssm.create_model(DETECTOR_RECORDS[name], num_classes=0).eval()
    vssm.checkpoint.load(model, record.state_dict)
    with torch.no_grad():
        maps = model.to(device).forward_intermediates(record.images.to(device), intermediates_only=True)
    for level, each in enumerate(maps, start=2):
        record.check(f"backbone_p{level}", each)


def test_classifiers_of_groupmamba_compute_the_official_outputs(device):
    record = records.load("group_mamba/groupmamba_tiny@160x256")
    model = vssm.create_model("groupmamba_tiny").eval()
    vssm.checkpoint.load(model, record.state_dict)
    features = model.to(device).forward_features(record.images.to(device))
    model.head.train()
    model.set_distilled_training()
    with torch.no_grad():
        record.check("pooled", model.forward_head(features, pre_logits=True))
        logits, distilled = model.forward_head(features)
    record.check("head_logits", logits)
    record.check("dist_logits", distilled)


@pytest.mark.parametrize(
    "name",
    [
        "vmamba/vmamba_tiny_s1l8@200x136",
        "vmamba/vmamba_tiny_s2l5@160x256",
        "plain_mamba/plain_mamba_l1",
        "msvmamba/msvmamba_nano",
        "msvmamba/msvmambav3_tiny@160x256",
        "efficient_vmamba/efficient_vmamba_tiny@200x136",
        "local_mamba/local_vim_tiny",
        "mamba_vision/mamba_vision_T",
        "a2mamba/a2mamba_n@224x320",
    ],
)
def test_classifier_under_autocast(name, device):
    record = records.load(name)
    model_name, arguments = RECORDS[name] if name in RECORDS else ((GRID_RECORDS | STAGE_RECORDS)[name], {})
    model = vssm.create_model(model_name, **arguments).eval()
    vssm.checkpoint.load(model, record.state_dict)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        logits = model.to(device)(record.images.to(device))
    assert logits.dtype == torch.bfloat16
    record.check("logits", logits, tolerance=2e-2)
