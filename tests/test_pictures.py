"""Pictures of what models see: the arrays behind them against hand computations, and the command."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import vssm
from vssm.cli import main
from vssm.engine.class_activation import class_activation
from vssm.engine.receptive_field import area_share, draw_receptive_fields, effective_receptive_field
from vssm.engine.scan_paths import scan_paths, visit_times
from vssm.engine.state_decay import decay_map, half_life, share_left
from vssm.scan_order import scan_order
from vssm_kernels import directional_scan

ROOT = Path(__file__).parents[1]
VIM = ["--model", "test_vim", "--model-kwargs", "patch_size=4", "depth=2", "--img-size", "16"]


class ConvModel(nn.Module):
    """One convolution as a backbone, with a classifier of the mean of its map."""

    def __init__(self, weight, bias=0.0, classes=0):
        super().__init__()
        self.conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=1)
        with torch.no_grad():
            self.conv.weight.copy_(weight)
            self.conv.bias.fill_(bias)
        self.head = nn.Linear(weight.shape[0], max(classes, 1))
        self.num_classes = classes
        self.feature_info = [{"num_chs": weight.shape[0], "reduction": 1, "module": "conv"}]

    def forward_intermediates(self, x, indices=None, norm=False, intermediates_only=False):
        return [self.conv(x)]

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(self.pool(self.conv(x)))

    def pool(self, x):
        return x.mean((2, 3))


class PeakModel(ConvModel):
    """The same with a classifier of the largest value of each channel."""

    def pool(self, x):
        return x.amax((2, 3))


def test_field_of_a_convolution_is_its_window():
    weight = torch.arange(1.0, 19.0).view(1, 2, 3, 3) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    field = effective_receptive_field(ConvModel(weight), torch.randn(3, 2, 7, 8))
    expected = torch.zeros(7, 8)
    expected[2:5, 3:6] = weight.abs().mean((0, 1))
    assert torch.equal(field, expected)
    assert area_share(field, 1.0) == 9 / 56
    assert area_share(field, 0.01) == 1 / 56


def test_field_is_the_mean_over_images():
    model = vssm.create_model("test_vmamba").eval()
    images = torch.randn(2, 3, 64, 64)
    each = [effective_receptive_field(model, image[None]) for image in images]
    assert (each[0] != each[1]).any()
    torch.testing.assert_close(effective_receptive_field(model, images), (each[0] + each[1]) / 2)


def test_field_of_a_causal_scan_ends_at_the_centre():
    """The state of one scan in raster order decays by 1/e a step; of later tokens it knows nothing."""

    class Scan(nn.Module):
        def forward_intermediates(self, x, **_):
            tokens = x.flatten(2).transpose(1, 2)
            ones = torch.ones(1, tokens.shape[1], 1, 1)
            y = directional_scan(tokens, ones.expand(-1, -1, -1, 3), -torch.ones(1, 3, 1), ones, ones, softplus=False)
            return [y.transpose(1, 2).unflatten(2, x.shape[2:])]

    field = effective_receptive_field(Scan(), torch.randn(1, 3, 4, 4)).flatten()
    expected = torch.where(torch.arange(16) <= 10, torch.exp(torch.arange(16.0) - 10), 0)
    torch.testing.assert_close(field, expected)


def test_what_has_no_field():
    with pytest.raises(ValueError, match="forward_intermediates, which makes maps, Linear has none"):
        effective_receptive_field(nn.Linear(2, 2), torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="depends on the images"):
        effective_receptive_field(ConvModel(torch.zeros(1, 3, 3, 3)), torch.randn(1, 3, 8, 8))


def test_map_of_a_class_that_reads_one_channel_is_that_channel():
    model = ConvModel(torch.randn(4, 3, 3, 3), bias=0.5, classes=4)
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(4))
    image = torch.randn(3, 6, 5)
    activation = class_activation(model, image, 2)
    assert (activation.method, activation.index) == ("CAM", 2)
    torch.testing.assert_close(activation.values, model.conv(image[None])[0, 2].detach())


@pytest.mark.parametrize("name", ["test_vmamba", "test_plainmamba", "test_mambavision", "test_vim2"])
def test_map_averages_to_the_logit(name):
    model = vssm.create_model(name, num_classes=7).eval()
    image = torch.randn(3, 96, 96)
    activation = class_activation(model, image)
    logits = model(image[None])[0].detach()
    assert (activation.method, activation.index) == ("CAM", int(logits.argmax()))
    bias = model.get_classifier().bias.detach()[activation.index]
    torch.testing.assert_close(activation.values.mean() + bias, logits[activation.index], atol=1e-5, rtol=1e-4)


def test_gradients_weigh_where_the_mean_is_not_read():
    """The gradient of a largest value is 1 at one place: the weight of its channel is the classifier's over h·w."""
    model = PeakModel(torch.randn(4, 3, 3, 3), classes=2)
    image = torch.randn(3, 6, 5)
    activation = class_activation(model, image, 1)
    expected = F.relu(torch.einsum("c,chw->hw", model.head.weight[1] / 30, model.conv(image[None])[0]))
    assert activation.method == "Grad-CAM"
    torch.testing.assert_close(activation.values, expected.detach())


