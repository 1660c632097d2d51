"""Exported programs: ONNX in onnxruntime and .pt2 without this package compute what the models compute."""

import importlib.util
import json
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch

import vssm
from vssm.cli import main
from vssm.engine import export as engine
from vssm.models._base import TokenBackbone

NAMES = vssm.list_models("test_*")
ONE_SIZE = {"test_a2mamba"}  # as ONNX: dilations of its windows follow the size of the map
QUICK = ["--warmup", "1", "--repeats", "2"]
SMALL = {"test_vim": {"depth": 1}, "test_vmamba": {"depths": (1, 1)}}  # of families that are tested every time
WITHOUT_PACKAGE = """
import sys
sys.modules["vssm"] = sys.modules["vssm_kernels"] = None
import torch
images, expected = torch.load(sys.argv[1])
results = torch.export.load(sys.argv[2]).module()(images)
torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)
"""


@pytest.fixture
def weights(tmp_path):
    """Writes the weights of a new model for ``--checkpoint``; returns the model and options that name them."""

    def write(name: str, **arguments):
        model = vssm.create_model(name, **arguments).eval()
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        settings = [f"{key}={value}" for key, value in arguments.items()]
        options = ["--checkpoint", str(tmp_path / "weights.pth"), *(["--model-kwargs", *settings] if settings else [])]
        return model, [name, *options, *QUICK]

    return write


def run_onnx(path, images: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(each) for each in session.run(None, {"images": images.numpy()})]


def assert_same(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for result, reference in zip(results, expected, strict=True):
        assert (result - reference).abs().max() <= 1e-4 * reference.abs().max()


def check_onnx(path, model, *, sizes) -> None:
    """Compares a file with a model on batches of several numbers and sizes of images."""
    for batch, size in zip((1, 5, 2, 4), sizes, strict=False):
        images = torch.randn(batch, 3, *size)
        with torch.no_grad():
            assert_same(run_onnx(path, images), [model(images)])


def any_size(model) -> None:
    if isinstance(model, TokenBackbone):
        model.dynamic_img_size = True


@pytest.mark.parametrize("name", SMALL)
def test_onnx(weights, tmp_path, name):
    model, options = weights(name, **SMALL[name])
    assert main(["export", *options, "--output", str(tmp_path / "model.onnx"), "--dynamic-size", "256"]) == 0
    any_size(model)
    check_onnx(tmp_path / "model.onnx", model, sizes=[(96, 96), (64, 144), (97, 75), (256, 224)])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_onnx_of_every_family(weights, tmp_path, name):
    model, options = weights(name)
    assert main(["export", *options, "--output", str(tmp_path / "model.onnx")]) == 0
    home = model.pretrained_cfg["input_size"][1:]
    check_onnx(tmp_path / "model.onnx", model, sizes=[home, home])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONE_SIZE])
def test_onnx_of_every_family_with_any_size(weights, tmp_path, name):
    model, options = weights(name)
    assert main(["export", *options, "--output", str(tmp_path / "model.onnx"), "--dynamic-size", "512"]) == 0
    any_size(model)
    check_onnx(tmp_path / "model.onnx", model, sizes=[(128, 128), (128, 224), (161, 139), (352, 224)])


