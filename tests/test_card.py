"""Model cards: their numbers are those of the models and records, and none stands there without a source."""

import json
import re
from pathlib import Path

import pytest

import vssm
from vssm.cli import main
from vssm.engine.card import SECTIONS, fill, problems
from vssm.engine.card_blocks import blocks, read_records
from vssm.engine.export import TOLERANCE
from vssm.engine.zoo import family_of

ROOT = Path(__file__).parents[1]
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
RECORDS = ROOT / "benchmarks" / "results"
BENCHMARK = {
    "model": "vim_tiny_patch16_224",
    "package": "vssm",
    "img_size": [224, 224],
    "params_m": 7.148,
    "amp_dtype": "bfloat16",
    "compile": "reduce-overhead",
    "scan_backend": "triton",
    "latency_ms": 1.25,
    "batch_size": 128,
    "images_per_s": 9876.5,
    "peak_memory_mib": None,
    "torch": "2.11.0",
    "triton": "3.6.0",
    "git_commit": "0123456789abcdef",
    "device": "cuda",
    "device_name": "Some GPU",
    "cpu_threads": 16,
    "date": "2026-01-02T03:04:05+00:00",
}
EXPORT = {
    "model": "vim_tiny_patch16_224",
    "format": "onnx",
    "img_size": [224, 224],
    "params_m": 7.148,
    "largest_side": None,
    "features": None,
    "file_mib": 33.14,
    "error_over_peak": 6.2e-7,
    "latency_ms": 61.0,
    "torch_latency_ms": 52.04,
    "scan_backend": "cpu",
    "cores": 2,
    "load_average": 1.26,
    "onnxruntime": "1.30.0",
    "torch": "2.14.1",
    "git_commit": None,
    "device": "cpu",
    "device_name": "Some CPU",
    "cpu_threads": 2,
    "date": "2026-01-02T03:04:05+00:00",
}


def filled(tmp_path, block: str, *files: list[dict], family: str | None = "vim") -> str:
    """The lines of a block when these are the files of records."""
    for number, records in enumerate(files):
        (tmp_path / f"any_name_{number}.json").write_text(json.dumps(records))
    return blocks(family, folder=tmp_path, records=read_records(tmp_path))[block]()


@pytest.mark.parametrize("path", [*CARDS, ROOT / "README.md"], ids=lambda path: path.stem)
def test_cards_are_as_the_command_leaves_them(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["card", path.stem, "--check"]) == 0, capsys.readouterr().out


def test_every_family_has_a_card():
    families = {family_of(name) for name in vssm.list_models()}
    assert families <= {path.stem for path in CARDS}
    for family in families:
        text = (ROOT / "model_cards" / f"{family}.md").read_text()
        for block in ("variants", "measured", "exported"):
            assert f"<!-- vssm card: {block} -->" in text


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_files_that_cards_name_are_there(path):
    text = path.read_text()
    linked = [path.parent / link for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)]
    named = [name for name in re.findall(r"`((?:tests|configs)/[^` ]+)`", text) if "MODEL" not in name]
    assert all(file.exists() for file in linked)
    assert all(any(ROOT.glob(name)) for name in named)


def test_records_are_known_by_what_they_hold(tmp_path):
    other = [{"model": "vim_tiny_patch16_224", "top1": 76.1, "images_per_s": 4.0}]
    (tmp_path / "settings.json").write_text('{"model": "vim_tiny_patch16_224"}')
    text = filled(tmp_path, "measured", other, [BENCHMARK], [EXPORT])
    assert "Some GPU, 2026-01-02, 224 × 224, bfloat16 autocast, compiled (reduce-overhead)" in text
    assert "commit 0123456789" in text
    assert "[record](any_name_1.json)" in text
    assert "| `vim_tiny_patch16_224` | 128 | 9876 | 1.25 |" in text
    assert text.count("\n| `") == 1
    assert "MiB" not in text
    exported = filled(tmp_path, "exported")
    assert "Some CPU, 2 threads, 2026-01-02" in exported
    assert "The load of the 2 cores was 1.3" in exported
    assert "| `vim_tiny_patch16_224` | 33.1 | 61.0 | 52.0 | 6e-07 |" in exported


def test_every_family_was_exported_and_compared():
    records = [each for each in read_records(RECORDS)["export"] if each["format"] == "onnx"]
    assert {family_of(each["model"]) for each in records} == {family_of(name) for name in vssm.list_models()}
    assert all(each["error_over_peak"] <= TOLERANCE for each in records)
    assert {tuple(each["img_size"]) for each in records} == {(224, 224)}


def test_the_newest_record_of_a_setting_counts(tmp_path):
    newer = BENCHMARK | {"images_per_s": 12345.0, "date": "2026-02-02T03:04:05+00:00"}
    eager = BENCHMARK | {"compile": False, "images_per_s": 555.0}
    text = filled(tmp_path, "measured", [newer], [BENCHMARK, eager])
    assert "| 12345 |" in text
    assert "| 9876 |" not in text
    assert "| 555 |" in text  # in another setting


