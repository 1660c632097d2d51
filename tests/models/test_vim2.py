"""What is ViM2's own: its channel mixer against a loop over channels, its averages, and what both start as."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vssm
from vssm.layers.ss2d import SS2D
from vssm.models.vim2 import AveragingStage, ChannelMixer, FeatureAverage


def channels_by_hand(mixer: ChannelMixer, x: Tensor) -> Tensor:
    """One token after the other, one channel after the other, with B and C made of each channel's number."""
    d, n = mixer.out_proj.in_features, mixer.ssm.d_state
    results = torch.zeros(*x.shape[:2], d, dtype=x.dtype)
    for sample in range(x.shape[0]):
        for token in range(x.shape[1]):
            u, z = (mixer.in_proj.weight @ x[sample, token]).split(d)
            for direction, walk in enumerate((list(range(d)), list(range(d))[::-1])):
                state = torch.zeros(n, dtype=x.dtype)
                for step, channel in enumerate(walk):
                    taps = mixer.conv.weight[direction, 0]
                    seen = [u[walk[step - back]] for back in range(len(taps)) if step >= back]
                    value = mixer.conv.bias[direction, 0] + sum(
                        taps[-1 - back] * other for back, other in enumerate(seen)
                    )
                    value = F.silu(value)
                    weight = mixer.ssm.x_proj.weight.unflatten(0, (2, -1))[direction, :, 0]
                    dt, B, C = (weight * value).split([1, n, n])
                    width = F.softplus(mixer.ssm.dt_weight[direction, 0] * dt + mixer.ssm.dt_bias[direction])
                    state = torch.exp(-width * mixer.ssm.A_log[direction, 0].exp()) * state + width * B * value
                    y = (C * state).sum() + mixer.ssm.D[direction, 0] * value
                    results[sample, token, channel] += y * F.silu(z[channel])
    return results @ mixer.out_proj.weight.T


def test_channel_mixer_against_a_loop_over_channels():
    mixer = ChannelMixer(3, d_inner=6, d_state=2).double()
    for parameter in (mixer.ssm.D, mixer.ssm.x_proj.weight, mixer.ssm.dt_weight):
        nn.init.normal_(parameter)
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    mine, expected = mixer(x, (1, 2)), channels_by_hand(mixer, x)
    torch.testing.assert_close(mine, expected)

    inputs, dy = [x, *mixer.parameters()], torch.randn_like(expected)
    names = ["x", *(name for name, _ in mixer.named_parameters())]
    gradients = zip(torch.autograd.grad(mine, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True)
    for name, (gradient, other) in zip(names, gradients, strict=True):
        torch.testing.assert_close(gradient, other, msg=lambda text, name=name: f"{name}: {text}")


def test_channel_mixer_sees_one_token_at_a_time():
    mixer = ChannelMixer(8, d_inner=16)
    x = torch.randn(2, 6, 8)
    order = torch.randperm(6)
    torch.testing.assert_close(mixer(x[:, order], (2, 3)), mixer(x, (2, 3))[:, order])


def test_average_weighs_both_copies_of_the_input():
    average = FeatureAverage(2)
    assert average.weight.tolist() == [0, 1, 1, 1]
    nn.init.normal_(average.weight)
    x, first, second = torch.randn(3, 2, 4, 5)
    w = average.weight
    torch.testing.assert_close(average([x, first, second]), (w[0] + w[1]) * x + w[2] * first + w[3] * second)


def test_number_of_averages_is_that_of_the_paper():
    """n·(2n + 3) scalars for n pairs of mixers, and one more average for the stage's result."""
    stages = vssm.create_model("test_vim2", depths=(2, 4)).stages
    for stage, mixers in zip(stages, (6, 12), strict=True):
        pairs = mixers // 2
        assert sum(block.average.weight.numel() for block in stage.blocks) == pairs * (2 * pairs + 3)
        assert stage.average.weight.numel() == mixers + 2


def test_stage_against_the_formulas():
    stage = vssm.create_model("test_vim2").eval().stages[0]
    assert isinstance(stage, AveragingStage)
    assert [type(block.mixer) for block in stage.blocks] == [SS2D, SS2D, ChannelMixer]
    for block in (*stage.blocks, stage):
        nn.init.normal_(block.average.weight)
    x = torch.randn(2, 3, 4, 16)
    outputs = [x.flatten(1, 2), x.flatten(1, 2)]
    for block in stage.blocks:
        seen = sum(weight * each for weight, each in zip(block.average.weight, outputs, strict=True))
        outputs.append(block.mixer(F.layer_norm(seen, (16,), block.norm1.weight, block.norm1.bias), (3, 4)))
    result = sum(weight * each for weight, each in zip(stage.average.weight, outputs, strict=True))
    torch.testing.assert_close(stage(x), result.unflatten(1, (3, 4)))


def test_without_channel_mixers_it_starts_as_the_first_vmamba():
    model = vssm.create_model("test_vim2", depths=(1, 1)).eval()
    vmamba = vssm.create_model("vmamba_tiny_v0", embed_dim=16, depths=(2, 2), d_state=4).eval()
    for stage in model.stages:
        nn.init.zeros_(stage.blocks[2].mixer.out_proj.weight)
    state = {
        key: value
        for key, value in model.state_dict().items()
        if not key.endswith("average.weight") and ".blocks.2." not in key
    }
    vmamba.load_state_dict(state)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(images), vmamba(images))


def test_stochastic_depth_leaves_outputs_out_of_later_averages():
    model = vssm.create_model("test_vim2", drop_path_rate=0.5)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_pretrained_weights_do_not_exist():
    with pytest.raises(ValueError, match="vim2_tiny: there are no published weights for pretrained=True"):
        vssm.create_model("vim2_tiny", pretrained=True)