def test_class_token_reads_the_block_before_the_last():
    """A small change of that block's patches changes the logit as the weighted sum says, before it is cut at 0."""
    model = vssm.create_model("test_vim", depth=3, num_classes=5).eval().double()
    image = torch.randn(3, 96, 96, dtype=torch.float64)
    activation = class_activation(model, image, 3)
    assert (activation.method, activation.layer) == ("Grad-CAM", "blocks.1")
    with torch.no_grad():
        tokens = model.blocks[1](model.blocks[0](model._embed(image[None])[0], (6, 6)), (6, 6))
    tokens.requires_grad_()
    logit = model.forward_head(model.norm(model.blocks[2](tokens, (6, 6))))[0, 3]
    patches = [place for place in range(37) if place != 18]
    gradient = torch.autograd.grad(logit, tokens)[0][0, patches]
    expected = F.relu(tokens[0, patches] @ gradient.mean(0)).view(6, 6)
    torch.testing.assert_close(activation.values, expected.detach())
    assert activation.values.max() > 0


@pytest.mark.parametrize("name", ["test_groupmamba", "test_a2mamba"])
def test_other_heads_are_weighted_by_gradients(name):
    activation = class_activation(vssm.create_model(name, num_classes=3).eval(), torch.randn(3, 96, 96), 0)
    assert activation.method == "Grad-CAM"
    assert activation.layer in ("stages.2", "stages.3")


def test_what_has_no_class():
    model = ConvModel(torch.randn(4, 3, 3, 3), classes=4)
    with pytest.raises(ValueError, match="a class from 0 to 3, got 4"):
        class_activation(model, torch.randn(3, 6, 5), 4)
    model.num_classes = 0
    with pytest.raises(ValueError, match="ConvModel has no classes"):
        class_activation(model, torch.randn(3, 6, 5))


def test_share_left_is_the_product_of_decays():
    step, A = torch.rand(9, 3, dtype=torch.float64), -torch.rand(3, 2, dtype=torch.float64)
    product, expected = torch.ones(3, 2, dtype=torch.float64), [1.0]
    for later in range(5, 9):
        product = product * torch.exp(step[later][:, None] * A)
        expected.append(float(product.mean()))
    torch.testing.assert_close(share_left(step, A, 4), torch.tensor(expected, dtype=torch.float64))
    assert share_left(step, A, 8).tolist() == [1.0]


def record(module):
    """What a module is called with, as a list that grows."""
    calls = []
    module.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    return calls


