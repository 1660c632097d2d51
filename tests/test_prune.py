"""Schedules of token reduction, and the commands that read them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vssm
from image_folders import make_folder
from vssm.cli import main
from vssm.engine import classifier as classifiers
from vssm.engine.classifier import ModelSpec
from vssm.engine.info import describe
from vssm.engine.prune import grid_of
from vssm.pruning import Schedule, TokenReducer, read_schedule

CONFIGS = sorted((Path(__file__).parent.parent / "configs/pruning").glob("*.yaml"))
SPEC = ModelSpec(
    model="test_vim", model_kwargs={"embed_dim": 8, "depth": 3, "patch_size": 4, "d_state": 1}, img_size=(16, 16)
)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Random weights of a Vim of 4×4 patches."""
    classifier = classifiers.build(SPEC, classes=("dark", "light"))
    path = tmp_path / "weights.safetensors"
    classifiers.save(path, classifier, classifier.model.state_dict(), {})
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_published_schedule_suits_its_model(path):
    schedule = read_schedule(path)
    with torch.device("meta"):
        model = vssm.create_model(schedule.model).eval()
        images = torch.empty(1, 3, 224, 224)
    with schedule.reducer(model) as reducer:
        assert model(images).shape == (1, 1000)
    assert list(reducer.maps) == list(schedule.after)
    assert schedule.source


@pytest.mark.parametrize(
    ("name", "share", "tokens"),
    [
        ("top_vim_small", 0.70, [157, 125, 101]),
        ("top_plainmamba_l3", 0.584, [134, 92, 63, 43]),
        ("merge_vim_small", 0.70, list(range(186, 75, -11))),
    ],
)
def test_operations_fall_as_published(name, share, tokens):
    schedule = read_schedule(Path(__file__).parent.parent / f"configs/pruning/{name}.yaml")
    record = describe(schedule.model, prune=schedule)
    assert record["tokens_left"] == tokens
    assert record["pruned_over_dense"] == pytest.approx(share, abs=0.0005 if share == 0.584 else 0.005)
    assert record["pruned_over_dense"] == pytest.approx(record["pruned_gflops"] / record["total_gflops"])


def test_operations_of_reduced_blocks_by_hand():
    """Vim-Ti: linear layers and scans of blocks after a cut fall with the tokens, convolutions on the grid do not."""
    dense = describe("vim_tiny_patch16_224")
    schedule = Schedule("vim_tiny_patch16_224", after=(10,), keep=0.8)
    pruned = describe("vim_tiny_patch16_224", prune=schedule)["pruned_gflops"]
    block = 192 * 768 + 2 * 384 * (12 + 2 * 16) + 2 * 12 * 384 + 384 * 192 + 9 * 2 * 384 * 16
    assert dense["total_gflops"] - pruned == pytest.approx(14 * (197 - 157) * block / 1e9, rel=1e-12)
    idle = describe("vim_tiny_patch16_224", prune=schedule.with_options(align="idle"))["pruned_gflops"]
    step = 2 * 384 * (12 + 2 * 16)  # of one token that is gone
    assert idle - pruned == pytest.approx(14 * step / 1e9, rel=1e-9)


