"""What people install: the wheel's content, imports from anywhere and with little around, the console script."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from importlib.metadata import version
from pathlib import Path

import pytest

import vssm
from vssm.cli import main

ROOT = Path(__file__).parents[1]
SCRIPT = Path(sys.executable).with_name("vssm")


def run(*command, cwd, **environment):
    """Output of a command run in a foreign folder."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of this checkout's sources, so that building leaves nothing behind in the checkout."""
    source = tmp_path_factory.mktemp("source")
    clutter = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "golden")
    shutil.copytree(ROOT, source, ignore=clutter, dirs_exist_ok=True)
    return source


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    """The wheel of the sources."""
    target = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", target, sources, cwd=target)
    (path,) = target.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_the_two_packages_only(wheel):
    folders = {name.split("/")[0] for name in wheel.namelist()}
    assert folders == {"vssm", "vssm_kernels", f"vssm-{version('vssm')}.dist-info"}


def test_wheel_holds_every_module_and_the_markers_of_types(wheel):
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vssm").rglob("*.py")}
    kernels = ROOT / "kernels"
    sources |= {path.relative_to(kernels).as_posix() for path in (kernels / "vssm_kernels").rglob("*.py")}
    packed = set(wheel.namelist())
    assert sources <= packed
    data = {"vssm/py.typed", "vssm_kernels/py.typed", "vssm_kernels/launch_table.json"}
    assert data <= packed
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in packed)
    assert all(name.endswith(".py") or name in data for name in packed if ".dist-info/" not in name)


def test_source_archive_holds_what_is_no_module_too(sources, tmp_path):
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=sources)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"vssm/py.typed", "kernels/vssm_kernels/py.typed", "kernels/vssm_kernels/launch_table.json"} <= packed


def test_wheel_names_licence_python_and_script(wheel):
    info = f"vssm-{version('vssm')}.dist-info"
    metadata = HeaderParser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"plot", "demo", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert "vssm = vssm.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_version_is_said_once_and_everywhere_the_same(capsys):
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert version("vssm") == declared, "installed metadata is older than pyproject.toml: pip install -e . again"
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vssm {declared}\n"
    assert vssm.__version__ == declared
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == declared
    newest = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == declared


def test_script_and_module_work_from_a_foreign_folder_without_gpu(tmp_path):
    by_script = run(SCRIPT, "list", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    by_module = run(sys.executable, "-m", "vssm.cli", "list", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert "vim_tiny_patch16_224" in by_script
    assert by_script == by_module


def test_import_is_quick_and_leaves_optional_packages_alone(tmp_path):
    """Importing vssm takes less than a second beyond timm, in processor time, which other processes hardly change."""
    code = """
import sys, time, timm

before, start = set(sys.modules), time.process_time()
import vssm

print(time.process_time() - start, *sorted(set(sys.modules) - before))
"""
    for _ in range(3):
        seconds, *modules = run(sys.executable, "-c", code, cwd=tmp_path).split()
        if float(seconds) < 1:
            break
    assert float(seconds) < 1
    packages = {name.split(".")[0] for name in modules}
    assert "vssm" in packages
    assert not packages & {"triton", "matplotlib", "sklearn", "scipy", "pandas", "mmengine", "mmcv", "torchvision"}


def test_classifies_without_triton_mmengine_and_matplotlib(tmp_path):
    code = """
import sys

for missing in ("triton", "mmengine", "mmcv", "matplotlib", "sklearn"):
    sys.modules[missing] = None  # importing it raises ImportError

import timm
import torch
import vssm  # registers the models

model = timm.create_model("test_vim", num_classes=7).eval()
logits = model(torch.zeros(1, *model.default_cfg["input_size"]))
print(tuple(logits.shape), bool(logits.isfinite().all()))
"""
    assert run(sys.executable, "-c", code, cwd=tmp_path, CUDA_VISIBLE_DEVICES="") == "(1, 7) True\n"
