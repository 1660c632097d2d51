"""Compiling kernels ahead of timing them: calls of a few samples that need the same ones, in several processes."""

from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vssm.engine.benchmark_op
import vssm.engine.compile_ahead
from vssm.engine.attention_subjects import AttentionShape, a2mamba_shapes, attention_subjects
from vssm.engine.benchmark_attention import benchmark_attention
from vssm.engine.benchmark_op import OpSetting, benchmark_op
from vssm.engine.compile_ahead import Compilation, Compilers, compile_one, compilers
from vssm.engine.op_shapes import NAMED_SHAPES, OpShape
from vssm.engine.op_subjects import compiled_subjects, phase_calls, subjects
from vssm_kernels import launch_table, scan_torch, use_backend
from vssm_kernels.launch_table import LaunchConfig
from vssm_kernels.scan_call import ScanCall

CPU, META = torch.device("cpu"), torch.device("meta")
PHASES = ("forward", "backward")
SHAPE = OpShape(64, 4, 8, 2, 256, 2, "cross")
CONFIG = LaunchConfig(steps=32, channels=16, slots=2, chunks=5, registers=99)
ODD_SHAPES = (OpShape(5, 1, 24, 4, 77, 3), OpShape(7, 4, 40, 16, 49, 5, "cross"), OpShape(1, 1, 384, 16, 197, 12))
SETS = {**NAMED_SHAPES, "odd": ODD_SHAPES}


@pytest.fixture
def seen(monkeypatch) -> list:
    """Batch, tokens and launch sizes of every pass."""
    calls = []
    forward, backward = scan_torch.forward, scan_torch.backward

    def recorded_forward(call):
        calls.append(("forward", call.batch, call.tokens, launch_table.launch_config(call, backward=False)))
        return forward(call)

    def recorded_backward(call, dy, dstate):
        calls.append(("backward", call.batch, call.tokens, launch_table.launch_config(call, backward=True)))
        return backward(call, dy, dstate)

    monkeypatch.setattr(scan_torch, "forward", recorded_forward)
    monkeypatch.setattr(scan_torch, "backward", recorded_backward)
    return calls


def test_a_call_of_a_few_samples_with_the_sizes_to_try(seen):
    work = Compilation(SHAPE, subjects, "directional_scan", "backward", torch.float64, CONFIG)
    compile_one(CPU, work)
    assert seen[-1] == ("backward", 16, 256, CONFIG)


def test_a_call_of_a_few_samples_with_the_sizes_of_all(seen):
    compile_one(CPU, Compilation(SHAPE._replace(b=4096), subjects, "selective_scan", "backward", torch.float64))
    (_, few, _, forward), (_, _, _, backward) = seen
    assert few == 16
    assert (forward.chunks, backward.chunks) == (1, 1)  # 16 samples alone would be cut
    assert launch_table._batch is None


def test_failures_are_left_to_the_timed_call(monkeypatch):
    def fails(*_):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(scan_torch, "forward", fails)
    compile_one(CPU, Compilation(SHAPE, subjects, "directional_scan", "forward", torch.float64))


@pytest.fixture
def torch_backend() -> Iterator[None]:
    """The one that has nothing to compile."""
    with use_backend("torch"):
        yield


class _Pool:
    """Keeps what it is given to do, and does nothing; or dies of it."""

    def __init__(self, *, dies: bool = False) -> None:
        self.dies = dies
        self.work: list[Compilation] = []

    def map(self, run: Callable, work: list[Compilation]) -> Iterator:
        self.work += work
        for _ in work:
            if self.dies:
                raise BrokenProcessPool
            yield


def test_processes_that_die_are_a_line_in_the_log(caplog):
    ahead = Compilers(_Pool(dies=True), CPU)
    ahead.compile([Compilation(SHAPE, subjects, "selective_scan", "forward", torch.float64)])
    assert ahead.pool is None
    assert "processes that compile kernels died" in caplog.text


@pytest.mark.usefixtures("torch_backend")
@pytest.mark.parametrize("op", ["scan", "neighbourhood_attention"])
def test_benchmarks_compile_everything_before_they_measure(monkeypatch, op):
    """All passes of all shapes and of all that runs kernels, forward ones first."""
    pool, measured = _Pool(), []

    @contextmanager
    def pretended(device, processes):
        assert processes == 5
        yield Compilers(pool, device)
        assert not measured

    measure = vssm.engine.benchmark_op.measure_kernels
    monkeypatch.setattr(vssm.engine.benchmark_op, "compilers", pretended)
    monkeypatch.setattr(vssm.engine.benchmark_op, "backend_name", lambda device_type: "triton")
    monkeypatch.setattr(vssm.engine.benchmark_op, "measure_kernels", lambda *a: measured.append(0) or measure(*a))
    setting = OpSetting(CPU, against=("torch", "official"), processes=5, warmup=1, repeats=2)
    if op == "scan":
        shapes, ours = [OpShape(1, 1, 4, 1, 8, 1), OpShape(1, 1, 4, 2, 8, 1)], compiled_subjects(("official",))
        benchmark_op(shapes, setting)
    else:
        shapes, ours = [AttentionShape(1, 1, 4, 5, 5, 3, 1)], ["neighbourhood_attention"]
        benchmark_attention(shapes, setting)
    expected = [(phase, shape, name) for phase in PHASES for shape in shapes for name in ours]
    assert [(work.phase, work.shape, work.op) for work in pool.work] == expected
    assert measured


