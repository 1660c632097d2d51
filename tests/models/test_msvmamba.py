"""What is MSVMamba's own: its mixers against a loop over tokens, its blocks, initialisation, the official keys."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

import vssm
from golden import records
from vssm.engine.convert import convert
from vssm.layers.downsample import ConvDownsample
from vssm.layers.ssm import SelectiveSSM
from vssm.models.msvmamba import MultiScaleSS2D, MultiScaleSS2DV3, ResidualConvFFN, checkpoint_filter_fn


def scan_by_hand(ssm: SelectiveSSM, x: Tensor, walk: list[int]) -> Tensor:
    """Results (b, steps, d) of one sequence of tokens, which a walk may visit more than once."""
    state = torch.zeros(x.shape[0], x.shape[2], ssm.d_state, dtype=x.dtype)
    results = []
    for token in walk:
        dt, B, C = (x[:, token] @ ssm.x_proj.weight.T).split([ssm.dt_rank, ssm.d_state, ssm.d_state], dim=-1)
        step = F.softplus(dt @ ssm.dt_weight[0].T + ssm.dt_bias[0])
        state = torch.exp(-step[..., None] * ssm.A_log[0].exp()) * state
        state = state + (step * x[:, token])[..., None] * B[:, None]
        results.append((state * C[:, None]).sum(-1) + ssm.D[0] * x[:, token])
    return torch.stack(results, dim=1)


def half_by_hand(mixer: MultiScaleSS2D, u: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Results (b, 3, l', d) of the three directions at half resolution, at their tokens, and the grid's size."""
    maps = F.pad(u.unflatten(1, size), (0, 0, 3, 3, 3, 3))
    height, width = -(-size[0] // 2), -(-size[1] // 2)
    rows = torch.zeros(u.shape[0], height, width, u.shape[2], dtype=u.dtype)
    for y in range(height):
        for x in range(width):
            window = maps[:, 2 * y : 2 * y + 7, 2 * x : 2 * x + 7]
            rows[:, y, x] = (window * mixer.conv_half.conv.weight[:, 0].permute(1, 2, 0)).sum((1, 2))
    x = F.silu(rows + mixer.conv_half.conv.bias).flatten(1, 2)
    by_rows = list(range(height * width))
    by_columns = [y * width + x for x in range(width) for y in range(height)]
    walk = [*by_rows[::-1], *by_columns, *by_columns[::-1]]
    steps = scan_by_hand(mixer.ssm_half, x, walk).unflatten(1, (3, -1))
    results = torch.zeros_like(steps)
    for direction in range(3):
        for step, token in enumerate(walk[direction * len(by_rows) :][: len(by_rows)]):
            results[:, direction, token] = steps[:, direction, step]
    return results, (height, width)


def upsampled(x: Tensor, grid: tuple[int, int], size: tuple[int, int], mode: str) -> Tensor:
    maps = x.unflatten(1, grid).permute(0, 3, 1, 2)
    return F.interpolate(maps, size=size, mode=mode).permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", [MultiScaleSS2D, MultiScaleSS2DV3])
def test_mixer_against_a_loop_over_tokens(kind, size):
    mixer = kind(8, d_state=2, expand=1, gate=kind is MultiScaleSS2D).double()
    for parameter in (mixer.ssm.D, mixer.ssm_half.D, mixer.out_norm.weight, mixer.out_norm.bias):
        nn.init.normal_(parameter)
    x = torch.randn(2, size[0] * size[1], 8, dtype=torch.float64)
    u = x @ mixer.in_proj.weight[:8].T
    full = scan_by_hand(mixer.ssm, F.silu(mixer.conv(u, size)), list(range(size[0] * size[1])))
    half, grid = half_by_hand(mixer, u, size)
    if kind is MultiScaleSS2D:
        merged = mixer.out_norm(full) + upsampled(mixer.out_norm(half).sum(1), grid, size, "bilinear")
    else:
        merged = mixer.out_norm(full + upsampled(half.sum(1), grid, size, "nearest"))
    inner = F.relu(merged.mean(1) @ mixer.se.reduce.weight.T)
    merged = merged * torch.sigmoid(inner @ mixer.se.expand.weight.T)[:, None]
    if kind is MultiScaleSS2D:
        merged = merged * F.silu(x @ mixer.in_proj.weight[8:].T)
    torch.testing.assert_close(mixer(x, size), merged @ mixer.out_proj.weight.T)


def test_feed_forward_adds_its_convolution():
    mlp = ResidualConvFFN(4, 8)
    x = torch.randn(2, 6, 4)
    inner = x @ mlp.fc1.weight.T + mlp.fc1.bias
    expected = F.gelu(inner + mlp.conv(inner, (2, 3))) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x, (2, 3)), expected)


def test_norm_precedes_the_mlp_and_in_the_later_version_follows_it():
    with torch.no_grad():
        for name in ("msvmamba_nano", "msvmamba_tiny_v3"):
            block = vssm.create_model(name, embed_dim=16, depths=(1, 1)).stages[0].blocks[0]
            nn.init.normal_(block.norm2.weight)
            x, size = torch.randn(2, 12, 16), (3, 4)
            x1 = x + block.mixer(block.norm1(x), size)
            later = x1 + block.norm2(block.mlp(x1, size))
            earlier = x1 + block.mlp(block.norm2(x1), size)
            torch.testing.assert_close(block(x, size), later if name.endswith("v3") else earlier)
            assert not torch.allclose(later, earlier)


