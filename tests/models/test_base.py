"""The two generic bases by themselves: a small backbone of stages, and the class token's way through a resize."""

import pytest
import torch
from timm.models import group_parameters
from torch import Tensor, nn

import vssm
from vssm.layers.conv import TokenConv
from vssm.models._base import GridBackbone, Stage


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = TokenConv(dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return x + self.conv(x, size)


class Stem(nn.Module):
    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class TinyGrid(GridBackbone):
    def __init__(self, in_chans: int = 3, num_classes: int = 10, **arguments) -> None:
        super().__init__(
            stem=Stem(in_chans, 8),
            stages=[Stage([Block(8), Block(8)]), Stage([Block(16)], downsample=Downsample(8, 16))],
            dims=(8, 16),
            strides=(2, 4),
            norm=nn.LayerNorm(16),
            in_chans=in_chans,
            num_classes=num_classes,
            **arguments,
        )


@pytest.fixture
def grid():
    return TinyGrid().eval()


def test_grid_convolution_sees_the_grid():
    conv = TokenConv(2)
    with torch.no_grad():
        conv.conv.weight.zero_()
        conv.conv.weight[:, 0, 2, 1] = 1  # the neighbour below
        conv.conv.bias.zero_()
        tokens = torch.arange(12.0).reshape(1, 12, 1).expand(1, 12, 2)
        below = conv(tokens, (3, 4))[0, :, 0]
    assert below.tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        TokenConv(2, 4)


def test_grid_forward_is_norm_pool_classifier(grid):
    images = torch.randn(2, 3, 20, 28)
    features = grid.forward_features(images)
    assert features.shape == (2, 5, 7, 16)
    torch.testing.assert_close(grid(images), grid.head.fc(grid.norm(features).mean((1, 2))))
    torch.testing.assert_close(grid.forward_head(features, pre_logits=True), grid.norm(features).mean((1, 2)))


def test_grid_intermediates(grid):
    images = torch.randn(2, 3, 20, 28)
    features, maps = grid.forward_intermediates(images)
    torch.testing.assert_close(features, grid.forward_features(images))
    assert [tuple(each.shape) for each in maps] == [(2, 8, 10, 14), (2, 16, 5, 7)]
    torch.testing.assert_close(maps[1].permute(0, 2, 3, 1), features)

    first, last = grid.forward_intermediates(images, norm=True, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(first.permute(0, 3, 1, 2), maps[0])
    torch.testing.assert_close(last, grid.norm(features))
    early = grid.forward_intermediates(images, indices=[0], stop_early=True, norm=True, intermediates_only=True)
    torch.testing.assert_close(early, maps[:1])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NHWC', got 'NLC'"):
        grid.forward_intermediates(images, output_fmt="NLC")


def test_grid_pruned_to_its_first_stage(grid):
    images = torch.randn(2, 3, 20, 28)
    expected = grid.forward_intermediates(images, indices=[0], intermediates_only=True)
    assert grid.prune_intermediate_layers([0]) == [0]
    torch.testing.assert_close(grid.forward_intermediates(images, indices=[0], intermediates_only=True), expected)
    assert grid.num_features == grid.head_hidden_size == 8
    assert grid.num_classes == 0
    assert not [key for key, _ in grid.named_parameters() if not key.startswith(("stem", "stages.0"))]
    torch.testing.assert_close(grid(images).permute(0, 3, 1, 2), expected[0])


def test_grid_head_and_groups(grid):
    grid.reset_classifier(3, "max")
    assert grid(torch.randn(1, 3, 16, 16)).shape == (1, 3)
    grid.reset_classifier(0, "catavgmax")
    assert isinstance(grid.get_classifier(), nn.Identity)
    assert grid(torch.randn(1, 3, 16, 16)).shape == (1, grid.head_hidden_size) == (1, 32)

    groups = group_parameters(TinyGrid(), TinyGrid().group_matcher())
    assert len(groups) == 5  # stem, three blocks, classifier
    assert "stages.1.downsample.conv.weight" in groups[3]
    assert "norm.weight" in groups[3]
    coarse = group_parameters(TinyGrid(), TinyGrid().group_matcher(coarse=True))
    assert len(coarse) == 4


def test_grid_classifier_is_like_the_rest():
    grid = TinyGrid().double().eval()
    grid.reset_classifier(3, "max")
    assert grid(torch.randn(1, 3, 16, 16, dtype=torch.float64)).dtype == torch.float64


def test_grid_gradient_checkpointing(grid):
    images = torch.randn(2, 3, 16, 16)
    grid(images).square().sum().backward()
    expected = {key: parameter.grad.clone() for key, parameter in grid.named_parameters()}
    grid.zero_grad()
    grid.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in grid.stages)
    grid(images).square().sum().backward()
    for key, parameter in grid.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key])
    with pytest.raises(ValueError, match=r"TinyGrid: expected images \(b, 3, height, width\), got \(3, 16, 16\)"):
        grid(images[0])


