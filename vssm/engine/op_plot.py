"""The picture of a benchmark of the scan: time against length, beside the limit."""

import os
from collections.abc import Sequence

from vssm.engine.plot import line_plot

_OURS = "directional_scan"
_LIMIT = "limit"
_SIZES = ("k", "d", "n")


def plot_op(path: str | os.PathLike, records: Sequence[dict]) -> None:
    """Draws time of forward with backward against length: a line per subject and size, a dashed one for the limit.

    The limit is that of ``directional_scan``, which moves the fewest bytes: the larger of memory and special functions
    in either pass.

    Args:
        path: Target, ending in .png, .svg or .pdf.
        records: Of `benchmark_op`.
    """
    told_apart = [key for key in _SIZES if len({record[key] for record in records}) > 1]
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        sizes = "".join(f", {key} = {record[key]}" for key in told_apart)
        points.setdefault(record["op"] + sizes, []).append((record["l"], record["forward_backward_ms"]))
        if record["op"] == _OURS:
            points.setdefault(_LIMIT + sizes, []).append((record["l"], _limit(record)))
    limits = [label for label in points if label.startswith(_LIMIT)]
    series = {
        label: tuple(zip(*sorted(points[label]), strict=True))
        for label in [*(label for label in points if label not in limits), *limits]
    }
    line_plot(
        path,
        {label: (x, y) for label, (x, y) in series.items()},
        xlabel="tokens",
        ylabel="milliseconds",
        title=_title(records),
        logx=True,
        logy=True,
        dashed=limits,
    )


def _limit(record: dict) -> float:
    exps = record["exp_floor_ms"] or 0.0
    return sum(max(record[f"{phase}_floor_ms"], exps) for phase in ("forward", "backward"))


def _title(records: Sequence[dict]) -> str:
    shared = [f"{key} = {records[0][key]}" for key in _SIZES if len({record[key] for record in records}) == 1]
    return ", ".join(["Scan, forward and backward", records[0]["dtype"], *shared])
