"""Pictures of scan orders: what they show, and one clear line where none can be drawn."""

import sys

import numpy as np
import pytest
from PIL import Image

from vssm.cli import main
from vssm.engine.visualize import draw_scan_order

FIRST, LAST = (68, 1, 84), (187, 223, 39)  # ends of the colours along a path


def centre_of(pixels, colour):
    """Mean (x, y) of the pixels of one colour."""
    y, x = np.nonzero(np.abs(pixels.astype(int) - colour).max(-1) < 3)
    assert len(x) > 20, f"colour {colour} is not in the picture"
    return x.mean(), y.mean()


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_directions_run_from_first_to_last_token(tmp_path):
    """Two panels below each other: the upper path runs to the right, the lower one to the left."""
    record = draw_scan_order(tmp_path / "both.png", "bidirectional", 1, 6)
    pixels = read(tmp_path / "both.png")
    height = len(pixels)
    upper, lower = pixels[: int(0.4 * height)], pixels[int(0.4 * height) : int(0.78 * height)]
    assert centre_of(upper, FIRST)[0] + 200 < centre_of(upper, LAST)[0]
    assert centre_of(lower, LAST)[0] + 200 < centre_of(lower, FIRST)[0]
    assert record == {
        "picture": str(tmp_path / "both.png"),
        "order": "bidirectional",
        "window": None,
        "height": 1,
        "width": 6,
        "directions": 2,
    }


def test_rows_are_counted_downwards(tmp_path):
    draw_scan_order(tmp_path / "column.png", "column", 5, 1)
    panel = read(tmp_path / "column.png")
    panel = panel[: int(0.85 * len(panel))]  # without the colour bar
    assert centre_of(panel, FIRST)[1] + 200 < centre_of(panel, LAST)[1]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_command_writes_every_format(tmp_path, capsys, suffix):
    output = tmp_path / f"new_folder/out{suffix}"
    assert main(["visualize", "--order", "cross", "--grid", "7x7", str(output)]) == 0
    assert output.stat().st_size > 5000
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert capsys.readouterr().out == f"{output}: cross over 7x7 tokens, 4 direction(s)\n"


def test_window_changes_the_picture(tmp_path):
    for window in (2, 3):
        options = ["--order", "window", "--window", str(window), "--grid", "6x6"]
        assert main(["visualize", *options, str(tmp_path / f"{window}.png")]) == 0
    two, three = read(tmp_path / "2.png"), read(tmp_path / "3.png")
    assert two.shape != three.shape or (two != three).any()


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--grid", "7by7", "out.png"], 2, "expected rows x columns such as 7x7 or 4x10, got '7by7'"),
        (["--grid", "0x7", "out.png"], 2, "got '0x7'"),
        (["--order", "croos", "out.png"], 2, "'croos'"),
        (["--order", "window", "out.png"], 1, "order 'window' needs window"),
        (["--window", "3", "out.png"], 1, "window belongs to the order 'window'"),
        (["--grid", "65x2", "out.png"], 1, "at most 64x64 tokens, which a page can show, got 65x2"),
        (["out.bmp"], 2, "'out.bmp'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, status, expected):
    monkeypatch.chdir(tmp_path)
    assert main(["visualize", *arguments]) == status
    error = capsys.readouterr().err
    assert error.startswith("vssm visualize: ")
    assert error.count("\n") == 1
    assert expected in error
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["visualize", str(tmp_path / "out.png")]) == 1
    assert 'pip install "vssm[plot]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
