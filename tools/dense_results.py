"""Records what runs of mmdetection and mmsegmentation reached: ``dense_results.py WORK_DIR... --results FILE.json``.

Reads the folders that training and testing with their tools have written, and is to be called on the machine of the
runs, which it describes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vssm.engine.records import environment, print_table, write_results

_MAIN = {"coco/bbox_mAP_50": "AP50", "coco/bbox_mAP": "AP", "mIoU": "mIoU", "aAcc": "accuracy"}


def read_run(folder: Path) -> dict[str, Any]:
    """The setting and the results of one run.

    Args:
        folder: Its ``work_dir``, in which each call of a tool has made a folder by its time.

    Raises:
        ValueError: If nothing was trained there, or no metrics were measured.
    """
    from mmengine.config import Config  # after vssm.openmmlab, which says what is missing

    logs = sorted(folder.glob("*/vis_data/scalars.json"))
    steps = [step for log in logs for step in _lines(log)]
    trained = [step for step in steps if "loss" in step]
    if not trained:
        raise ValueError(f"{folder}: expected a folder that a training of mmengine has written, got no losses in it")
    cfg = Config.fromfile(logs[0].with_name("config.py"))
    tested = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json")) if path.stem == path.parent.name]
    metrics = [_metrics(each) for each in [*(step for step in steps if "loss" not in step), *tested]]
    if not any(metrics):
        raise ValueError(f"{folder}: expected metrics of a validation or a test, got none; run the test first")
    return {
        "config": next(folder.glob("*.py")).stem,
        "model": cfg.model.backbone.model_name,
        "seed": cfg.randomness.seed,
        "iterations": max(step["iter"] for step in trained),
        "batch_size": cfg.train_dataloader.batch_size,
        "mixed_precision": cfg.optim_wrapper.type == "AmpOptimWrapper",
        "loss": trained[-1]["loss"],
        "peak_memory_mib": max((step.get("memory", 0) for step in trained), default=0) or None,
        **[each for each in metrics if each][-1],
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name not in ("data_time", "time", "step")}


def main() -> None:
    """Writes the records and prints a table of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="WORK_DIR", help="of runs")
    parser.add_argument("--results", required=True, type=Path, metavar="FILE", help=".json or .csv to write")
    args = parser.parse_args()
    import vssm.openmmlab  # noqa: F401  what it lacks it says

    try:
        records = [read_run(folder) for folder in args.folders]
        write_results(args.results, [{**record, **environment()} for record in records])
    except ValueError as error:
        sys.exit(str(error))
    shown = [{**record, **{short: record.get(name) for name, short in _MAIN.items()}} for record in records]
    print_table(shown, ["config", "seed", "iterations", "loss", *_MAIN.values()])


if __name__ == "__main__":
    main()
