"""Quantisation: integer layers against integers by hand, exact folds, every family, and ``vssm quantize``."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch

import vssm
from image_folders import make_folder
from vssm import checkpoint
from vssm.cli import main
from vssm.engine import classifier as classifiers
from vssm.engine.classifier import ModelSpec
from vssm.engine.quantize import QuantizeSetting, quantize_classifier
from vssm.layers import int8
from vssm.layers.group_linear import DirectionLinear
from vssm.layers.hadamard import RotatedLinear, block_size, hadamard_matrix, multiply_blocks
from vssm.layers.int8 import Int8GroupLinear, Int8Linear
from vssm.quantization import _Range, compact, fold_hadamard, quantize, restore

NAMES = vssm.list_models("test_*")
WITHOUT_CALLS = {"test_vim2": ("stages.0.blocks.2.mixer.ssm.x_proj", "stages.1.blocks.2.mixer.ssm.x_proj")}
SPEC = ModelSpec(
    model="test_vim",
    model_kwargs={"embed_dim": 16, "depth": 2, "patch_size": 4, "d_state": 2},
    in_chans=1,
    img_size=(16, 16),
)


@pytest.fixture(params=["kernel", "plain"])
def arithmetic(request, monkeypatch):
    """Either way to compute an integer layer, torch's kernel where it runs here."""
    if request.param == "plain":
        monkeypatch.setattr(int8, "_multiplies_bytes", lambda: False)
    elif not int8._multiplies_bytes():
        pytest.skip("the CPU has no VNNI")


@pytest.fixture
def float_weights(tmp_path) -> Path:
    """Random weights of a small Vim for two classes."""
    classifier = classifiers.build(SPEC, classes=("dark", "light"))
    path = tmp_path / "float.safetensors"
    classifiers.save(path, classifier, classifier.model.state_dict(), {})
    return path


def steps_by_hand(layer: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    """q_x − z in 64-bit integers."""
    zero = layer.input_zero.long()
    return (x.double() / layer.input_scale).round().long().add(zero).clamp(-128, 127) - zero


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("low", "high"), [(-1.5, 2.5), (0.5, 2.0), (-3.0, -1.0)])
def test_integer_layer_by_hand(arithmetic, low, high):
    linear = torch.nn.Linear(600, 40)
    x = torch.empty(3, 7, 600).uniform_(-4, 4)  # beyond every range
    layer = Int8Linear((40, 600), bias=True)
    layer.quantize(linear.weight, linear.bias, low=low, high=high)
    total = steps_by_hand(layer, x) @ layer.weight.long().T
    expected = total * (layer.input_scale.double() * layer.weight_scale) + linear.bias
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-5, atol=1e-5)
    clipped = torch.nn.functional.linear(x.clamp(min(low, 0), max(high, 0)), linear.weight, linear.bias)
    assert 0 < relative(layer(x), clipped) < 0.02
    assert (layer.weight.abs().amax(1) == 127).all()


@pytest.mark.parametrize("shape", [(2, 5, 24), (2, 5, 3, 24)])
def test_integer_layer_of_groups_by_hand(arithmetic, shape):
    x, weight = torch.randn(shape), torch.randn(3, 10, 24)
    layer = Int8GroupLinear(weight.shape)
    layer.quantize(weight, None, low=-2.0, high=3.0)
    steps = steps_by_hand(layer, x)
    maps = steps if x.ndim == 4 else steps[:, :, None].expand(-1, -1, 3, -1)
    total = (maps[..., None, :] * layer.weight.long()).sum(-1)
    expected = total * (layer.input_scale.double() * layer.weight_scale)
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-5, atol=1e-5)


def test_layer_of_directions_is_one_einsum():
    layer, x = DirectionLinear(6, 8, directions=2), torch.randn(3, 5, 2, 6)
    expected = torch.stack([x[:, :, i] @ layer.weight[4 * i : 4 * i + 4].T for i in range(2)], dim=2)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[:, :, 1])[:, :, 1], expected[:, :, 1])


def test_packed_weights_follow_new_ones_and_are_not_copied():
    layer, x = Int8Linear((4, 8)), torch.randn(2, 8)
    layer.quantize(torch.randn(4, 8), None, low=-3.0, high=3.0)
    before = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), before)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), before)
    layer.load_state_dict(layer.state_dict() | {"weight": -layer.weight})
    torch.testing.assert_close(layer(x), -before)