@pytest.mark.parametrize(("name", "block"), [("test_vmamba", 2), ("test_vim", 3), ("test_localvmamba", 1)])
def test_decay_is_the_product_of_the_models_own_steps(name, block):
    """From `SelectiveSSM.step` and the order that the block's scan is called with, token by token, in float64."""
    model = vssm.create_model(name).eval().double()
    image = torch.randn(3, 96, 96, dtype=torch.float64)
    blocks = [each for key, each in model.named_modules() if key.rpartition(".")[0].endswith("blocks")]
    ssm = blocks[block - 1].mixer.ssm
    calls = record(ssm)
    paths = scan_paths(model, image, block)
    (x, *_), options = calls[0]
    order, gap = options["order"], options.get("gap")
    step, A = ssm.step(x)[0].detach(), -ssm.A_log.detach().exp()
    height, width = paths[0].size
    class_place = 18 if name == "test_vim" else None
    patch = (height // 2) * width + 1
    for i, path in enumerate(paths):
        expected = torch.full((height * width,), torch.nan, dtype=torch.float64)
        product = None
        for s, token in enumerate(order[i].tolist()):
            cell = token if class_place is None else token - (token > class_place)
            if product is not None:
                passed = step[token, i]
                if gap is not None:
                    passed = passed + gap[i, s] * F.softplus(ssm.dt_bias[i].detach())
                product = product * torch.exp(passed[:, None] * A[i])
            if cell == patch and token != class_place:
                product = torch.ones_like(A[i])
            if product is not None and token != class_place:
                expected[cell] = product.mean()
        torch.testing.assert_close(decay_map(path, patch), expected.view(height, width), equal_nan=True)
    assert len(paths) == len(order)


def test_decay_is_what_the_op_leaves_in_the_state():
    """An impulse in one token, and the state at the end."""
    model = vssm.create_model("test_vmamba").eval().double()
    path = scan_paths(model, torch.randn(3, 96, 96, dtype=torch.float64), 2)[1]
    t, d, n = len(path.cells), *path.A.shape
    impulse = torch.zeros(1, t, d, dtype=torch.float64)
    impulse[0, 7] = 1 / path.step[7]
    ones = torch.ones(1, t, 1, n, dtype=torch.float64)
    step = path.step[None, :, None]
    _, state = directional_scan(impulse, step, path.A[None], ones, ones, softplus=False, return_last_state=True)
    torch.testing.assert_close(share_left(path.step, path.A, 7)[-1], state.mean())


def test_steps_of_plainmamba_belong_to_places_in_the_sequence():
    model = vssm.create_model("test_plainmamba").eval()
    ssm = model.blocks[1].mixer.ssm
    calls = record(ssm)
    paths = scan_paths(model, torch.randn(3, 96, 96), 2)
    x, order, _ = calls[0][0]
    assert len(paths) == 4
    for path, row in zip(paths, order, strict=True):
        assert path.cells.tolist() == row.tolist()
        torch.testing.assert_close(path.step, ssm.step(x)[0, :, 0].detach())


def test_half_life():
    path = scan_paths(vssm.create_model("test_vmamba").eval(), torch.randn(3, 96, 96), 1)[0]
    left = decay_map(path, 100).flatten()[100:]
    steps = half_life(path, 100)
    assert left[steps] < 0.5 <= left[steps - 1]
    assert half_life(path, 24 * 24 - 1) is None


@pytest.mark.parametrize("name", ["cross", "snake", "bidirectional", "atrous", "alternating"])
def test_times_follow_the_table(name):
    order = scan_order(name, 4, 6, "cpu")
    for row in order:
        times = visit_times(row, (4, 6)).flatten()
        assert [int(times[token]) for token in row] == list(range(len(row)))
        assert (times >= 0).sum() == len(row)


@pytest.mark.parametrize(
    ("name", "order"),
    [("test_vmamba", "cross"), ("test_groupmamba", "cross"), ("test_plainmamba", "snake"), ("test_a2mamba", "row")],
)
def test_paths_of_a_block_are_the_table(name, order):
    paths = scan_paths(vssm.create_model(name).eval(), torch.randn(3, 96, 96), 1)
    table = scan_order(order, *paths[0].size, "cpu")
    assert [path.cells.tolist() for path in paths] == table.tolist()


def test_paths_leave_out_the_class_token():
    forward, backward = scan_paths(vssm.create_model("test_vim").eval(), torch.randn(3, 96, 96), 1)
    assert forward.cells.tolist() == [*range(18), -1, *range(18, 36)]
    assert backward.cells.tolist() == forward.cells.flip(0).tolist()


def test_paths_of_localvim_leave_out_padding():
    """The windows of 7×7 tokens pad a grid of 6×6; rows and columns do not."""
    paths = scan_paths(vssm.create_model("test_localvim").eval(), torch.randn(3, 96, 96), 1)
    for path in paths:
        assert sorted(path.cells[path.cells >= 0].tolist()) == list(range(36))
        assert len(path.cells) == 49
    assert any(int((path.cells >= 0).nonzero()[-1]) > 35 for path in paths)


def test_scans_of_half_the_sides_have_their_own_grid():
    paths = scan_paths(vssm.create_model("test_msvmamba").eval(), torch.randn(3, 96, 96), 2)
    assert [path.size for path in paths] == [(6, 6), (6, 6), (6, 6), (12, 12)]
    tables = [*scan_order("cross_rest", 6, 6, "cpu"), *scan_order("row", 12, 12, "cpu")]
    assert [path.cells.tolist() for path in paths] == [table.tolist() for table in tables]


@pytest.mark.parametrize(
    ("name", "block", "expected"),
    [
        ("test_a2mamba", 3, "block 3, stages.2.blocks.0, does not"),
        ("test_vim", 5, "a block from 1 to 4, got 5"),
        ("test_mambavision", 3, "scans 4 of 16: windows have paths of their own"),
        ("resnet10t", 1, "a model of vssm, got ResNet"),
    ],
)
def test_blocks_without_paths(name, block, expected):
    with pytest.raises(ValueError, match=expected):
        scan_paths(vssm.create_model(name).eval(), torch.randn(3, 96, 96), block)


@pytest.fixture
def photo(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--what", "erf", "--count", "2"], "test_vim, random weights: half of the field within "),
        (["--what", "cam", "--num-classes", "4", "--class", "3"], "Grad-CAM at blocks.0 of 3 ("),
        (["--what", "cam", "--class", "7"], "Grad-CAM at blocks.0 of cock ("),
        (["--what", "decay", "--block", "2", "--token", "1,2"], "half-life in steps, by direction: "),
        (["--what", "path", "--block", "2"], "test_vim, block 2, 2 direction(s)"),
    ],
)
def test_command_draws_a_model(tmp_path, capsys, caplog, arguments, expected):
    caplog.set_level("INFO")
    output = tmp_path / "new_folder/out.png"
    assert main(["visualize", str(output), *VIM, *arguments]) == 0
    assert capsys.readouterr().out.startswith(f"{output}: {expected}")
    assert "test_vim: random weights, of seed 0" in caplog.text
    assert [path.name for path in output.parent.iterdir()] == ["out.png"]
    with Image.open(output) as picture:
        assert round(picture.info["dpi"][0]) == 300
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_several_models_stand_side_by_side(tmp_path, capsys, photo):
    options = ["--what", "erf", "--models", "test_vmamba,resnet10t", "--img-size", "32", "--image", str(photo)]
    assert main(["visualize", str(tmp_path / "out.png"), *options]) == 0
    out = capsys.readouterr().out
    assert out.index("test_vmamba, random weights") < out.index("resnet10t, random weights")


