"""What is PlainMamba's own: its layers against loops over tokens, initialisation, conversion of official keys."""

import pytest
import torch
import torch.nn.functional as F

import vssm
from golden import records
from vssm.engine.info import describe
from vssm.models.plainmamba import PlainMambaStem, SnakeSSM, checkpoint_filter_fn
from vssm.scan_order import scan_moves, scan_order


def test_ssm_against_a_loop_over_tokens():
    """At step s the token visited meets step, B and C of token s in raster order, and the bias counts twice."""
    height, width = 3, 2
    ssm = SnakeSSM(4, d_state=3, dt_rank=2).double()
    torch.nn.init.normal_(ssm.D)
    torch.nn.init.normal_(ssm.move_B)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    order, moves = scan_order("snake", height, width), scan_moves("snake", height, width)
    dt, B, C = (x @ ssm.x_proj.weight.T).split([2, 3, 3], dim=-1)
    step = F.softplus(dt @ ssm.dt_weight[0].T + 2 * ssm.dt_bias[0])
    A = -ssm.A_log[0].exp()
    expected = torch.zeros(2, 6, 4, dtype=torch.float64)
    for direction in range(4):
        state = torch.zeros(2, 4, 3, dtype=torch.float64)
        for s in range(6):
            token = int(order[direction, s])
            B_s = B[:, s] + ssm.move_B[moves[direction, s]]
            decay, drive = torch.exp(step[:, s, :, None] * A), step[:, s] * x[:, token]
            state = decay * state + drive[..., None] * B_s[:, None]
            expected[:, token] += (state * C[:, s, None]).sum(-1) + ssm.D[0] * x[:, token]
    torch.testing.assert_close(ssm(x, order, moves), expected)
    torch.testing.assert_close(ssm.step(x), step[:, :, None])


def test_convolution_after_a_block_replaces_the_stream():
    """Without a residual around it: where it is zero, nothing of the block's input is left."""
    model = vssm.create_model("test_plainmamba").eval()
    assert [hasattr(block, "local_conv") for block in model.blocks] == [True, False, False, False]
    torch.nn.init.zeros_(model.blocks[0].local_conv.conv.conv.weight)
    with torch.no_grad():
        assert (model.blocks[0](torch.randn(1, 12, 64), (3, 4)) == 0).all()  # gelu(0), of a fresh batch norm


@pytest.mark.parametrize(("size", "grid"), [((96, 96), (6, 6)), ((97, 75), (7, 5)), ((1, 33), (1, 3))])
def test_stem_pads_to_whole_patches_at_the_right_and_bottom(size, grid):
    stem = PlainMambaStem(3, 8, dim=4).eval()
    image = torch.randn(1, 3, *size)
    larger = F.pad(image, (0, 16 * grid[1] - size[1], 0, 16 * grid[0] - size[0]))
    tokens = stem(image)
    assert tokens.shape == (1, *grid, 8)
    assert stem.grid_size(*size) == grid
    torch.testing.assert_close(tokens[:, : grid[0] - 1, : grid[1] - 1], stem(larger)[:, : grid[0] - 1, : grid[1] - 1])


def test_initialisation():
    model = vssm.create_model("test_plainmamba", embed_dim=128)
    for block in model.blocks:
        mixer, ssm = block.mixer, block.mixer.ssm
        torch.testing.assert_close(ssm.A_log.exp(), torch.arange(1.0, 17).expand(1, 256, 16))
        assert (ssm.D == 1).all()
        assert not any(bias.any() for bias in (ssm.dt_bias, mixer.in_proj.bias, mixer.out_proj.bias))
        for weight in (mixer.in_proj.weight, mixer.out_proj.weight, ssm.x_proj.weight, ssm.dt_weight):
            assert abs(weight.std() - 0.02) < 0.001
        assert abs(ssm.move_B.std() - 0.02) < 0.006
        assert 0.9 / 7 < mixer.conv.conv.weight.abs().max() <= 1 / 7  # PyTorch's default
    assert abs(model.head.weight.std() - 0.01) < 0.0005
    assert abs(model.pos_embed.std() - 0.02) < 0.002


