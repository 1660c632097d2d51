"""Measurements of time and memory, of models and of the scan alone."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vssm
import vssm.engine.op_subjects
import vssm.models.a2mamba
from image_folders import make_folder
from tar_files import write_shards
from vssm.cli import main
from vssm.engine.attention_subjects import AttentionShape, a2mamba_shapes
from vssm.engine.benchmark import Setting, benchmark_models
from vssm.engine.benchmark_attention import benchmark_attention
from vssm.engine.benchmark_op import OpSetting, benchmark_op, relative_error
from vssm.engine.op_limits import Limits
from vssm.engine.op_rivals import cuda_scan
from vssm.engine.op_shapes import NAMED_SHAPES, Anchor, OpShape, read_anchors, read_shapes
from vssm.engine.op_subjects import subjects, token_inputs
from vssm.engine.timing import measure_memory, measure_time
from vssm.layers.neighborhood import attend_to_neighborhood
from vssm.scan_order import scatter
from vssm_kernels.neighbourhood_attention_torch import Tiles
from vssm_kernels.reference import selective_scan_ref

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
QUICK = OpSetting(CPU, warmup=1, repeats=2)
SUBJECTS = ("directional_scan", "selective_scan")


def test_time_is_that_of_the_calls_after_the_warmup(monkeypatch):
    clock, calls = [0.0], []
    durations = [9.0, 9.0, 0.001, 0.002, 0.003, 0.004, 0.005]

    def call() -> None:
        clock[0] += durations[len(calls)]
        calls.append(None)

    monkeypatch.setattr("vssm.engine.timing.time.perf_counter", lambda: clock[0])
    times = measure_time(call, CPU, warmup=2, repeats=5)
    assert len(calls) == 7
    assert times == pytest.approx({"median": 3.0, "p10": 1.4, "p90": 4.6})


def test_memory_is_the_peak_of_what_lives_at_once(device):
    mebibyte = 2**18  # float32 numbers

    def call() -> None:
        first = torch.empty(3 * mebibyte, device=device)
        second = torch.empty(4 * mebibyte, device=device)
        del first, second
        torch.empty(5 * mebibyte, device=device)

    assert measure_memory(call, device) == 7.0


def test_memory_of_a_release_inside_the_call_is_not_negative(device):
    held = [torch.empty(2**20, device=device)]

    def call() -> None:
        held.clear()
        torch.empty(2**18, device=device)

    assert measure_memory(call, device) in (0.0, 1.0)


def test_memory_sees_inside_the_op():
    small, large = (
        benchmark_op([OpShape(1, 1, 4, 16, length, 2)], QUICK)[0]["peak_memory_mib"] for length in (64, 4096)
    )
    gradients = 4096 * 4 * (2 * 4 + 2 * 16) / 2**20
    assert large > gradients > small


def test_op_records_agree_with_the_loop():
    setting = QUICK._replace(against=("loop", "torch", "official"))
    records = benchmark_op([OpShape(2, 4, 6, 3, 16, 2, "cross")], setting)
    assert [record["op"] for record in records] == [*SUBJECTS, "loop", "torch", "official"]
    for record in records:
        assert [record[key] for key in ("b", "k", "d", "n", "l", "r")] == [2, 4, 6, 3, 16, 2]
        assert (record["order"], record["dtype"], record["device"]) == ("cross", "float32", "cpu")
        for phase in ("forward", "backward", "forward_backward"):
            assert 0 < record[f"{phase}_p10_ms"] <= record[f"{phase}_ms"] <= record[f"{phase}_p90_ms"]
        assert record["peak_memory_mib"] > 0
        assert record["relative_error"] < 1e-6
    assert records[2]["speedup_backward"] == 1
    assert records[0]["speedup_forward"] == records[2]["forward_ms"] / records[0]["forward_ms"]
    assert records[-1]["scan"] == "vssm"


def test_gradients_of_the_composition_are_those_of_the_directional_scan():
    shape = OpShape(2, 4, 6, 3, 16, 2, "cross")
    ours, _, official = subjects(shape, CPU, torch.float64, ["official"])
    upstream = torch.randn(2, 16, 6, dtype=torch.float64)
    dx, *others = torch.autograd.grad(ours.as_tokens(ours.call()), ours.inputs, upstream)
    dx_map, ddt, *others_too = torch.autograd.grad(official.as_tokens(official.call()), official.inputs, upstream)
    assert relative_error(dx_map.flatten(2).mT, dx) < 1e-12
    assert relative_error(scatter(ddt.permute(0, 3, 1, 2), shape.table(), 16), others[0]) < 1e-12
    assert relative_error(others_too[2].unflatten(0, (4, 6)), others[1]) < 1e-12  # of A


def test_inputs_are_views_of_one_projection_with_the_steps_of_a_model():
    x, dt, A, B, C, _, _, dt_bias = token_inputs(OpShape(2, 4, 6, 3, 16, 2, "cross"), CPU, torch.bfloat16)
    assert x.is_contiguous()
    assert dt.stride() == B.stride() == C.stride() == (16 * 4 * 8, 4 * 8, 8, 1)
    assert len({tensor.untyped_storage().data_ptr() for tensor in (dt, B, C)}) == 1
    assert A[1, 2].tolist() == [-1, -2, -3]
    steps = nn.functional.softplus(dt_bias.detach())
    assert 0.00099 < float(steps.min()) < float(steps.max()) < 0.101


def test_op_records_show_a_wrong_result(monkeypatch):
    right = vssm.engine.op_subjects.selective_scan
    monkeypatch.setattr(vssm.engine.op_subjects, "selective_scan", lambda *a, **k: 3 * right(*a, **k))
    record = benchmark_op([OpShape(1, 1, 4, 2, 8, 1)], QUICK._replace(against=("loop",)))[1]
    assert record["relative_error"] == pytest.approx(2)


def test_limits_count_every_byte_once_and_every_special_function():
    [ours, theirs] = subjects(OpShape(2, 4, 6, 3, 16, 2, "cross"), CPU, torch.bfloat16)
    limits = Limits(copy_gb_per_s=1.0, exps_per_ms=10.0)
    projected, parameters = 2 * 16 * 4 * (2 + 2 * 3), 4 * 6 * (3 + 1 + 2 + 1)
    special = OpShape(2, 4, 6, 3, 16, 2, "cross").special_functions
    described = limits.describe(special, ours.inputs, ours.call())
    tokens = 2 * 16 * 6
    assert described["forward_bytes"] == 2 * (2 * tokens + projected) + 4 * parameters
    assert described["backward_bytes"] == 2 * (3 * tokens + 2 * projected) + 2 * 4 * parameters
    assert described["forward_floor_ms"] == pytest.approx(described["forward_bytes"] / 1e6)
    assert described["exp_floor_ms"] == 2 * 4 * 6 * 16 * (3 + 2) / 10
    sequences = limits.describe(special, theirs.inputs, theirs.call())
    assert sequences["forward_bytes"] == 2 * (3 * 4 * tokens + 2 * 2 * 16 * 4 * 3) + 4 * 4 * 6 * (3 + 2)


class FakeCudaScan:
    """selective_scan_cuda in plain torch, with its arguments and results."""

    @staticmethod
    def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        y = selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return y, torch.zeros(())

    @staticmethod
    def bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute):
        leaves = [tensor.detach().requires_grad_() for tensor in (u, delta, A, B, C, D, delta_bias)]
        with torch.enable_grad():
            y = selective_scan_ref(*leaves[:6], z, leaves[6], delta_softplus)
        return torch.autograd.grad(y, leaves, dout)


def test_the_scan_of_mamba_ssm_is_measured_where_it_can_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", FakeCudaScan)
    scan = cuda_scan(torch.device("cuda"))
    monkeypatch.setattr(vssm.engine.op_subjects, "cuda_scan", lambda device: scan)
    shape = OpShape(2, 4, 6, 3, 16, 2, "cross")
    ours, theirs, official = list(subjects(shape, CPU, torch.float32, ["mamba_ssm", "official"]))[1:]
    assert (theirs.name, official.facts) == ("mamba_ssm", {"scan": "mamba_ssm"})
    upstream = torch.randn_like(ours.call())
    for found, expected in zip(
        torch.autograd.grad(theirs.call(), theirs.inputs, upstream),
        torch.autograd.grad(ours.call(), ours.inputs, upstream),
        strict=True,
    ):
        assert relative_error(found, expected) < 1e-5


def test_what_cannot_be_measured_is_left_out_with_a_line(caplog):
    setting = QUICK._replace(against=("mamba_ssm", "official"))
    records = benchmark_op([OpShape(1, 2, 4, 2, 8, 1, "bidirectional")], setting)
    assert [record["op"] for record in records] == list(SUBJECTS)
    assert [line.partition(" is")[0] for line in caplog.messages] == ["mamba_ssm", "official"]


def test_what_does_not_fit_into_memory_is_left_out_with_a_line(monkeypatch, caplog):
    def hungry(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vssm.engine.op_subjects, "selective_scan", hungry)
    [record] = benchmark_op([OpShape(1, 1, 4, 2, 8, 1)], QUICK)
    assert record["op"] == "directional_scan"
    assert "selective_scan: not enough memory" in caplog.text


def test_anchors_give_speedups_at_their_shape_and_dtype():
    anchors = read_anchors(str(ROOT / "benchmarks" / "anchors_h100.json"))
    assert set(anchors) == {shape.sizes for shape in NAMED_SHAPES["vision"]}
    shape = OpShape(1, 1, 4, 2, 8, 1)
    here = {shape.sizes: Anchor("theirs", 2.0, 4.0, "a test")}
    record = benchmark_op([shape], QUICK, anchors=here)[0]
    assert record["speedup_over_anchor_backward"] == 4.0 / record["backward_ms"]
    assert (record["anchor"], record["anchor_forward_ms"], record["anchor_source"]) == ("theirs", 2.0, "a test")
    elsewhere = {shape.sizes: Anchor("theirs", 2.0, 4.0, "a test", dtype="bfloat16")}
    assert "anchor" not in benchmark_op([shape], QUICK, anchors=elsewhere)[0]


@pytest.mark.parametrize("name", NAMED_SHAPES)
def test_named_shapes_have_an_order_of_their_directions(name):
    shapes = read_shapes(name)
    assert shapes
    assert all(shape.table().shape == (shape.k, shape.l) for shape in shapes)


def test_lengths_share_their_tokens():
    assert {shape.l for shape in NAMED_SHAPES["lengths"]} == {196, 784, 3136, 12544, 50176, 100352}
    assert all(shape.b * shape.l == pytest.approx(2**17, rel=0.25) for shape in NAMED_SHAPES["lengths"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_are_captured_and_replayed():
    setting = OpSetting(torch.device("cuda"), torch.bfloat16, against=("official",), warmup=2, repeats=5)
    for record in benchmark_op([OpShape(2, 4, 32, 1, 196, 2, "cross")], setting):
        assert record["cuda_graph"]
        assert record["exp_floor_ms"] > 0
        assert record["relative_error"] < 1e-2


def test_model_record():
    setting = Setting(device=CPU, batch_size=2, train=True, amp_dtype=torch.bfloat16, warmup=1, repeats=2)
    [record] = benchmark_models(["test_vim"], setting, img_sizes=[(32, 48)])
    assert (record["model"], record["img_size"], record["amp_dtype"]) == ("test_vim", [32, 48], "bfloat16")
    assert (record["batch_size"], record["train_batch_size"]) == (2, 2)
    assert 0 < record["latency_p10_ms"] <= record["latency_ms"] <= record["latency_p90_ms"]
    for phase in ("", "train_"):
        assert 0 < record[f"{phase}images_per_s_p10"] <= record[f"{phase}images_per_s"]
        assert record[f"{phase}images_per_s"] <= record[f"{phase}images_per_s_p90"]
    weights = record["params_m"] * 4e6 / 2**20
    assert record["peak_memory_mib"] > weights
    assert record["train_peak_memory_mib"] > 4 * weights  # weights, gradients and two moments


class Hungry(nn.Module):
    """Runs out of memory above a number of images."""

    def __init__(self, limit: int, error: RuntimeError) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 4, 4)}
        self.limit, self.error = limit, error
        self.head = nn.Linear(48, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.limit:
            raise self.error
        return self.head(x.flatten(1))


ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_batch_is_halved_until_it_fits(monkeypatch, kind):
    monkeypatch.setattr("vssm.engine.benchmark.create_by_name", lambda *_, **__: Hungry(5, ERRORS[kind]))
    [record] = benchmark_models(["hungry"], Setting(device=CPU, batch_size=16, train=True, warmup=1, repeats=2))
    assert (record["batch_size"], record["train_batch_size"]) == (4, 4)


def test_one_image_that_does_not_fit_is_an_error(monkeypatch):
    monkeypatch.setattr("vssm.engine.benchmark.create_by_name", lambda *_, **__: Hungry(0, ERRORS["gpu"]))
    with pytest.raises(ValueError, match="one image does not fit into memory"):
        benchmark_models(["hungry"], Setting(device=CPU, batch_size=4, warmup=1, repeats=2))


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    monkeypatch.setattr("vssm.engine.benchmark.create_by_name", lambda *_, **__: Hungry(1, RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        benchmark_models(["hungry"], Setting(device=CPU, batch_size=4, warmup=1, repeats=2))


def test_command_measures_the_op(capsys, tmp_path):
    target = tmp_path / "op.json"
    argv = [
        "benchmark",
        "--op",
        "--shapes",
        "1,4,2,8;1,4,2,16",
        "--against",
        "loop",
        "--repeats",
        "2",
        "--device",
        "cpu",
    ]
    assert main([*argv, "--backend", "torch", "--results", str(target), "--plot", str(tmp_path / "op.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["op", *(2 * ["directional_scan", "selective_scan", "loop"])]
    assert [record["l"] for record in json.loads(target.read_text())] == [8, 8, 8, 16, 16, 16]
    assert (tmp_path / "op.png").read_bytes().startswith(b"\x89PNG")


def test_command_measures_models_at_several_sizes(capsys, tmp_path):
    target = tmp_path / "models.csv"
    argv = ["benchmark", "test_vim", "--img-size", "32,48", "--batch-size", "2", "--repeats", "2", "--device", "cpu"]
    assert main([*argv, "--results", str(target), "--plot", str(tmp_path / "models.png")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert len(target.read_text().splitlines()) == 3
    assert (tmp_path / "models.png").exists()


def test_command_draws_bars_of_models_and_their_peers(tmp_path):
    target = tmp_path / "models.json"
    argv = [
        "benchmark",
        "test_vi[mt]",
        "test_vim",
        "--img-size",
        "96",
        "--batch-size",
        "1",
        "--repeats",
        "2",
        "--train",
    ]
    assert main([*argv, "--device", "cpu", "--results", str(target), "--plot", str(tmp_path / "bars.svg")]) == 0
    records = json.loads(target.read_text())
    assert [(record["model"], record["package"]) for record in records] == [("test_vim", "vssm"), ("test_vit", "timm")]
    assert [record["scan_backend"] is None for record in records] == [False, True]
    assert (records[0]["warmup"], records[0]["repeats"]) == (3, 2)
    picture = (tmp_path / "bars.svg").read_text()
    assert all(f"<!-- {word} -->" in picture for word in ("inference", "training", "test_vim", "vssm", "timm"))


def test_records_are_kept_as_they_come(monkeypatch):
    monkeypatch.setattr("vssm.engine.benchmark.create_by_name", lambda *_, **__: Hungry(5, ERRORS["cpu"]))
    kept: list[int] = []
    setting = Setting(device=CPU, batch_size=2, warmup=1, repeats=2)
    benchmark_models(["a", "b"], setting, keep=lambda records: kept.append(len(records)))
    assert kept == [1, 2]


def test_patterns_without_a_match_are_named(capsys):
    assert main(["benchmark", "vimm_*"]) == 1
    assert "no model matches 'vimm_*'; those of vssm are" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_command_measures_loaders_beside_those_of_timm(tmp_path, capsys, workers):
    data, target = make_folder(tmp_path / "data", train=8, val=6), tmp_path / "loaders.json"
    argv = ["benchmark", "--loader", str(data), "--workers", str(workers), "--img-size", "16", "--batch-size", "4"]
    assert main([*argv, "--images", "8", "--repeats", "2", "--device", "cpu", "--results", str(target)]) == 0
    records = json.loads(target.read_text())
    kinds = ["crop and flip", "RandAugment and erasing", "evaluation"]
    assert [(each["loader"], each["package"]) for each in records] == [(k, p) for k in kinds for p in ("vssm", "timm")]
    for ours, theirs in zip(records[::2], records[1::2], strict=True):
        assert ours["images"] == theirs["images"] == 8
        assert ours["images_per_s_p10"] <= ours["images_per_s"] <= ours["images_per_s_p90"]
        assert min(ours["cpu_ms_per_image"], ours["speed_over_timm"], ours["cpu_over_timm"]) > 0
    assert len(capsys.readouterr().out.splitlines()) == 7


def test_loaders_of_other_data_are_measured_alone(tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setenv("VSSM_CACHE", str(tmp_path / "cache"))
    for split in ("train", "val"):
        write_shards(tmp_path / "data", split, shards=1, samples=4)
    argv = ["benchmark", "--loader", str(tmp_path / "data"), "--workers", "0", "--img-size", "16", "--batch-size", "2"]
    caplog.set_level("INFO")
    assert main([*argv, "--repeats", "2", "--device", "cpu"]) == 0
    assert [line.split()[-5] for line in capsys.readouterr().out.splitlines()[1:]] == ["vssm"] * 3
    assert caplog.text.count("no class folders, which timm would read") == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--loader", "x", "--plot", "x.png"], "--plot draws models or --op, not --loader"),
        (["test_vim", "--loader", "x"], "expected models, --op or --loader DATA, got models and --loader"),
        ([], "expected models, --op or --loader DATA, got none of them"),
        (["test_vim", "--op"], "expected models, --op or --loader DATA, got models and --op"),
        (["--op", "--shapes", "1,2,3"], f"argument --shapes: expected {', '.join(NAMED_SHAPES)}, a .json file or"),
        (["--op", "--shapes", "1,2,0,3"], f"argument --shapes: expected {', '.join(NAMED_SHAPES)}, a .json file or"),
        (["--op", "--against", "loop,mamba"], "argument --against: expected some of loop, torch, mamba_ssm, official"),
        (["--op", "--against", "natten"], "--against: expected some of loop, torch, mamba_ssm, official for scan, got"),
        (["--op", "neighbourhood_attention", "--plot", "x.png"], "--plot draws models or --op, not neighbourhood_att"),
        (["--op", "--repeats", "1"], "argument --repeats: expected at least 2"),
        (["--op", "--device", "nonsense"], "argument --device: expected a device such as cpu or cuda:0"),
        (["--op", "--device", "cuda:99"], "argument --device: no device 'cuda:99' here"),
        (["--op", "--plot", "x.gif"], "argument --plot: expected a file name ending in .png or .svg or .pdf"),
        (["test_vim", "--batch-size", "0"], "argument --batch-size: expected a positive integer, got 0"),
    ],
)
def test_bad_usage_is_one_line(capsys, argv, message):
    assert main(["benchmark", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"vssm benchmark: {message}")
    assert captured.err.count("\n") == 1


GOOD = {"b": 1, "k": 4, "d": 8, "n": 1, "l": 16, "r": 2, "order": "cross"}
TIMES = {"b": 1, "k": 1, "d": 8, "n": 1, "l": 16, "name": "x", "forward_ms": 1.0, "backward_ms": 2.0, "source": "y"}


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--shapes", "{", "not a JSON file"),
        ("--shapes", "[]", "expected a list of at least one object"),
        ("--shapes", json.dumps([{"b": 1, "d": 8}]), "expected the key n, l, r in"),
        ("--shapes", json.dumps([GOOD | {"K": 4}]), "unknown key K in"),
        ("--shapes", json.dumps([GOOD | {"n": 1.5}]), "expected a positive integer for n, got 1.5"),
        ("--shapes", json.dumps([GOOD | {"b": True}]), "expected a positive integer for b, got True"),
        ("--shapes", json.dumps([GOOD | {"l": 15}]), "order 'cross' needs a square number of tokens, got l = 15"),
        ("--shapes", json.dumps([GOOD | {"k": 2}]), "order 'cross' has 4 directions, got k = 2"),
        ("--shapes", json.dumps([GOOD | {"order": ["row"]}]), "order must be one of row, column"),
        ("--shapes", json.dumps([{**GOOD, "k": 2, "order": "window"}]), "order must be one of row, column"),
        (
            "--shapes",
            json.dumps([{key: GOOD[key] for key in GOOD if key != "order"}]),
            "k = 4 directions need an order",
        ),
        ("--anchors", json.dumps([TIMES | {"forward_ms": "fast"}]), "expected a positive number for forward_ms"),
        ("--anchors", json.dumps([TIMES, TIMES]), "expected every shape once"),
        ("--anchors", json.dumps([GOOD]), "expected the key name, forward_ms, backward_ms, source in"),
    ],
)
def test_a_bad_file_is_one_line(capsys, tmp_path, option, content, message):
    path = tmp_path / "file.json"
    path.write_text(content)
    assert main(["benchmark", "--op", option, str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vssm benchmark: argument {option}: {path}: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_file_is_one_line(capsys, tmp_path):
    assert main(["benchmark", "--op", "--shapes", str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err == f"vssm benchmark: {tmp_path / 'none.json'}: No such file or directory\n"


def test_a_device_without_exact_measures_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert main(["benchmark", "--op", "--device", "mps"]) == 2
    assert "cpu and cuda only" in capsys.readouterr().err


def test_unknown_model_writes_nothing(capsys, tmp_path):
    assert main(["benchmark", "test_vin", "--results", str(tmp_path / "r.json")]) == 1
    assert "test_vim" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_backend_of_the_environment_holds_unless_the_command_line_names_one(monkeypatch, capsys):
    monkeypatch.setenv("VSSM_SCAN_BACKEND", "none_such")
    command = ["benchmark", "--op", "--shapes", "1,4,2,8", "--repeats", "2", "--warmup", "1", "--device", "cpu"]
    assert main(command) == 1
    assert "none_such" in capsys.readouterr().err
    assert main([*command, "--backend", "torch"]) == 0


ATTENTION = AttentionShape(2, 1, 4, 7, 8, 3, 2)


def test_attention_records_agree_with_the_plain_version():
    ours, torch_too = benchmark_attention([ATTENTION], QUICK._replace(against=("torch",)))
    assert (ours["op"], torch_too["op"]) == ("neighbourhood_attention", "torch")
    for record in (ours, torch_too):
        assert tuple(record[key] for key in AttentionShape._fields) == ATTENTION
        assert record["relative_error"] < 1e-6
        assert 0 < record["backward_p10_ms"] <= record["backward_ms"] <= record["backward_p90_ms"]
    tokens, table = 2 * 56 * 4, 5 * 5
    assert ours["forward_bytes"] == 4 * (4 * tokens + table)
    assert ours["backward_bytes"] == 4 * (7 * tokens + 2 * table)
    assert ours["forward_ns_per_token"] == pytest.approx(1e6 * ours["forward_ms"] / (2 * 56))


def test_attention_is_measured_at_the_sizes_of_its_models(monkeypatch):
    seen = []

    def seeing(q, k, bias, **grid):
        seen.append((q.shape[2], q.shape[3], *grid["size"], grid["window"], grid.get("dilation", (1, 1))[0]))
        return attend_to_neighborhood(q, k, bias, **grid)

    monkeypatch.setattr(vssm.models.a2mamba, "attend_to_neighborhood", seeing)
    for name in ("a2mamba_nano", "a2mamba_base"):
        with torch.device("meta"):
            vssm.create_model(name).eval()(torch.empty(1, 3, 224, 224))
    assert {tuple(shape[1:]) for shape in a2mamba_shapes(1)} == set(seen)


class FakeNatten:
    """natten.functional in two steps, in plain torch."""

    @staticmethod
    def na2d_qk(q, k, kernel_size, dilation, rpb):
        q, k = (each.flatten(2, 3).transpose(1, 2) for each in (q, k))
        return FakeNatten._tiles(kernel_size, dilation).attend(q, k, rpb).log()

    @staticmethod
    def na2d_av(weights, v, kernel_size, dilation):
        y = FakeNatten._tiles(kernel_size, dilation).aggregate(weights, v.flatten(2, 3).transpose(1, 2))
        return y.transpose(1, 2).unflatten(2, v.shape[2:4])

    @staticmethod
    def _tiles(kernel_size, dilation):
        return Tiles(ATTENTION[3:5], window=kernel_size, dilation=(dilation, dilation), device=CPU)


class FakeFusedNatten:
    """natten.functional of later versions, which know no biases."""

    @staticmethod
    def na2d(q, k, v, kernel_size, dilation, scale):
        bias = q.new_zeros(q.shape[3], 2 * kernel_size - 1, 2 * kernel_size - 1)
        q, k, v = (each.flatten(1, 2) for each in (scale * q, k, v))
        tiles = FakeNatten._tiles(kernel_size, dilation)
        return tiles.aggregate(tiles.attend(q, k, bias), v).unflatten(1, ATTENTION[3:5])


@pytest.mark.parametrize(("module", "biases"), [(FakeNatten, True), (FakeFusedNatten, False)])
def test_natten_is_called_with_its_layouts(module, biases, monkeypatch):
    monkeypatch.setitem(sys.modules, "natten", module)
    monkeypatch.setitem(sys.modules, "natten.functional", module)
    records = benchmark_attention([ATTENTION], QUICK._replace(against=("torch", "natten")))
    assert [record["op"] for record in records] == ["neighbourhood_attention", "torch", "natten"]
    assert records[-1].get("biases") == (None if biases else "none")
    assert (records[-1]["relative_error"] < 1e-6) == biases


def test_attention_without_natten_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "natten.functional", None)
    [record] = benchmark_attention([ATTENTION], QUICK._replace(against=("natten",)))
    assert record["op"] == "neighbourhood_attention"
    assert "natten is left out: natten.functional cannot be imported" in caplog.text


def test_command_measures_attention(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vssm.cli.benchmark.a2mamba_shapes", lambda batch_size: [ATTENTION._replace(b=batch_size)])
    path = tmp_path / "attention.json"
    command = ["benchmark", "--op", "neighbourhood_attention", "--against", "torch", "--batch-size", "1"]
    assert main([*command, "--repeats", "2", "--warmup", "1", "--device", "cpu", "--results", str(path)]) == 0
    records = json.loads(path.read_text())
    assert [(record["op"], record["b"]) for record in records] == [("neighbourhood_attention", 1), ("torch", 1)]
    assert "window  dilation" in capsys.readouterr().out
