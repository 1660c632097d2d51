"""Counts of ``vssm info`` against formulas written out here."""

import json

import pytest
import torch
from torch import nn

from vssm.cli import main
from vssm.engine.info import Counts, count_parts, describe


def vim_counts(*, height: int, width: int, batch: int = 1) -> Counts:
    """Vim-Ti by hand: 24 blocks of width 192, two directions, one class token, patches of 16 pixels."""
    depth, c, d, n, r, taps, k, classes = 24, 192, 384, 16, 12, 4, 2, 1000
    patches = (height // 16) * (width // 16)
    tokens = patches + 1
    patch_weights = 3 * 16 * 16 * c
    block_params = (
        c  # norm
        + c * 2 * d  # in_proj
        + k * (d * taps + d)  # convolutions
        + k * d * (r + 2 * n)  # x_proj
        + k * (r * d + d)  # dt_proj
        + k * (d * n + d)  # A_log, D
        + d * c  # out_proj
    )
    block_macs_per_token = c * 2 * d + k * d * (r + 2 * n) + k * r * d + d * c
    return Counts(
        params=patch_weights + c + c + tokens * c + depth * block_params + c + c * classes + classes,
        matmul_macs=batch * (depth * tokens * block_macs_per_token + c * classes),
        conv_macs=batch * (patches * patch_weights + depth * k * tokens * d * taps),
        scan_ops=batch * depth * 9 * k * d * tokens * n,
    )


@pytest.mark.parametrize(
    ("size", "batch"), [(None, 1), ((160, 256), 1), (None, 3)], ids=["default", "other size", "batch"]
)
def test_vim_tiny_equals_the_hand_formula(size, batch):
    record = describe("vim_tiny_patch16_224", img_size=size, batch_size=batch)
    height, width = size or (224, 224)
    expected = vim_counts(height=height, width=width, batch=batch)
    assert Counts(*(record[name] for name in Counts._fields)) == expected
    macs = expected.matmul_macs + expected.conv_macs
    assert record["gmacs"] == macs / 1e9
    assert record["scan_gops"] == expected.scan_ops / 1e9
    assert record["total_gflops"] == (macs + expected.scan_ops) / 1e9


def test_parameters_are_those_of_the_official_model():
    assert describe("vim_tiny_patch16_224")["params"] == 7_148_008


def test_parts_add_up():
    record = describe("vim_tiny_patch16_224")
    parts = {part["part"]: part for part in record["parts"]}
    assert list(parts) == ["stem", "blocks", "norm", "head", "(other)"]
    for name in Counts._fields:
        assert sum(part[name] for part in parts.values()) == record[name]
    assert parts["stem"]["conv_macs"] == 196 * 768 * 192
    assert parts["head"] == {"part": "head", "params": 193_000, "matmul_macs": 192_000, "conv_macs": 0, "scan_ops": 0}
    assert parts["(other)"]["params"] == 192 + 197 * 192


def test_stages_are_counted_one_by_one():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList([nn.Conv2d(3, 4, 3, groups=1), nn.ModuleList([nn.Linear(4, 5)])])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stages[0](x).mean((2, 3))
            return self.stages[1][0](x) @ torch.ones(5, 7)

    assert count_parts(Model(), torch.ones(2, 3, 5, 5)) == {
        "stages.0": Counts(params=3 * 4 * 9 + 4, conv_macs=2 * 9 * 3 * 4 * 9),
        "stages.1": Counts(params=25, matmul_macs=2 * 4 * 5),
        "(other)": Counts(matmul_macs=2 * 5 * 7),
    }


def test_published_figures_stand_beside_the_default_input_only():
    assert describe("vim_tiny_patch16_224")["published_gflops"] == 1.5
    assert describe("vim_small_patch16_224.in1k")["published_gflops"] == 5.1
    assert describe("vim_tiny_patch16_224", img_size=(448, 448))["published_gflops"] is None
    assert describe("test_vim")["published_params_m"] is None


def test_a_peer_of_timm_is_counted():
    assert describe("resnet18")["params"] == 11_689_512
    assert describe("resnet18")["gmacs"] == pytest.approx(1.814, abs=1e-3)


def test_command_prints_counts_and_writes_the_record(capsys, tmp_path):
    target = tmp_path / "info.json"
    assert main(["info", "vim_tiny_patch16_224", "--results", str(target)]) == 0
    output = capsys.readouterr().out
    total = next(line for line in output.splitlines() if line.startswith("total"))
    assert total.split() == ["total", "7148008", "1249291776", "43425792", "522878976"]
    assert "published FLOPs: 1.5 G" in output
    [record] = json.loads(target.read_text())
    assert (record["params"], record["scan_ops"], record["img_size"]) == (7_148_008, 522_878_976, [224, 224])
    assert record["torch"]


def test_command_shows_a_dash_where_nothing_is_published(capsys):
    assert main(["info", "test_vim", "--img-size", "64x96"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("test_vim, 1 x 64x96\n")
    assert "(published: -)" in output


def test_impossible_sizes_are_one_line(capsys):
    assert main(["info", "test_vim", "--img-size", "224x"]) == 2
    assert main(["info", "test_vim", "--img-size", "8"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "expected a size in pixels such as 224 or 160x256" in lines[0]