def test_integer_layer_has_no_gradient():
    with pytest.raises(ValueError, match="Int8Linear: a quantised layer has no gradient"):
        Int8Linear((4, 8))(torch.randn(2, 8, requires_grad=True))


def test_half_precision_goes_in_and_comes_out():
    layer = Int8Linear((4, 8))
    layer.quantize(torch.randn(4, 8), None, low=-3.0, high=3.0)
    x = torch.randn(2, 8).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), layer(x.float()).bfloat16())


@pytest.mark.parametrize(("channels", "block"), [(384, 32), (48, 16), (20, 4), (15, 1)])
def test_hadamard_blocks(channels, block):
    assert block_size(channels) == block
    matrix = hadamard_matrix(block)
    torch.testing.assert_close(matrix @ matrix, torch.eye(block))
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix.abs(), torch.full((block, block), block**-0.5))
    outlier = torch.zeros(channels)
    outlier[0] = 1.0
    assert multiply_blocks(outlier, matrix).abs().max() == pytest.approx(block**-0.5)


@pytest.mark.parametrize("name", NAMES)
def test_folded_model_computes_the_same(name):
    model = vssm.create_model(name).eval()
    folded = copy.deepcopy(model)
    layers = fold_hadamard(folded)
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    assert layers
    for layer in layers:
        rotated = folded.get_submodule(layer)
        assert isinstance(rotated, RotatedLinear)
        assert relative(rotated.get_parameter("linear.weight"), model.get_parameter(f"{layer}.weight")) > 0.1
    with torch.no_grad():
        assert relative(folded(images), model(images)) < 2e-6


@pytest.mark.parametrize("tail", [0.0, 0.001, 0.1])
def test_range_is_cut_where_so_many_values_lie_beyond(tail):
    batches = [torch.randn(size, 7, 11) for size in (5, 3, 4)]
    found = _Range(tail=tail, images=12)
    for batch in batches:
        found.update(batch)
    values = torch.cat([batch.flatten() for batch in batches]).sort().values
    beyond = int(tail * len(values))
    assert found.ends() == (values[beyond].item(), values[-1 - beyond].item())


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_quantised_written_and_read(name, tmp_path):
    model = vssm.create_model(name).eval()
    images = torch.randn(4, *model.pretrained_cfg["input_size"])
    quantized = copy.deepcopy(model)
    done = quantize(quantized, [images[:3], images[3:]], images=4)
    layers = {name for name, module in quantized.named_modules() if isinstance(module, Int8Linear)}
    assert len(layers) == len(done.int8)
    assert done.rotated
    assert done.clipped
    assert done.kept == WITHOUT_CALLS.get(name, ())
    checkpoint.write(tmp_path / "int8.safetensors", compact(quantized.state_dict()), {})
    weights = checkpoint.read(tmp_path / "int8.safetensors")
    read = copy.deepcopy(model)
    restore(read, weights)
    checkpoint.load(read, weights)
    with torch.no_grad():
        assert torch.equal(read(images), quantized(images))
        assert 1e-4 < relative(read(images), model(images)) < 0.05


def test_clipping_and_the_transform_can_be_left_out():
    model = vssm.create_model("test_vim", depth=1).eval()
    images = torch.randn(8, 3, 96, 96)
    scales, rotated = [], []
    for percentile, hadamard in ((100, False), (99, True)):
        quantized = copy.deepcopy(model)
        done = quantize(quantized, [images], images=8, percentile=percentile, hadamard=hadamard)
        scales.append(quantized.get_buffer("blocks.0.mixer.ssm.x_proj.input_scale").item())
        rotated.append(done.rotated)
    assert scales[1] < 0.9 * scales[0]
    assert rotated == [(), ("blocks.0.mixer.out_proj",)]


def test_what_half_precision_cannot_hold_stays():
    values = {"a": torch.tensor([1e6]), "b": torch.tensor([0.1]), "c": torch.tensor(3)}
    values |= {"d.input_scale": torch.tensor(1e-9), "d.weight_scale": torch.tensor([0.1])}
    kept = compact(values)
    assert {name for name in values if torch.equal(kept[name], values[name])} == values.keys() - {"b"}
    assert kept["b"].dtype == torch.float16


