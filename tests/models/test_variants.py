"""Every registered variant: published parameter counts, and default configurations that hold together."""

import pytest
import timm
import torch
from timm.models import get_arch_pretrained_cfgs

import vssm
from vssm.models import FAMILIES

# Exact where the official model was counted, in millions to the published digits elsewhere.
PARAMETERS = {
    "vim_tiny_patch16_224": 7_148_008,
    "vim_tiny_patch16_stride8_224": 7_250_344,
    "vim_small_patch16_224": 25.797,
    "vim_small_patch16_stride8_224": 26.001,
    "vim_base_patch16_224": 97.598,
    "localvim_tiny": 7_994_152,
    "localvim_tiny_class_token": 7_994_536,
    "localvim_small": 27.784,
    "localvmamba_tiny": 25_527_160,
    "localvmamba_small": 49.749,
    "plainmamba_l1": 7_551_656,
    "plainmamba_l2": 26.146,
    "plainmamba_l3": 50.956,
    "vmamba_tiny_s1l8": 30_249_064,
    "vmamba_tiny_s2l5": 30_705_832,
    "vmamba_small_s2l15": 50_147_752,
    "vmamba_small_s1l20": 49_012_840,
    "vmamba_base_s2l15": 88_557_800,
    "vmamba_base_s1l20": 86_614_504,
    "vmamba_tiny_v0": 22_893_448,
    "vmamba_small_v0": 44_417_416,
    "vmamba_base_v0": 76_254_056,
    "msvmamba_nano": 6_864_136,
    "msvmamba_micro": 11_879_272,
    "msvmamba_tiny": 33_046_312,
    "msvmamba_tiny_v3": 32_263_720,
    "msvmamba_small_v3": 50_216_296,
    "efficientvmamba_tiny": 6_493_660,
    "efficientvmamba_small": 11_273_688,
    "efficientvmamba_base": 33_717_136,
    "groupmamba_tiny": 23_361_917,
    "groupmamba_small": 34_781_555,
    "groupmamba_base": 57_150_838,
    "mambavision_tiny": 31_794_248,
    "mambavision_tiny2": 35_104_008,
    "mambavision_small": 50_140_584,
    "mambavision_base": 97_685_288,
    "mambavision_large": 227_961_048,
    "mambavision_large2": 241_554_824,
    "a2mamba_nano": 4_195_052,
    "a2mamba_tiny": 15_365_506,
    "a2mamba_small": 30_672_834,
    "a2mamba_base": 51_134_464,
    "a2mamba_large": 93.737,  # printed as 95
    "vim2_tiny": 24.011,  # printed as 20; the sizes below as 43 and 74
    "vim2_small": 43.675,
    "vim2_base": 75.583,
    "mambayolo_tiny": 2_942_776,  # backbones with a classifier, which no paper counts; detectors are in `test_yolo`
    "mambayolo_base": 10_550_752,
    "mambayolo_large": 33_332_248,
}
WITHOUT_GATE = {"vim2_tiny": 19_698_399, "vim2_small": 35_822_844, "vim2_base": 61_623_708}  # as the card has them
VARIANTS = [name for name in vssm.list_models() if not name.startswith("test_")]


@pytest.fixture(params=VARIANTS)
def variant(request):
    with torch.device("meta"):
        return request.param, timm.create_model(request.param)


def test_parameter_count(variant):
    name, model = variant
    count = sum(parameter.numel() for parameter in model.parameters())
    published = PARAMETERS[name]
    assert count == published if isinstance(published, int) else round(count / 1e6, 3) == published


@pytest.mark.parametrize("name", WITHOUT_GATE)
def test_parameter_count_without_gate(name):
    with torch.device("meta"):
        model = vssm.create_model(name, gate=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == WITHOUT_GATE[name]


def test_default_configuration(variant):
    name, model = variant
    for cfg in get_arch_pretrained_cfgs(name).values():
        assert (cfg.url or cfg.origin_url).startswith("https://")
        assert cfg.license
        assert cfg.origin_url
        assert cfg.paper_ids
        assert model.get_submodule(cfg.first_conv).in_channels == cfg.input_size[0]
        for classifier in [cfg.classifier] if isinstance(cfg.classifier, str) else cfg.classifier:
            assert model.get_submodule(classifier).out_features == cfg.num_classes
    assert model(torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")).shape == (1, 1000)


def test_lists():
    assert set(PARAMETERS) == set(VARIANTS)
    assert vssm.list_models("vim_small*") == ["vim_small_patch16_224", "vim_small_patch16_stride8_224"]
    assert vssm.list_models("vim_base*", pretrained=True) == ["vim_base_patch16_224.in1k"]
    assert "test_vim" not in vssm.list_models(pretrained=True)
    assert sorted(name for family in FAMILIES for name in vssm.list_models(family=family)) == vssm.list_models()
    assert vssm.list_models("*vmamba_*_v0", family="vmamba") == ["vmamba_base_v0", "vmamba_small_v0", "vmamba_tiny_v0"]
    assert not set(vssm.list_models()) & {"resnet18", "vit_base_patch16_224"}
    with pytest.raises(ValueError, match="unknown family 'vmi', expected one of vim, "):
        vssm.list_models(family="vmi")


def test_unknown_names():
    with pytest.raises(ValueError, match=r"unknown model 'vim_tny_patch16_224'.* vim_tiny_patch16_224"):
        vssm.create_model("vim_tny_patch16_224")
    with pytest.raises(ValueError, match=r"unknown weights .*in22k', expected one of vim_tiny_patch16_224.in1k"):
        vssm.create_model("vim_tiny_patch16_224.in22k")
    assert vssm.create_model("vim_tiny_patch16_224.in1k", depth=1).num_features == 192
