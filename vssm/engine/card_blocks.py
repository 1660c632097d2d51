"""Numbers of model cards as Markdown: counted ones, published ones, and those of the records of our commands."""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

import vssm
from vssm.engine.info import count_parts, describe
from vssm.engine.published import PUBLISHED, PUBLISHED_DETECTORS
from vssm.engine.zoo import family_of
from vssm.yolo import MambaYoloDetector

# Keys that tell the records of a command from those of others.
_ALWAYS = {"model", "img_size", "params_m", "latency_ms", "device", "device_name", "cpu_threads", "date", "git_commit"}
_KINDS = {
    "benchmark": _ALWAYS | {"batch_size", "images_per_s"},
    "export": _ALWAYS | {"format", "file_mib", "error_over_peak", "torch_latency_ms", "load_average", "cores"},
}
_USUAL_BACKEND = {"cuda": "triton", "cpu": "cpu"}  # of records that do not say which computed the scan
_DETECTOR_SIZE = 640


def read_records(folder: Path) -> dict[str, list[dict]]:
    """Reads the records that cards show, of whatever file, and leaves out those that newer ones replace.

    Args:
        folder: Holds files of results; those of other kinds are passed over.

    Returns:
        Records of ``benchmark`` and of ``export``, each with ``file``, the path that it was read from.

    Raises:
        ValueError: A file is not JSON.
    """
    newest: dict[str, dict[tuple, dict]] = {kind: {} for kind in _KINDS}
    for path in sorted(folder.glob("*.json")):
        for record in _read(path):
            kind = next((kind for kind, keys in _KINDS.items() if keys <= record.keys()), None)
            if kind is None:
                continue
            record = _uniform(record) | {"file": path}
            key = (record["model"], *_setting(record), record["batch_size"])
            if key not in newest[kind] or newest[kind][key]["date"] <= record["date"]:
                newest[kind][key] = record
    return {kind: list(records.values()) for kind, records in newest.items()}


def blocks(family: str | None, *, folder: Path, records: dict[str, list[dict]]) -> dict[str, Callable[[], str]]:
    """What fills the blocks of a card, by their names.

    Args:
        family: Whose models to show; all if None.
        folder: Where the card is, from which it links to records.
        records: As `read_records` returns them.
    """
    published = [*PUBLISHED, *PUBLISHED_DETECTORS]  # from small to large
    known = {name: family_of(name) for name in vssm.list_models() if not name.startswith("test_")}
    order = [*(name for name in published if name in known), *(name for name in known if name not in published)]
    models = [name for name in order if family in (None, known[name])]
    return {
        "variants": partial(_variants, models),
        "detectors": partial(_detectors, models),
        "measured": partial(_measured, models, folder, records["benchmark"]),
        "exported": partial(_exported, models, folder, records["export"]),
    }


def _read(path: Path) -> list[dict]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a file of results ({error})") from error
    return [each for each in content if isinstance(each, dict)] if isinstance(content, list) else []


def _uniform(record: dict) -> dict:
    """The record with every key by which records are told apart."""
    return {
        **record,
        "model": record["model"].partition(".")[0],
        "package": record.get("package") or ("vssm" if record["model"] in vssm.list_models() else "timm"),
        "amp_dtype": record.get("amp_dtype"),
        "compile": record.get("compile") or None,
        "scan_backend": record.get("scan_backend") or _USUAL_BACKEND.get(record["device"]),
        "batch_size": record.get("batch_size", 1),
    }


def _setting(record: dict) -> tuple:
    """What has to be the same of records of one table, but for the file."""
    return (
        record["device_name"],
        *record["img_size"],
        record["amp_dtype"],
        record["compile"],
        record["scan_backend"],
        record["cpu_threads"] if record["device"] == "cpu" else None,
        "train_images_per_s" in record,
        record.get("format"),
        record.get("largest_side"),
        record.get("features") is None,
    )


