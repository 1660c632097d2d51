"""What is MambaVision's own: its mixer against a loop over tokens, windows, halves of a stage, official keys."""

import logging

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention, LayerScale
from torch import nn

import vssm
from golden import records
from vssm.models.mambavision import (
    ConvBlock,
    MambaVisionMixer,
    WindowBlock,
    WindowStage,
    checkpoint_filter_fn,
)


def test_mixer_against_a_loop_over_tokens():
    """Steps have the bias twice, the convolution sees both neighbours, and what is not scanned is no gate."""
    mixer = MambaVisionMixer(12, d_state=3).double()
    nn.init.normal_(mixer.ssm.D)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    projected = F.pad(x @ mixer.in_proj.weight.T, (0, 0, 1, 1))
    taps = mixer.conv.conv.weight[:, 0, 0]
    u, z = F.silu(sum(projected[:, i : i + 7] * taps[:, i] for i in range(3))).split(6, dim=-1)
    ssm = mixer.ssm
    state, y = torch.zeros(2, 6, 3, dtype=torch.float64), torch.zeros_like(u)
    for token in range(7):
        dt, B, C = (u[:, token] @ ssm.x_proj.weight.T).split([1, 3, 3], dim=-1)
        step = F.softplus(dt @ ssm.dt_weight[0].T + 2 * ssm.dt_bias[0])
        state = torch.exp(-step[..., None] * ssm.A_log[0].exp()) * state + (step * u[:, token])[..., None] * B[:, None]
        y[:, token] = (state * C[:, None]).sum(-1) + ssm.D[0] * u[:, token]
    torch.testing.assert_close(mixer(x), torch.cat([y, z], dim=-1) @ mixer.out_proj.weight.T)


class Recorder(nn.Module):
    """Keeps what it sees, and adds one to it."""

    def forward(self, x, size):
        self.seen, self.size = x, size
        return x + 1


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 1), (4, 9)], ids=str)
def test_windows_are_sequences_of_their_own(size):
    block = Recorder()
    x = torch.randn(2, *size, 3)
    torch.testing.assert_close(WindowStage([block], window=4)(x), x + 1)
    assert block.size == (4, 4)
    windows = []
    for image in x:
        padded = torch.zeros(12, 12, 3)
        padded[: size[0], : size[1]] = image
        for top in range(0, size[0], 4):
            windows += [padded[top : top + 4, left : left + 4].reshape(16, 3) for left in range(0, size[1], 4)]
    torch.testing.assert_close(block.seen, torch.stack(windows))


def test_padding_takes_part():
    stage = vssm.create_model("test_mambavision").eval().stages[2]
    stage.downsample = nn.Identity()
    x = torch.randn(1, 6, 6, 48)
    with torch.no_grad():
        torch.testing.assert_close(stage(x), stage(F.pad(x, (0, 0, 0, 2, 0, 2)))[:, :6, :6])
        last = stage(x)[:, 4:, 4:]
        stage.window = 2  # the last four tokens without padding
        assert not torch.allclose(stage(x[:, 4:, 4:]), last)


@pytest.mark.parametrize(("depth", "scanning"), [(1, 1), (2, 1), (5, 3)])
def test_first_half_of_a_stage_scans_and_the_rest_attends(depth, scanning):
    model = vssm.create_model("test_mambavision", depths=(1, 2, depth, 1))
    kinds = [[type(getattr(block, "mixer", block)) for block in stage.blocks] for stage in model.stages]
    assert kinds[:2] == [[ConvBlock], 2 * [ConvBlock]]
    assert kinds[2] == scanning * [MambaVisionMixer] + (depth - scanning) * [Attention]
    assert kinds[3] == [MambaVisionMixer]


def test_layer_scale_is_of_branches_in_windows_alone():
    block = WindowBlock(8, MambaVisionMixer(8), mlp_ratio=2, layer_scale=1e-5)
    nn.init.constant_(block.scale1.gamma, 2)
    nn.init.constant_(block.scale2.gamma, 3)
    x = torch.randn(2, 4, 8)
    inner = x + 2 * block.mixer(block.norm1(x))
    torch.testing.assert_close(block(x, (2, 2)), inner + 3 * block.mlp(block.norm2(inner)))
    with torch.device("meta"):
        base, small = vssm.create_model("mambavision_base"), vssm.create_model("mambavision_small")
    assert sum(isinstance(module, LayerScale) for module in base.modules()) == 2 * (10 + 5)
    assert not any(isinstance(module, LayerScale) for module in small.modules())


