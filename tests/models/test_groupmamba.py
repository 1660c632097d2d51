"""What is GroupMamba's own: its mixer against a loop over tokens, the class block, two classifiers, official keys."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vssm
from golden import records
from vssm.layers.ffn import ConvFFN
from vssm.models.groupmamba import GroupMixer, TokenGroupNorm, checkpoint_filter_fn


def walks(height: int, width: int) -> list[list[int]]:
    """The tokens of a grid by rows, by columns, and both from the end."""
    rows = [y * width + x for y in range(height) for x in range(width)]
    columns = [y * width + x for x in range(width) for y in range(height)]
    return [rows, columns, rows[::-1], columns[::-1]]


def scan_by_hand(mixer: GroupMixer, u: torch.Tensor, group: int, walk: list[int]) -> torch.Tensor:
    """What one group of channels (b, l, d) becomes, with one state."""
    ssm = mixer.ssm
    weight = ssm.x_proj.weight.unflatten(0, (4, -1))[group]
    state, y = torch.zeros_like(u[:, 0]), torch.zeros_like(u)
    for token in walk:
        dt, B, C = (u[:, token] @ weight.T).split([ssm.dt_rank, 1, 1], dim=-1)
        step = F.softplus(dt @ ssm.dt_weight[group].T + ssm.dt_bias[group])
        state = torch.exp(-step * ssm.A_log[group, :, 0].exp()) * state + step * u[:, token] * B
        y[:, token] = state * C + ssm.D[group] * u[:, token]
    return y


@pytest.mark.parametrize("size", [(3, 4), (1, 1)], ids=str)
def test_mixer_against_a_loop_over_tokens(size):
    mixer = GroupMixer(20, se_reduction=4).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, size[0] * size[1], 20, dtype=torch.float64)

    n = F.layer_norm(x, (20,), mixer.norm.weight, mixer.norm.bias)
    squeezed = F.relu(n.mean(1) @ mixer.se.reduce.weight.T + mixer.se.reduce.bias)
    gate = torch.sigmoid(squeezed @ mixer.se.expand.weight.T + mixer.se.expand.bias)
    assert squeezed.shape == (2, 5)
    groups = []
    for group, walk in enumerate(walks(*size)):
        own = slice(5 * group, 5 * group + 5)
        u, z = (n[..., own] @ mixer.in_proj.weight[group].T).split(5, dim=-1)
        kernel, bias = mixer.conv.conv.weight[own], mixer.conv.conv.bias[own]
        u = F.conv2d(u.transpose(1, 2).unflatten(2, size), kernel, bias, padding=1, groups=5)
        y = scan_by_hand(mixer, F.silu(u.flatten(2).transpose(1, 2)), group, walk)
        y = F.layer_norm(y, (5,), mixer.out_norm.weight[own], mixer.out_norm.bias[own])
        groups.append((y * F.silu(z)) @ mixer.out_proj.weight[group].T)
    y = torch.cat(groups, dim=-1) * mixer.skip_scale * n * gate[:, None]
    y = F.layer_norm(y, (20,), mixer.norm.weight, mixer.norm.bias)
    torch.testing.assert_close(mixer(x, size), y @ mixer.proj.weight.T + mixer.proj.bias)


def test_norm_of_groups_is_a_layer_norm_of_each():
    norm = TokenGroupNorm(4, 12)
    nn.init.normal_(norm.weight)
    x = 5 + 3 * torch.randn(2, 7, 12)
    expected = [F.layer_norm(part, (3,)) for part in x.chunk(4, dim=-1)]
    torch.testing.assert_close(norm(x), torch.cat(expected, dim=-1) * norm.weight)


def test_channels_must_be_quarters():
    with pytest.raises(ValueError, match="GroupMixer: dim must be a multiple of 4, the groups of channels, got 30"):
        GroupMixer(30)


def test_feed_forward_activates_its_convolution():
    mlp = ConvFFN(4, 8)
    x = torch.randn(2, 6, 4)
    expected = F.gelu(mlp.conv(x @ mlp.fc1.weight.T + mlp.fc1.bias, (2, 3))) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x, (2, 3)), expected)


@pytest.fixture(scope="module")
def small():
    return vssm.create_model("test_groupmamba", num_classes=5).eval()


def test_mean_token_passes_a_block_whose_first_norm_follows_its_mixer(small):
    block = small.class_stage.blocks[0]
    nn.init.normal_(block.norm1.weight)
    features = torch.randn(2, 3, 2, 72)
    with torch.no_grad():
        u = features.mean((1, 2))[:, None]
        u = u + block.norm1(block.mixer(u, (1, 1)))
        u = small.norm(u + block.mlp(block.norm2(u)))[:, 0]
        expected = (small.head.fc(u) + small.head.fc_dist(u)) / 2
        torch.testing.assert_close(small.forward_head(features), expected)
        torch.testing.assert_close(small.forward_head(features, pre_logits=True), u)


def test_without_pooling_each_token_is_classified_by_itself():
    model = vssm.create_model("test_groupmamba", num_classes=5, global_pool="").eval()
    features = torch.randn(2, 3, 2, 72)
    with torch.no_grad():
        logits = model.forward_head(features)
        pooled = vssm.create_model("test_groupmamba", num_classes=5).eval()
        pooled.load_state_dict(model.state_dict())
        torch.testing.assert_close(logits[:, 1, 0], pooled.forward_head(features[:, 1:2, :1]))
    assert logits.shape == (2, 3, 2, 5)


def test_two_results_only_in_training_and_where_asked_for():
    model = vssm.create_model("test_groupmamba", num_classes=5)
    images = torch.randn(2, 3, 64, 64)
    assert model(images).shape == (2, 5)
    model.set_distilled_training()
    logits, distilled = model(images)
    assert logits.shape == distilled.shape == (2, 5)
    assert not torch.allclose(logits, distilled)
    assert model.eval()(images).shape == (2, 5)
    model.train().set_distilled_training(False)
    assert model(images).shape == (2, 5)


def test_classifiers_are_replaced_together():
    model = vssm.create_model("test_groupmamba").double()
    model.reset_classifier(7)
    first, second = model.get_classifier()
    assert first.weight.shape == second.weight.shape == (7, 72)
    assert first.weight.dtype == second.weight.dtype == torch.float64
    assert not torch.equal(first.weight, second.weight)
    with pytest.raises(ValueError, match="global_pool must keep the number of channels, such as 'avg'"):
        model.reset_classifier(7, "catavgmax")


def test_features_have_neither_class_block_nor_classifiers():
    model = vssm.create_model("test_groupmamba", features_only=True)
    assert not [key for key, _ in model.named_parameters() if "class_stage" in key or "head" in key]


def test_stages_end_in_norms_but_for_the_last(small):
    maps = small.forward_intermediates(torch.randn(2, 3, 64, 64), output_fmt="NHWC", intermediates_only=True)
    means = [each.mean(-1).abs().max().item() for each in maps]
    assert max(means[:3]) < 1e-6 < means[3]


def test_initialisation():
    model = vssm.create_model("test_groupmamba", dims=(128, 128, 128, 128))
    block = model.stages[1].blocks[0]
    for weight in (
        block.mlp.fc1.weight,
        block.mixer.in_proj.weight,
        block.mixer.proj.weight,
        model.head.fc_dist.weight,
    ):
        assert abs(weight.std() - 0.02) < 0.002
    assert abs(block.mlp.conv.conv.weight.std() - math.sqrt(2 / 9)) < 0.05
    downsample = model.stages[1].downsample.conv
    assert abs(downsample.weight.std() - math.sqrt(2 / (9 * 128))) < 0.002
    assert (downsample.bias == 0).all()


@pytest.fixture(scope="module")
def official():
    return records.load("group_mamba/groupmamba_tiny@160x256")


@pytest.fixture
def tiny():
    with torch.device("meta"):
        return vssm.create_model("groupmamba_tiny")


def test_blocks_under_autocast(official, device):
    """Each by itself: over the whole network, products with the input multiply every rounding a thousandfold."""
    model = vssm.create_model("groupmamba_tiny").eval()
    vssm.checkpoint.load(model, official.state_dict)
    model, x = model.to(device), official.images.to(device)
    with torch.no_grad():
        x = model.stem(x)
        for stage in model.stages:
            x = stage.downsample(x)
            size = x.shape[1:3]
            tokens = x.flatten(1, 2)
            for block in stage.blocks:
                exact = block(tokens, size)
                with torch.autocast(device.type, torch.bfloat16):
                    error = block(tokens, size) - exact
                assert 0 < error.abs().max() < 2e-2 * exact.abs().max()
                tokens = exact
            x = stage.norm(tokens.unflatten(1, size))


def test_own_keys_stay_as_they_are(small):
    state = small.state_dict()
    converted = checkpoint_filter_fn(dict(state), small)
    assert converted.keys() == state.keys()
    assert all(converted[key] is state[key] for key in state)


def test_groups_go_to_their_directions(official, tiny):
    state, ours = official.state_dict, checkpoint_filter_fn(dict(official.state_dict), tiny)
    for group in range(4):
        theirs = f"block3.7.attn.mamba_g{group + 1}"
        mixer = "stages.2.blocks.7.mixer"
        assert torch.equal(ours[f"{mixer}.in_proj.weight"][group], state[f"{theirs}.in_proj.weight"])
        assert torch.equal(ours[f"{mixer}.ssm.A_log"][group], state[f"{theirs}.A_logs"])
        own = slice(87 * group, 87 * group + 87)
        assert torch.equal(ours[f"{mixer}.conv.conv.weight"][own], state[f"{theirs}.conv2d.weight"])
        assert torch.equal(ours[f"{mixer}.out_norm.bias"][own], state[f"{theirs}.out_norm.bias"])
        assert torch.equal(
            ours[f"{mixer}.ssm.x_proj.weight"].unflatten(0, (4, -1))[group], state[f"{theirs}.x_proj_weight"][0]
        )


def test_unknown_keys_and_missing_groups_are_named(official, tiny):
    state = official.state_dict
    for key in ("block5.0.attn.norm.weight", "block1.0.norm3.weight", "post_network.0.attn.gamma", "norm5.weight"):
        with pytest.raises(ValueError, match=f"groupmamba: unknown key '{key}' in the checkpoint"):
            checkpoint_filter_fn({**state, key: torch.zeros(3)}, tiny)
    without = {key: value for key, value in state.items() if key != "block2.1.attn.mamba_g3.Ds"}
    with pytest.raises(ValueError, match=r"expected 4 groups, .* for 'block2.1.attn.mamba_g\*.Ds' .*, got 3"):
        checkpoint_filter_fn(without, tiny)


def test_pretrained_says_where_the_file_is():
    with pytest.raises(
        ValueError, match=r"get it at https://huggingface.co/.*/GroupMamba-Base and pass checkpoint_path"
    ):
        vssm.create_model("groupmamba_base", pretrained=True)


@pytest.mark.parametrize("arguments", [{"num_classes": 3}, {"features_only": True}])
def test_both_classifiers_are_left_out_of_a_file_with_other_classes(small, tmp_path, arguments):
    torch.save(small.state_dict(), tmp_path / "small.pth")
    overlay = {"file": tmp_path / "small.pth"}
    model = vssm.create_model("test_groupmamba", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    weights = dict(model.named_parameters())
    key = next(key for key in weights if key.endswith("stages.3.blocks.0.mixer.proj.weight"))
    assert torch.equal(weights[key], small.stages[3].blocks[0].mixer.proj.weight)


def test_wrong_number_of_classes_is_named(small):
    model = vssm.create_model("test_groupmamba", num_classes=3)
    with pytest.raises(ValueError, match=r"the checkpoint has 5 classes and GroupMamba has 3: build the model with"):
        vssm.checkpoint.load(model, small.state_dict())
