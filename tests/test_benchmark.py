"""Measurements of time and memory, of models and of the scan alone."""

import json

import pytest
import torch
from torch import nn

import vssm.engine.benchmark_op
from vssm.cli import main
from vssm.engine.benchmark import Setting, benchmark_models
from vssm.engine.benchmark_op import benchmark_op
from vssm.engine.timing import measure_memory, measure_time

CPU = torch.device("cpu")


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
        benchmark_op([(1, 4, 16, length)], device=CPU, warmup=1, repeats=2)[0]["peak_memory_mib"]
        for length in (64, 4096)
    )
    gradients = 4096 * 4 * (2 * 4 + 2 * 16) / 2**20
    assert large > gradients > small


def test_op_records_agree_with_the_loop():
    records = benchmark_op([(2, 6, 3, 17)], device=CPU, against_loop=True, warmup=1, repeats=2)
    assert [record["op"] for record in records] == ["selective_scan", "directional_scan", "loop"]
    for record in records:
        assert (record["b"], record["d"], record["n"], record["l"], record["dtype"]) == (2, 6, 3, 17, "float32")
        assert 0 < record["forward_p10_ms"] <= record["forward_ms"] <= record["forward_p90_ms"]
        assert record["forward_backward_ms"] > 0
        assert record["peak_memory_mib"] > 0
        assert record["relative_error"] < 1e-6
        assert record["device"] == "cpu"


def test_op_records_show_a_wrong_result(monkeypatch):
    right = vssm.engine.benchmark_op.selective_scan
    monkeypatch.setattr(vssm.engine.benchmark_op, "selective_scan", lambda *a, **k: 3 * right(*a, **k))
    record = benchmark_op([(1, 4, 2, 8)], device=CPU, against_loop=True, warmup=1, repeats=2)[0]
    assert record["relative_error"] == pytest.approx(2)


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
    assert [line.split()[0] for line in lines] == ["op", *(2 * ["selective_scan", "directional_scan", "loop"])]
    assert [record["l"] for record in json.loads(target.read_text())] == [8, 8, 8, 16, 16, 16]
    assert (tmp_path / "op.png").read_bytes().startswith(b"\x89PNG")


def test_command_measures_models_at_several_sizes(capsys, tmp_path):
    target = tmp_path / "models.csv"
    argv = ["benchmark", "test_vim", "--img-size", "32,48", "--batch-size", "2", "--repeats", "2", "--device", "cpu"]
    assert main([*argv, "--results", str(target), "--plot", str(tmp_path / "models.png")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert len(target.read_text().splitlines()) == 3
    assert (tmp_path / "models.png").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected either models or --op, got neither"),
        (["test_vim", "--op"], "expected either models or --op, got both"),
        (["--op", "--shapes", "1,2,3"], "argument --shapes: expected positive b,d,n,l such as"),
        (["--op", "--shapes", "1,2,0,3"], "argument --shapes: expected positive b,d,n,l such as"),
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
