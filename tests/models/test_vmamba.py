"""What is VMamba's own: the 2D scan against a loop over tokens, initialisation, and the official keys' many names."""

import re

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging
from torch import nn

import vssm
from golden import records
from vssm.layers.downsample import ConvDownsample
from vssm.layers.ss2d import SS2D
from vssm.layers.stem import ConvStem, PatchStem
from vssm.models.vmamba import checkpoint_filter_fn


def walks(height: int, width: int) -> list[list[int]]:
    """The tokens of a grid by rows, by columns, and both from the end."""
    rows = [y * width + x for y in range(height) for x in range(width)]
    columns = [y * width + x for x in range(width) for y in range(height)]
    return [rows, columns, rows[::-1], columns[::-1]]


@pytest.mark.parametrize("gate", [False, True])
def test_mixer_against_a_loop_over_tokens(gate):
    mixer = SS2D(6, d_state=2, expand=1.5, gate=gate, conv_bias=gate).double()
    for parameter in (mixer.ssm.D, mixer.out_norm.weight, mixer.out_norm.bias):
        nn.init.normal_(parameter)
    height, width, d = 3, 4, 9
    x = torch.randn(2, height * width, 6, dtype=torch.float64)

    u = x @ mixer.in_proj.weight[:d].T
    grid = F.pad(u.reshape(2, height, width, d), (0, 0, 1, 1, 1, 1))
    taps = mixer.conv.conv.weight[:, 0]
    u = sum(grid[:, i : i + height, j : j + width] * taps[:, i, j] for i in range(3) for j in range(3)).flatten(1, 2)
    u = F.silu(u if mixer.conv.conv.bias is None else u + mixer.conv.conv.bias)
    y = torch.zeros_like(u)
    for direction, walk in enumerate(walks(height, width)):
        weight = mixer.ssm.x_proj.weight.unflatten(0, (4, -1))[direction]
        state = torch.zeros(2, d, 2, dtype=torch.float64)
        for token in walk:
            dt, B, C = (u[:, token] @ weight.T).split([1, 2, 2], dim=-1)
            step = F.softplus(dt @ mixer.ssm.dt_weight[direction].T + mixer.ssm.dt_bias[direction])
            decay = torch.exp(-step[..., None] * mixer.ssm.A_log[direction].exp())
            state = decay * state + (step * u[:, token])[..., None] * B[:, None]
            y[:, token] += (state * C[:, None]).sum(-1) + mixer.ssm.D[direction] * u[:, token]
    y = F.layer_norm(y, (d,), mixer.out_norm.weight, mixer.out_norm.bias)
    if gate:
        y = y * F.silu(x @ mixer.in_proj.weight[d:].T)
    torch.testing.assert_close(mixer(x, (height, width)), y @ mixer.out_proj.weight.T)


