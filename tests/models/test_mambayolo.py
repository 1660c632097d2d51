"""What is Mamba-YOLO's own: sides of odd length, batch norms, what scans start from, keys of whole detectors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vssm
from golden import records
from vssm.dense import DenseBackbone
from vssm.models.mambayolo import LocalSpatialBlock, MambaYoloBlock, VisionClueMerge

RECORD = "mamba_yolo/mamba_yolo_t@160x256"


def test_blocks_add_to_what_the_projection_gives_not_to_the_local_block():
    block = vssm.create_model("test_mambayolo").eval().stages[0].blocks[0]
    assert isinstance(block, MambaYoloBlock)
    nn.init.zeros_(block.mixer.out_proj.weight)
    for parameter in block.mlp.fc2.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 15, 16)
    maps = x.transpose(1, 2).unflatten(2, (3, 5))
    torch.testing.assert_close(block(x, (3, 5)), block.proj(maps).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (3, 7)], ids=str)
def test_merging_pads_odd_sides_at_the_right_and_bottom(size):
    merge = VisionClueMerge(3, 5).eval()
    x = torch.randn(2, *size, 3)
    padded = torch.zeros(2, -(-size[0] // 2) * 2, -(-size[1] // 2) * 2, 3)
    padded[:, : size[0], : size[1]] = x
    phases = torch.cat([padded[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
    weight = merge.conv.conv.weight.permute(0, 3, 2, 1).flatten(1)  # (5, 12), by column, row and channel
    joined = F.linear(phases, weight, merge.conv.conv.bias)
    expected = F.silu(merge.conv.bn.running_var.add(1e-3).rsqrt() * joined)
    torch.testing.assert_close(merge(x), expected)


def test_local_block_of_a_grid_that_is_no_square():
    block = LocalSpatialBlock(4).eval()
    x = torch.randn(1, 6, 4)
    maps = x.transpose(1, 2).unflatten(2, (2, 3))
    normed = block.norm(block.conv.conv(maps)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(block(x, (2, 3)), x + block.fc2(F.gelu(block.fc1(normed))))


def test_batch_norms_and_scans_start_as_in_the_official_code():
    torch.manual_seed(0)
    model = vssm.create_model("mambayolo_tiny")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 17
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}
    ssm = model.stages[3].blocks[0].mixer.ssm
    assert not ssm.A_log.any()
    assert (ssm.D == 1).all()
    for parameter in (ssm.dt_weight, ssm.dt_bias):
        assert parameter.mean().item() == pytest.approx(0, abs=0.1)
        assert parameter.std().item() == pytest.approx(1, abs=0.1)


def test_wrong_detectors_are_refused():
    record = records.load(RECORD)
    model = vssm.create_model("mambayolo_tiny", num_classes=0)
    with pytest.raises(ValueError, match=r"mambayolo: unknown key 'model\.22\.weight' in the checkpoint"):
        vssm.checkpoint.load(model, record.state_dict | {"model.22.weight": torch.ones(1)})
    incomplete = {key: value for key, value in record.state_dict.items() if key != "model.5.1.op.A_logs"}
    with pytest.raises(ValueError, match=r"1 missing \(stages\.2\.blocks\.1\.mixer\.ssm\.A_log\)"):
        vssm.checkpoint.load(model, incomplete)
    with pytest.raises(ValueError, match="does not fit MambaYolo"):
        vssm.checkpoint.load(vssm.create_model("mambayolo_base", num_classes=0), record.state_dict)
    with pytest.raises(ValueError, match="mambayolo_tiny: there are no published weights for pretrained=True"):
        vssm.create_model("mambayolo_tiny", pretrained=True)


def test_detectors_of_other_kinds_start_from_its_file():
    """Its keys begin as those of our own dense backbones do."""
    record = records.load(RECORD)
    backbone = DenseBackbone("mambayolo_tiny", out_indices=(1, 2, 3)).eval()
    backbone.load(record.state_dict)
    with torch.no_grad():
        for level, each in enumerate(backbone(record.images), start=3):
            record.check(f"backbone_p{level}", each)