def test_peers_are_those_of_the_same_run_and_size(tmp_path):
    def peer(name: str, params_m: float) -> dict:
        return BENCHMARK | {"model": name, "package": "timm", "params_m": params_m}

    text = filled(
        tmp_path,
        "measured",
        [
            peer("resnet50", 25.6),
            BENCHMARK,
            peer("deit_tiny_patch16_224", 5.7),
            BENCHMARK | {"model": "vmamba_tiny_v0"},
        ],
        [peer("convnext_tiny", 7.1)],
    )
    assert re.findall(r"^\| `(\w+)`", text, re.MULTILINE) == ["vim_tiny_patch16_224", "deit_tiny_patch16_224"]
    assert filled(tmp_path, "measured", family="plainmamba") == "No measurement is recorded yet."


def test_variants_are_counted_and_published(tmp_path):
    text = filled(tmp_path, "variants")
    assert "| `vim_tiny_patch16_224` | 7,148,008 | 7 | 1.29 | 0.52 | 1.82 | 1.5 | 76.1 | 93.0 |" in text
    assert text.count("README of hustvl/Vim") == 1
    assert [name.startswith("vim") for name in re.findall(r"^\| `(\w+)`", text, re.MULTILINE)] == [True] * 5


def test_only_what_is_between_markers_is_replaced():
    text = "a\n<!-- vssm card: one -->\nold\n<!-- end of one -->\nb\n<!-- vssm card: two -->\n<!-- end of two -->\n"
    assert fill(text, {"one": lambda: "1\n2", "two": lambda: "3"}) == (
        "a\n<!-- vssm card: one -->\n1\n2\n<!-- end of one -->\nb\n<!-- vssm card: two -->\n3\n<!-- end of two -->\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- vssm card: six -->\n<!-- end of six -->", "unknown block 'six'; known are one"),
        ("<!-- vssm card: one -->\n<!-- end of six -->", "expected <!-- end of one -->"),
        ("<!-- vssm card: one -->\nno end", "<!-- vssm card: one --> belongs to no pair"),
        ("no begin\n<!-- end of one -->", "<!-- end of one --> belongs to no pair"),
    ],
)
def test_markers_that_do_not_fit_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        fill(text, {"one": lambda: ""})


@pytest.mark.parametrize(
    "text",
    [
        "It runs 1,234 images/s on a GPU.",
        "One image takes 1.5 ms.",
        "- It needs 3 GiB.\n- And ([record](../benchmarks/results/models_cpu.json)) 4 GiB.",
        "Right are 97.7 % of them.",
        "| model | one image, ms |\n| --- | --- |\n| `vim` | 12 |",
        "As measured:\n\n| model | top-1 |\n| --- | --- |\n| `vim` | 76 |",
        "Counted are 4.5 G.",
    ],
)
def test_numbers_without_a_source_are_found(text):
    assert len(problems(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "It runs 1,234 images/s on a GPU ([record](../benchmarks/results/models_h100.json)).",
        "The paper says 76.1 % ([arXiv](https://arxiv.org/abs/2401.09417)).",
        "Logits stay within 2 % of their peak, which `tests/models/test_golden.py` checks.",
        "As published (arXiv:2401.09417):\n\n| model | top-1 |\n| --- | --- |\n| `vim` | 76 |",
        "A side of s pixels gives M + 1 tokens, 14 × 14 = 196 of ImageNet's; 4 blocks, 3 stages.",
        "<!-- vssm card: measured -->\n| one image, ms |\n| --- |\n| 3 |\n<!-- end of measured -->",
        "```\nvssm train --lr 3 # 5 ms\n```",
    ],
)
def test_numbers_with_a_source_pass(text):
    assert problems(text) == []


def test_sections_have_one_order():
    text = "\n".join(f"## {name}" for name in SECTIONS)
    assert problems(text, sections=SECTIONS) == []
    assert "expected the sections" in problems(text.replace("## Limits\n", ""), sections=SECTIONS)[0]


def test_command_fills_and_checks(tmp_path, capsys):
    card = tmp_path / "other.md"
    card.write_text("# Others\n\n<!-- vssm card: measured -->\n<!-- end of measured -->\n")
    (tmp_path / "records.json").write_text(json.dumps([BENCHMARK]))
    command = ["card", "other", "--cards", str(tmp_path), "--records", str(tmp_path)]
    assert main([*command, "--check"]) == 1
    assert "run vssm card" in capsys.readouterr().out
    assert "9876" not in card.read_text()
    assert main(command) == 0
    assert "| 9876 |" in card.read_text()
    assert main([*command, "--check"]) == 0
    card.write_text(card.read_text() + "\nIt takes 3 ms.\n")
    assert main(command) == 1
    assert "no record or reference for the numbers in 'It takes 3 ms.'" in capsys.readouterr().out


def test_unknown_cards_and_folders_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for options, message in (
        (["vmi"], "no card of 'vmi' in model_cards; did you mean vim?"),
        ([], "expected families or --all, got neither"),
        (["vim", "--all"], "got both"),
        (["--all", "--cards", str(tmp_path)], "no cards there; they are part of a checkout"),
    ):
        assert main(["card", *options]) == 2
        assert message in capsys.readouterr().err
