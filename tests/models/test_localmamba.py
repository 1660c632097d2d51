"""What is LocalMamba's own: its mixers against walks written out, rotary positions, conversion of official keys."""

import math

import pytest
import torch
import torch.nn.functional as F

import vssm
from golden import records
from vssm.engine.info import describe
from vssm.layers.conv import CausalTokenConv
from vssm.models.localmamba import (
    LOCALVIM_TINY_DIRECTIONS,
    LocalSS2D,
    LocalVimMixer,
    checkpoint_filter_fn,
    rotary_tables,
)

DIRECTIONS = ("v", "w2", "w3_flip", "h_flip")


def padded_walk(direction, height, width):
    """Cells in the order of a direction, those outside the grid, which pad it to whole windows, included."""
    name, _, flip = direction.partition("_")
    if name[0] == "w":
        side = int(name[1:])
        tops, lefts = range(0, height, side), range(0, width, side)
        cells = [(t + y, l + x) for t in tops for l in lefts for y in range(side) for x in range(side)]
    else:
        cells = [(y, x) for y in range(height) for x in range(width)]
        cells = sorted(cells, key=lambda cell: cell[::-1]) if name == "v" else cells
    return cells[::-1] if flip else cells


def gate(module, y):
    """The gate of channels, by the mean of normed tokens."""
    mean = F.layer_norm(y, y.shape[-1:], module.norm.weight, module.norm.bias).mean(1)
    return torch.sigmoid(module.expand(F.gelu(module.reduce(mean))))[:, None]


def scan(ssm, direction, u, present, *, A):
    """Scans sequences (b, t, d); steps that are not ``present`` have no B and C, and the bias for their step."""
    weight = ssm.x_proj.weight.unflatten(0, (ssm.directions, -1))[direction]
    dt, B, C = (u @ weight.T).split([ssm.dt_rank, ssm.d_state, ssm.d_state], dim=-1)
    state, results = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        low_rank = dt[:, t] if present[t] else torch.zeros_like(dt[:, t])
        step = F.softplus(low_rank @ ssm.dt_weight[direction].T + ssm.dt_bias[direction])
        drive = (step * u[:, t])[..., None] * B[:, t, None] if present[t] else 0.0
        state = torch.exp(step[..., None] * A) * state + drive
        results.append((state * C[:, t, None]).sum(-1) + ssm.D[direction] * u[:, t])
    return torch.stack(results, 1)


@pytest.fixture
def random_ssm():
    def randomise(mixer):
        torch.nn.init.normal_(mixer.ssm.D)
        torch.nn.init.normal_(mixer.ssm.A_log, std=0.3)
        torch.nn.init.normal_(mixer.channel_gate.norm.weight)
        return mixer.double()

    return randomise


@pytest.mark.parametrize("size", [(4, 3), (2, 6)])
def test_mixer_of_localvmamba_lets_the_state_decay_over_padding(size, random_ssm):
    mixer = random_ssm(LocalSS2D(8, directions=DIRECTIONS, d_state=3))
    height, width = size
    x = torch.randn(2, height * width, 16, dtype=torch.float64)
    expected = 0
    for direction, name in enumerate(DIRECTIONS):
        cells = padded_walk(name, height, width)
        present = [y < height and z < width for y, z in cells]
        tokens = [y * width + z for (y, z), here in zip(cells, present, strict=True) if here]
        u = torch.zeros(2, len(cells), 16, dtype=torch.float64)
        u[:, present] = x[:, tokens]
        y = torch.zeros_like(x)
        A = -mixer.ssm.A_log[direction].exp()
        y[:, tokens] = scan(mixer.ssm, direction, u, present, A=A)[:, present]
        expected = expected + y * gate(mixer.channel_gate, y)
    torch.testing.assert_close(mixer.scan(x, size), expected)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("size", [(4, 3), (2, 6)])
def test_mixer_of_localvim_convolves_and_scans_the_padding(size, class_token, random_ssm):
    """The class token keeps its number in every sequence; the A of the last direction serves all."""
    mixer = random_ssm(LocalVimMixer(8, directions=DIRECTIONS, class_token=class_token, d_state=3))
    height, width = size
    middle = height * width // 2
    x = torch.randn(2, height * width + class_token, 8, dtype=torch.float64)
    inputs, z = mixer.in_proj(x).chunk(2, dim=-1)
    expected = 0
    for direction, name in enumerate(DIRECTIONS):
        tokens = [y * width + z if y < height and z < width else None for y, z in padded_walk(name, height, width)]
        if class_token:
            tokens = [None if t is None else t + (t >= middle) for t in tokens]
            tokens.insert(middle, middle)
        steps = [s for s, token in enumerate(tokens) if token is not None]
        real = [token for token in tokens if token is not None]
        sequence = torch.zeros(2, len(tokens), 16, dtype=torch.float64)
        sequence[:, steps] = inputs[:, real]
        weight, bias = mixer.conv.weight[direction], mixer.conv.bias[direction]
        padded = F.pad(sequence, (0, 0, 3, 0))
        u = F.silu(bias + sum(weight[:, tap] * padded[:, tap : tap + len(tokens)] for tap in range(4)))
        y = torch.zeros_like(inputs)
        A = -mixer.ssm.A_log[-1].exp()
        y[:, real] = scan(mixer.ssm, direction, u, [True] * len(tokens), A=A)[:, steps]
        y = y * F.silu(z)
        expected = expected + y * gate(mixer.channel_gate, y)
    torch.testing.assert_close(mixer(x, size), mixer.out_proj(expected))


