"""Maps for dense prediction: the official backbones' numbers, and where things are in them."""

import pytest
import torch
from torch import nn

import vssm
from golden import records
from golden.dense import OFFICIAL
from vssm import checkpoint
from vssm.dense import DenseBackbone, has_one_stride
from vssm.engine.convert import convert


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_keys_load_and_give_the_official_maps(name, device):
    record = records.load(name)
    backbone = DenseBackbone(**OFFICIAL[name]).eval()
    backbone.load(record.state_dict)
    with torch.no_grad():
        maps = backbone.to(device)(record.images.to(device))
    assert [each.shape[1] for each in maps] == backbone.out_channels
    for level, each in enumerate(maps):
        record.check(f"stage{level}", each)


@pytest.mark.parametrize("name", [name for name in OFFICIAL if not name.startswith("local_mamba")])
def test_files_of_whole_detectors_are_converted(name, tmp_path):
    """Backbone under our keys, the rest as it was; the backbone's official numbers come out."""
    record, setting = records.load(name), OFFICIAL[name]
    heads = {"neck.lateral_convs.0.conv.weight": torch.randn(4, 3), "decode_head.conv_seg.bias": torch.randn(5)}
    theirs = {f"backbone.{key}": value for key, value in record.state_dict.items()}
    torch.save({"meta": {"iter": 1}, "state_dict": theirs | heads}, tmp_path / "official.pth")
    size = {"img_size": (setting["img_size"],) * 2} if "img_size" in setting else {}
    task = "segment" if "_seg" in name else "detect"
    written = convert(tmp_path / "official.pth", setting["model_name"], task=task, **size)
    assert written["keys"].keys() | written["dropped"].keys() >= theirs.keys() | heads.keys()
    whole = checkpoint.read_whole(tmp_path / "official.safetensors")
    backbone = DenseBackbone(**setting).eval()
    inside = {key.removeprefix("backbone."): value for key, value in whole.items() if key not in heads}
    backbone.load_state_dict(inside, strict=True)
    for key, value in heads.items():
        assert torch.equal(whole[key], value)
    with torch.no_grad():
        for level, each in enumerate(backbone(record.images)):
            record.check(f"stage{level}", each)


def test_a_classifier_is_no_detector(tmp_path):
    torch.save(vssm.create_model("test_vim").state_dict(), tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"names begin with 'backbone\.'.*for a classifier leave the task out"):
        convert(tmp_path / "own.pth", "test_vim", task="detect", output=tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="heads of detectors and segmentors keep their classes"):
        convert(tmp_path / "own.pth", "test_vim", task="segment", num_classes=3, output=tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="expected task 'detect', got 'segment'"):
        convert(tmp_path / "own.pth", "mambayolo_tiny", task="segment", output=tmp_path / "out.safetensors")