@pytest.mark.parametrize("size", [(224, 224), (97, 75), (1, 5)])
def test_stem_and_downsampling_round_sizes_up(size):
    halved = tuple(-(-side // 2) for side in size)
    quartered = tuple(-(-side // 2) for side in halved)
    assert ConvStem(3, 8)(torch.randn(1, 3, *size)).shape == (1, *quartered, 8)
    maps = torch.randn(1, *size, 8)
    assert ConvDownsample(8, 16)(maps).shape == (1, *halved, 16)
    assert PatchMerging(8)(maps).shape == (1, *halved, 16)


def test_downsampling_keeps_maps_and_weights_channels_last():
    """Else each call would reorder one of them."""
    layer = ConvDownsample(8, 16)
    layer.load_state_dict({key: value.clone().contiguous() for key, value in layer.state_dict().items()})
    assert layer.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer(torch.randn(2, 6, 5, 8)).is_contiguous()


def test_images_smaller_than_a_patch_are_refused():
    model = vssm.create_model("test_vmamba", stem_layer=lambda chans, dim: PatchStem(chans, dim, patch_size=4))
    with pytest.raises(ValueError, match="at least 4×4 pixels, one patch, got 3×64"):
        model(torch.randn(1, 3, 3, 64))


def test_initialisation():
    model = vssm.create_model("test_vmamba", embed_dim=64, d_state=4)
    for module in model.modules():
        if isinstance(module, SS2D):
            projection, bound = module.ssm.x_proj.weight, module.out_norm.weight.numel() ** -0.5
            assert 0.9 * bound < projection.abs().max() <= bound
            torch.testing.assert_close(module.ssm.A_log.exp(), torch.arange(1.0, 5).expand_as(module.ssm.A_log))
            assert (module.ssm.D == 1).all()
    linear = [block.mlp.fc1 for stage in model.stages for block in stage.blocks]
    linear += [model.head.fc, model.stages[2].blocks[0].mlp.fc2]
    for layer in linear:
        assert abs(layer.weight.std() - 0.02) < 0.002
        assert (layer.bias == 0).all()
    assert abs(model.stages[3].blocks[0].mixer.out_proj.weight.std() - 0.02) < 0.002


def test_stochastic_depth_grows_over_all_blocks():
    model = vssm.create_model("test_vmamba", drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.fixture(scope="module")
def official():
    return records.load("vmamba/vmamba_tiny_s1l8").state_dict


@pytest.fixture(scope="module")
def official_v0():
    return records.load("vmamba/vanilla_vmamba_tiny").state_dict


@pytest.fixture
def tiny():
    with torch.device("meta"):
        return vssm.create_model("vmamba_tiny_s1l8")


@pytest.fixture
def tiny_v0():
    with torch.device("meta"):
        return vssm.create_model("vmamba_tiny_v0")


def assert_same(mine: dict, expected: dict) -> None:
    assert mine.keys() == expected.keys()
    for key, value in mine.items():
        assert torch.equal(value, expected[key]), key


def test_own_keys_stay_as_they_are():
    model = vssm.create_model("test_vmamba")
    state = model.state_dict()
    assert_same(checkpoint_filter_fn(dict(state), model), state)


def test_projections_stored_as_convolutions(official, tiny):
    linear = re.compile(r"(in_proj|out_proj|fc1|fc2)\.weight$")
    stored = {key: value[..., None, None] if linear.search(key) else value for key, value in official.items()}
    assert_same(checkpoint_filter_fn(stored, tiny), checkpoint_filter_fn(official, tiny))


def test_keys_of_the_version_in_one_file(official, official_v0, tiny, tiny_v0):
    flat = {
        key.replace("x_proj_weight", "x_proj.weight").replace("dt_projs_weight", "dt_projs.weight"): (
            value.flatten(0, 1) if key.endswith(("x_proj_weight", "dt_projs_weight")) else value
        )
        for key, value in official.items()
    }
    assert_same(checkpoint_filter_fn(flat, tiny), checkpoint_filter_fn(official, tiny))
    numbered = {
        key.replace("downsample.norm", "downsample.1").replace("downsample.reduction", "downsample.2"): value
        for key, value in official_v0.items()
    }
    assert numbered.keys() != official_v0.keys()
    assert_same(checkpoint_filter_fn(numbered, tiny_v0), checkpoint_filter_fn(official_v0, tiny_v0))


def test_keys_of_the_first_version(official_v0, tiny_v0):
    names = [
        (r"^patch_embed\.0\.", "patch_embed.proj."),
        (r"^patch_embed\.2\.", "patch_embed.norm."),
        (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."),
        (r"(blocks\.\d+)\.op\.", r"\1.self_attention."),
        (r"^classifier\.", ""),
    ]
    old = {}
    for key, value in official_v0.items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        old[key] = value
    assert not old.keys() & {key for key in official_v0 if "downsample" not in key}
    assert_same(checkpoint_filter_fn(old, tiny_v0), checkpoint_filter_fn(official_v0, tiny_v0))


def test_unknown_key_is_named(official, tiny, tiny_v0):
    with pytest.raises(ValueError, match=r"vmamba: unknown key 'layers.0.blocks.0.op.gamma' in the checkpoint"):
        checkpoint_filter_fn({**official, "layers.0.blocks.0.op.gamma": torch.zeros(3)}, tiny)
    with pytest.raises(ValueError, match=r"unknown key 'outnorm0.weight'"):
        checkpoint_filter_fn({**official, "outnorm0.weight": torch.zeros(96)}, tiny)
    with pytest.raises(ValueError, match=r"unknown key 'patch_embed.5.weight' .* an official model with PatchStem"):
        checkpoint_filter_fn(official, tiny_v0)


def test_weights_of_another_variant_are_refused(official):
    with torch.device("meta"):
        wider = vssm.create_model("vmamba_tiny_s2l5")
    with pytest.raises(ValueError, match=r"does not fit VMamba: 54 unexpected .*; 110 of another shape"):
        vssm.checkpoint.check(wider, checkpoint_filter_fn(official, wider))
