"""Models as programs for other runtimes: ONNX, or torch.export's .pt2; what is written was run and compared."""

import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchRuntimeError, UserError
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from vssm.engine.classifier import Classifier
from vssm.engine.timing import measure_time
from vssm.engine.zoo import count_parameters
from vssm.files import atomic_path
from vssm.models._base import TokenBackbone
from vssm.quantization import count_int8
from vssm_kernels.backend import backend_name
from vssm_kernels.decompositions import decompose

FORMATS = ("onnx", "pt2")
TOLERANCE = 1e-4  # largest difference of an output to that of the model, over the output's peak
DESCRIPTION = "vssm.json"  # name of the description inside a .pt2 file
_CPU = torch.device("cpu")
_ROUNDS = 3  # of timed calls there and here by turns, so that what else the machine does meets both


@dataclass(frozen=True)
class ExportSetting:
    """What to write, and how to measure it.

    Args:
        format: ``"onnx"`` or ``"pt2"``.
        decompose: Write the ops of this package in operators of torch; always so for ONNX.
        largest: Longest side in pixels of images of any size; None for the model's own size alone.
        features: Write maps instead of logits: those of these stages or blocks, of all if empty.
        warmup: Calls before the timed ones.
        repeats: Timed calls.
    """

    format: str
    decompose: bool = False
    largest: int | None = None
    features: Sequence[int] | None = None
    warmup: int = 3
    repeats: int = 10


def check_packages() -> None:
    """Raises ValueError if a package that ONNX needs is not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"export: onnx needs {', '.join(missing)}, not installed here: pip install 'vssm[export]'")


def export(classifier: Classifier, path: Path, setting: ExportSetting) -> dict[str, Any]:
    """Writes a model as a program, after running the file and comparing it with the model.

    Args:
        classifier: The model, on the CPU, in evaluation mode; one with positions is set to take images of any size
            if the program shall.
        path: Target.
        setting: What to write, and how to measure it.

    Returns:
        What was written and measured: ``opset``, ``params_m``, ``file_mib``, ``error_over_peak``, the times in
        milliseconds of one image in the program, ``latency_ms``, and in the model, ``torch_latency_ms``, whose scan is
        computed by ``scan_backend``; and ``load_average``, how many processes wanted the ``cores`` in the last minute.

    Raises:
        ValueError: A package is missing, the model is quantised or cannot be written for images of any size, or the
            file computes something else than the model. There is no file then.
    """
    if layers := count_int8(classifier.model):
        raise ValueError(f"export: expected weights in float, got {layers} layers in integers; export those before")
    if setting.format == "onnx":
        check_packages()
    if setting.largest is not None and isinstance(classifier.model, TokenBackbone):
        classifier.model.dynamic_img_size = True
    network = classifier.model if setting.features is None else _Features(classifier.model, setting.features)
    description = _describe(classifier, setting)
    with atomic_path(path) as temporary, torch.no_grad():
        program = _program(network, classifier, setting)
        write = _write_onnx if setting.format == "onnx" else _write_pt2
        facts = write(program, temporary, description)
        run = _onnx_session(temporary) if setting.format == "onnx" else _pt2_program(temporary)
        facts["params_m"] = count_parameters(classifier.model) / 1e6
        facts["file_mib"] = temporary.stat().st_size / 2**20
        facts |= _compare(run, network, classifier, setting)
        facts |= _times(run, network, classifier, setting)
    return description | facts


class _Features(nn.Module):
    """The maps (b, c, h, w) of a model, as ``features_only`` gives them."""

    def __init__(self, model: nn.Module, indices: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.indices = list(indices) or None

    def forward(self, images: Tensor) -> list[Tensor]:
        forward_intermediates = cast(Any, self.model).forward_intermediates
        return forward_intermediates(images, indices=self.indices, stop_early=True, intermediates_only=True)


def _describe(classifier: Classifier, setting: ExportSetting) -> dict[str, Any]:
    """What a user of the file has to know, as JSON has it."""
    config = classifier.config
    return {
        "model": classifier.spec.model,
        "format": setting.format,
        "plain_operators": setting.format == "onnx" or setting.decompose,
        "img_size": [config.height, config.width],
        "largest_side": setting.largest,
        "features": None if setting.features is None else list(setting.features),
        "mean": list(config.mean),
        "std": list(config.std),
        "interpolation": config.interpolation,
        "crop_pct": config.crop_pct,
    }


def _program(network: nn.Module, classifier: Classifier, setting: ExportSetting) -> ExportedProgram:
    sizes = {0: Dim.DYNAMIC(min=1)}
    if setting.largest is not None:
        sizes |= dict.fromkeys((2, 3), Dim.DYNAMIC(min=1, max=setting.largest))
    # Of attention, torch's own operators: what the fused ones return is laid out as others need not.
    try:
        with sdpa_kernel(SDPBackend.MATH), _silent_logs():
            program = torch.export.export(
                network, (_images(classifier, batch=2),), dynamic_shapes=(sizes,), strict=setting.largest is not None
            )
            return decompose(program) if setting.format == "onnx" or setting.decompose else program
    except (UserError, TorchRuntimeError) as error:
        constant = re.search(r"to be a constant \((\d+)\)", str(error))
        reason = (
            f"its code takes {constant[1]} pixels for granted" if constant else str(error).strip().partition("\n")[0]
        )
        sizes = "" if setting.largest is None else " for images of any size"
        raise ValueError(f"export: {classifier.spec.model} cannot be written{sizes}: {reason}") from error


@contextmanager
def _silent_logs() -> Iterator[None]:
    """Keeps torch from logging the traceback of a failure, which is told in a line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _images(classifier: Classifier, *, batch: int, size: tuple[int, int] | None = None) -> Tensor:
    config = classifier.config
    return torch.randn(batch, config.channels, *(size or (config.height, config.width)))


