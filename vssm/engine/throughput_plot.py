"""The picture of a benchmark of models: images per second as bars, or over the size of the images."""

import os
from collections.abc import Sequence

from vssm.engine.plot import Bar, bar_plot, line_plot

_PANELS = {"": "inference", "train_": "training"}


def plot_throughput(path: str | os.PathLike, records: Sequence[dict]) -> None:
    """Draws bars of images per second, the fastest model on top, or lines where models were measured at several sizes.

    Error bars go from the 10th to the 90th percentile. Models of vssm and of timm have colours of their own.

    Args:
        path: Target, ending in .png, .svg or .pdf.
        records: Of `vssm.engine.benchmark.benchmark_models`.
    """
    if len({record["model"] for record in records}) < len(records):
        _plot_lines(path, records)
        return
    order = sorted(records, key=lambda record: -record["images_per_s"])
    panels = {
        heading: [_bar(record, prefix) for record in order]
        for prefix, heading in _PANELS.items()
        if all(f"{prefix}images_per_s" in record for record in records)
    }
    bar_plot(path, panels, groups=("vssm", "timm"), xlabel="images per second", title=_title(records))


def _bar(record: dict, prefix: str) -> Bar:
    value, low, high = (record[f"{prefix}images_per_s{suffix}"] for suffix in ("", "_p10", "_p90"))
    size = "x".join(map(str, dict.fromkeys(record["img_size"])))
    label = f"{record['model']}\n{record['params_m']:.1f} M, {size}, batch {record[f'{prefix}batch_size']}"
    return Bar(label, value, low, high, record["package"])


def _plot_lines(path: str | os.PathLike, records: Sequence[dict]) -> None:
    series: dict[str, tuple[list, list]] = {}
    for record in records:
        sizes, rates = series.setdefault(record["model"], ([], []))
        sizes.append(record["img_size"][0])
        rates.append(record["images_per_s"])
    line_plot(
        path,
        series,
        xlabel="image height in pixels",
        ylabel="images per second",
        title=f"Inference, {_title(records)}",
        logy=True,
    )


def _title(records: Sequence[dict]) -> str:
    first = records[0]
    mode = f"compiled ({first['compile']})" if first["compile"] else "eager"
    threads = f", {first['cpu_threads']} threads" if first["device"] == "cpu" else ""
    return f"{first['amp_dtype'] or 'float32'}, {mode}, {first['device_name']}{threads}"