@pytest.mark.usefixtures("torch_backend")
def test_nothing_is_compiled_ahead_for_another_backend(monkeypatch):
    monkeypatch.setattr(vssm.engine.benchmark_op, "compilers", None)
    assert benchmark_op([OpShape(1, 1, 4, 1, 8, 1)], OpSetting(CPU, processes=5, warmup=1, repeats=2))


class _Launches(TorchDispatchMode):
    """Takes the launch code of the kernels through ops on tensors without memory, which would skip it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        from vssm_kernels import launch
        from vssm_kernels import neighbourhood_attention_triton as attention

        if func is torch.ops.vssm.scan.default:
            launch.forward(ScanCall(*args))
        elif func is torch.ops.vssm.scan_backward.default:
            launch.backward(ScanCall(*args[2:]), *args[:2])
        elif func is torch.ops.vssm.neighbourhood_attention.default:
            attention.forward(*args[:4], size=args[4], window=args[5], dilation=args[6])
        elif func is torch.ops.vssm.neighbourhood_attention_backward.default:
            attention.backward(*args[:7], size=args[7], window=args[8], dilation=args[9])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def compiled(monkeypatch) -> Callable[[Callable[[], object]], set[tuple[str, str]]]:
    """What Triton would compile for a call on an H100: kernels, and the keys by which it knows them."""
    jit = pytest.importorskip("triton.runtime.jit", reason="Triton is not on every platform")
    compiler = pytest.importorskip("triton.compiler")
    backend = compiler.make_backend(pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32))
    keys: set[tuple[str, str]] = set()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        constants = {parameter.name: bound[parameter.name] for parameter in kernel.params if parameter.is_constexpr}
        keys.add((kernel.__name__, f"{specialization} {sorted(constants.items())} {backend.parse_options(options)}"))

    def of(call: Callable[[], object]) -> set[tuple[str, str]]:
        keys.clear()
        with _Launches():
            call()
        return keys.copy()

    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(torch, "Generator", lambda device: _NoGenerator())
    return of


class _NoGenerator:
    """There is no generator of numbers without memory; torch's functions take None for it."""

    def manual_seed(self, seed: int) -> None:
        return None


def _call(work: Compilation) -> None:
    """The call that is timed, of all samples."""
    subject = next(each for each in work.subjects(work.shape, META, work.dtype, [work.op]) if each.name == work.op)
    call = phase_calls(subject)[work.phase]
    with nullcontext() if work.config is None else launch_table.forced(work.config):
        call()


def _same(compiled: Callable, work: Compilation) -> int:
    """How many kernels the timed call needs, and all of them, and no other, are compiled ahead of it."""
    timed, ahead = compiled(lambda: _call(work)), compiled(lambda: compile_one(META, work))
    assert ahead == timed, work
    return len(timed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETS)
def test_what_is_compiled_ahead_is_what_is_timed(compiled, name, dtype):
    for shape in SETS[name]:
        for op in compiled_subjects(("official",) if shape.order == "cross" or shape.k == 1 else ()):
            assert _same(compiled, Compilation(shape, subjects, op, "forward", dtype)) >= 2
            assert _same(compiled, Compilation(shape, subjects, op, "backward", dtype)) >= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 128, 6])
def test_attention_that_is_compiled_ahead_is_what_is_timed(compiled, batch, dtype):
    for shape in a2mamba_shapes(batch):
        work = Compilation(shape, attention_subjects, "neighbourhood_attention", "forward", dtype)
        assert _same(compiled, work) == 1
        assert _same(compiled, work._replace(phase="backward")) >= 4


def test_sizes_to_try_that_are_compiled_ahead_are_what_is_timed(compiled):
    shape = OpShape(32, 4, 96, 16, 3136, 6, "cross")
    for phase in PHASES:
        for config in launch_table.candidates(f"{phase} b32 k4 d96 n16 t3136 r6 bfloat16")[::7]:
            _same(compiled, Compilation(shape, subjects, "directional_scan", phase, torch.bfloat16, config))


def test_kernels_of_other_lengths_and_batches_are_others(compiled, monkeypatch):
    """So the comparisons above can fail: with fewer tokens, and with one sample, other kernels are compiled."""
    work = Compilation(OpShape(128, 1, 768, 16, 197, 24), subjects, "directional_scan", "backward", torch.bfloat16)
    timed = compiled(lambda: _call(work))
    assert compiled(lambda: compile_one(META, work._replace(shape=work.shape._replace(l=144)))) != timed
    monkeypatch.setattr(vssm.engine.compile_ahead, "_few", lambda batch: 1)
    assert compiled(lambda: compile_one(META, work)) != timed


@pytest.mark.slow
def test_processes_compile():
    with compilers(CPU, 2) as ahead:
        ahead.compile(2 * [Compilation(SHAPE, subjects, "selective_scan", "forward", torch.float64)])


def test_no_processes_without_a_gpu():
    with compilers(CPU) as ahead:
        assert ahead.pool is None
