"""Results as records: where they were measured, writing them to a file, showing them as a table."""

import csv
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vssm.files import atomic_path

_PACKAGES = ("vssm", "torch", "torchvision", "timm", "triton")


def environment(device: str | torch.device | None = None) -> dict[str, str | int | None]:
    """Describes where a result was obtained.

    Args:
        device: Device that computed it; the first CUDA device if there is one, else the CPU, when not given.

    Returns:
        Versions of python, vssm, torch, torchvision, timm and triton (``None`` where a package is not installed), the
        git commit of the checkout (``None`` outside of one, with ``-dirty`` when files differ from it), the name of the
        device, the number of CPU threads and the date in UTC.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "device": place.type,
        "device_name": torch.cuda.get_device_name(place) if place.type == "cuda" else _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_results(path: str | os.PathLike, records: Sequence[dict]) -> None:
    """Writes records to a .json file (a list of objects) or a .csv file (one row per record), whole or not at all.

    Numbers that are not finite become null, which JSON can express. In CSV, the columns are all keys in the order of
    their first appearance, and lists and mappings are written as JSON.

    Args:
        path: Target, ending in .json or .csv.
        records: One mapping per result.

    Raises:
        ValueError: ``path`` ends in something else.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".csv"):
        raise ValueError(f"write_results: expected a file name ending in .json or .csv, got {str(path)!r}")
    rows = [_plain(record) for record in records]
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        if suffix == ".json":
            json.dump(rows, file, indent=2)
            file.write("\n")
        else:
            _write_csv(file, rows)


def read_results(path: str | os.PathLike) -> list[dict]:
    """Reads the records that :func:`write_results` has written; of a .csv file, all values are text.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else.
    """
    with open(path, encoding="utf-8", newline="") as file:
        try:
            records = (
                json.load(file) if Path(path).suffix.lower() == ".json" else list(csv.DictReader(file, strict=True))
            )
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}: not a file of results ({error})") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: not a file of results (expected a list of records)")
    return records


def format_table(records: Sequence[dict], columns: Sequence[str]) -> str:
    """Lays records out as aligned plain text: a header, then one line per record, numbers to the right.

    Args:
        records: One mapping per line; a missing or ``None`` value shows as ``-``.
        columns: Keys to show, in order.

    Returns:
        The table without a final line break.
    """
    cells = [[_cell(record.get(column)) for column in columns] for record in records]
    widths = [max(len(text) for text in texts) for texts in zip(columns, *cells, strict=True)]
    numeric = [any(_is_number(record.get(column)) for record in records) for column in columns]

    def line(texts: Sequence[str]) -> str:
        aligned = zip(texts, widths, numeric, strict=True)
        return "  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in aligned).rstrip()

    return "\n".join([line(columns), *(line(row) for row in cells)])


def print_table(records: Sequence[dict], columns: Sequence[str]) -> None:
    """Writes :func:`format_table` to standard output."""
    sys.stdout.write(format_table(records, columns) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or a folder that it refuses to read
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _plain(value: object) -> object:
    """The value in terms of JSON."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)  # paths, dtypes, devices


def _write_csv(file, rows: list) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    for row in rows:
        writer.writerow({key: json.dumps(item) if isinstance(item, dict | list) else item for key, item in row.items()})


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
