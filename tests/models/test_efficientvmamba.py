"""What is EfficientVMamba's own: its scan against a loop over tokens, its gate, initialisation, the official keys."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging
from torch import nn

import vssm
from golden import records
from vssm.layers.squeeze_excite import TokenSqueezeExcite
from vssm.models.efficientvmamba import AtrousSS2D, EVSSBlock, InvertedResidualBlock, checkpoint_filter_fn
from vssm.scan_order import scan_order
from vssm_kernels import directional_scan


def walks(height: int, width: int) -> list[list[tuple[int, int]]]:
    """Rows and columns that each direction visits, of a grid of even sides."""
    return [
        [(y, x) for y in range(0, height, 2) for x in range(0, width, 2)],
        [(y, x) for x in range(0, width, 2) for y in range(1, height, 2)],
        [(y, x) for y in range(0, height, 2) for x in range(1, width, 2)],
        [(y, x) for x in range(1, width, 2) for y in range(1, height, 2)],
    ]


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (4, 3), (1, 1)], ids=str)
def test_scan_against_a_loop_over_tokens(size):
    mixer = AtrousSS2D(4, d_state=2, expand=1).double()
    nn.init.normal_(mixer.ssm.D)
    x = torch.randn(2, size[0] * size[1], 4, dtype=torch.float64)
    padded = F.pad(x.unflatten(1, size), (0, 0, 0, size[1] % 2, 0, size[0] % 2))
    y = torch.zeros_like(padded)
    for direction, walk in enumerate(walks(*padded.shape[1:3])):
        weight = mixer.ssm.x_proj.weight.unflatten(0, (4, -1))[direction]
        state = torch.zeros(2, 4, 2, dtype=torch.float64)
        for row, column in walk:
            token = padded[:, row, column]
            dt, B, C = (token @ weight.T).split([1, 2, 2], dim=-1)
            step = F.softplus(dt @ mixer.ssm.dt_weight[direction].T + mixer.ssm.dt_bias[direction])
            state = torch.exp(-step[..., None] * mixer.ssm.A_log[direction].exp()) * state
            state = state + (step * token)[..., None] * B[:, None]
            y[:, row, column] = (state * C[:, None]).sum(-1) + mixer.ssm.D[direction] * token
    torch.testing.assert_close(mixer.scan(x, size), y[:, : size[0], : size[1]].flatten(1, 2))


def test_scan_is_that_of_the_atrous_order():
    """Cells of 2×2 tokens, one map a direction, are a cheaper way to say what the order's table says."""
    ssm = (mixer := AtrousSS2D(4, expand=1)).ssm
    x = torch.randn(2, 6 * 4, 4)
    dt, B, C = ssm.x_proj(x).split([1, 16, 16], dim=-1)
    expected = directional_scan(
        x,
        dt,
        -ssm.A_log.exp(),
        B,
        C,
        ssm.D,
        dt_weight=ssm.dt_weight,
        dt_bias=ssm.dt_bias,
        order=scan_order("atrous", 6, 4),
    )
    torch.testing.assert_close(mixer.scan(x, (6, 4)), expected)


def test_gate_norms_what_it_averages_and_not_what_it_gates():
    gate = TokenSqueezeExcite(16, norm_layer=nn.LayerNorm, act_layer=nn.GELU)
    x = 3 * torch.randn(2, 10, 16)
    pooled = torch.stack([F.layer_norm(x[:, i], (16,)) for i in range(10)]).sum(0) / 10
    inner = F.gelu(pooled @ gate.reduce.weight.T + gate.reduce.bias)
    assert inner.shape == (2, 2)
    weights = 1 / (1 + torch.exp(-(inner @ gate.expand.weight.T + gate.expand.bias)))
    torch.testing.assert_close(gate(x), x * weights[:, None])


