"""Writes the pages that come from the code and from measurements: commands with their options, and benchmarks."""

import contextlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vssm.cli import commands, main
from vssm.engine.plot import Bar, bar_plot
from vssm.engine.throughput_plot import plot_throughput
from vssm.engine.zoo import package_of
from vssm.files import atomic_path

Records = list[dict[str, Any]]
_COLUMNS = 88  # of a help text, so that it fits a page
_OURS = ("directional_scan", "selective_scan")
_SIZES = ("b", "k", "heads", "d", "e", "n", "l", "h", "w", "window", "dilation")  # of scans and of attention


def write_pages(root: Path) -> None:
    """Writes the pages and their plots into ``docs/generated``.

    Args:
        root: The checkout.
    """
    folder = root / "docs" / "generated"
    _write(folder / "commands.md", command_page())
    _write(folder / "benchmarks.md", benchmark_page(root / "benchmarks" / "results", folder))


def command_page() -> str:
    """The help of every command, as ``vssm COMMAND --help`` prints it, in Markdown."""
    sections = [f"## vssm {name}\n\n```text\n{_help(name)}\n```\n" for name in commands()]
    return "# Commands\n\nWhat `vssm COMMAND --help` says of each command.\n\n" + "\n".join(sections)


def benchmark_page(results: Path, folder: Path) -> str:
    """Plots and tables of the records of measurements, in Markdown.

    Args:
        results: Folder of the records.
        folder: Where plots are written, and the page is going to be.
    """
    links = os.path.relpath(results, folder)
    paths = sorted(results.glob("*.json"))
    sections = [
        section
        for kind in _KINDS
        for section in (f"## {kind.heading}\n\n{kind.says}\n", *_of_kind(kind, paths, folder=folder, links=links))
    ]
    rest = [path for path in paths if not any(path.name.startswith(kind.prefix) for kind in _KINDS)]
    others = [f"- [{path.stem}]({links}/{path.name})" for path in rest]
    return "\n".join([_INTRODUCTION, *sections, "## Other records", "", *others, ""])


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _help(command: str) -> str:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(_COLUMNS)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            main([command, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return said.getvalue().rstrip()


@dataclass(frozen=True)
class Kind:
    """Records that are shown alike.

    Args:
        prefix: How the names of their files begin.
        heading: Of their section.
        says: What was measured.
        columns: Key of a record to heading of its column.
        setting: What records have in common that are drawn together.
        plot: Draws such records; none when not given.
    """

    prefix: str
    heading: str
    says: str
    columns: Mapping[str, str]
    setting: Callable[[dict[str, Any]], str]
    plot: Callable[[Path, Records], None] | None = None


def _of_kind(kind: Kind, paths: list[Path], *, folder: Path, links: str) -> Iterator[str]:
    """Sections of all records of one kind, one for each setting."""
    for path in paths:
        if not path.name.startswith(kind.prefix):
            continue
        records = json.loads(path.read_text(encoding="utf-8"))
        for number, (setting, group) in enumerate(itertools.groupby(sorted(records, key=kind.setting), kind.setting)):
            together = list(group)
            yield f"### {setting}\n"
            if kind.plot is not None:
                picture = f"{path.stem}_{number}.svg"
                kind.plot(folder / picture, together)
                says = f"{kind.heading}, {setting}; the table has the numbers"
                yield f":::{{container}} plot\n![{says}]({picture})\n:::\n"
            yield _table(together, kind.columns)
            yield f"{_measured(together[0])} ([record]({links}/{path.name})).\n"


def _table(records: Records, columns: Mapping[str, str]) -> str:
    shown = {key: heading for key, heading in columns.items() if any(record.get(key) is not None for record in records)}
    numeric = {key for key in shown if all(isinstance(record.get(key), int | float | None) for record in records)}
    lines = [
        " | ".join(shown.values()),
        " | ".join("---:" if key in numeric else "---" for key in shown),
        *(" | ".join(_cell(record.get(key)) for key in shown) for record in records),
    ]
    return "".join(f"| {line} |\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list):
        return "×".join(map(str, value))
    return f"`{value}`" if "_" in str(value) else str(value)


def _measured(record: dict[str, Any]) -> str:
    threads = f", {record['cpu_threads']} threads" if record["device"] == "cpu" else ""
    return (
        f"{record['device_name']}{threads}, {record['date'][:10]}, torch {record['torch']}, triton {record['triton']}"
    )


def _plot_models(path: Path, records: Records) -> None:
    plot_throughput(path, [{"package": package_of(record["model"]), **record} for record in records])


def _plot_op(path: Path, records: Records) -> None:
    """Bars of the forward pass and of both, rivals beside each other at every size."""
    sizes = [list(group) for _, group in itertools.groupby(records, _op_size)]
    panels = {
        heading: [bar for group in sizes for bar in _op_bars(group, phase)]
        for heading, phase in {"forward": "forward", "forward and backward": "forward_backward"}.items()
    }
    rivals = dict.fromkeys(bar.group for bars in panels.values() for bar in bars if bar.group not in _OURS)
    bar_plot(path, panels, groups=[*_OURS, *rivals], xlabel="milliseconds", title=_op_setting(records[0]))


def _op_bars(records: Records, phase: str) -> Iterator[Bar]:
    label = _op_size(records[0])
    for record in records:
        value, low, high = (record[f"{phase}{suffix}"] for suffix in ("_ms", "_p10_ms", "_p90_ms"))
        yield Bar(label, value, low, high, record["op"])
        label = ""


def _op_size(record: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {record[key]}" for key in _SIZES if key in record)


def _plot_loader(path: Path, records: Records) -> None:
    bars = []
    for record in records:
        value, low, high = (record[f"images_per_s{end}"] for end in ("", "_p10", "_p90"))
        bars.append(Bar(record["loader"], value, low, high, record["package"]))
    bar_plot(path, {"": bars}, groups=("vssm", "timm"), xlabel="images per second", title=_loader_setting(records[0]))


def _model_setting(record: dict[str, Any]) -> str:
    mode = f"compiled ({record['compile']})" if record["compile"] else "eager"
    return f"{record['amp_dtype'] or 'float32'}, {mode}, {record['device_name']}"


def _op_setting(record: dict[str, Any]) -> str:
    return f"{record['dtype']}, {record['device_name']}"


def _loader_setting(record: dict[str, Any]) -> str:
    return f"{record['data']}, {record['workers']} workers, {record['device_name']}"


_INTRODUCTION = """# Benchmarks

Plots and tables are drawn from the records in `benchmarks/results` when this page is built. A record says on what
device, when, and with which versions it was measured; the code may have become faster since. Values are medians, and
the lines at the end of bars go from the 10th to the 90th percentile. `vssm benchmark` and other commands write such
records with `--results`.
"""
_KINDS = (
    Kind(
        prefix="models_",
        heading="Models",
        says="Images a second of whole models, by `vssm benchmark MODEL...`; models of timm beside them.",
        columns={
            "model": "model",
            "img_size": "size",
            "params_m": "parameters, M",
            "batch_size": "batch",
            "images_per_s": "inference, images/s",
            "train_images_per_s": "training, images/s",
            "latency_ms": "one image, ms",
            "peak_memory_mib": "memory, inference, MiB",
            "train_peak_memory_mib": "memory, training, MiB",
        },
        setting=_model_setting,
        plot=_plot_models,
    ),
    Kind(
        prefix="op_",
        heading="Ops alone",
        says="By `vssm benchmark --op`. Of scans b is the batch, k the directions, d the width, n the states, l the "
        "tokens; `loop` goes over tokens in torch.",
        columns={
            "op": "op",
            **{key: key for key in _SIZES},
            "forward_ms": "forward, ms",
            "backward_ms": "backward, ms",
            "forward_backward_ms": "both, ms",
        },
        setting=_op_setting,
        plot=_plot_op,
    ),
    Kind(
        prefix="loader_",
        heading="Reading images",
        says="By `vssm benchmark --loader DATA`, beside timm's loader.",
        columns={
            "loader": "loader",
            "package": "package",
            "images_per_s": "images/s",
            "cpu_ms_per_image": "processor time an image, ms",
        },
        setting=_loader_setting,
        plot=_plot_loader,
    ),
)