@pytest.mark.parametrize("model", vssm.list_models("test_*"))
def test_maps_show_a_change_where_it_is(model):
    """Every level shows a changed square in the cells that it covers, in an image whose sides no stride divides."""
    one_stride = has_one_stride(vssm.create_model(model))
    backbone = DenseBackbone(model, pyramid=one_stride).eval()
    assert backbone.out_strides == [4, 8, 16, 32][: len(backbone.out_strides)]
    top, bottom, left, right = 48, 64, 96, 109
    image = torch.rand(1, 3, 75, right)
    changed = image.clone()
    changed[..., top:bottom, left:right] = 5.0
    with torch.no_grad():
        before, after = backbone(image), backbone(changed)
    for stride, a, b in zip(backbone.out_strides, before, after, strict=True):
        assert a.shape[2] * stride >= image.shape[2]
        assert a.shape[3] * stride >= image.shape[3]
        change = (a - b).abs().mean((0, 1))
        inside = torch.zeros_like(change, dtype=torch.bool)
        inside[top // stride : -(-bottom // stride), left // stride : -(-right // stride)] = True
        assert change[inside].mean() > 2 * change[~inside].mean()


def test_a_level_does_not_depend_on_the_others():
    torch.manual_seed(1)
    whole = DenseBackbone("test_vmamba").eval()
    part = DenseBackbone("test_vmamba", (1, 2)).eval()
    part.load_state_dict(whole.state_dict(), strict=False)
    assert not any(name.startswith("model.stages.3") for name, _ in part.named_parameters())
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(part(image), whole(image)[1:3], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_mixer_outputs_are_what_blocks_add():
    plain, mixer = (DenseBackbone("test_vim", (1, 3), source=source).eval() for source in ("stream", "mixer"))
    mixer.load_state_dict(plain.state_dict())
    before = DenseBackbone("test_vim", (0, 2)).eval()
    before.load_state_dict({key: value for key, value in plain.state_dict().items() if "blocks.3" not in key})
    image = torch.rand(1, 3, 96, 80)
    with torch.no_grad():
        for added, after, old in zip(mixer(image), plain(image), before(image), strict=True):
            torch.testing.assert_close(added, after - old, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["stream", "mixer"])
def test_recomputing_blocks_gives_the_same_gradients(source):
    gradients = []
    image = torch.rand(1, 3, 96, 96)
    for with_cp in (False, True):
        torch.manual_seed(0)
        backbone = DenseBackbone("test_vim", source=source, with_cp=with_cp)
        sum(each.square().sum() for each in backbone(image)).backward()
        gradients.append({name: parameter.grad for name, parameter in backbone.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("model", ["test_plainmamba", "test_efficientvmamba"])
def test_frozen_parts_stay_as_they_are(model):
    backbone = DenseBackbone(model, frozen_stages=1).train()
    kind = "stages" if hasattr(backbone.model, "stages") else "blocks"
    frozen = {
        key: value.clone()
        for key, value in backbone.state_dict().items()
        if not key.startswith(tuple(f"model.{kind}.{i}." for i in (1, 2, 3)))
    }
    assert any("stem" in key for key in frozen)
    assert any(f"{kind}.0" in key for key in frozen)
    optimizer = torch.optim.SGD([each for each in backbone.parameters() if each.requires_grad], lr=0.1)
    sum(each.sum() for each in backbone(torch.rand(2, 3, 64, 64))).backward()
    optimizer.step()
    after = backbone.state_dict()
    assert [key for key, value in frozen.items() if not torch.equal(after[key], value)] == []
    assert any(not torch.equal(after[key], value) for key, value in DenseBackbone(model).state_dict().items())


def test_batch_norms_can_be_kept_as_they_are():
    backbone = DenseBackbone("test_efficientvmamba", norm_eval=True).train()
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert backbone.training
    assert not any(norm.training for norm in norms)


@pytest.mark.parametrize("model", ["test_vim", "test_vmamba"])
def test_classifier_weights_load_whole_or_not_at_all(model):
    classifier = vssm.create_model(model, num_classes=7)
    backbone = DenseBackbone(model, out_norm=True, pyramid=model == "test_vim")
    backbone.load(classifier.state_dict())
    state = classifier.state_dict()
    for key, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)

    own = backbone.state_dict()
    DenseBackbone(model, out_norm=True, pyramid=model == "test_vim").load(own)
    key = "norms.3.weight"
    with pytest.raises(ValueError, match=rf"1 missing \({key}\)"):
        backbone.load({name: value for name, value in own.items() if name != key})
    backbone.load({name: value for name, value in own.items() if name != key}, allow_missing=["norms.*.weight"])
    lost = next(name for name in state if name.endswith("in_proj.weight"))
    with pytest.raises(ValueError, match=rf"1 missing \(model\.{lost}\)"):
        backbone.load({name: value for name, value in state.items() if name != lost})
    with pytest.raises(ValueError, match=r"has no 'stem\.surplus'"):
        backbone.load({**state, "stem.surplus": state[lost]})


def test_weights_of_another_image_size_and_with_a_class_token_load():
    classifier = vssm.create_model("test_vim").eval()
    backbone = DenseBackbone("test_vim", (0, 3), class_token=False, img_size=96).eval()
    backbone.load(classifier.state_dict())
    expected = vssm.create_model("test_vim", class_token=False, global_pool="avg", img_size=96).eval()
    vssm.checkpoint.load(expected, classifier.state_dict())
    image = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        theirs = expected.forward_intermediates(image, indices=(0, 3), intermediates_only=True)
        for a, b in zip(backbone(image), theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"increasing numbers of blocks from 0 to 3 of test_vim, got \(3, 1\)"):
        DenseBackbone("test_vim", (3, 1))
    with pytest.raises(ValueError, match="source of test_vmamba must be 'stream', got 'mixer'"):
        DenseBackbone("test_vmamba", source="mixer")
    with pytest.raises(ValueError, match="pyramid needs up to 4 levels of one stride"):
        DenseBackbone("test_vmamba", pyramid=True)
    with pytest.raises(ValueError, match="final_norm needs a model of one stride whose last block"):
        DenseBackbone("test_vim", (0, 1), final_norm=True)
    with pytest.raises(ValueError, match="frozen_stages of test_vim must be at most 4, got 5"):
        DenseBackbone("test_vim", frozen_stages=5)
