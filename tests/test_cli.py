"""The command line: one-line failures, exit statuses, help, and options from YAML files."""

import argparse
import importlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import vssm.cli
from fuzzing import fuzzed
from vssm.cli import UsageError, commands, main
from vssm.cli._options import Parser, positive_int
from vssm.cli.config import parse_with_config


def failure(capsys, *argv: str) -> tuple[int, str]:
    """Runs a command that fails; returns its status and the one line it must have printed."""
    status = main(list(argv))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return status, captured.err.rstrip("\n")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Adds a command ``sample`` with the given body of ``run(args)``."""

    def add(body: str) -> None:
        source = '"""A sample."""\ndef add_arguments(parser): parser.add_argument("--size", type=int)\n'
        (tmp_path / "sample.py").write_text(f"{source}def run(args):\n    {body}\n")
        monkeypatch.setattr(vssm.cli, "__path__", [*vssm.cli.__path__, str(tmp_path)])
        monkeypatch.delitem(sys.modules, "vssm.cli.sample", raising=False)

    yield add
    sys.modules.pop("vssm.cli.sample", None)


def test_unknown_command_names_the_nearest(capsys):
    assert failure(capsys, "benchmrk") == (2, "vssm: unknown command 'benchmrk'; did you mean benchmark?")


def test_unknown_command_far_from_all_lists_them(capsys):
    status, line = failure(capsys, "qqq")
    assert status == 2
    assert all(name in line for name in commands())


def test_unknown_option_is_named_before_a_missing_argument(capsys):
    assert failure(capsys, "info", "--bach-size", "3") == (
        2,
        "vssm info: unknown option --bach-size; did you mean --batch-size?",
    )


def test_options_are_not_abbreviated(capsys):
    assert failure(capsys, "list", "--pre")[0] == 2


def test_two_dashes_are_no_value(capsys):
    line = "vssm validate: argument --checkpoint: expected a value, got '--'"
    assert failure(capsys, "validate", "--checkpoint=--") == (2, line)


@pytest.mark.parametrize("value", ["0", "-3", "x", "1.5", "3000000000"])
def test_batch_size_must_be_positive(capsys, value):
    status, line = failure(capsys, "info", "test_vim", f"--batch-size={value}")
    assert status == 2
    assert line.startswith("vssm info: argument --batch-size: expected a positive integer")
    assert line.endswith(f"got {value}" if value[-1].isdecimal() and "." not in value else f"got {value!r}")


@pytest.mark.parametrize("value", ["", "x", "0", "224x", "1x2x3", "-224", "65536", "224x99999999999999999999"])
def test_image_sizes_are_checked(capsys, value):
    status, line = failure(capsys, "info", "test_vim", f"--img-size={value}")
    assert status == 2
    assert line.endswith(f"expected a size in pixels such as 224 or 160x256 (height x width), got {value!r}")


def test_unknown_model_names_the_nearest_and_writes_nothing(capsys, tmp_path):
    target = tmp_path / "out.json"
    status, line = failure(capsys, "info", "vim_tiny_patch16_242", "--results", str(target))
    assert status == 1
    assert line.startswith("vssm info: ")
    assert "vim_tiny_patch16_224" in line
    assert list(tmp_path.iterdir()) == []


WORDS = (
    *(
        "",
        "0",
        "1",
        "-1",
        "0.5",
        "1e400",
        "nan",
        "-inf",
        "999999999999999999999",
        "16x16",
        "0x0",
        "224x",
        "x",
        "é",
        "a\nb",
    ),
    *(
        "cpu",
        "cuda:99",
        "meta",
        "test_vim",
        "nope",
        "a=1",
        "=",
        "b=1,l=16",
        "1,16,8",
        "{a,b}",
        "}{",
        "float32,int8",
        "-",
    ),
    *("out.json", "out.png", "out.txt", "nowhere/out.csv", "/", "..", "/dev/null", "3m", "auto", "sgd", "default"),
)


@pytest.mark.parametrize("name", commands())
def test_random_options_are_understood_or_refused(name, tmp_path, monkeypatch):
    """What is not told in one line, as UsageError and OSError are, would be raised here; no command runs."""
    monkeypatch.chdir(tmp_path)
    refused = 0

    @fuzzed(150)
    def parse(rng: random.Random) -> None:
        nonlocal refused
        parser = Parser(prog=f"vssm {name}")
        importlib.import_module(f"vssm.cli.{name}").add_arguments(parser)
        options = [option for option in parser._option_string_actions if option not in ("-h", "--help")]
        argv = [word for _ in range(rng.choice([1, 2, 4])) for word in (rng.choice(options), rng.choice(WORDS))]
        try:
            parse_with_config(parser, rng.sample(WORDS, rng.choice([0, 1])) + argv)
        except (UsageError, OSError):
            refused += 1

    parse()
    assert refused > 10


def test_results_of_unknown_format_are_refused_before_the_work(capsys):
    assert failure(capsys, "info", "test_vim", "--results", "out.txt") == (
        2,
        "vssm info: argument --results: expected a file name ending in .json or .csv, got 'out.txt'",
    )


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ("raise ValueError('first\\n  second')", 1, "vssm sample: first second"),
        ("raise FileNotFoundError('no folder x')", 1, "vssm sample: no folder x"),
        ("open('/nonexistent/x')", 1, "vssm sample: /nonexistent/x: No such file or directory"),
        ("raise KeyboardInterrupt", 130, "vssm sample: interrupted"),
        ("raise ValueError('sample: said once')", 1, "vssm sample: said once"),
        (
            "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 MiB. GPU 0 has ...')",
            1,
            "vssm sample: CUDA out of memory. Tried to allocate 2 MiB; try a smaller --batch-size or --img-size, or "
            "another --device",
        ),
        (
            "raise RuntimeError(\"[enforce fail at c:7] . DefaultCPUAllocator: can't allocate memory: you tried to "
            'allocate 9 bytes. Error code 12")',
            1,
            "vssm sample: can't allocate memory: you tried to allocate 9 bytes. Error code 12; try a smaller "
            "--batch-size or --img-size, or another --device",
        ),
        (
            "import safetensors; raise safetensors.SafetensorError('I/O error: No space left on device')",
            1,
            "vssm sample: I/O error: No space left on device",
        ),
        ("from vssm.cli import UsageError; raise UsageError('either a or b')", 2, "vssm sample: either a or b"),
    ],
)
def test_expected_failures_are_one_line(capsys, command, body, status, line):
    command(body)
    assert failure(capsys, "sample") == (status, line)


@pytest.mark.parametrize(
    ("body", "error"), [("return {}['absent']", KeyError), ("raise RuntimeError(3)", RuntimeError)]
)
def test_a_bug_keeps_its_traceback(command, body, error):
    command(body)
    with pytest.raises(error):
        main(["sample"])


def test_debug_variable_shows_the_traceback(command, monkeypatch):
    command("raise ValueError('told')")
    monkeypatch.setenv("VSSM_DEBUG", "1")
    with pytest.raises(ValueError, match="told"):
        main(["sample"])


def test_status_of_a_command_is_returned(command):
    command("return 1")
    assert main(["sample"]) == 1


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vssm {vssm.__version__}\n"


@pytest.mark.parametrize("name", commands())
def test_every_command_explains_itself(capsys, name):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: vssm {name} ")
    assert main([]) == 0
    summary = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == [name])
    assert summary.split(maxsplit=1)[1] in text
    assert failure(capsys, name, "--nonsense")[0] == 2


def test_help_shows_the_defaults_that_say_something():
    parser = Parser(prog="sample")
    parser.add_argument("--workers", default=0, help="processes")
    parser.add_argument("--filter", default="", help="part of a name")
    parser.add_argument("--fast", action="store_true", help="be quick")
    text = parser.format_help()
    assert "processes (default: 0)\n" in text
    assert "part of a name\n" in text
    assert "be quick\n" in text


def test_help_imports_no_command(capsys, monkeypatch):
    def refuse(name: str) -> None:
        raise AssertionError(f"imported {name}")

    monkeypatch.setattr("vssm.cli.importlib.import_module", refuse)
    assert main(["--help"]) == 0
    assert {"benchmark", "info", "list"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines() if line}
    with pytest.raises(AssertionError, match=r"imported vssm\.cli\.list"):
        main(["list"])


def test_a_reader_that_leaves_is_no_failure():
    process = subprocess.Popen([sys.executable, "-m", "vssm.cli"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_list_shows_parameters_size_and_tags(capsys):
    assert main(["list", "vim_tiny_*", "--pretrained", "--json"]) == 0
    records = {record["model"]: record for record in json.loads(capsys.readouterr().out)}
    assert set(records) == {"vim_tiny_patch16_224", "vim_tiny_patch16_stride8_224"}
    tiny = records["vim_tiny_patch16_224"]
    assert tiny == {
        "model": "vim_tiny_patch16_224",
        "family": "vim",
        "params_m": 7.148008,
        "input_size": [3, 224, 224],
        "tags": ["in1k"],
    }


def test_list_matches_parts_of_names(capsys):
    assert main(["list", "stride8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "params_m", "input_size", "tags"]
    assert [line.split()[0] for line in lines[1:]] == ["vim_small_patch16_stride8_224", "vim_tiny_patch16_stride8_224"]


def test_list_without_a_match_fails(capsys):
    assert failure(capsys, "list", "nothing")[1].startswith("vssm list: no model matches 'nothing'; there are ")
    assert failure(capsys, "list", "--family", "vin")[1].startswith("vssm list: no family 'vin'; there are ")
    assert failure(capsys, "list", "test_vim", "--pretrained")[1].startswith("vssm list: no model with weights matches")


def sample_parser() -> Parser:
    parser = Parser(prog="vssm sample")
    parser.add_argument("model", nargs="+")
    parser.add_argument("--batch-size", type=positive_int, default=8)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--opt", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--mean", type=float, nargs=3)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, default=True)
    return parser


def parse(folder: Path, text: str, *argv: str, default: str | None = None) -> argparse.Namespace:
    (folder / "run.yaml").write_text(text)
    if default is not None:
        (folder / "_default.yaml").write_text(default)
    return parse_with_config(sample_parser(), ["--config", str(folder / "run.yaml"), *argv])


def test_command_line_over_file_over_default_file_over_parser(tmp_path):
    default = "model: a\nlr: 1\nbatch-size: 1\nopt: sgd\nverbose: true\nema: false"
    args = parse(tmp_path, "batch_size: 2\nlr: 1e-3\nverbose: false", "--batch-size", "3", default=default)
    assert (args.model, args.batch_size, args.lr, args.opt) == (["a"], 3, 1e-3, "sgd")
    assert (args.verbose, args.ema, args.mean) == (False, False, None)


def test_positional_arguments_of_the_command_line_replace_those_of_the_file(tmp_path):
    assert parse(tmp_path, "model: [a, b]\nlr: 1").model == ["a", "b"]
    assert parse(tmp_path, "model: [a, b]\nlr: 1", "c").model == ["c"]


def test_lists_numbers_flags_and_null(tmp_path):
    args = parse(tmp_path, "lr: -1\nmean: [0.5, -0.5, 1]\nno-ema: true\nbatch-size: null", "m", default="batch-size: 4")
    assert (args.lr, args.mean, args.ema, args.batch_size) == (-1, [0.5, -0.5, 1], False, 8)
    assert parse(tmp_path, "no-ema: false\nlr: 1", "m", default="ema: false").ema is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bacth-size: 3", "unknown key 'bacth-size'; did you mean batch-size?"),
        ("config: x.yaml", "unknown key 'config'"),
        ("batch-size: 0", "argument --batch-size: expected a positive integer, got 0"),
        ("batch-size: [1, 2]", "batch-size: expected one value, got a list of 2"),
        ("lr: true", "argument --lr: invalid float value: 'true'"),
        ("opt: adam", "argument --opt: invalid choice: 'adam'"),
        ("mean: [1, 2]", "argument --mean: expected 3 arguments"),
        ("verbose: 3", "verbose: expected true or false, got '3'"),
        ("ema: [true]", "ema: expected true or false"),
        ("opt: {name: sgd}", "opt: expected a value or a list of values"),
        ("- lr", "expected lines of 'option: value', got a list"),
        ("lr: [1", "not a YAML file"),
    ],
)
def test_files_are_checked_like_the_command_line(tmp_path, text, message):
    with pytest.raises(UsageError) as caught:
        parse(tmp_path, text, "m", "--lr", "1")
    assert str(caught.value).startswith(f"{tmp_path / 'run.yaml'}: {message}")


def test_the_default_file_is_named_in_its_errors(tmp_path):
    with pytest.raises(UsageError, match=r"_default\.yaml: unknown key 'x'"):
        parse(tmp_path, "lr: 1", "m", default="x: 1")


def test_a_missing_file_is_bad_usage(capsys):
    assert failure(capsys, "list", "--config", "absent.yaml") == (2, "vssm list: --config absent.yaml: no such file")


def test_an_empty_file_changes_nothing(tmp_path):
    assert parse(tmp_path, "# nothing yet\n", "m", "--lr", "2").lr == 2
