"""What is particular to the compiled CPU scan: its arithmetic, blocks of channels, threads, forks and its cache."""

import math
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from scan_cases import TOLERANCE, outputs_and_gradients, relative_error
from vssm_kernels import backend, directional_scan, directional_scan_ref, use_backend

numba = pytest.importorskip("numba")
from vssm_kernels import scan_cpu, scan_cpu_kernels, scan_cpu_threads  # noqa: E402  numba first


@pytest.fixture(autouse=True)
def _cpu():
    with use_backend("cpu"):
        yield


@pytest.fixture(params=["torch's team", "own pool"])
def threads(request, monkeypatch):
    """Sets the number of threads, and makes every unit of work worth one."""
    monkeypatch.setattr(scan_cpu, "THREAD_WORK", 1)
    if request.param == "own pool":
        monkeypatch.setattr(scan_cpu_threads, "_openmp", lambda: None)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _inputs(dtype=torch.float32, d: int = 140) -> dict:
    """Three samples, two directions and channels for several blocks, the last one narrow."""
    torch.manual_seed(1)
    b, l, k, n, r = 3, 21, 2, 3, 4
    tensors = {
        "x": torch.randn(b, l, d), "dt": torch.randn(b, l, k, r), "A": -torch.rand(k, d, n),
        "B": torch.randn(b, l, k, n), "C": torch.randn(k, d, n), "D": torch.randn(k, d),
        "dt_weight": torch.randn(k, d, r), "dt_bias": torch.randn(k, d), "z": torch.randn(b, l, d),
    }  # fmt: skip
    order = torch.stack([torch.arange(l), torch.arange(l).flip(0)])
    return {name: t.to(dtype).requires_grad_() for name, t in tensors.items()} | {"order": order}


@pytest.mark.parametrize("d", [1, 8, 63, 64, 65, 130, 200])
def test_blocks_of_channels(d, threads):
    threads(2)
    results = outputs_and_gradients(directional_scan, _inputs(d=d))
    expected = outputs_and_gradients(directional_scan_ref, _inputs(torch.float64, d))
    for name, reference in expected.items():
        assert relative_error(results[name], reference) < TOLERANCE[torch.float32], name


def test_same_bits_on_any_number_of_threads(threads):
    results = []
    for number in (1, 2, 5):
        threads(number)
        results.append(outputs_and_gradients(directional_scan, _inputs()))
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


def test_calls_from_several_threads_at_once(threads):
    threads(2)
    expected = outputs_and_gradients(directional_scan, _inputs())
    cases = [_inputs() for _ in range(16)]  # seeds are global: made here, run there
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda case: directional_scan(**case).detach(), cases))
    assert all(torch.equal(result.double(), expected["y"]) for result in results)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_forked_process(threads):
    """A worker of a data loader: its parent's threads are gone, and torch gives it one; it may ask for more."""
    threads(2)
    inputs = {name: tensor.detach() for name, tensor in _inputs().items() if name not in ("dt_weight", "z")}
    inputs["dt"] = torch.rand(3, 21, 2, 140)  # no matrix product: torch's own threads may not survive a fork
    expected = directional_scan(**inputs)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(directional_scan(**inputs).tolist()), daemon=True)
    child.start()
    assert queue.get(timeout=60) == expected.tolist()
    child.join()


def test_float64_stays_float64():
    y = directional_scan(**_inputs(torch.float64))
    assert relative_error(y.detach(), directional_scan_ref(**_inputs(torch.float64)).detach()) < 1e-12


def _compiled(name: str):
    function = getattr(scan_cpu_kernels, name)
    return numba.njit(lambda x: function(x))


def test_exp_and_softplus():
    x = torch.cat([torch.linspace(-86, 88, 20001), torch.linspace(-1, 1, 20001)])
    x64 = x.double()
    for name, exact in (("exp", x64.exp()), ("exp2", x64.exp2()), ("softplus", x64.exp().log1p())):
        result = torch.tensor([*map(_compiled(name), x.numpy())], dtype=torch.float64)
        assert ((result - exact) / exact).abs().max() < 3e-7, name
    small = torch.linspace(-0.3, 0, 20001)
    result = torch.tensor([*map(_compiled("exp2"), small.numpy())], dtype=torch.float64)
    assert abs((result / small.double().exp2() - 1).mean()) < 3e-9  # an error to one side adds up over the steps


def test_exp_and_softplus_at_the_ends():
    numbers = torch.tensor([-math.inf, -1e30, -200, 200, math.inf, math.nan]).numpy()
    big = [0, 0, 0, math.inf, math.inf]
    for name, expected in (("exp", big), ("exp2", big), ("softplus", [0, 0, 0, 200, math.inf])):
        *results, last = map(float, map(_compiled(name), numbers))
        assert results == expected, name
        assert math.isnan(last), name


def test_no_place_for_the_cache():
    """A read-only installation with a read-only home: the code is compiled in every process."""
    scope: dict = {}
    exec(compile("def nothing(address):\n    pass", "<not a file>", "exec"), scope)
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(scope["nothing"])
    assert scan_cpu_kernels._callback(scope["nothing"]).address


def test_compiling_is_announced_once_and_loading_is_not(monkeypatch, caplog):
    helpers = [numba.njit(lambda x: x), numba.njit(lambda x: -x)]
    monkeypatch.setattr(scan_cpu_kernels, "_callback", lambda function: [helper(1) for helper in helpers])
    for expected in (1, 0):  # the second time, both are compiled
        caplog.clear()
        scan_cpu_kernels.entry.__wrapped__("backward")
        assert caplog.text.count("compiling the backward scan") == expected


def test_choice(monkeypatch):
    with use_backend("auto"):
        assert backend.backend_for("cpu") is scan_cpu
        monkeypatch.setattr(backend, "_numba_works", lambda: False)
        assert backend.backend_for("cpu").__name__ == "vssm_kernels.scan_torch"
    with pytest.raises(ValueError, match="cpu needs tensors on cpu, got cuda"):
        backend.backend_for("cuda")
    monkeypatch.setattr(backend, "available_backends", lambda: ("torch",))
    with pytest.raises(ValueError, match=r"got 'cpu'; it needs numba: pip install 'vssm\[cpu\]'"):
        use_backend("cpu")


def test_numba_that_refuses_to_be_imported(monkeypatch, caplog):
    def refuse(name):
        raise ImportError("Numba needs NumPy 2.5 or less")

    monkeypatch.setattr(backend.importlib, "import_module", refuse)
    assert not backend._numba_works.__wrapped__()
    assert "torch instead of cpu, as numba cannot be imported: Numba needs NumPy" in caplog.text