def test_schedule_gives_the_reducer_of_its_arguments(tmp_path):
    path = write(tmp_path / "s.yaml", "model: test_vim\nafter: [1, 3]\nkeep: [0.5, 0.8]\npolicy: mtr\nalign: hold\n")
    schedule = read_schedule(path)
    assert schedule == Schedule("test_vim", (1, 3), (0.5, 0.8), policy="mtr", align="hold")
    reducer = schedule.reducer(vssm.create_model("test_vim"))
    assert (reducer.after, reducer.keep, reducer.align, reducer.conv) == ((1, 3), (0.5, 0.8), "hold", "grid")
    assert read_schedule(write(path, "{model: test_vim, after: 2, remove: 3}")).after == (2,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: test_vim", "expected the keys model and after, and of keep, remove, policy, .*, got model"),
        ("[1]", "got list"),
        ("{model: test_vim, after: [1], kepe: 0.5}", "got model, after, kepe"),
        ("{model: test_vim, after: [1], keep: high}", "keep must be a share or a list of shares, got 'high'"),
        ("{model: test_vim, after: [one], keep: 0.5}", r"after must be a list of numbers of blocks, got \['one'\]"),
        ("{model: test_vim, after: [1], remove: true}", "remove must be a whole number, got True"),
        ("{model: [a], after: [1]}", r"model must be text, got \['a'\]"),
        ("{model: test_vim", "not a YAML file"),
    ],
)
def test_schedules_that_cannot_be_read(tmp_path, text, expected):
    path = write(tmp_path / "s.yaml", text)
    with pytest.raises(ValueError, match=f"s.yaml: .*{expected}"):
        read_schedule(path)


def test_grid_varies_what_is_given():
    base = Schedule("test_vim", (1,), remove=2, policy="utr", score="step_size", align="none", conv="compact")
    assert grid_of(base) == [base]
    varied = grid_of(base, keeps=(0.9, 0.5), policies=("utr", "merge"), aligns=("none", "decay"))
    assert [(each.policy, each.align, each.keep, each.remove) for each in varied[:5]] == [
        ("utr", "none", 0.9, None),
        ("utr", "none", 0.5, None),
        ("utr", "decay", 0.9, None),
        ("utr", "decay", 0.5, None),
        ("merge", "none", 0.9, None),
    ]
    assert [(each.score, each.conv) for each in varied[::2]] == [
        ("step_size", "compact"),
        ("step_size", None),
        (None, "compact"),
        (None, None),
    ]


def test_sweep_measures_what_the_reducer_does(tmp_path, checkpoint, capsys):
    data = make_folder(tmp_path / "data", train=1, val=3)
    results, plot = tmp_path / "out/r.json", tmp_path / "out/p.png"
    options = ["--after", "1", "2", "--keep", "1", "0.5", "--policy", "top", "merge", "--batch-size", "4"]
    arguments = [str(data), *options, "--checkpoint", str(checkpoint), "--results", str(results), "--plot", str(plot)]
    assert main(["prune", *arguments]) == 0
    records = json.loads(results.read_text())
    assert [(each["policy"], each.get("keep"), each.get("tokens_left")) for each in records] == [
        (None, None, None),
        ("top", 1.0, [17, 17]),
        ("top", 0.5, [9, 5]),
        ("merge", 1.0, [17, 17]),
        ("merge", 0.5, [9, 5]),
    ]
    assert len(capsys.readouterr().out.splitlines()) == 6
    dense = records[0]
    for record in records:
        assert (record["images"], record["model"], record["batch_size"]) == (6, "test_vim", 4)
        assert record["images_per_s"] > 0
        if record.get("keep") == 1:
            assert (record["loss"], record["over_dense"]) == (dense["loss"], 1)
    assert records[2]["over_dense"] == records[2]["gflops"] / dense["gflops"] < 0.75
    assert plot.stat().st_size > 5000

    classifier = classifiers.load(checkpoint)
    images = [Image.open(path) for path in sorted((data / "val").rglob("*.png"))]
    batch = torch.stack([classifier.config.transform()(image.convert("RGB")) for image in images])
    targets = torch.tensor([0, 0, 0, 1, 1, 1])
    with torch.no_grad(), TokenReducer(classifier.model, after=(1, 2), keep=0.5, policy="merge"):
        loss = torch.nn.functional.cross_entropy(classifier.model(batch), targets)
    assert records[4]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert records[4]["loss"] != dense["loss"]


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--keep", "0.5"], 2, "expected --schedule FILE.yaml, or --after and --keep"),
        (["--after", "1", "--keep", "1.5"], 2, "expected a number from 0.01 to 1, got 1.5"),
        (["--after", "3", "--keep", "0.5"], 1, "from 1 to 2, without the last of a stage (3), got 3"),
        (["--after", "1", "--keep", "0.5", "--policy", "tops"], 2, "'tops'"),
        (["--schedule", "none.yaml"], 1, "none.yaml: No such file"),
    ],
)
def test_sweeps_that_cannot_be_made(tmp_path, checkpoint, capsys, arguments, status, expected):
    assert main(["prune", *arguments, "--checkpoint", str(checkpoint)]) == status
    error = capsys.readouterr().err
    assert error.startswith("vssm prune: ")
    assert error.count("\n") == 1
    assert expected in error


