"""What is A2Mamba's own: its mixers and states against loops over tokens, scales, initialisation, the official keys."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vssm
from golden import records
from vssm.models.a2mamba import MASS, ChannelAffine, GlobalAttentionMixer, StateAggregationSSM, checkpoint_filter_fn


def window_of(cell: int, length: int, window: int, dilation: int) -> list[int]:
    same = list(range(cell % dilation, length, dilation))
    start = min(max(same.index(cell) - window // 2, 0), len(same) - window)
    return same[start : start + window]


def attention_matrix(
    q: Tensor, k: Tensor, bias: Tensor, *, size: tuple[int, int], window: int, dilation: tuple[int, int]
) -> Tensor:
    """Weights (b, heads, l, l) of queries and keys (b, l, heads, e), zero outside the windows."""
    tokens = list(itertools.product(range(size[0]), range(size[1])))
    scores = torch.full((q.shape[0], q.shape[2], len(tokens), len(tokens)), -math.inf, dtype=q.dtype)
    for i, (row, column) in enumerate(tokens):
        rows = window_of(row, size[0], window, dilation[0])
        for y, x in itertools.product(rows, window_of(column, size[1], window, dilation[1])):
            dy, dx = (y - row) // dilation[0], (x - column) // dilation[1]
            score = (q[:, i] * k[:, y * size[1] + x]).sum(-1) + bias[:, dy + window - 1, dx + window - 1]
            scores[:, :, i, y * size[1] + x] = score
    return scores.softmax(-1)


def turned(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Rotary embedding as complex numbers: rows turn the first half of a head's channels, columns the second."""
    quarter = x.shape[-1] // 4
    speeds = 10000.0 ** -(torch.arange(quarter) / max(quarter - 1, 1))
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij")
    angles = torch.cat([rows.flatten()[:, None] * speeds, columns.flatten()[:, None] * speeds], -1)  # (l, e/2)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)