def test_path_over_an_image(tmp_path):
    """The left half of the picture is darker where the image is black there."""
    pixels = np.full((16, 16, 3), 255, dtype=np.uint8)
    pixels[:, :8] = 0
    Image.fromarray(pixels).save(tmp_path / "halves.png")
    options = ["--what", "path", "--order", "column", "--grid", "2x2"]
    pictures = []
    for more in ([], ["--image", str(tmp_path / "halves.png")]):
        assert main(["visualize", str(tmp_path / "out.png"), *options, *more]) == 0
        pictures.append(np.asarray(Image.open(tmp_path / "out.png").convert("L")).astype(int))
    darker = pictures[0] - pictures[1]
    assert darker[:, : darker.shape[1] // 2].mean() > 10
    assert abs(darker[:, darker.shape[1] // 2 :].mean()) < 2


def test_fields_are_relative_to_their_largest_value(tmp_path):
    """Two fields that differ by a factor look the same."""
    field = torch.rand(8, 8) + 0.1
    record = draw_receptive_fields(tmp_path / "out.png", ["a", "a"], [field, 1000 * field])
    assert record["half_area"][0] == record["half_area"][1]
    pixels = np.asarray(Image.open(tmp_path / "out.png").convert("RGB")).astype(int)
    yellow = np.nonzero((np.abs(pixels - (253, 231, 37)).max(-1) < 3).any(0))[0]
    assert (yellow < pixels.shape[1] // 3).any()
    assert ((yellow > pixels.shape[1] // 2.2) & (yellow < 0.8 * pixels.shape[1])).any()


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--what", "cam"], 2, "--what cam needs a model: expected --model NAME or --checkpoint FILE"),
        (["--what", "erf", "--block", "2", *VIM], 2, "--block belongs to --what path or decay, got --what erf"),
        (["--what", "path", "--block", "2"], 2, "--block belongs to a model"),
        (["--what", "erf", "--before", *VIM], 2, "--before shows random weights beside trained ones"),
        (["--what", "erf", "--models", "test_vim", *VIM], 2, "expected --models A,B, or --model or --checkpoint"),
        (["--what", "erf", "--models", "test_vim,none.pth"], 1, "none.pth"),
        (["--what", "erf", "--models", "test_vim,"], 2, "expected names with commas between them"),
        (["--what", "cam", "--prune", "s.yaml", *VIM], 2, "--prune draws tokens that stay"),
        (["--what", "cam", "--class", "cat", "--num-classes", "3", *VIM], 2, "the model has no class 'cat'"),
        (["--what", "cam", "--class", "3", "--num-classes", "3", *VIM], 1, "a class from 0 to 2, got 3"),
        (["--what", "cam", "--index", "355", *VIM], 1, "an index from 0 to 354 in the embedded digits"),
        (["--what", "cam", "--image", "none.png", *VIM], 1, "none.png"),
        (["--what", "decay", "--token", "4", *VIM], 2, "such as 4,4, got '4'"),
        (["--what", "decay", "--token", "4,0", *VIM], 1, "a token from 0,0 to 3,3, got 4,0"),
        (["--what", "decay", "--block", "3", *VIM], 1, "a block from 1 to 2, got 3"),
        (["--what", "sound"], 2, "'sound'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, status, expected):
    monkeypatch.chdir(tmp_path)
    assert main(["visualize", "out.png", *arguments]) == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("vssm visualize: ")
    assert expected in last
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["visualize", str(tmp_path / "out.png"), "--what", "cam", *VIM]) == 1
    assert 'pip install "vssm[plot]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_gallery_shows_what_its_commands_write():
    page = (ROOT / "model_cards/gallery.md").read_text(encoding="utf-8")
    written = re.findall(r"^vssm visualize (model_cards/\S+)", page, re.MULTILINE)
    shown = ["model_cards/" + name for name in re.findall(r"\]\((images/\S+)\)", page)]
    assert sorted(written) == sorted(shown)
    assert all(4_000 < (ROOT / name).stat().st_size <= 150_000 for name in shown)
