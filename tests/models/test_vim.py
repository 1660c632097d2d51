"""What is Vim's own: its layers against loops over tokens, its initialisation, its conversion of official keys."""

import math

import pytest
import torch
import torch.nn.functional as F

import vssm
from golden import fill, records
from vssm.layers.conv import CausalTokenConv
from vssm.layers.ssm import SelectiveSSM
from vssm.models.vim import checkpoint_filter_fn
from vssm.scan_order import scan_order


def test_causal_convolution_reads_each_direction_from_its_own_past():
    conv = CausalTokenConv(3, 4, reverse=(False, True)).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    y = conv(x)
    expected = torch.zeros(2, 6, 2, 3, dtype=torch.float64)
    for direction, sequence in enumerate((x, x.flip(1))):
        for t in range(6):
            for tap in range(4):
                if t - 3 + tap >= 0:
                    expected[:, t, direction] += conv.weight[direction, :, tap] * sequence[:, t - 3 + tap]
    expected[:, :, 1] = expected[:, :, 1].flip(1)
    torch.testing.assert_close(y, expected + conv.bias)


@pytest.mark.parametrize("shared", [True, False])
def test_ssm_against_a_loop_over_tokens(shared):
    ssm = SelectiveSSM(4, d_state=3, dt_rank=2, directions=2).double()
    torch.nn.init.normal_(ssm.D)
    x = torch.randn(2, 5, 4, dtype=torch.float64) if shared else torch.randn(2, 5, 2, 4, dtype=torch.float64)
    z = torch.randn(2, 5, 4, dtype=torch.float64)
    weights = ssm.x_proj.weight.unflatten(0, (2, -1))
    steps = torch.empty(2, 5, 2, 4, dtype=torch.float64)
    expected = torch.zeros(2, 5, 4, dtype=torch.float64)
    for direction in range(2):
        tokens = x if shared else x[:, :, direction]
        state = torch.zeros(2, 4, 3, dtype=torch.float64)
        for t in range(5) if direction == 0 else reversed(range(5)):
            dt, B, C = (tokens[:, t] @ weights[direction].T).split([2, 3, 3], dim=-1)
            step = F.softplus(dt @ ssm.dt_weight[direction].T + ssm.dt_bias[direction])
            A = -ssm.A_log[direction].exp()
            state = torch.exp(step[..., None] * A) * state + step[..., None] * B[:, None] * tokens[:, t, :, None]
            expected[:, t] += (state * C[:, None]).sum(-1) + ssm.D[direction] * tokens[:, t]
            steps[:, t, direction] = step
    y = ssm(x, order=scan_order("bidirectional", 1, 5), z=z)
    torch.testing.assert_close(y, expected * F.silu(z))
    torch.testing.assert_close(ssm.step(x), steps)


def test_initialisation():
    model = vssm.create_model("test_vim", embed_dim=128, depth=9)
    for block in model.blocks:
        ssm = block.mixer.ssm
        torch.testing.assert_close(-ssm.A_log.exp(), -torch.arange(1.0, 17).expand(2, 256, 16))
        assert (ssm.D == 1).all()
        steps = F.softplus(ssm.dt_bias[0])
        assert 0.9e-3 < steps.min() < 2e-3
        assert 5e-2 < steps.max() < 1.1e-1
        assert abs(steps.log().mean() - math.log(1e-2)) < 0.3  # log-uniform: its middle is the geometric one
        assert (ssm.dt_bias[1] == 0).all()
        for direction in range(2):
            assert 0.95 * 8**-0.5 < ssm.dt_weight[direction].abs().max() <= 8**-0.5
        assert 0.95 * 256**-0.5 / 3 < block.mixer.out_proj.weight.abs().max() <= 256**-0.5 / 3
        assert 0.95 * 128**-0.5 < block.mixer.in_proj.weight.abs().max() <= 128**-0.5
    assert (model.stem.proj.bias == 0).all()
    assert abs(model.stem.proj.weight.std() * math.sqrt(3 * 16 * 16) - 1) < 0.05
    for parameter in (model.head.weight, model.pos_embed, model.cls_token):
        assert abs(parameter.std() - 0.02) < 0.005


