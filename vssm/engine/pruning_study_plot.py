"""The picture of a study of token reduction."""

import os
from collections.abc import Sequence
from typing import Any

from vssm.engine.plot import COLOURS, new_figure, save_figure
from vssm.pruning import ALIGNMENTS

_APART = 0.008  # of the operations of the dense model: points of the same schedule stand so far from each other


def draw_study(path: str | os.PathLike, records: Sequence[dict[str, Any]]) -> None:
    """Draws accuracy against the share of operations, a panel for each policy and a colour for each alignment.

    Open markers and broken lines are models as they are, filled ones those trained further; bars are the 95 % intervals
    of their differences to the dense models as they are, whose accuracy is the grey line.

    Args:
        path: Target, ending in .png, .svg or .pdf.
        records: Of `vssm.engine.pruning_study.records_of`.

    Raises:
        ValueError: matplotlib is missing, or the format is unknown.
    """
    dense, *others = records
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
        _draw_policy(axes, [record for record in others if record["policy"] == policy], dense)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("operations over those of the dense model", fontsize="medium")
    figure.supylabel("held-out top-1 (%)", fontsize="medium")
    drawn = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: handle for pair in drawn for handle, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    save_figure(figure, path)


def _after(epochs: int) -> str:
    return f", {epochs} more epoch{'s' if epochs > 1 else ''}" if epochs else ""


def _draw_dense(axes: Any, record: dict[str, Any]) -> None:
    style: dict[str, Any] = {"marker": "*", "markersize": 11, "linestyle": "", "color": "black"}
    face = "black" if record["epochs"] else "white"
    axes.plot(1.0, record["top1"], markerfacecolor=face, label=f"all tokens{_after(record['epochs'])}", **style)


def _draw_policy(axes: Any, records: Sequence[dict[str, Any]], dense: dict[str, Any]) -> None:
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    ordered = sorted(records, key=lambda each: (ALIGNMENTS.index(each["align"]), each["epochs"], each["over_dense"]))
    for record in ordered:
        lines.setdefault((record["align"], record["epochs"]), []).append(record)
    for (align, trained), points in lines.items():
        index = ALIGNMENTS.index(align)
        colour, label = COLOURS[index], align + _after(trained)
        shift = _APART * (index - (len(ALIGNMENTS) - 1) / 2)
        middle = [record["top1"] for record in points]
        ends = [[dense["top1"] + record[f"difference_{end}"] for record in points] for end in ("low", "high")]
        spread = [[y - low for y, low in zip(middle, ends[0], strict=True)]]
        spread += [[high - y for y, high in zip(middle, ends[1], strict=True)]]
        axes.errorbar(
            [record["over_dense"] + shift for record in points],
            middle,
            yerr=spread,
            label=label,
            color=colour,
            marker="o",
            markersize=5,
            markerfacecolor=colour if trained else "white",
            linestyle="-" if trained else "--",
            linewidth=1.4,
            elinewidth=0.8,
        )