def test_info_counts_on_fewer_tokens(tmp_path, capsys):
    path = write(tmp_path / "s.yaml", "{model: test_vim, after: [1], keep: 0.5}")
    assert main(["info", "--prune", str(path)]) == 0
    output = capsys.readouterr().out
    record = describe("test_vim", prune=read_schedule(path))
    assert output.startswith("test_vim, 1 x 96x96")
    assert f"tokens left   {record['tokens_left'][0]}\n" in output
    assert f"{record['pruned_over_dense']:.3f} of all" in output
    assert 0.4 < record["pruned_over_dense"] < 0.8
    assert main(["info"]) == 2
    assert "expected a model, or --prune FILE.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["top", "merge"])
def test_picture_shows_the_tokens_that_stay(tmp_path, checkpoint, capsys, policy):
    """Every patch of the image has a colour of its own, found again in the picture or not."""
    schedule = write(tmp_path / "s.yaml", f"{{model: test_vim, after: [2], keep: 0.5, policy: {policy}}}")
    number = np.arange(16).reshape(4, 4)
    colours = np.stack([40 + 12 * number, 30 + number**2 * 5 % 200, 30 + number**3 * 7 % 90], axis=-1)
    image = colours.astype(np.uint8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(image).save(tmp_path / "image.png")
    output = tmp_path / "kept.png"
    options = ["--prune", str(schedule), "--image", str(tmp_path / "image.png"), "--checkpoint", str(checkpoint)]
    assert main(["visualize", str(output), *options, "--crop-pct", "1"]) == 0
    assert capsys.readouterr().out == f"{output}: 8 of 16 after block 2\n"

    classifier = classifiers.load(checkpoint, options={"crop_pct": 1.0})
    pixels = classifier.config.transform()(Image.fromarray(image))
    with torch.no_grad(), read_schedule(schedule).reducer(classifier.model) as reducer:
        classifier.model(pixels[None])
    target = reducer.maps[2].target[0].tolist()
    patches = [token - (token > 8) for token in range(17) if token != 8 and target.count(token) == 1]
    drawn = np.asarray(Image.open(output).convert("RGB")).astype(int)
    right = drawn[:, drawn.shape[1] // 2 :]
    for patch in range(16):
        colour = image[patch // 4 * 4, patch % 4 * 4].astype(int)
        there = (np.abs(right - colour).max(-1) < 3).sum() > 100
        assert there == (patch in patches), f"patch {patch}"


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--prune", "s.yaml"], 2, "expected --prune FILE.yaml and --image FILE together"),
        (["--image", "image.png"], 2, "expected --prune FILE.yaml and --image FILE together"),
        (["--prune", "s.yaml", "--image", "none.png"], 1, "none.png: no such image file"),
        (["--prune", "s.yaml", "--image", "s.yaml"], 1, "s.yaml: not a readable image"),
    ],
)
def test_pictures_that_cannot_be_drawn(tmp_path, checkpoint, monkeypatch, capsys, arguments, status, expected):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "s.yaml", "{model: test_vim, after: [2], keep: 0.5}")
    assert main(["visualize", "out.png", *arguments, "--checkpoint", str(checkpoint)]) == status
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