def test_stochastic_depth_grows_to_its_rate():
    model = vssm.create_model("test_vim", drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.fixture(scope="module")
def official():
    return records.load("vim/vim_tiny").state_dict


@pytest.fixture
def tiny():
    with torch.device("meta"):
        return vssm.create_model("vim_tiny_patch16_224")


def test_own_keys_stay_as_they_are():
    model = vssm.create_model("test_vim")
    state = model.state_dict()
    converted = checkpoint_filter_fn(dict(state), model)
    assert converted.keys() == state.keys()
    assert all(converted[key] is state[key] for key in state)


def test_unknown_key_is_named(official, tiny):
    with pytest.raises(ValueError, match=r"unknown key 'rope.freqs_cos' in the checkpoint \(1 in all\)"):
        checkpoint_filter_fn({**official, "rope.freqs_cos": torch.zeros(3)}, tiny)
    with pytest.raises(ValueError, match=r"unknown key 'layers.3.mixer.gamma'"):
        checkpoint_filter_fn({**official, "layers.3.mixer.gamma": torch.zeros(3)}, tiny)


def test_missing_direction_is_named(official, tiny):
    incomplete = {key: value for key, value in official.items() if key != "layers.7.mixer.A_b_log"}
    with pytest.raises(ValueError, match=r"no layers.7.mixer.A_b_log, expected two scan directions"):
        checkpoint_filter_fn(incomplete, tiny)


def test_positions_of_another_size(official):
    """Positions that are a plane over the image stay one; the class token's entry is moved, not mixed in."""
    ys, xs = torch.meshgrid(torch.linspace(-1, 1, 14), torch.linspace(-1, 1, 14), indexing="ij")
    plane = (ys + 10 * xs).flatten()[None, :, None].expand(1, -1, 192)
    positions = torch.cat([plane[:, :98], torch.full((1, 1, 192), 500.0), plane[:, 98:]], dim=1)
    model = vssm.create_model("vim_tiny_patch16_224", img_size=(224, 448))
    resized = checkpoint_filter_fn({**official, "pos_embed": positions}, model)["pos_embed"][0, :, 0]
    assert resized.shape == (14 * 28 + 1,)
    assert resized[14 * 28 // 2] == 500.0
    grid = torch.cat([resized[:196], resized[197:]]).view(14, 28)
    assert grid.abs().max() < 12
    torch.testing.assert_close(grid[:, ::2] + grid[:, 1::2], 2 * plane[0, :, 0].view(14, 14), rtol=0, atol=0.25)

    with pytest.raises(ValueError, match="positions of 195 patches, neither a square grid nor this model's 14×28"):
        checkpoint_filter_fn({**official, "pos_embed": positions[:, :-1]}, model)


def test_missing_class_token_is_named():
    state = vssm.create_model("test_vim", class_token=False, global_pool="avg").state_dict()
    with pytest.raises(ValueError, match=r"does not fit Vim: 1 missing \(cls_token\); 1 of another shape \(pos_embed"):
        vssm.checkpoint.load(vssm.create_model("test_vim"), state)


def test_model_without_class_token_drops_that_of_the_checkpoint(official):
    model = vssm.create_model("vim_tiny_patch16_224", class_token=False, global_pool="avg")
    vssm.checkpoint.load(model, official)
    positions = official["pos_embed"]
    torch.testing.assert_close(model.pos_embed.data, torch.cat([positions[:, :98], positions[:, 99:]], dim=1))


def test_digits_sized_model_learns_to_tell_images_apart():
    """As small as the demonstration's: grey images of 8×8 pixels, patches of 2."""
    model = vssm.create_model("test_vim", in_chans=1, img_size=8, patch_size=2, num_classes=4, depth=2)
    images = fill.image((4, 1, 8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        loss = F.cross_entropy(model(images), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model(images).argmax(1).tolist() == [0, 1, 2, 3]