def test_convolution_of_a_sequence_for_each_direction():
    conv = CausalTokenConv(3, 4, reverse=(False, False), activation=True)
    x = torch.randn(2, 5, 2, 3)
    for direction in range(2):
        torch.testing.assert_close(conv(x)[:, :, direction], conv(x[:, :, direction])[:, :, direction])
    with pytest.raises(ValueError, match="are read forwards, got a reversed direction"):
        CausalTokenConv(3, 4, reverse=(False, True))(x)


def test_rotary_tables():
    """On the grid of 14×14: rows turn the first half of the channels, columns the second, two channels each alike."""
    cos, sin = rotary_tables(24, 14, 14).unflatten(1, (14, 14))
    for y, x in [(0, 0), (3, 5), (13, 1)]:
        for channel in range(24):
            position, within = (y, channel) if channel < 12 else (x, channel - 12)
            angle = position * 10000.0 ** (-2 * (within // 2) / 12)
            assert cos[y, x, channel] == pytest.approx(math.cos(angle), abs=1e-5)
            assert sin[y, x, channel] == pytest.approx(math.sin(angle), abs=1e-5)
    resized = F.interpolate(cos.permute(2, 0, 1)[None], size=(5, 16), mode="bicubic")[0]
    torch.testing.assert_close(rotary_tables(24, 5, 16)[0], resized.flatten(1).T)


def test_block_turns_its_input_and_the_stream():
    """Where the mixer adds nothing, the stream is still turned: angles of pairs grow, their lengths stay."""
    block = vssm.create_model("test_localvim").blocks[0]
    torch.nn.init.zeros_(block.mixer.out_proj.weight)
    x = torch.randn(1, 196, 64)
    with torch.no_grad():
        turned = block(x, (14, 14))
    pairs, before = (
        torch.view_as_complex(turned.unflatten(-1, (32, 2))),
        torch.view_as_complex(x.unflatten(-1, (32, 2))),
    )
    cos, sin = rotary_tables(64, 14, 14)
    torch.testing.assert_close(pairs, before * torch.complex(cos[:, ::2], sin[:, ::2]))


def test_class_token_model_has_no_rotary_positions():
    model = vssm.create_model("test_localvim", class_token=True, global_pool="token").eval()
    for block in model.blocks:
        torch.nn.init.zeros_(block.mixer.out_proj.weight)
    x = torch.randn(1, 37, 64)
    assert torch.equal(model.blocks[0](x, (6, 6)), x)
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 1000)


def test_directions_of_blocks():
    with torch.device("meta"):
        small = vssm.create_model("localvim_small")
        searched = vssm.create_model("localvim_small", directions=LOCALVIM_TINY_DIRECTIONS)
        tiny = vssm.create_model("localvmamba_tiny")
    assert {block.mixer.directions for block in small.blocks} == {("h", "h_flip", "w2", "w2_flip")}
    assert searched.blocks[16].mixer.directions == ("v", "v_flip", "w2", "w7")
    assert tiny.stages[3].blocks[1].mixer.directions == ("h_flip", "v", "w7", "w7_flip")
    with pytest.raises(ValueError, match="unknown direction 'w7_flop'"):
        vssm.create_model("test_localvim", directions=[("h", "w7_flop")])
    with pytest.raises(ValueError, match="embed_dim must be a multiple of 4 for rotary positions, got 66"):
        vssm.create_model("test_localvim", embed_dim=66)


def test_initialisation():
    localvim = vssm.create_model("test_localvim", embed_dim=128)
    for block in localvim.blocks:
        mixer = block.mixer
        assert not mixer.ssm.dt_bias.any()
        for weight in (
            mixer.in_proj.weight,
            mixer.ssm.dt_weight,
            mixer.ssm.x_proj.weight,
            mixer.channel_gate.reduce.weight,
        ):
            assert abs(weight.std() - 0.02) < 0.001
        assert 0.95 * 256**-0.5 / 2 < mixer.out_proj.weight.abs().max() <= 256**-0.5 / 2
    localvmamba = vssm.create_model("test_localvmamba", embed_dim=64)
    for stage in localvmamba.stages:
        steps = F.softplus(stage.blocks[0].mixer.ssm.dt_bias)
        assert 0.9e-3 < steps.min() < 2e-3
        assert 5e-2 < steps.max() < 1.1e-1
        assert abs(stage.blocks[0].mixer.out_proj.weight.std() - 0.02) < 0.001


@pytest.fixture(scope="module")
def official():
    return records.load("local_mamba/local_vim_tiny").state_dict


@pytest.fixture
def tiny():
    with torch.device("meta"):
        return vssm.create_model("localvim_tiny")


@pytest.mark.parametrize("name", ["test_localvim", "test_localvmamba"])
def test_own_keys_stay_as_they_are(name):
    model = vssm.create_model(name)
    state = model.state_dict()
    converted = checkpoint_filter_fn(dict(state), model)
    assert converted.keys() == state.keys()
    assert all(converted[key] is state[key] for key in state)


def test_rotary_tables_of_a_checkpoint_are_dropped(official, tiny):
    tables = {"rope.freqs_cos": torch.zeros(196, 192), "rope.freqs_sin": torch.zeros(196, 192)}
    assert checkpoint_filter_fn({**official, **tables}, tiny).keys() == tiny.state_dict().keys()


def test_unknown_key_is_named(official, tiny):
    with pytest.raises(ValueError, match=r"localmamba: unknown key 'outnorm_0.weight' in the checkpoint \(1 in all\)"):
        checkpoint_filter_fn({**official, "outnorm_0.weight": torch.zeros(192)}, tiny)
    with torch.device("meta"):
        localvmamba = vssm.create_model("localvmamba_tiny")
    with pytest.raises(ValueError, match=r"localmamba: unknown key 'outnorm0\.weight'"):
        checkpoint_filter_fn({"outnorm0.weight": torch.zeros(96)}, localvmamba)


def test_missing_direction_is_named(official):
    incomplete = {key: value for key, value in official.items() if key != "layers.7.mixer.D_2"}
    with pytest.raises(ValueError, match=r"of another shape \(blocks.7.mixer.ssm.D: got \(3, 384\), expected \(4, 384"):
        vssm.checkpoint.load(vssm.create_model("localvim_tiny"), incomplete)


def test_checkpoint_with_a_class_token_needs_a_model_with_one():
    """Without one, rotary positions would be applied, which its weights do not know."""
    state = records.load("local_mamba/local_vim_tiny_middle_cls_token").state_dict
    with pytest.raises(ValueError, match=r"does not fit LocalVim: 1 unexpected \(cls_token\)"):
        vssm.checkpoint.load(vssm.create_model("localvim_tiny"), state)
    vssm.checkpoint.load(vssm.create_model("localvim_tiny_class_token"), state)


def test_counts_of_localvim_equal_the_hand_formula():
    c, d, n, r, k, taps, depth, l = 192, 384, 16, 12, 4, 4, 20, 14 * 14
    parts = {part["part"]: part for part in describe("localvim_tiny")["parts"]}
    assert parts["stem"]["conv_macs"] == l * 3 * 16 * 16 * c
    assert parts["blocks"]["conv_macs"] == depth * l * k * taps * d
    gates = k * 2 * d * d // 8
    assert parts["blocks"]["matmul_macs"] == depth * (l * (3 * c * d + k * (d * (r + 2 * n) + r * d)) + gates)
    assert parts["blocks"]["scan_ops"] == depth * 9 * k * l * d * n
    padded = {part["part"]: part for part in describe("localvim_tiny", img_size=(160, 256))["parts"]}
    steps = sum(21 * 14 if any("w7" in each for each in block) else 160 for block in LOCALVIM_TINY_DIRECTIONS)
    assert padded["blocks"]["scan_ops"] == 9 * k * steps * d * n


def test_counts_of_localvmamba_equal_the_hand_formula():
    n, k = 16, 4
    parts = {part["part"]: part for part in describe("localvmamba_tiny")["parts"]}
    for stage, depth in enumerate((2, 2, 9, 2)):
        c, l = 96 * 2**stage, (56 // 2**stage) ** 2
        d, r = 2 * c, c // 16
        token = 3 * c * d + k * (d * (r + 2 * n) + r * d)
        merging = l * (4 * c // 2) * c if stage else 0
        part = parts[f"stages.{stage}"]
        assert part["matmul_macs"] == depth * (l * token + k * 2 * d * (d // 8)) + merging
        assert part["conv_macs"] == depth * l * 9 * d
        assert part["scan_ops"] == depth * 9 * k * l * d * n
