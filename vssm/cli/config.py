"""Options from YAML files: the command line over ``--config`` over ``_default.yaml`` beside it over the defaults."""

import argparse
from pathlib import Path

import yaml

from vssm.cli._options import Parser, UsageError, nearest

_DEFAULT_FILE = "_default.yaml"
_TRUE, _FALSE, _UNSET = ("true", "yes", "on"), ("false", "no", "off"), ("", "null", "~")


def parse_with_config(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """Parses a command line whose options may also stand in a YAML file.

    Keys are names of options, with ``-`` or ``_``, or of positional arguments. Values are checked by the parser itself,
    as if they stood on the command line; ``true`` and ``false`` set flags, lists give several values, and ``null``
    goes back to the parser's default.

    Args:
        parser: Parser of the command; gets the option ``--config`` if it has none.
        argv: Command line without the command.

    Returns:
        The parsed arguments.

    Raises:
        UsageError: An option or key is unknown, or a value is not what the parser expects.
    """
    if "--config" not in parser._option_string_actions:
        parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="take options from this YAML file")
    parser.check_option_names(argv)
    before = Parser(prog=parser.prog, add_help=False)
    before.add_argument("--config", type=Path)
    path = before.parse_known_args(argv)[0].config
    if path is not None and not {"-h", "--help"}.intersection(argv):
        unset = {action.dest: action.default for action in parser._actions}
        for file in (path.with_name(_DEFAULT_FILE), path):
            if file == path or file.is_file():
                _take_defaults(parser, file, unset)
    return parser.parse_args(argv)


def _take_defaults(parser: Parser, file: Path, unset: dict[str, object]) -> None:
    """Makes the values of one YAML file the parser's defaults; ``unset`` are those that it had without files."""
    actions = _actions_by_key(parser)
    for key, value in _read(file).items():
        name = key.replace("_", "-")
        if name not in actions:
            raise UsageError(f"{file}: unknown key {key!r}{nearest(name, actions)}")
        action = actions[name]
        if _unsets(action, value):
            parser.set_defaults(**{action.dest: unset[action.dest]})
            continue
        try:
            parser.set_defaults(**{action.dest: _checked(action, name, value)})
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from None
        _make_optional(action)


def _read(file: Path) -> dict[str, str | list]:
    """The top level of a YAML file, scalars as they are written: the parser gives them their types."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except FileNotFoundError:
        raise UsageError(f"--config {file}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: not a YAML file: {error}") from None
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{file}: expected lines of 'option: value', got a {type(content).__name__}")
    return content


def _actions_by_key(parser: Parser) -> dict[str, argparse.Action]:
    actions = {}
    for action in parser._actions:
        if action.dest not in ("help", "config"):
            names = [option.lstrip("-") for option in action.option_strings if option.startswith("--")] or [action.dest]
            actions.update((name.replace("_", "-"), action) for name in names)
    return actions


def _unsets(action: argparse.Action, value: object) -> bool:
    """Whether a value says that the option is not given: null, or false for a flag without a negative form."""
    flag = action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction)
    return isinstance(value, str) and (value.lower() in _UNSET or (flag and value.lower() in _FALSE))


def _checked(action: argparse.Action, name: str, value: str | list | dict) -> object:
    """The value as the parser would have stored it.

    A parser of this one action does the work, so that type, choices and number of values are checked in one place.
    """
    parser = Parser(prog="", add_help=False)
    parser._add_action(action)
    return getattr(parser.parse_args(_tokens(action, name, value)), action.dest)


def _tokens(action: argparse.Action, name: str, value: str | list | dict) -> list[str]:
    """The value as it would stand on the command line."""
    option = next((option for option in action.option_strings if option.lstrip("-").replace("_", "-") == name), None)
    if isinstance(value, dict) or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
        raise UsageError(f"{name}: expected a value or a list of values, got {value}")
    if action.nargs == 0:
        assert option is not None, "positional arguments take values"
        return [option if _as_bool(name, value) else _negative(option)]
    if isinstance(value, list) and action.nargs in (None, "?"):
        raise UsageError(f"{name}: expected one value, got a list of {len(value)}")
    values = value if isinstance(value, list) else [value]
    if option is None:
        return ["--", *values]
    return [f"{option}={value}"] if isinstance(value, str) else [option, *values]


def _negative(option: str) -> str:
    return f"--{option[5:]}" if option.startswith("--no-") else f"--no-{option[2:]}"


def _as_bool(name: str, value: str | list) -> bool:
    if isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE):
        return value.lower() in _TRUE
    raise UsageError(f"{name}: expected true or false, got {value!r}")


def _make_optional(action: argparse.Action) -> None:
    """What a file has given need not stand on the command line."""
    if action.option_strings:
        action.required = False
    else:
        action.nargs = {None: "?", "+": "*"}.get(action.nargs, action.nargs)
        action.required = False
