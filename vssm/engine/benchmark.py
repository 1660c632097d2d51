"""Speed and memory of whole models: inference and training throughput, latency of one image."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vssm.engine.memory import halving, release
from vssm.engine.profile import profile_step
from vssm.engine.records import environment
from vssm.engine.timing import measure_memory, measure_time, throughput
from vssm.engine.zoo import count_parameters, create_by_name, input_size, package_of
from vssm_kernels.backend import backend_name

_OF_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile


class Setting(NamedTuple):
    """How models are measured.

    Args:
        device: Where to compute.
        batch_size: Images per step; halved until a step fits into memory.
        amp_dtype: Half-precision dtype for autocast; float32 without autocast when ``None``.
        train: Also measure a training step.
        compile: Mode of ``torch.compile``, such as ``default`` or, with CUDA graphs, ``reduce-overhead``; eager when
            ``None``.
        profile: Also tell which kernels a step spends its time in.
        warmup: Steps before the timed ones.
        repeats: Timed steps.
    """

    device: torch.device
    batch_size: int
    amp_dtype: torch.dtype | None = None
    train: bool = False
    compile: str | None = None
    profile: bool = False
    warmup: int = 3
    repeats: int = 10

    def autocast(self) -> AbstractContextManager:
        """The context in which models run."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)


def benchmark_models(
    names: Sequence[str],
    setting: Setting,
    *,
    img_sizes: Sequence[tuple[int, int] | None] = (None,),
    keep: Callable[[list[dict]], None] | None = None,
) -> list[dict]:
    """Measures models on random images.

    A training step is forward, cross-entropy, backward and one step of AdamW. Peak memory holds weights, optimizer
    state and images too; it is ``None`` where a mode of ``torch.compile`` replays CUDA graphs, whose memory torch does
    not count.

    Args:
        names: Models of vssm or timm.
        setting: How to measure.
        img_sizes: Input heights and widths in pixels; ``None`` is the model's own.
        keep: Called with all records so far after each, such as to write them.

    Returns:
        One record per model and size: ``model``, ``package`` (vssm or timm), ``img_size``, ``params_m``, ``amp_dtype``,
        ``compile``, ``scan_backend`` (of vssm's models), ``warmup`` and ``repeats``;
        ``latency_ms`` of one image; ``batch_size``, ``images_per_s`` and ``peak_memory_mib`` of inference, the same
        with ``train_`` before it of training if asked for; 10th and 90th percentiles of all times and rates;
        ``profile`` and ``train_profile``, as `profile_step` makes them, if asked for; and the environment.

    Raises:
        ValueError: A name is unknown, a model does not take a size, or one image does not fit into memory.
    """
    surroundings = environment(setting.device)
    records: list[dict] = []
    for size in img_sizes:
        for name in names:
            records.append(_benchmark(name, size, setting) | surroundings)
            release()
            if keep is not None:
                keep(records)
    return records


def _benchmark(name: str, size: tuple[int, int] | None, setting: Setting) -> dict:
    torch.manual_seed(0)
    model = create_by_name(name, img_size=size).to(setting.device)
    channels, height, width = input_size(model)
    shape = (channels, *(size or (height, width)))
    package = package_of(name)
    record = {
        "model": name,
        "package": package,
        "img_size": list(shape[1:]),
        "params_m": count_parameters(model) / 1e6,
        "amp_dtype": str(setting.amp_dtype).removeprefix("torch.") if setting.amp_dtype else None,
        "compile": setting.compile,
        "scan_backend": backend_name(setting.device.type) if package == "vssm" else None,
        "warmup": setting.warmup,
        "repeats": setting.repeats,
    }
    network = torch.compile(model, mode=setting.compile) if setting.compile else model
    record |= _measure_inference(network, shape, setting)
    if setting.train:
        record |= _measure_training(network, shape, setting)
    return record


def _measure_inference(model: Callable[[Tensor], Tensor], shape: tuple[int, ...], setting: Setting) -> dict:
    module = _module(model).eval()

    def step(images: Tensor) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad(), setting.autocast():
                model(images)

        return call

    def measure(batch_size: int) -> dict:
        images = torch.randn(batch_size, *shape, device=setting.device)
        return _rates(step(images), batch_size, _bytes_of([*_tensors(module), images]), setting)

    rates = halving(measure, setting.batch_size)
    one_image = torch.randn(1, *shape, device=setting.device)
    times = measure_time(step(one_image), setting.device, warmup=setting.warmup, repeats=setting.repeats)
    latency = {"latency_ms": times["median"], "latency_p10_ms": times["p10"], "latency_p90_ms": times["p90"]}
    return latency | rates


def _measure_training(model: Callable[[Tensor], Tensor], shape: tuple[int, ...], setting: Setting) -> dict:
    module = _module(model).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)

    def measure(batch_size: int) -> dict:
        images = torch.randn(batch_size, *shape, device=setting.device)
        labels = torch.zeros(batch_size, dtype=torch.long, device=setting.device)

        def call() -> None:
            with setting.autocast():
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        optimizer.zero_grad(set_to_none=True)
        call()  # makes the optimizer's state, which is held between steps
        state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
        return _rates(call, batch_size, _bytes_of([*_tensors(module), *state, images, labels]), setting)

    return {f"train_{key}": value for key, value in halving(measure, setting.batch_size).items()}


def _rates(call: Callable[[], object], batch_size: int, held: int, setting: Setting) -> dict:
    """Throughput and peak memory of a step; ``held`` bytes stay allocated between steps."""
    times = measure_time(call, setting.device, warmup=setting.warmup, repeats=setting.repeats)
    peak = None if setting.compile in _OF_GRAPHS else held / 2**20 + measure_memory(call, setting.device)
    profile = {"profile": profile_step(call, setting.device)} if setting.profile else {}
    return {**throughput(times, batch_size), "peak_memory_mib": peak, **profile}


def _module(model: Callable[[Tensor], Tensor]) -> nn.Module:
    assert isinstance(model, nn.Module), "torch.compile wraps a module in a module"
    return model


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