def mixed_by_hand(mixer: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
    heads, c = mixer.num_heads, x.shape[-1]
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in mixer.in_proj(x).split(c, dim=-1))
    lepe = mixer.lepe(v.flatten(2), size)
    q, k = turned(q, size) / math.sqrt(c // heads), turned(k, size)
    half, window, bias = heads // 2, mixer.window, mixer.rel_pos_bias
    far = min(size[0] // window, window), min(size[1] // window, window)
    near_a = attention_matrix(q[:, :, :half], k[:, :, :half], bias, size=size, window=window, dilation=(1, 1))
    far_a = attention_matrix(q[:, :, half:], k[:, :, half:], bias, size=size, window=window, dilation=far)
    near = torch.einsum("bhij,bjhe->bihe", near_a, v[:, :, :half])
    distant = torch.einsum("bhij,bjhe->bihe", far_a, v[:, :, half:] + near)
    y = torch.cat([near, distant], 2)  # (b, l, heads, e)
    if isinstance(mixer, GlobalAttentionMixer):
        scores = torch.einsum("bihe,bjhe->bhij", q, k) + mixer.global_pos_bias
        y = torch.einsum("bhij,bjhe->bihe", scores.softmax(-1), y).flatten(2)
    else:
        y = scanned_by_hand(mixer, F.silu(mixer.conv(y.flatten(2), size)), near_a, far_a)
    gate = mixer.gate.norm(mixer.gate.proj(x).transpose(1, 2)).transpose(1, 2)
    return mixer.out_proj(mixer.proj_norm((mixer.out_norm(y) + lepe) * gate * torch.sigmoid(gate)))


def scanned_by_hand(mixer: MASS, u: Tensor, near_a: Tensor, far_a: Tensor) -> Tensor:
    ssm, r = mixer.ssm, mixer.ssm.dt_rank
    state, states, readouts = torch.zeros_like(u[:, 0]), [], []
    for token in u.unbind(1):
        dt, B, C = (token @ ssm.x_proj.weight.T).split([r, 1, 1], dim=-1)
        step = F.softplus(dt @ ssm.dt_weight[0].T + ssm.dt_bias[0])
        state = torch.exp(-step * ssm.A_log[0, :, 0].exp()) * state + step * B * token
        states.append(state)
        readouts.append(C)
    near, far = torch.stack(states, 1).unflatten(-1, (mixer.num_heads, -1)).chunk(2, dim=2)
    moved = torch.cat([torch.einsum("bhij,bjhe->bihe", a, s) for a, s in ((near_a, near), (far_a, far))], 2)
    fused = torch.einsum("gh,bihe->bige", mixer.state_fusion.weight[:, :, 0, 0], moved)
    fused = (fused + mixer.state_fusion.bias[:, None]).flatten(2)
    return torch.stack(readouts, 1) * fused + ssm.D[0] * u


@pytest.mark.parametrize("fused", [False, True], ids=["tiles", "fused op"])
@pytest.mark.parametrize("size", [(7, 5), (3, 4)], ids=str)
@pytest.mark.parametrize("kind", [MASS, GlobalAttentionMixer])
def test_mixer_against_loops(kind, size, fused, monkeypatch):
    monkeypatch.setattr("vssm.layers.neighborhood.FUSED", ("cpu",) if fused else ())
    arguments = {"grid_size": size} if kind is GlobalAttentionMixer else {}
    mixer = kind(32, num_heads=4, window=3, **arguments).double().eval()
    for parameter in mixer.parameters():
        if parameter.ndim == 1 or parameter.ndim == 3:
            nn.init.normal_(parameter)
    nn.init.uniform_(mixer.gate.norm.running_mean)
    x = torch.randn(2, size[0] * size[1], 32, dtype=torch.float64)
    expected = mixed_by_hand(mixer, x, size)
    torch.testing.assert_close(mixer(x, size), expected, rtol=1e-5, atol=1e-6)  # angles are in float32


def test_states_are_mixed_before_they_are_read():
    ssm = StateAggregationSSM(6, dt_rank=2).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    seen = []
    ssm(x, lambda states: seen.append(states) or states)
    y = ssm(x, lambda states: states.flip(1))
    C = (x @ ssm.x_proj.weight.T)[..., -1:]
    torch.testing.assert_close(y, C * seen[0].flip(1) + ssm.D * x)
    assert seen[0].dtype == torch.float64
    ssm.float()(x.bfloat16().float(), lambda states: seen.append(states) or states)
    assert seen[-1].dtype == torch.float32


def test_biases_of_the_whole_map_are_resized_to_another_grid():
    mixer = GlobalAttentionMixer(16, num_heads=2, window=3, grid_size=(4, 4)).eval()
    nn.init.normal_(mixer.global_pos_bias)
    x = torch.randn(1, 15, 16)
    before = mixer(x, (3, 5))
    bias = F.interpolate(mixer.global_pos_bias.detach(), (15, 15), mode="bicubic", align_corners=False)
    other = GlobalAttentionMixer(16, num_heads=2, window=3, grid_size=(3, 5)).eval()
    other.load_state_dict(mixer.state_dict() | {"global_pos_bias": bias})
    torch.testing.assert_close(other(x, (3, 5)), before)


def test_scales_are_where_a_variant_has_them():
    with torch.device("meta"):
        small, base = vssm.create_model("a2mamba_small"), vssm.create_model("a2mamba_base")
    for model, name, stages in ((small, "res_scale", (2, 3)), (base, "layer_scale", (0, 1, 2, 3))):
        found = {key.rpartition(".")[0] for key, each in model.named_modules() if isinstance(each, ChannelAffine)}
        depths = [len(stage.blocks) for stage in model.stages]
        assert found == {f"stages.{i}.blocks.{j}" for i in stages for j in range(depths[i])}
        assert all(isinstance(getattr(model.stages[3].blocks[0], f"{name}{i}"), ChannelAffine) for i in (1, 2))


def test_block_scales_branch_and_skip():
    block = vssm.create_model("test_a2mamba").eval().stages[1].blocks[0]
    block.layer_scale1, block.res_scale1 = ChannelAffine(32, 0.5), ChannelAffine(32, 1.0)
    nn.init.normal_(block.res_scale1.weight)
    nn.init.normal_(block.layer_scale1.bias)
    for last in (block.mlp.fc2, block.cpe2.conv):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    x = torch.randn(1, 16, 32)
    inner = x + block.cpe1(x, (4, 4))
    branch = 0.5 * block.mixer(block.norm1(inner), (4, 4)) + block.layer_scale1.bias
    torch.testing.assert_close(block(x, (4, 4)), inner * block.res_scale1.weight + branch)


def test_images_too_small_for_the_windows_are_refused():
    with torch.device("meta"):
        model = vssm.create_model("a2mamba_nano").eval()
    assert model(torch.empty(1, 3, 193, 200, device="meta")).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"window of 7×7 tokens .* a map of at least 7×7 tokens, got 6×7; enlarge"):
        model(torch.empty(1, 3, 192, 224, device="meta"))
    with pytest.raises(ValueError, match="expected an even number of heads, each of a multiple of 4 channels, got 3"):
        MASS(48, num_heads=3, window=3)


def test_head_norms_each_token_before_it_pools():
    head = vssm.create_model("test_a2mamba").eval().head
    nn.init.normal_(head.proj.norm.running_mean)
    x = torch.randn(2, 3, 4, 32)
    tokens = (x @ head.proj.proj.weight.T - head.proj.norm.running_mean) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(head(x, pre_logits=True), F.silu(tokens).mean((1, 2)))


@pytest.fixture(scope="module")
def official():
    return records.load("a2mamba/a2mamba_n").state_dict


@pytest.fixture
def nano():
    with torch.device("meta"):
        return vssm.create_model("a2mamba_nano")


def test_own_keys_stay_as_they_are():
    model = vssm.create_model("test_a2mamba")
    state = model.state_dict()
    converted = checkpoint_filter_fn(dict(state), model)
    assert converted.keys() == state.keys()
    assert all(converted[key] is state[key] for key in state)


def test_the_shared_table_is_that_of_the_later_key(official, nano):
    other = official | {"layers.0.blocks.0.token_mixer.rpb.0": torch.zeros(1, 21, 21)}
    ours = checkpoint_filter_fn(other, nano)
    table = official["layers.0.blocks.0.token_mixer.rpb.1"]
    assert torch.equal(ours["stages.0.blocks.0.mixer.rel_pos_bias"], table)
    assert official["layers.0.blocks.0.token_mixer.rpb.0"].equal(table)


def test_official_scales_go_to_branch_or_skip():
    scale = {"layers.4.blocks.1.layer_scale2.weight": torch.randn(320, 1, 1, 1)}
    with torch.device("meta"):
        small, base = vssm.create_model("a2mamba_small"), vssm.create_model("a2mamba_base", dims=(96, 192, 384, 512))
    ((key, value),) = checkpoint_filter_fn(scale, small).items()
    assert (key, value.shape) == ("stages.2.blocks.1.res_scale2.weight", (320,))
    assert list(checkpoint_filter_fn(scale, base)) == ["stages.2.blocks.1.layer_scale2.weight"]


def test_stored_tables_of_angles_are_left_out(official, nano):
    stored = official | {"layers.0.rope.angle": torch.zeros(8)}
    assert checkpoint_filter_fn(stored, nano).keys() == nano.state_dict().keys()


def test_unknown_keys_are_named(official, nano):
    for key in ("layers.0.blocks.0.token_mixer.gamma", "layers.7.weight", "classifier.2.weight"):
        with pytest.raises(ValueError, match=f"a2mamba: unknown key '{key}' in the checkpoint"):
            checkpoint_filter_fn({**official, key: torch.zeros(3)}, nano)