def test_models_that_cannot_be_quantised():
    model, images = vssm.create_model("test_vim", depth=1).eval(), torch.randn(1, 3, 96, 96)
    with pytest.raises(ValueError, match="expected a percentile from 50 to 100, got 20"):
        quantize(model, [images], images=1, percentile=20)
    with pytest.raises(ValueError, match=r"in_proj reads values that are not finite"):
        quantize(copy.deepcopy(model), [images * float("nan")], images=1)
    with pytest.raises(ValueError, match="expected images and a model with linear layers"):
        quantize(copy.deepcopy(model), [], images=1)
    quantize(model, [images], images=1)
    with pytest.raises(ValueError, match="expected a model in float, got one with 4 layers in integers"):
        quantize(model, [images], images=1)
    with pytest.raises(ValueError, match=r"blocks.0.mixer.in_proj is quantised in the checkpoint, but no linear"):
        restore(torch.nn.Sequential(), model.state_dict())


def test_command(float_weights, tmp_path, capsys):
    data = make_folder(tmp_path / "data")
    output, results = tmp_path / "int8.safetensors", tmp_path / "record.json"
    command = ["quantize", str(float_weights), "--data", str(data), "--output", str(output), "--repeats", "2"]
    command += ["--calibration-images", "6", "--batch-size", "4", "--device", "cpu", "--results", str(results)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    (record,) = json.loads(results.read_text())
    assert record["bytes"] == output.stat().st_size
    assert record["size_percent"] == pytest.approx(100 * record["bytes"] / record["float_bytes"])
    assert (record["calibration_images"], record["images"]) == (6, 8)
    assert (record["int8_layers"], record["rotated_layers"], record["clipped_layers"]) == (7, 2, 2)
    assert record["int8_percent"] + sum(record["float_percent"].values()) == pytest.approx(100)
    assert record["latency_ms"] > 0 < record["float_latency_ms"]
    assert "7 linear layers in integers" in shown
    for path, name in ((output, "top1"), (float_weights, "float_top1")):
        validated = tmp_path / f"{name}.json"
        assert main(["validate", str(data), "--checkpoint", str(path), "--results", str(validated)]) == 0
        assert json.loads(validated.read_text())[0]["top1"] == record[name]


def test_agreement_counts_equal_answers(float_weights, tmp_path, monkeypatch):
    """Of 8 images, with a head whose bias alone decides after it was turned around in the file."""
    data = make_folder(tmp_path / "data")
    classifier = classifiers.load(float_weights)
    head = classifier.model.get_submodule("head")
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([1.0, 0.0]))
    setting = QuantizeSetting(torch.device("cpu"), images=2, repeats=2)
    path = tmp_path / "int8.safetensors"
    same = quantize_classifier(classifier, data, path, setting)
    assert (same["agreement"], same["top1"], same["float_top1"]) == (100, 50, 50)
    turned = "vssm.engine.quantize.compact"
    monkeypatch.setattr(turned, lambda weights: compact(weights) | {"head.bias": torch.tensor([0.0, 1.0])})
    assert quantize_classifier(classifier, data, path, setting)["agreement"] == 0


def failure(capsys, *arguments: object) -> str:
    assert main([str(each) for each in arguments]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_failures_of_the_command_are_one_line(float_weights, tmp_path, capsys):
    data = make_folder(tmp_path / "data", train=1, val=1)
    output = tmp_path / "int8.safetensors"
    command = ["quantize", float_weights, "--data", data, "--repeats", "2", "--device", "cpu"]
    assert "expected another name" in failure(capsys, *command, "--output", float_weights)
    assert "expected another name" in failure(
        capsys, *command, "--output", output, "--results", output.with_suffix(".json")
    )
    assert "ending in .safetensors" in failure(capsys, *command, "--output", "model.onnx")
    assert "a number from 50 to 100" in failure(capsys, *command, "--percentile", "10")
    assert "expected CHECKPOINT, or --model NAME --pretrained" in failure(capsys, "quantize", "--data", data)
    assert "train" in failure(capsys, "quantize", float_weights, "--data", data / "val", "--output", output)
    assert not output.exists()
    assert main([str(each) for each in [*command, "--output", output]]) == 0
    capsys.readouterr()
    again = ["quantize", output, *command[2:], "--output", tmp_path / "again.safetensors"]
    assert "expected a model in float, got one with 7 layers in integers" in failure(capsys, *again)
    assert "export: expected weights in float" in failure(
        capsys, "export", "--checkpoint", output, "--output", tmp_path / "model.pt2"
    )
