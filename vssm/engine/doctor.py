"""What is installed, what computes a scan here and whether it computes it right, and what is missing."""

import os
import shutil
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from vssm.engine.records import environment
from vssm.engine.self_test import self_tests
from vssm.engine.tune import read_table
from vssm_kernels import use_backend
from vssm_kernels.backend import backend_name
from vssm_kernels.cache import cache_folder
from vssm_kernels.launch_table import user_table_path

BACKEND_VARIABLE = "VSSM_SCAN_BACKEND"
REQUIRED = "(required)"  # in place of an extra's name
PURPOSES = {
    REQUIRED: "vssm itself",
    "cpu": "the scan compiled for the CPU",
    "plot": "curves and plots as pictures",
    "demo": "the embedded digits: vssm demo, training without data",
    "export": "programs for other runtimes",
    "video": "frames of videos",
    "mm": "mmdetection and mmsegmentation",
    "docs": "the documentation as a site",
    "dev": "tests and checks",
}


def examine() -> dict[str, Any]:
    """Looks at the installation and the machine, and tests the scan on every device.

    Returns:
        ``environment`` (versions, CUDA runtime and driver), ``devices`` with the backend that ``auto`` takes on each,
        ``scan_backend_variable`` (what ``VSSM_SCAN_BACKEND`` asks for instead, if it does), ``self_tests``, ``extras``
        with what each lacks, ``cache``; and ``passed``, whether every self-test did.
    """
    devices = _devices()
    tests = self_tests(devices)
    return {
        "environment": _versions(),
        "devices": [_describe(device) for device in devices],
        "scan_backend_variable": os.environ.get(BACKEND_VARIABLE) or None,
        "self_tests": tests,
        "extras": [_extra(name) for name in (REQUIRED, *(metadata("vssm").get_all("Provides-Extra") or ()))],
        "cache": _cache(),
        "passed": all(test["passed"] for test in tests),
    }


def _versions() -> dict[str, Any]:
    """Where this is, as in every record, with numba and what belongs to GPUs."""
    known = environment("cpu")
    return {
        **{name: known[name] for name in ("python", "vssm", "torch", "torchvision", "timm", "triton")},
        "numba": _installed("numba"),
        "cuda_runtime": torch.version.cuda,
        "hip_runtime": torch.version.hip,
        "nvidia_driver": _nvidia_driver(),
        "git_commit": known["git_commit"],
    }


def _devices() -> list[torch.device]:
    """Every device here that scans run on."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    mps = [torch.device("mps")] if torch.backends.mps.is_available() else []
    return [torch.device("cpu"), *gpus, *mps]


def _describe(device: torch.device) -> dict[str, Any]:
    with use_backend("auto"):  # whatever the environment asks for
        automatic = backend_name(device.type)
    record = {"device": str(device), "name": None, "capability": None, "memory_gib": None, "auto": automatic}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        capability = f"{found.major}.{found.minor}"
        return record | {"name": found.name, "capability": capability, "memory_gib": found.total_memory / 2**30}
    return record | {"name": environment("cpu")["device_name"]}


def _nvidia_driver() -> str | None:
    """Version of the driver, which may be there although torch sees no GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # it is installed, but there is no driver that answers
        return None
    return done.stdout.partition("\n")[0].strip() or None


def _extra(name: str) -> dict[str, Any]:
    """What an extra is for, what it lacks here, and the command that gets it; of `REQUIRED`, what vssm itself lacks."""
    missing = _missing("" if name == REQUIRED else name)
    wanted = "vssm" if name == REQUIRED else f"vssm[{name}]"
    return {
        "extra": name,
        "for": PURPOSES.get(name),
        "missing": missing,
        "get": f"pip install '{wanted}'" if missing else None,
    }


def _missing(extra: str) -> list[str]:
    """Requirements of an extra, and of the extras it takes in, that what is installed does not meet."""
    missing = []
    for line in requires("vssm") or ():
        needed = Requirement(line)
        applies = needed.marker is None or needed.marker.evaluate({"extra": extra})
        always = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if not applies or (extra and always):
            continue
        if needed.name == "vssm":
            missing += [each for inner in sorted(needed.extras) for each in _missing(inner)]
            continue
        found = _installed(needed.name)
        if found is None or not needed.specifier.contains(found, prereleases=True):
            missing.append(f"{needed.name}{needed.specifier}" + (f" (here: {found})" if found else ""))
    return missing


def _cache() -> dict[str, Any]:
    """Whether the cache folder takes files, and how many launch sizes were tuned for each GPU."""
    folder, path = cache_folder(), user_table_path()
    try:
        table = {device: len(rows) for device, rows in read_table(path).items()}
        problem = None
    except (OSError, ValueError) as error:
        table, problem = {}, str(error)
    return {
        "folder": str(folder),
        "not_writable": _why_not_writable(folder),
        "launch_table": str(path) if path.exists() else None,
        "launch_sizes": table,
        "launch_table_problem": problem,
    }


def _why_not_writable(folder: Path) -> str | None:
    """Why no file can be written to a folder, or to the nearest one that exists where it would be made; else None."""
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{place}: {error.strerror}"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
