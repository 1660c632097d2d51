"""``vssm doctor``: what it finds here, and that it finds a wrong scan, a missing package and a bad cache folder."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from vssm.cli import main
from vssm.engine import doctor
from vssm_kernels import scan_torch
from vssm_kernels.backend import backends_on

ROOT = Path(__file__).parents[1]
TORCH = version("torch")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VSSM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def torch_alone(monkeypatch):
    """One device and one backend, for tests of something else than the scan."""
    monkeypatch.setattr(doctor, "_devices", lambda: [torch.device("cpu")])
    monkeypatch.setattr("vssm.engine.self_test.backends_on", lambda device_type: ("torch",))


def examined(capsys, *, status: int = 0) -> dict:
    assert main(["doctor", "--json"]) == status
    return json.loads(capsys.readouterr().out)


def printed(capsys, *, status: int = 0) -> str:
    assert main(["doctor"]) == status
    return capsys.readouterr().out


def test_every_backend_of_every_device_passes_here(capsys):
    record = examined(capsys)
    assert record["passed"] is True
    assert record["environment"]["torch"] == TORCH
    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    assert [device["device"] for device in record["devices"]] == here
    tested = [(test["device"], test["backend"]) for test in record["self_tests"]]
    assert tested == [(device, backend) for device in here for backend in backends_on(device.partition(":")[0])]
    assert {(device["device"], device["auto"]) for device in record["devices"]} <= set(tested)
    assert all(test["passed"] and 0 < test["largest_error"] < 1e-5 for test in record["self_tests"])


def test_tables_say_what_the_record_does(capsys, torch_alone):
    text = printed(capsys)
    assert re.search(rf"^torch +{re.escape(TORCH)}$", text, re.MULTILINE)
    assert re.search(r"^cpu +torch +passed +\S+e-0\d +\w+ +\S+$", text, re.MULTILINE)
    assert "cache, writable\nlaunch table  none; on a GPU, vssm tune makes one\n" in text
    assert "FAILED" not in text


def _scaled(monkeypatch, name: str, change) -> None:
    right = getattr(scan_torch, name)
    monkeypatch.setattr(scan_torch, name, lambda *arguments: change(right(*arguments)))


def test_a_wrong_result_is_reported(capsys, monkeypatch, torch_alone):
    _scaled(monkeypatch, "forward", lambda outputs: (outputs[0] * 1.001, outputs[1]))
    text = printed(capsys, status=1)
    assert re.search(r"^cpu +torch +FAILED +0\.001 +y ", text, re.MULTILINE)
    assert "\ntorch on cpu does not compute the scan: y is off by 1.0e-03\n" in text


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias", "z"])
def test_a_wrong_gradient_is_reported(capsys, monkeypatch, torch_alone, name):
    _scaled(monkeypatch, "backward", lambda gradients: gradients | {name: gradients[name] * 1.0001})
    (test,) = examined(capsys, status=1)["self_tests"]
    assert (test["passed"], test["of"]) == (False, f"d{name}")


def test_a_result_that_is_not_finite_fails(capsys, monkeypatch, torch_alone):
    _scaled(monkeypatch, "forward", lambda outputs: (outputs[0] * float("nan"), outputs[1]))
    assert "does not compute the scan: y is off by inf" in printed(capsys, status=1)


def test_a_backend_that_does_not_run_is_reported_in_one_line(capsys, monkeypatch, torch_alone):
    def refuse(outputs):
        raise RuntimeError("ptxas: no such\n   architecture")

    _scaled(monkeypatch, "forward", refuse)
    text = printed(capsys, status=1)
    assert "torch on cpu does not compute the scan: RuntimeError: ptxas: no such architecture\n" in text


def test_what_an_extra_lacks_is_named_with_the_command_that_gets_it(capsys, monkeypatch, torch_alone):
    lines = [
        "torch>=999",
        "numpy",
        'elsewhere; platform_system == "Nowhere"',
        'absent-package>=2; extra == "cpu"',
        'pillow; extra == "plot"',
        'vssm[cpu,plot]; extra == "demo"',
        'future; extra == "mm" and python_version < "3"',
    ]
    monkeypatch.setattr(doctor, "requires", lambda name: lines)
    monkeypatch.setattr(doctor, "metadata", lambda name: _Extras())
    extras = {each["extra"]: (each["missing"], each["get"]) for each in examined(capsys)["extras"]}
    assert extras == {
        "(required)": ([f"torch>=999 (here: {TORCH})"], "pip install 'vssm'"),
        "cpu": (["absent-package>=2"], "pip install 'vssm[cpu]'"),
        "plot": ([], None),
        "demo": (["absent-package>=2"], "pip install 'vssm[demo]'"),
        "mm": ([], None),
    }
    assert re.search(
        r"^cpu .* incomplete +absent-package>=2 +pip install 'vssm\[cpu\]'$", printed(capsys), re.MULTILINE
    )


class _Extras:
    def get_all(self, key: str) -> list[str]:
        return ["cpu", "plot", "demo", "mm"]


def test_every_extra_says_what_it_is_for():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", section, re.MULTILINE)
    assert {"cpu", "mm", "dev"} <= set(extras)
    assert set(extras) <= set(doctor.PURPOSES)


def test_tuned_launch_sizes_are_counted(capsys, cache, torch_alone):
    cache.mkdir()
    table = cache / "launch_table.json"
    table.write_text('{"NVIDIA H100": {"a": {}, "b": {}}}')
    assert examined(capsys)["cache"]["launch_sizes"] == {"NVIDIA H100": 2}
    assert "\nlaunch table  2 sizes for NVIDIA H100\n" in printed(capsys)
    table.write_text("[3]")
    assert "launch_table.json: expected a JSON table of launch sizes" in printed(capsys)


def test_a_cache_folder_that_takes_no_files_is_reported(capsys, cache, torch_alone):
    cache.write_text("a file where the folder should be")
    text = printed(capsys)
    assert f"cache folder  {cache}, NOT writable ({cache}: Not a directory)\n" in text
    assert cache.read_text() == "a file where the folder should be"


def test_looking_at_the_cache_folder_leaves_nothing_behind(capsys, cache, torch_alone):
    assert examined(capsys)["cache"]["not_writable"] is None
    assert not cache.exists()


def test_a_driver_without_a_gpu_in_sight_and_another_backend_are_told(capsys, monkeypatch, torch_alone):
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: "580.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("VSSM_SCAN_BACKEND", "no-such")
    text = printed(capsys)
    assert "there is a driver of NVIDIA's, but torch sees no GPU: this torch is built without CUDA\n" in text
    assert "VSSM_SCAN_BACKEND=no-such asks for another scan than auto\n" in text
