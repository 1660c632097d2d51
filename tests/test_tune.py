"""The search for launch sizes, with kernels that only pretend to depend on them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import vssm.cli.tune
import vssm.engine.tune
from vssm.cli import main
from vssm.engine.benchmark_op import OpSetting
from vssm.engine.op_shapes import OpShape
from vssm.engine.tune import read_table, tune
from vssm_kernels import scan_torch
from vssm_kernels.scan_call import ScanCall

CPU = torch.device("cpu")
SETTING = OpSetting(CPU, warmup=1, repeats=2)
SHAPE = OpShape(1, 4, 8, 2, 16, 2, "cross")


@dataclass(frozen=True)
class Config:
    channels: int


class FakeTable:
    """Four sizes: 16 and 32 are right, 64 does not fit the device, 128 gives wrong results."""

    sizes = (16, 32, 64, 128)

    def __init__(self, path: Path) -> None:
        self.path = path
        self.active: int | None = None
        self.searched: list[str] = []

    def key(self, call: ScanCall, *, backward: bool) -> str:
        return f"{call.width},{call.steps},{call.dt.shape[-1]},{call.x.dtype},{'backward' if backward else 'forward'}"

    def candidates(self, key: str) -> list[Config]:
        self.searched.append(key)
        return [Config(size) for size in self.sizes]

    @contextmanager
    def forced(self, config: Config) -> Iterator[None]:
        self.active = config.channels
        try:
            yield
        finally:
            self.active = None

    def user_table_path(self) -> Path:
        return self.path

    def device_part(self, device: torch.device) -> str:
        return f"part of {device}"


@pytest.fixture
def kernels(monkeypatch, tmp_path) -> FakeTable:
    table = FakeTable(tmp_path / "cache" / "launch_table.json")
    forward, backward = scan_torch.forward, scan_torch.backward

    def factor() -> float:
        if table.active == 64:
            raise RuntimeError("out of resources")
        return 3.0 if table.active == 128 else 1.0

    def changed_forward(call: ScanCall):
        y, state = forward(call)
        return factor() * y, state

    def changed_backward(call: ScanCall, dy: torch.Tensor, dstate: torch.Tensor):
        return {name: factor() * gradient for name, gradient in backward(call, dy, dstate).items()}

    monkeypatch.setattr(scan_torch, "forward", changed_forward)
    monkeypatch.setattr(scan_torch, "backward", changed_backward)
    monkeypatch.setenv("VSSM_SCAN_BACKEND", "torch")
    monkeypatch.setattr(
        vssm.engine.tune,
        "measure_kernels",
        lambda call, setting: ({"median": {None: 9.0, 16: 2.0, 32: 1.0}[table.active]}, False),
    )
    monkeypatch.setattr(vssm.engine.tune, "launch_table", table)
    return table


def search(**options) -> list[dict]:
    return tune([SHAPE], SETTING, dtypes=[torch.float32], **options)


def test_the_fastest_right_candidate_is_written(kernels, caplog):
    records = search()
    assert [(record["op"], record["phase"]) for record in records] == [
        (op, phase) for op in ("directional_scan", "selective_scan") for phase in ("forward", "backward")
    ]
    [rows] = read_table(kernels.path).values()
    for record in records:
        assert record["config"] == {"channels": 32}
        assert (record["candidates"], record["failed"], record["refused"]) == (4, 1, 1)
        assert (record["before_ms"], record["ms"]) == (9.0, 1.0)
        assert rows[record["key"]]["channels"] == 32
        assert rows[record["key"]]["ms"] == 1.0
        assert rows[record["key"]]["part"] == "part of cpu"
    refusals = [line for line in caplog.messages if "is refused: its result is off by 2.0e+00" in line]
    assert len(refusals) == 4
    assert "Config(channels=128)" in refusals[0]


def test_keys_are_those_of_the_calls_that_the_functions_make(kernels):
    assert [record["key"] for record in search()] == [
        "8,16,2,torch.float32,forward",  # a step of rank 2
        "8,16,2,torch.float32,backward",
        "8,16,8,torch.float32,forward",  # one for each channel
        "8,16,8,torch.float32,backward",
    ]


def test_what_the_table_holds_is_not_searched_again_unless_forced(kernels):
    search()
    assert len(kernels.searched) == 4
    assert all(record["config"]["channels"] == 32 for record in search())
    assert len(kernels.searched) == 4
    search(force=True)
    assert len(kernels.searched) == 8


def test_another_version_is_searched_again(kernels):
    search()
    table = read_table(kernels.path)
    [rows] = table.values()
    rows["8,16,2,torch.float32,forward"]["version"] = "0.0.0"
    kernels.path.write_text(json.dumps(table))
    search()
    assert kernels.searched[4:] == ["8,16,2,torch.float32,forward"]


def test_rows_of_other_devices_and_shapes_stay(kernels, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"another GPU": {"key": {"channels": 64}}}))
    search(path=path)
    assert read_table(path)["another GPU"] == {"key": {"channels": 64}}
    assert len(read_table(path)) == 2
    assert not kernels.path.exists()


def test_an_interrupted_search_keeps_what_it_found(kernels, monkeypatch):
    def interrupted(key: str) -> list[Config]:
        if kernels.searched:
            raise KeyboardInterrupt
        return FakeTable.candidates(kernels, key)

    monkeypatch.setattr(kernels, "candidates", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search()
    [rows] = read_table(kernels.path).values()
    assert list(rows) == ["8,16,2,torch.float32,forward"]


def test_where_nothing_works_nothing_is_written(kernels, caplog):
    kernels.sizes = (64, 128)
    assert all(record["config"] is None for record in search())
    assert not kernels.path.exists()
    assert "none of 2 candidates works" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", '{"GPU": 1}', '{"GPU": {"key": 1}}'])
def test_a_file_that_is_no_table_is_refused_and_stays(kernels, content):
    kernels.path.parent.mkdir()
    kernels.path.write_text(content)
    with pytest.raises(ValueError, match=r"launch_table.json: expected a JSON table of launch sizes"):
        search()
    assert kernels.path.read_text() == content


def test_command_prints_what_it_found(kernels, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(vssm.cli.tune, "_gpu", lambda place: CPU)
    monkeypatch.setattr(vssm.cli.tune, "use_backend", lambda name: nullcontext())  # auto would compile for the CPU
    argv = ["tune", "--shapes", "1,4,2,8", "--dtype", "float32,bfloat16", "--output", str(tmp_path / "table.json")]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == vssm.cli.tune._COLUMNS
    assert len(lines) == 1 + 2 * 2 * 2
    assert len(next(iter(read_table(tmp_path / "table.json").values()))) == 8
    kernels.sizes = (64,)
    assert main([*argv, "--force"]) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "cpu"], "launch sizes are those of a GPU: expected a CUDA device, got cpu"),
        (["--dtype", "float64"], "argument --dtype: expected some of bfloat16, float16, float32 with commas"),
        (["--shapes", "nonsense"], "argument --shapes: expected default, vision"),
        (["--repeats", "1"], "argument --repeats: expected at least 2"),
    ],
)
def test_bad_usage_is_one_line(capsys, argv, message):
    assert main(["tune", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vssm tune: {message}")
    assert error.count("\n") == 1