@pytest.mark.parametrize(("old", "new"), [((96, 96), (96, 128)), ((64, 48), (112, 80)), ((48, 48), (16, 16))])
def test_class_position_stays_with_the_class_token(old, new):
    """Patch positions are made a plane over the image, the class token's entry something else."""
    model = vssm.create_model("test_vim", img_size=old)
    patches = model.grid_size[0] * model.grid_size[1]
    with torch.no_grad():
        model.pos_embed.fill_(2.0)
        model.pos_embed[:, patches // 2] = 100.0
    model.set_input_size(new)
    patches = (new[0] // 16) * (new[1] // 16)
    assert model.pos_embed.shape[1] == patches + 1
    entries = model.pos_embed[0, :, 0]
    assert entries[patches // 2] == 100.0
    others = torch.cat([entries[: patches // 2], entries[patches // 2 + 1 :]])
    torch.testing.assert_close(others, torch.full_like(others, 2.0))


def test_positions_are_resized_to_a_grid_of_as_many_cells():
    """A slope along x over 4×9 cells stays one over 6×6: counting entries would take the grids for the same."""
    model = vssm.create_model("test_vim", img_size=(64, 144), class_token=False, global_pool="avg")
    with torch.no_grad():
        model.pos_embed.copy_(torch.linspace(-1, 1, 9).repeat(4)[None, :, None].expand(1, 36, 64))
    model.set_input_size(96)
    rows = model.pos_embed[0, :, 0].view(6, 6)
    torch.testing.assert_close(rows, rows[:1].expand(6, 6))
    assert (rows.diff(dim=1) > 0.1).all()


def test_positions_are_resized_bicubically():
    """Which overshoots beside a step; bilinearly it would stay between its ends."""
    model = vssm.create_model("test_vim", depth=1, class_token=False, global_pool="avg")
    with torch.no_grad():
        model.pos_embed.copy_((torch.arange(36) % 6 >= 3).float()[None, :, None].expand(1, 36, 64))
    model.set_input_size(192)
    assert model.pos_embed.max() > 1.02
    assert model.pos_embed.min() < -0.02


def test_size_once_set_is_the_only_one():
    model = vssm.create_model("test_vim", depth=1).eval()
    model.set_input_size((64, 112))
    assert (model.img_size, model.grid_size) == ((64, 112), (4, 7))
    assert model(torch.randn(1, 3, 64, 112)).shape == (1, 1000)
    with pytest.raises(ValueError, match="expected images of 64×112 pixels, got 96×96"):
        model(torch.randn(1, 3, 96, 96))


def test_images_without_a_whole_patch_are_refused():
    model = vssm.create_model("test_vim", dynamic_img_size=True)
    with pytest.raises(ValueError, match="at least 16×16 pixels, one patch, got 96×8"):
        model(torch.randn(1, 3, 96, 8))


def test_overlapping_patches_announce_their_stride():
    model = vssm.create_model("test_vim", stride=8, features_only=True, out_indices=(0,))
    assert model.feature_info.reduction() == [8]
    (features,) = model(torch.randn(1, 3, 96, 96))
    assert features.shape == (1, 64, 11, 11)  # 1 + (96 - 16)/8


def test_pruned_norm_leaves_the_residual_stream():
    model = vssm.create_model("test_vim", class_token=False, global_pool="avg").eval()
    images = torch.randn(1, 3, 96, 96)
    expected = model.forward_intermediates(images, [1], output_fmt="NLC", intermediates_only=True)
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.blocks) == 2
    assert (model.num_classes, model.global_pool) == (0, "")
    torch.testing.assert_close([model(images)], expected)


@pytest.mark.parametrize("build", [TinyGrid, lambda **kwargs: vssm.create_model("test_vim", **kwargs)])
def test_dropout_before_the_classifier(build):
    model = build(drop_rate=0.5).eval()
    features = model.forward_features(torch.randn(16, 3, 96, 96))
    whole = model.forward_head(features, pre_logits=True)
    left = model.train().forward_head(features, pre_logits=True)
    dropped = left == 0
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close(left[~dropped], 2 * whole[~dropped])


def test_resized_positions_stay_trainable_or_frozen():
    for trainable in (True, False):
        model = vssm.create_model("test_vim", depth=1).bfloat16()
        model.pos_embed.requires_grad_(trainable)
        model.set_input_size((64, 112))
        assert isinstance(model.pos_embed, nn.Parameter)
        assert model.pos_embed.requires_grad == trainable
        assert model.pos_embed.dtype == torch.bfloat16


def test_stochastic_depth_leaves_out_mixers_in_training_only():
    torch.manual_seed(0)
    block = vssm.create_model("test_vim", drop_path_rate=0.5).blocks[-1]
    x = torch.randn(64, 3, 64)
    whole = block.eval()(x, (1, 2)) - x
    kept = block.train()(x, (1, 2)) - x
    dropped = (kept == 0).all((1, 2))
    assert 16 < dropped.sum() < 48
    torch.testing.assert_close(kept[~dropped], 2 * whole[~dropped])


def test_class_token_is_in_the_middle():
    model = vssm.create_model("test_vim", img_size=48).eval()  # 9 patches, an odd number
    with torch.no_grad():
        model.cls_token.fill_(5.0)
        model.pos_embed.zero_()
        images = torch.randn(1, 3, 48, 48)
        tokens, size = model._embed(images)
        patches = model.stem(images).flatten(1, 2)
    assert size == (3, 3)
    assert model.class_token_index(10) == 4
    torch.testing.assert_close(tokens[:, 4], torch.full((1, 64), 5.0))
    torch.testing.assert_close(torch.cat([tokens[:, :4], tokens[:, 5:]], 1), patches)


def test_pooling_of_tokens():
    images = torch.randn(2, 3, 96, 96)
    model = vssm.create_model("test_vim", num_classes=6).eval()
    with torch.no_grad():
        tokens = model.forward_features(images)
        torch.testing.assert_close(model(images), model.head(tokens[:, 18]))
        model.reset_classifier(6, "avg")
        patches = torch.cat([tokens[:, :18], tokens[:, 19:]], 1)
        torch.testing.assert_close(model(images), model.head(patches.mean(1)))
        model.reset_classifier(6, "")
        torch.testing.assert_close(model(images), model.head(tokens))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_pool": "max"}, "global_pool must be one of 'token', 'avg', '', got 'max'"),
        ({"class_token": False}, "global_pool without a class token must be one of 'avg', '', got 'token'"),
        ({"stride": 0}, "patch_size and stride must be at least 1, got 16 and 0"),
        ({"img_size": (8, 96)}, "at least 16×16 pixels, one patch, got 8×96"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        vssm.create_model("test_vim", **arguments)


def test_misspelt_argument_is_not_swallowed():
    with pytest.raises(TypeError, match="unexpected keyword argument 'drop_pth_rate'"):
        vssm.create_model("test_vim", drop_pth_rate=0.1)
