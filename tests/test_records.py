"""Records in files and tables, and the line plots drawn from them."""

import csv
import errno
import json
import os

import pytest
import torch

from vssm.engine.plot import line_plot
from vssm.engine.records import environment, format_table, print_table, write_results
from vssm.files import atomic_path

RECORDS = [
    {"model": "a", "top1": 76.1, "img_size": (160, 256), "dtype": torch.float32},
    {"model": "b", "loss": float("nan"), "top1": None},
]


def test_json_holds_every_record_and_no_nan(tmp_path):
    write_results(tmp_path / "new" / "r.json", RECORDS)
    text = (tmp_path / "new" / "r.json").read_text()
    assert json.loads(text) == [
        {"model": "a", "top1": 76.1, "img_size": [160, 256], "dtype": "torch.float32"},
        {"model": "b", "loss": None, "top1": None},
    ]
    assert "NaN" not in text


def test_csv_has_all_columns(tmp_path):
    write_results(tmp_path / "r.csv", RECORDS)
    with open(tmp_path / "r.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["model", "top1", "img_size", "dtype", "loss"]
    assert rows[0]["img_size"] == "[160, 256]"
    assert [row["top1"] for row in rows] == ["76.1", ""]


def test_other_formats_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"expected a file name ending in \.json or \.csv, got '.*r\.txt'"):
        write_results(tmp_path / "r.txt", RECORDS)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "r.json"
    target.write_text("old")

    def disk_full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("vssm.engine.records.json.dump", disk_full)
    with pytest.raises(OSError, match="disk full"):
        write_results(target, RECORDS)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_table_is_aligned(capsys):
    records = [{"model": "vim", "ms": 1.23456, "l": 3136}, {"model": "longer", "ms": 12345.6}]
    expected = "model      ms     l\nvim     1.235  3136\nlonger  12346     -"
    assert format_table(records, ["model", "ms", "l"]) == expected
    print_table(records, ["model", "ms", "l"])
    assert capsys.readouterr().out == expected + "\n"


def test_table_without_records_is_its_header():
    assert format_table([], ["model", "ms"]) == "model  ms"


def test_environment_names_versions_and_device():
    found = environment("cpu")
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["device"] == "cpu"
    assert found["device_name"]
    assert found["cpu_threads"] == torch.get_num_threads()
    assert {"python", "vssm", "timm", "triton", "git_commit", "date"} <= set(found)


def test_line_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    series = {"loss": ([1, 2, 3], [3.0, 2.0, 1.5]), "other": ([1, 2], [1.0, 2.0])}
    line_plot(tmp_path / "p.png", series, xlabel="epoch", ylabel="loss", title="Training", logy=True)
    line_plot(tmp_path / "p.svg", series, xlabel="epoch", ylabel="loss", title="Training")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_line_plot_refuses_what_it_cannot_draw(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"as many y as x values for 'loss', got 1 and 2"):
        line_plot(tmp_path / "p.png", {"loss": ([1, 2], [3.0])}, xlabel="", ylabel="", title="")
    with pytest.raises(ValueError, match=r"ending in \.png, \.svg, \.pdf, got"):
        line_plot(tmp_path / "p.txt", {}, xlabel="", ylabel="", title="")
    assert list(tmp_path.iterdir()) == []


def test_line_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'pip install "vssm\[plot\]"'):
        line_plot(tmp_path / "p.png", {}, xlabel="", ylabel="", title="")


def test_a_full_disk_names_the_file_that_was_to_be_written(tmp_path):
    target = tmp_path / "out.json"
    with pytest.raises(OSError, match="No space left") as caught, atomic_path(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(target)
    assert not list(tmp_path.iterdir())