def test_every_parameter_of_the_later_version_gets_a_gradient():
    model = vssm.create_model("msvmamba_tiny_v3", embed_dim=16, depths=(1, 1))
    model(torch.randn(2, 3, 50, 37)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("name", "depths", "downsample"),
    [("msvmamba_micro", [1, 2, 5, 2], PatchMerging), ("msvmamba_small_v3", [2, 3, 20, 2], ConvDownsample)],
)
def test_stages(name, depths, downsample):
    with torch.device("meta"):
        model = vssm.create_model(name)
    assert [len(stage.blocks) for stage in model.stages] == depths
    assert [type(stage.downsample) for stage in model.stages] == [nn.Identity, *3 * [downsample]]


def test_initialisation():
    model = vssm.create_model("test_msvmamba", embed_dim=64)
    for block in (stage.blocks[0] for stage in model.stages):
        for ssm in (block.mixer.ssm, block.mixer.ssm_half):
            assert (ssm.A_log == 0).all()
            assert (ssm.D == 1).all()
        for layer in (block.mixer.se.reduce, block.mixer.in_proj):
            assert abs(layer.weight.std() - 0.02) < 0.002
        bound = block.mlp.fc1.in_features**-0.5  # a convolution's own, as in the official code
        assert 0.95 * bound < block.mlp.fc1.weight.abs().max() <= bound
        assert block.mlp.fc1.bias.any()


@pytest.fixture(scope="module")
def official():
    return records.load("msvmamba/msvmamba_nano").state_dict


@pytest.fixture(scope="module")
def official_v3():
    return records.load("msvmamba/msvmambav3_tiny").state_dict


@pytest.fixture
def nano():
    with torch.device("meta"):
        return vssm.create_model("msvmamba_nano")


@pytest.fixture
def tiny_v3():
    with torch.device("meta"):
        return vssm.create_model("msvmamba_tiny_v3")


def test_parameter_sets_are_in_opposite_order(official, official_v3, nano, tiny_v3):
    op = "layers.1.blocks.1.op."
    for state, model, (full, half) in ((official, nano, (1, 0)), (official_v3, tiny_v3, (0, 1))):
        ours = checkpoint_filter_fn(state, model)
        mixer = "stages.1.blocks.1.mixer."
        assert torch.equal(ours[f"{mixer}ssm.x_proj.weight"], state[f"{op}x_proj_weight"][full])
        assert torch.equal(ours[f"{mixer}ssm_half.dt_bias"][0], state[f"{op}dt_projs_bias"][half])
        width = state[f"{op}Ds"].numel() // 2
        assert torch.equal(ours[f"{mixer}ssm_half.A_log"][0], state[f"{op}A_logs"].view(2, width, 1)[half])


def test_own_keys_stay_as_they_are():
    model = vssm.create_model("test_msvmamba")
    state = model.state_dict()
    converted = checkpoint_filter_fn(dict(state), model)
    assert converted.keys() == state.keys()
    assert all(converted[key] is state[key] for key in state)


def test_conversion_says_where_both_parameter_sets_went(official, tmp_path):
    torch.save({"model": official}, tmp_path / "best_ckpt.pth")
    written = convert(tmp_path / "best_ckpt.pth", "msvmamba_nano")
    mixer = "stages.0.blocks.0.mixer."
    assert written["keys"]["layers.0.blocks.0.op.Ds"] == [f"{mixer}ssm.D", f"{mixer}ssm_half.D"]
    model = vssm.create_model("msvmamba_nano", checkpoint_path=tmp_path / "best_ckpt.safetensors")
    assert torch.equal(model.stages[0].blocks[0].mixer.ssm.D[0], official["layers.0.blocks.0.op.Ds"][96:])


def test_projections_stored_as_convolutions(official_v3, tiny_v3):
    stored = {
        key: value[..., None, None] if key.endswith(("in_proj.weight", "out_proj.weight")) else value
        for key, value in official_v3.items()
    }
    expected = checkpoint_filter_fn(official_v3, tiny_v3)
    for key, value in checkpoint_filter_fn(stored, tiny_v3).items():
        assert torch.equal(value, expected[key]), key


def test_unknown_keys_are_named(official, official_v3, nano):
    with pytest.raises(ValueError, match=r"msvmamba: unknown key 'layers.0.blocks.0.op.gamma' in the checkpoint"):
        checkpoint_filter_fn({**official, "layers.0.blocks.0.op.gamma": torch.zeros(3)}, nano)
    with pytest.raises(ValueError, match=r"unknown key 'patch_embed.5.weight' .* an official model with PatchStem"):
        checkpoint_filter_fn(official_v3, nano)


def test_weights_in_a_shared_drive_folder_are_told_where_they_are():
    with pytest.raises(ValueError, match=r"msvmamba_nano: .* get it at https://drive.google.com/drive/folders/1J41w3A"):
        vssm.create_model("msvmamba_nano", pretrained=True)
    assert "msvmamba_nano.in1k" not in vssm.list_models(pretrained=True)
    assert "msvmamba_tiny_v3.in1k" in vssm.list_models(pretrained=True)