def test_attention_is_softmax_of_scaled_products():
    attention = vssm.create_model("test_mambavision").eval().stages[3].blocks[1].mixer
    x = torch.randn(2, 4, 96)
    q, k, v = (part.unflatten(-1, (4, 24)).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    weights = torch.softmax(q @ k.transpose(2, 3) * 24**-0.5, dim=-1)
    torch.testing.assert_close(attention(x), attention.proj((weights @ v).transpose(1, 2).flatten(2)))


def test_small_images():
    model = vssm.create_model("mambavision_tiny", depths=(1, 1, 2, 2), embed_dim=16, num_classes=3).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 1, 40)).isfinite().all()


def test_exports_windows_with_any_size():
    """Of at least two windows along each side, as in the example: one is a case of its own to torch.export."""
    model = vssm.create_model("test_mambavision", depths=(1, 1, 2)).eval()
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (torch.randn(1, 3, 112, 80),), dynamic_shapes=(sizes,), strict=True).module()
    for size in ((96, 96), (80, 144), (97, 75)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def official():
    return records.load("mamba_vision/mamba_vision_T@160x256").state_dict


@pytest.fixture
def tiny():
    with torch.device("meta"):
        return vssm.create_model("mambavision_tiny")


def test_own_keys_stay_as_they_are():
    model = vssm.create_model("test_mambavision")
    state = model.state_dict()
    converted = checkpoint_filter_fn(dict(state), model)
    assert converted.keys() == state.keys()
    assert all(converted[key] is state[key] for key in state)


def test_a_mixers_two_convolutions_are_one(official, tiny):
    weight = checkpoint_filter_fn(dict(official), tiny)["stages.3.blocks.1.mixer.conv.conv.weight"]
    assert weight.shape == (640, 1, 1, 3)
    assert torch.equal(weight[:320, 0], official["levels.3.blocks.1.mixer.conv1d_x.weight"])
    assert torch.equal(weight[320:, 0], official["levels.3.blocks.1.mixer.conv1d_z.weight"])


def test_scales_go_to_their_branches():
    with torch.device("meta"):
        model = vssm.create_model("mambavision_base", embed_dim=8, depths=(1, 1, 2, 1))
    gammas = {f"levels.2.blocks.1.gamma_{i}": torch.randn(32) for i in (1, 2)}
    converted = checkpoint_filter_fn(dict(gammas), model)
    for i in (1, 2):
        assert converted[f"stages.2.blocks.1.scale{i}.gamma"] is gammas[f"levels.2.blocks.1.gamma_{i}"]
    assert converted.keys() <= model.state_dict().keys()


def test_files_of_an_encoder(official, tiny, tmp_path):
    """The official loader takes what is called encoder, and nothing else."""
    wrapped = {f"module.encoder.{key}": value for key, value in official.items()}
    torch.save({"state_dict": {**wrapped, "module.mask_token": torch.zeros(3)}}, tmp_path / "encoder.pth.tar")
    state = vssm.checkpoint.to_model_keys(vssm.checkpoint.read(tmp_path / "encoder.pth.tar"), tiny)
    expected = checkpoint_filter_fn(dict(official), tiny)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_unknown_keys_are_named(official, tiny):
    for key in (
        "levels.3.downsample.reduction.0.weight",
        "levels.0.blocks.0.gamma",
        "levels.2.blocks.0.mixer.dt",
        "ln",
    ):
        with pytest.raises(ValueError, match=f"mambavision: unknown key '{key}' in the checkpoint"):
            checkpoint_filter_fn({**official, key: torch.zeros(3)}, tiny)


def test_licence_is_said_before_a_download(caplog, tmp_path):
    overlay = {"url": (tmp_path / "no_such.pth").as_uri()}
    with caplog.at_level(logging.WARNING), pytest.raises(ConnectionError):
        vssm.create_model("mambavision_tiny", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
    assert "mambavision_tiny: the authors license these weights as cc-by-nc-sa-4.0" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING), pytest.raises(ConnectionError):
        vssm.create_model("vmamba_tiny_s1l8", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
    assert "license" not in caplog.text