def test_record_and_description(weights, tmp_path, capsys):
    model, options = weights("test_plainmamba", depth=1)
    target, results = tmp_path / "model.onnx", tmp_path / "record.json"
    assert main(["export", *options, "--output", str(target), "--results", str(results)]) == 0
    (record,) = json.loads(results.read_text())
    assert record["file_mib"] == pytest.approx(target.stat().st_size / 2**20)
    assert 0 < record["error_over_peak"] < 1e-4
    assert 0 < record["latency_p10_ms"] <= record["latency_ms"] <= record["latency_p90_ms"]
    assert 0 < record["torch_latency_p10_ms"] <= record["torch_latency_ms"] <= record["torch_latency_p90_ms"]
    assert record["params_m"] == pytest.approx(sum(each.numel() for each in model.parameters()) / 1e6)
    assert record["load_average"] >= 0
    assert {"opset", "onnxruntime", "git_commit", "cpu_threads", "cores", "scan_backend"} <= record.keys()
    described = {each.key: json.loads(each.value) for each in onnx.load(target).metadata_props}
    assert described["model"] == "test_plainmamba"
    assert described["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert f"opset {record['opset']}" in capsys.readouterr().out


def test_benchmark_of_several_models_keeps_records_and_no_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--model-kwargs", "depth=1", "--img-size", "64", "--format", "pt2", "--decompose", *QUICK]
    names = ["test_vim", "test_plainmamba"]
    assert main(["export", *names, *options, "--benchmark", "--results", "records.json"]) == 0
    records = json.loads((tmp_path / "records.json").read_text())
    assert [(each["model"], each["img_size"]) for each in records] == [(name, [64, 64]) for name in names]
    assert [path.name for path in tmp_path.iterdir()] == ["records.json"]
    assert capsys.readouterr().out.count("MiB\n") == 2


def test_features(weights, tmp_path):
    model, options = weights("test_plainmamba", depth=2)
    target = tmp_path / "maps.onnx"
    assert main(["export", *options, "--output", str(target), "--features", "0", "1"]) == 0
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        maps = model.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    assert_same(run_onnx(target, images), maps)


def test_decomposed_program_runs_without_the_package(weights, tmp_path):
    model, options = weights("test_vim", depth=1)
    target = tmp_path / "model.pt2"
    assert main(["export", *options, "--output", str(target), "--decompose"]) == 0
    images = torch.randn(3, 3, 96, 96)
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / "example.pth")
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(tmp_path / "example.pth"), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_fused_program_keeps_the_op(weights, tmp_path):
    model, options = weights("test_vim", depth=1)
    target = tmp_path / "model.pt2"
    assert main(["export", *options, "--output", str(target)]) == 0
    extra = {engine.DESCRIPTION: ""}
    program = torch.export.load(target, extra_files=extra)
    assert any(node.target is torch.ops.vssm.scan.default for node in program.graph.nodes)
    assert json.loads(extra[engine.DESCRIPTION])["plain_operators"] is False
    images = torch.randn(5, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model(images))


def failure(capsys, *arguments: str) -> str:
    assert main(["export", *arguments]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_program_that_differs_is_not_kept(weights, tmp_path, monkeypatch, capsys):
    _, options = weights("test_vim", depth=1)
    monkeypatch.setattr(engine, "TOLERANCE", 0.0)
    target = tmp_path / "model.pt2"
    error = failure(capsys, *options, "--output", str(target), "--decompose")
    assert "differs from test_vim by" in error
    assert "nothing is written" in error
    assert not target.exists()


def test_a_model_of_one_size_says_so(tmp_path, capsys):
    error = failure(capsys, "test_vit", "--output", str(tmp_path / "vit.onnx"), "--dynamic-size", "256")
    assert "test_vit cannot be written for images of any size: its code takes 160 pixels for granted" in error


def test_an_operator_that_onnx_lacks_is_named(weights, tmp_path, monkeypatch, capsys):
    _, options = weights("test_vim", depth=1)
    monkeypatch.setattr(engine, "decompose", lambda program: program)  # which leaves the fused ops
    error = failure(capsys, *options, "--output", str(tmp_path / "vim.onnx"))
    assert "test_vim cannot be written as ONNX: its exporter does not take vssm.causal_conv.default" in error


def test_packages_are_named(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    assert "onnx needs onnxscript, not installed here: pip install 'vssm[export]'" in failure(capsys, "test_vim")


def test_options_that_contradict_each_other(capsys):
    assert "ending in .onnx" in failure(capsys, "test_vim", "--format", "onnx", "--output", "model.pt2")
    assert "--decompose belongs to --format pt2" in failure(capsys, "test_vim", "--decompose")
    assert "expected a model" in failure(capsys)
    assert "--output belongs to one model, got 2" in failure(capsys, "test_vim", "test_vim2", "--output", "model.onnx")
    assert "keeps no file, got both" in failure(capsys, "test_vim", "--benchmark", "--output", "model.onnx")