def test_stochastic_depth_grows_to_its_rate():
    model = vssm.create_model("test_plainmamba", drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_moves_are_not_decayed():
    undecayed = vssm.create_model("test_plainmamba").no_weight_decay()
    assert {"blocks.0.mixer.ssm.move_B", "pos_embed", "blocks.3.mixer.ssm.A_log"} <= undecayed
    assert not any(name.endswith("weight") for name in undecayed)


@pytest.fixture(scope="module")
def official():
    return records.load("plain_mamba/plain_mamba_l1").state_dict


@pytest.fixture
def l1():
    with torch.device("meta"):
        return vssm.create_model("plainmamba_l1")


def test_own_keys_stay_as_they_are():
    model = vssm.create_model("test_plainmamba")
    state = model.state_dict()
    converted = checkpoint_filter_fn(dict(state), model)
    assert converted.keys() == state.keys()
    assert all(converted[key] is state[key] for key in state)


def test_unknown_key_is_named(official, l1):
    with pytest.raises(ValueError, match=r"plainmamba: unknown key 'layers.3.mamba.gamma' in the checkpoint \(1 in"):
        checkpoint_filter_fn({**official, "backbone.layers.3.mamba.gamma": torch.zeros(3)}, l1)
    with pytest.raises(ValueError, match=r"unknown key 'norm_layer5.weight'"):
        checkpoint_filter_fn({**official, "norm_layer5.weight": torch.zeros(192)}, l1)


def test_official_file_loads_with_its_classifier_and_without_its_shadows(official, tmp_path):
    """As mmpretrain writes it, with the buffers of the moving average."""
    shadows = {"ema_backbone_pos_embed": torch.zeros(1, 196, 192), "ema_head_fc_bias": torch.zeros(1000)}
    torch.save({"meta": {"epoch": 300}, "state_dict": {**official, **shadows}}, tmp_path / "l1.pth")
    model = vssm.create_model("plainmamba_l1", checkpoint_path=tmp_path / "l1.pth")
    torch.testing.assert_close(model.head.bias.data, official["head.fc.bias"])
    torch.testing.assert_close(model.pos_embed.data, official["backbone.pos_embed"])
    assert checkpoint_filter_fn({**official, **shadows}, model).keys() == model.state_dict().keys()


def test_variants_have_the_published_depths_and_levels():
    with torch.device("meta"):
        l3 = vssm.create_model("plainmamba_l3", features_only=True)
        assert len(vssm.create_model("plainmamba_l2").state_dict()) == 361
        assert len(vssm.create_model("plainmamba_l3").state_dict()) == 529
    assert l3.feature_info.out_indices == (8, 17, 26, 35)
    assert l3.feature_info.channels() == [448] * 4
    assert l3.feature_info.reduction() == [16] * 4


@pytest.mark.parametrize(
    ("name", "c", "depth", "stem_convs"),
    [("plainmamba_l1", 192, 24, 1), ("plainmamba_l2", 384, 24, 2), ("plainmamba_l3", 448, 36, 2)],
)
def test_counts_equal_the_hand_formula(name, c, depth, stem_convs):
    """The published sum counts the product that forms the step once; here each of the four directions forms it."""
    d, n, r, k, classes, l = 2 * c, 16, c // 16, 4, 1000, 14 * 14
    record = describe(name)
    parts = {part["part"]: part for part in record["parts"]}
    stem = 112 * 112 * (49 * 3 * 64 + stem_convs * 9 * 64 * 64) + l * 64 * 64 * c
    local_conv = l * 9 * c if name == "plainmamba_l1" else 0
    step_product = depth * l * r * d
    assert parts["stem"]["conv_macs"] == stem
    assert parts["blocks"]["conv_macs"] == depth * l * 49 * d + local_conv
    assert parts["blocks"]["matmul_macs"] == depth * l * (3 * c * d + d * (r + 2 * n)) + k * step_product
    assert parts["blocks"]["scan_ops"] == depth * k * 9 * l * d * n
    assert parts["head"]["matmul_macs"] == c * classes
    once = record["total_gflops"] - (k - 1) * step_product / 1e9
    assert once == pytest.approx(record["published_gflops"], abs=0.05)
