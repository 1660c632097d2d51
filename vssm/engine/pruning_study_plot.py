"""The picture of a study of token reduction."""

import os
from collections.abc import Sequence
from typing import Any

from vssm.engine.plot import COLOURS, new_figure, save_figure
from vssm.pruning import ALIGNMENTS

_APART = 0.008  # of the operations of the dense model: points of the same schedule stand so far from each other
_ENDS = ("_low", "_high")


def draw_study(path: str | os.PathLike, records: Sequence[dict[str, Any]]) -> None:
    """Draws accuracy against the share of operations, a panel for each policy and a colour for each way to align.

    Open markers and broken lines are models as they are, filled ones those trained further; bars are the 95 % intervals
    of their differences to the dense models as they are, whose accuracy is the grey line.

    Args:
        path: Target, ending in .png, .svg or .pdf.
        records: Of `vssm.engine.pruning_study.records_of`.

    Raises:
        ValueError: matplotlib is missing, or the format is unknown.
    """
    dense, *others = records
    ways = sorted({_way(record) for record in others if record["policy"] is not None})
    policies = list(dict.fromkeys(record["policy"] for record in others if record["policy"] is not None))
    figure = new_figure(width=1.4 + 2.9 * len(policies), height=4.2)
    first = None
    for place, policy in enumerate(policies, start=1):
        axes = figure.add_subplot(1, len(policies), place, title=policy, sharey=first)
        first = first or axes
        axes.tick_params(labelleft=place == 1)
        axes.axhline(dense["top1"], color="#777777", linewidth=0.8)
        for record in records:
            if record["policy"] is None:
                _draw_dense(axes, record)
        _draw_policy(axes, [record for record in others if record["policy"] == policy], ways)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("operations over those of the dense model", fontsize="medium")
    figure.supylabel("held-out top-1 (%)", fontsize="medium")
    drawn = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: handle for pair in drawn for handle, label in zip(*pair, strict=True)}
    epochs = max(record["epochs"] for record in records)
    title = f"open: as they are\nfilled: trained {epochs} epoch{'s' * (epochs > 1)} further" if epochs else None
    figure.legend(handles.values(), handles.keys(), title=title, loc="outside right upper", frameon=False)
    save_figure(figure, path)


def _draw_dense(axes: Any, record: dict[str, Any]) -> None:
    style: dict[str, Any] = {"marker": "*", "markersize": 11, "linestyle": "", "color": "black"}
    face = "black" if record["epochs"] else "white"
    axes.plot(1.0, record["top1"], markerfacecolor=face, label="all tokens", **style)


def _way(record: dict[str, Any]) -> tuple[int, str]:
    """Place of a record's alignment, and what to call it with its convolutions."""
    return ALIGNMENTS.index(record["align"]), ", ".join(filter(None, (record["align"], record["conv"])))


def _draw_policy(axes: Any, records: Sequence[dict[str, Any]], ways: Sequence[tuple[int, str]]) -> None:
    lines: dict[tuple[tuple[int, str], int], list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda each: (_way(each), each["epochs"], each["over_dense"])):
        lines.setdefault((_way(record), record["epochs"]), []).append(record)
    for (way, epochs), points in lines.items():
        index = ways.index(way)
        middle = [record["top1"] for record in points]
        spread = [[abs(record[f"difference{end}"] - record["difference"]) for record in points] for end in _ENDS]
        axes.errorbar(
            [record["over_dense"] + _APART * (index - (len(ways) - 1) / 2) for record in points],
            middle,
            yerr=spread,
            label=way[1],
            color=COLOURS[index],
            marker="o",
            markersize=5,
            markerfacecolor=COLOURS[index] if epochs else "white",
            linestyle="-" if epochs else "--",
            linewidth=1.4,
            elinewidth=0.8,
        )