def test_block_gates_both_branches_by_themselves():
    block = EVSSBlock(16, AtrousSS2D(16)).eval()
    x = torch.randn(2, 12, 16)
    normed = F.layer_norm(x, (16,), block.norm1.weight, block.norm1.bias)
    mixed, convolved = block.mixer(normed, (3, 4)), block.conv_branch(normed, (3, 4))
    torch.testing.assert_close(block(x, (3, 4)), x + block.se(mixed) + block.se(convolved))
    assert not torch.allclose(block(x, (3, 4)), x + block.se(mixed + convolved))


def test_stages_that_scan_come_first():
    model = vssm.create_model("efficientvmamba_base")
    kinds = [{type(block) for block in stage.blocks} for stage in model.stages]
    assert kinds == [{EVSSBlock}, {EVSSBlock}, {InvertedResidualBlock}, {InvertedResidualBlock}]
    assert [len(stage.blocks) for stage in model.stages] == [2, 2, 9, 2]
    assert [type(stage.downsample) for stage in model.stages] == [nn.Identity, *3 * [PatchMerging]]


def test_initialisation():
    model = vssm.create_model("test_efficientvmamba", embed_dim=64, scan_stages=3)
    block = model.stages[2].blocks[0]
    for layer in (block.se.reduce, block.se.expand, block.mixer.in_proj, model.stages[1].downsample.reduction):
        assert abs(layer.weight.std() - 0.02) < 0.002
    assert (block.se.reduce.bias == 0).all()
    convolution = block.conv_branch.proj.weight  # PyTorch's default, unlike a linear layer's
    assert 0.9 * 256**-0.5 < convolution.abs().max() <= 256**-0.5


@pytest.fixture(scope="module")
def official():
    return records.load("efficient_vmamba/efficient_vmamba_tiny").state_dict


@pytest.fixture
def tiny():
    with torch.device("meta"):
        return vssm.create_model("efficientvmamba_tiny")


def test_own_keys_stay_as_they_are():
    model = vssm.create_model("test_efficientvmamba")
    state = model.state_dict()
    converted = checkpoint_filter_fn(dict(state), model)
    assert converted.keys() == state.keys()
    assert all(converted[key] is state[key] for key in state)


@pytest.mark.parametrize("entry", ["state_dict", "ema_model"])
def test_files_of_the_moving_average_of_a_distributed_model(official, tmp_path, entry):
    wrapped = {f"module.module.{key}": value for key, value in official.items()}
    torch.save({entry: wrapped, "epoch": 291}, tmp_path / "efficient_vmamba_tiny.ckpt")
    model = vssm.create_model("efficientvmamba_tiny", checkpoint_path=tmp_path / "efficient_vmamba_tiny.ckpt")
    taken = [
        ("layers.2.6.reduction.weight", model.stages[3].downsample.reduction.weight),
        ("layers.2.1.conv_pw.1.running_var", model.stages[2].blocks[0].residual.bn1.running_var),
        ("layers.3.2.conv_pw2.0.weight", model.stages[3].blocks[1].residual.conv_pwl.weight),
        ("layers.1.blocks.1.conv_branch.3.bias", model.stages[1].blocks[1].conv_branch.proj.bias),
    ]
    for key, mine in taken:
        assert torch.equal(mine, official[key]), key


def test_unknown_keys_are_named(official, tiny):
    for key in ("layers.2.0.weight", "layers.3.4.norm.weight", "layers.0.blocks.0.conv_branch.2.weight", "gamma"):
        with pytest.raises(ValueError, match=f"efficientvmamba: unknown key '{key}' in the checkpoint"):
            checkpoint_filter_fn({**official, key: torch.zeros(3)}, tiny)


def test_weights_of_another_variant_are_refused(official):
    with torch.device("meta"):
        wider = vssm.create_model("efficientvmamba_small")
    with pytest.raises(ValueError, match=r"does not fit EfficientVMamba: .* of another shape \(stem.proj.weight: "):
        vssm.checkpoint.check(wider, checkpoint_filter_fn(official, wider))