def _variants(models: Sequence[str]) -> str:
    """Counted and published size, operations and accuracy."""
    rows, sources = [], []
    sizes = {}
    for name in models:
        counted, published = describe(name), PUBLISHED.get(name)
        sizes[" × ".join(map(str, counted["img_size"]))] = None
        rows.append(
            {
                "model": f"`{name}`",
                "parameters": f"{counted['params']:,}",
                "as published, M": _plain(published and published.params_m),
                "products and convolutions, G": _rounded(counted["gmacs"]),
                "scan, G": _rounded(counted["scan_gops"]),
                "sum, G": _rounded(counted["total_gflops"]),
                "FLOPs as published, G": _plain(published and published.gflops),
                "top-1 as published, %": _plain(published and published.top1),
                "top-5, %": _plain(published and published.top5),
            }
        )
        sources += published.source.split("; ") if published else []
    text = (
        f"Counted by `vssm info` for one image of {' or '.join(sizes)} pixels: multiply-adds of products and "
        "convolutions, and 9·b·k·d·l·n operations of the scan."
    )
    if sources:
        text += f" Published: {'; '.join(dict.fromkeys(sources))}. The accuracies were not measured here."
    return f"{_table(rows)}\n\n{text}"


def _detectors(models: Sequence[str]) -> str:
    """Counted and published size and operations of whole detectors, and their published accuracy."""
    rows, sources = [], []
    for name in models:
        with torch.device("meta"):
            images = torch.empty(1, 3, _DETECTOR_SIZE, _DETECTOR_SIZE)
            parts = count_parts(MambaYoloDetector(name).eval(), images).values()
        published = PUBLISHED_DETECTORS[name]
        rows.append(
            {
                "detector on": f"`{name}`",
                "parameters": f"{sum(part.params for part in parts):,}",
                "products and convolutions, G": _rounded(
                    sum(part.matmul_macs + part.conv_macs for part in parts) / 1e9
                ),
                "scan, G": _rounded(sum(part.scan_ops for part in parts) / 1e9),
                "parameters as published, M": _plain(published.params_m),
                "FLOPs as published, G": _plain(published.gflops),
                "AP": _plain(published.ap),
                "AP50": _plain(published.ap50),
                "AP75": _plain(published.ap75),
            }
        )
        sources += published.source.split("; ")
    return (
        f"{_table(rows)}\n\nCounted for one image of {_DETECTOR_SIZE} × {_DETECTOR_SIZE} pixels, multiply-adds and "
        f"9·b·k·d·l·n operations of the scan. Published: {'; '.join(dict.fromkeys(sources))}, AP of boxes on COCO "
        "val2017; it was not measured here."
    )


def _measured(models: Sequence[str], folder: Path, records: Sequence[dict]) -> str:
    """Throughput, latency and memory, by device and setting."""
    parts = []
    for group in _groups(models, records):
        rows = [
            {
                "model": f"`{record['model']}`",
                "batch": str(record["batch_size"]),
                "inference, images/s": _rounded(record["images_per_s"]),
                "training, images/s": _rounded(record.get("train_images_per_s")),
                "one image, ms": _rounded(record["latency_ms"]),
                "memory of inference, MiB": _rounded(record.get("peak_memory_mib")),
                "of training, MiB": _rounded(record.get("train_peak_memory_mib")),
            }
            for record in group
        ]
        parts.append(f"{_benchmark_setting(group, folder)}\n\n{_table(rows)}")
    return "\n\n".join(parts) or "No measurement is recorded yet."


def _exported(models: Sequence[str], folder: Path, records: Sequence[dict]) -> str:
    """Size and time of programs for onnxruntime beside torch, by device and setting."""
    parts = []
    for group in _groups(models, [record for record in records if record["format"] == "onnx"]):
        rows = [
            {
                "model": f"`{record['model']}`",
                "file, MiB": f"{record['file_mib']:.1f}",
                "onnxruntime, ms": _rounded(record["latency_ms"]),
                "torch, ms": _rounded(record["torch_latency_ms"]),
                "difference over the peak": f"{record['error_over_peak']:.0e}",
            }
            for record in group
        ]
        parts.append(f"{_export_setting(group, folder)}\n\n{_table(rows)}")
    return "\n\n".join(parts) or "No time of an exported program is recorded yet."