def _write_onnx(program: ExportedProgram, path: Path, description: dict[str, Any]) -> dict[str, Any]:
    maps = description["features"] is not None
    outputs = [f"map{i}" for i in range(len(program.graph_signature.user_outputs))] if maps else ["logits"]
    any_size = description["largest_side"] is not None
    try:
        written = torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"} if any_size else {0: "batch"},),
            input_names=["images"],
            output_names=outputs,
            external_data=False,
            optimize=False,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        operator = re.search(r"target=torch\.ops\.([\w.]+)", str(error))
        reason = f"its exporter does not take {operator[1]} as it is used there" if operator else str(error)
        sizes = " for images of any size" if any_size else ""
        raise ValueError(f"export: {description['model']} cannot be written as ONNX{sizes}: {reason}") from error
    assert written is not None, "it is with dynamo=True"
    _tidy(written.model)
    written.model.metadata_props.update({key: json.dumps(value) for key, value in description.items()})
    written.save(str(path), external_data=False)
    return {"opset": written.model.opset_imports[""], "onnx": version("onnx"), "onnxruntime": version("onnxruntime")}


def _tidy(model: Any) -> None:
    """Computes what is constant, and once what is there several times.

    The exporter's own optimizer takes minutes for a deep model, in time that is quadratic in its size, for no speed.
    """
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass  # not at the top: they belong to an extra
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    CommonSubexpressionEliminationPass()(model)
    fold_constants(model)
    remove_unused_nodes(model)
    CommonSubexpressionEliminationPass()(model)


def _write_pt2(program: ExportedProgram, path: Path, description: dict[str, Any]) -> dict[str, Any]:
    torch.export.save(program, path, extra_files={DESCRIPTION: json.dumps(description)})
    return {}


def _onnx_session(path: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime  # not at the top: it belongs to an extra

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(each) for each in session.run(None, {"images": images.numpy()})]


def _pt2_program(path: Path) -> Callable[[Tensor], list[Tensor]]:
    module = torch.export.load(path).module()
    return lambda images: _listed(module(images))


def _listed(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _compare(
    run: Callable[[Tensor], list[Tensor]], network: nn.Module, classifier: Classifier, setting: ExportSetting
) -> dict[str, Any]:
    """The largest difference to the model over batches, and sizes if these are free, unlike that of the example."""
    home = classifier.config.height, classifier.config.width
    inputs = [(3, home), (1, home)]
    if setting.largest is not None:
        inputs += [(1, (home[0], home[1] + 32)), (2, (setting.largest // 2, setting.largest // 2))]
    worst = 0.0
    for batch, size in inputs:
        images = _images(classifier, batch=batch, size=size)
        for result, expected in zip(run(images), _listed(network(images)), strict=True):
            worst = max(worst, ((result - expected).abs().max() / expected.abs().max()).item())
            if not worst <= TOLERANCE:  # a NaN is no small number
                raise ValueError(
                    f"export: the program differs from {classifier.spec.model} by {worst:.1e} of the peak on "
                    f"{batch}×{size[0]}×{size[1]} images, expected {TOLERANCE:.0e} at most; nothing is written"
                )
    return {"error_over_peak": worst}


def _times(
    run: Callable[[Tensor], list[Tensor]], network: nn.Module, classifier: Classifier, setting: ExportSetting
) -> dict[str, Any]:
    images = _images(classifier, batch=1)
    calls = {"latency": run, "torch_latency": network}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            times = measure_time(lambda call=call: call(images), _CPU, warmup=setting.warmup, repeats=setting.repeats)
            rounds[name].append(times)
    record: dict[str, Any] = {}
    for name, found in rounds.items():
        for key, of in (("ms", "median"), ("p10_ms", "p10"), ("p90_ms", "p90")):
            record[f"{name}_{key}"] = median(times[of] for times in found)
    return record | {
        "scan_backend": backend_name("cpu"),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
