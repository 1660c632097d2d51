"""The ``vssm`` command: finds a command's module, parses its options, turns expected failures into one line."""

import ast
import importlib
import os
import pkgutil
import sys
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError

from vssm.cli._options import Parser, UsageError, nearest
from vssm.cli.config import parse_with_config
from vssm.engine.memory import is_out_of_memory

__all__ = ["UsageError", "main"]

_DEBUG_VARIABLE = "VSSM_DEBUG"
# A disk that is full while weights are written is a SafetensorError.
_EXPECTED = (UsageError, ValueError, OSError, KeyboardInterrupt, SafetensorError)


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Every command is a module of this package with ``add_arguments(parser)`` and ``run(args)``; its docstring is its
    help. Only the module of the command that runs is imported.

    Args:
        argv: Command and its options; those of the process when not given.

    Returns:
        Exit status: 0, 1 for a failure, 2 for bad usage, 130 when interrupted.
    """
    arguments = sys.argv[1:] if argv is None else argv
    program = "vssm"
    try:
        command, status = _select(arguments), 0
        if command is not None:
            program = f"vssm {command}"
            status = _run(command, arguments[1:])
        sys.stdout.flush()  # so that a reader who has left is noticed here
        return status
    except SystemExit as leaving:  # argparse leaves so after --help
        return leaving.code if isinstance(leaving.code, int) else 0
    except BrokenPipeError:
        return _reader_is_gone()
    except (*_EXPECTED, RuntimeError) as error:
        if os.environ.get(_DEBUG_VARIABLE) == "1" or not (isinstance(error, _EXPECTED) or is_out_of_memory(error)):
            raise
        line = " ".join(_describe(error).split())
        print(f"{program}: {line.removeprefix(program.removeprefix('vssm ') + ': ')}", file=sys.stderr)
        return _status(error)


def commands() -> list[str]:
    """Names of the commands: the modules of this package that are not shared helpers."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in modules if not name.startswith("_") and name != "config")


def _select(arguments: list[str]) -> str | None:
    """The command to run, or None when the question was about ``vssm`` itself and has been answered."""
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        print(_overview())
        return None
    if first == "--version":
        print(f"vssm {version('vssm')}")
        return None
    if first not in commands():
        kind = "option" if first.startswith("-") else "command"
        raise UsageError(f"unknown {kind} {first!r}{nearest(first, [*commands(), '--help', '--version'])}")
    return first


def _overview() -> str:
    lines = [f"  {name:<12}{_summary(name)}" for name in commands()]
    return "\n".join(
        [
            "usage: vssm <command> [options]",
            "",
            "Vision state-space backbones in timm.",
            "",
            "commands:",
            *lines,
            "",
            "vssm <command> --help describes the options of a command, vssm --version the installed version.",
            "--config FILE.yaml of every command takes options from a file; those on the command line win.",
            f"{_DEBUG_VARIABLE}=1 in the environment shows the traceback of a failure.",
        ]
    )


def _summary(command: str) -> str:
    """First line of a command's docstring, read without importing what the command needs."""
    source = Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _run(command: str, argv: list[str]) -> int:
    module = importlib.import_module(f"{__name__}.{command}")
    parser = Parser(prog=f"vssm {command}", description=module.__doc__)
    module.add_arguments(parser)
    return module.run(parse_with_config(parser, argv))


def _describe(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if is_out_of_memory(error):
        said = str(error).partition("DefaultCPUAllocator: ")[2] or str(error)
        needed = ". ".join(said.split(". ")[:2])  # what follows is about torch's allocator
        return f"{needed}; try a smaller --batch-size or --img-size, or another --device"
    return str(error) or type(error).__name__


def _status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, UsageError) else 1


def _reader_is_gone() -> int:
    """Ends quietly when the reader of a pipe has left, as ``vssm list | head -1`` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails again
    return 141
