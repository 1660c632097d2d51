"""Official keys load strictly, and the networks compute what the official code computes."""

import pytest
import torch
from torch import nn

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
# Their official backbones of detectors, which have a norm of their own, outnorm{i}, after each stage.
GRID_BACKBONE_RECORDS = {
    "vmamba/vmamba_tiny_s1l8_backbone@256x192": "vmamba_tiny_s1l8",
    "msvmamba/msvmamba_nano_backbone@256x192": "msvmamba_nano",
    "efficient_vmamba/efficient_vmamba_tiny_backbone@256x192": "efficientvmamba_tiny",
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
    ],
)
def test_classifier_under_autocast(name, device):
    record = records.load(name)
    model_name, arguments = RECORDS[name] if name in RECORDS else (GRID_RECORDS[name], {})
    model = vssm.create_model(model_name, **arguments).eval()
    vssm.checkpoint.load(model, record.state_dict)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        logits = model.to(device)(record.images.to(device))
    assert logits.dtype == torch.bfloat16
    record.check("logits", logits, tolerance=2e-2)


@pytest.mark.parametrize("name", GRID_BACKBONE_RECORDS)
def test_detection_backbone_of_stages(name, device):
    record = records.load(name)
    model = vssm.create_model(GRID_BACKBONE_RECORDS[name]).eval()
    model.prune_intermediate_layers(len(model.stages), prune_norm=True)
    norms = nn.ModuleDict({f"outnorm{i}": nn.LayerNorm(info["num_chs"]) for i, info in enumerate(model.feature_info)})
    norms.load_state_dict({key: value for key, value in record.state_dict.items() if key.startswith("outnorm")})
    vssm.checkpoint.load(
        model, {key: value for key, value in record.state_dict.items() if not key.startswith("outnorm")}
    )
    assert sum(parameter.numel() for part in (model, norms) for parameter in part.parameters()) == record.num_params
    model, norms = model.to(device), norms.to(device)

    with torch.no_grad():
        maps = model.forward_intermediates(record.images.to(device), output_fmt="NHWC", intermediates_only=True)
        for stage, each in enumerate(maps):
            record.check(f"stage{stage}", norms[f"outnorm{stage}"](each).permute(0, 3, 1, 2))


def _official_fpn(dim: int) -> nn.ModuleDict:
    """The four levels that the official segmentation backbone of Vim makes of its one."""
    return nn.ModuleDict(
        {
            "fpn1": nn.Sequential(
                nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)
            ),
            "fpn2": nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2)),
            "fpn3": nn.Identity(),
            "fpn4": nn.MaxPool2d(2, 2),
        }
    )


def test_segmentation_backbone_of_vim(device):
    record = records.load("vim/vim_tiny_seg@256x256")
    model = vssm.create_model(
        "vim_tiny_patch16_224", img_size=256, class_token=False, global_pool="", num_classes=0
    ).eval()
    fpn = _official_fpn(model.embed_dim).eval()
    fpn.load_state_dict({key: value for key, value in record.state_dict.items() if key.startswith("fpn")})
    vssm.checkpoint.load(model, {key: value for key, value in record.state_dict.items() if not key.startswith("fpn")})
    model, fpn = model.to(device), fpn.to(device)

    outputs = []  # of the mixers: the official backbone leaves the residual stream out
    for block in (5, 11, 17, 23):
        model.blocks[block].mixer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(record.images.to(device))
        for level, tokens in enumerate(outputs):
            patches = tokens.unflatten(1, model.grid_size).permute(0, 3, 1, 2)
            record.check(f"stage{level}", fpn[f"fpn{level + 1}"](patches))


def test_segmentation_backbone_of_plainmamba(device):
    record = records.load("plain_mamba/plain_mamba_l1_seg@160x256")
    model = vssm.create_model("plainmamba_l1", dynamic_img_size=True, num_classes=0).eval()
    norms = nn.ModuleDict({f"norm_layer{block}": nn.LayerNorm(model.embed_dim, eps=1e-6) for block in (5, 11, 17)})
    norms.load_state_dict({key: value for key, value in record.state_dict.items() if key.startswith("norm_layer")})
    backbone = {key: value for key, value in record.state_dict.items() if not key.startswith("norm_layer")}
    vssm.checkpoint.load(model, backbone)
    assert sum(parameter.numel() for part in (model, norms) for parameter in part.parameters()) == record.num_params
    model, norms = model.to(device), norms.to(device)

    with torch.no_grad():
        blocks = (5, 11, 17, 23)
        images = record.images.to(device)
        maps = model.forward_intermediates(images, indices=blocks, intermediates_only=True)
        for level, (norm, each) in enumerate(zip([*norms.values(), model.norm], maps, strict=True)):
            record.check(f"stage{level}", norm(each.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_dense_backbone_of_localvim(device):
    """The official one has layer norms, and gives what the mixers add, through norms of its own."""
    record = records.load("local_mamba/local_vim_tiny_backbone@256x256")
    model = vssm.create_model("localvim_tiny", dynamic_img_size=True, num_classes=0, norm_layer=nn.LayerNorm).eval()
    model.norm = nn.Identity()
    norms = nn.ModuleDict({f"outnorm_{level}": nn.LayerNorm(model.embed_dim) for level in range(4)})
    norms.load_state_dict({key: value for key, value in record.state_dict.items() if key.startswith("outnorm")})
    backbone = {key: value for key, value in record.state_dict.items() if not key.startswith("outnorm")}
    vssm.checkpoint.load(model, backbone)
    assert sum(parameter.numel() for part in (model, norms) for parameter in part.parameters()) == record.num_params
    model, norms = model.to(device), norms.to(device)

    outputs = []
    for block in (4, 9, 14, 19):
        model.blocks[block].mixer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(record.images.to(device))
        for level, tokens in enumerate(outputs):
            patches = norms[f"outnorm_{level}"](tokens).unflatten(1, (16, 16)).permute(0, 3, 1, 2)
            record.check(f"stage{level}", patches)