def _groups(models: Sequence[str], records: Iterable[dict]) -> list[list[dict]]:
    """Records of one file and setting that show some of the models, GPUs and the newest first; peers at the end."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault((record["file"], *_setting(record)), []).append(record)
    shown = [_with_peers(models, group) for group in groups.values()]
    shown.sort(key=lambda group: max((record["date"] for record in group), default=""), reverse=True)
    return sorted((group for group in shown if group), key=lambda group: group[0]["device"] == "cpu")


def _with_peers(models: Sequence[str], group: Sequence[dict]) -> list[dict]:
    """Records of the models, and for each the timm model of the same run with the most similar number of parameters."""
    ours = sorted((each for each in group if each["model"] in models), key=lambda each: models.index(each["model"]))
    others = [record for record in group if record["package"] == "timm"]
    peers = [min(others, key=lambda other: _distance(other, record)) for record in ours] if others else []
    return ours + sorted({id(peer): peer for peer in peers}.values(), key=lambda peer: peer["params_m"])


def _distance(one: dict, other: dict) -> float:
    return abs(math.log(one["params_m"] / other["params_m"]))


def _benchmark_setting(group: Sequence[dict], folder: Path) -> str:
    first = group[0]
    options = ["--train"] if "train_images_per_s" in first else []
    options += [f"--amp-dtype {first['amp_dtype']}"] if first["amp_dtype"] else []
    options += [f"--compile {first['compile']}"] if first["compile"] else []
    text = [
        *_where(group),
        f"{first['amp_dtype']} autocast" if first["amp_dtype"] else "float32",
        f"compiled ({first['compile']})" if first["compile"] else "eager",
        *_versions(group),
    ]
    peers = " Models of timm are of the same run." if any(record["package"] == "timm" for record in group) else ""
    return f"{', '.join(text)}: `{' '.join(['vssm benchmark MODEL...', *options])}` ({_link(first, folder)}).{peers}"


def _export_setting(group: Sequence[dict], folder: Path) -> str:
    first = group[0]
    text = [*_where(group), "one image, float32", f"onnxruntime {first['onnxruntime']}", *_versions(group)]
    loads = [record["load_average"] for record in group]
    load = f"{min(loads):.1f}" if len(loads) == 1 else f"{min(loads):.1f} to {max(loads):.1f}"
    return (
        f"{', '.join(text)}: `vssm export MODEL... --benchmark` ({_link(first, folder)}). "
        f"Torch runs the scan of the backend `{first['scan_backend']}`. The load of the {first['cores']} cores was "
        f"{load}, this command included."
    )


def _where(group: Sequence[dict]) -> list[str]:
    first = group[0]
    days = sorted({record["date"].partition("T")[0] for record in group})
    threads = [f"{first['cpu_threads']} threads"] if first["device"] == "cpu" else []
    size = " × ".join(map(str, first["img_size"]))
    return [first["device_name"], *threads, days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}", size]


def _versions(group: Sequence[dict]) -> list[str]:
    packages = ("torch", "triton") if group[0]["device"] == "cuda" else ("torch",)
    known = [(package, sorted({str(record[package]) for record in group})) for package in packages]
    commits = sorted({record["git_commit"] for record in group if record["git_commit"]})
    short = [commit[:10] + ("-dirty" if commit.endswith("-dirty") else "") for commit in commits]
    return [
        *(f"{package} {' and '.join(versions)}" for package, versions in known),
        f"commit {' and '.join(short)}" if short else "commit not recorded",
    ]


def _link(record: dict, folder: Path) -> str:
    return f"[record]({Path(os.path.relpath(record['file'], folder)).as_posix()})"


def _table(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table without the columns in which nothing is known."""
    columns = [column for column in rows[0] if any(row[column] != "-" for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: float | None) -> str:
    return "-" if value is None else str(value)


def _rounded(value: float | None) -> str:
    if value is None:
        return "-"
    digits = next((digits for digits, limit in ((3, 0.1), (2, 10), (1, 100)) if value < limit), 0)
    return f"{value:.{digits}f}"
