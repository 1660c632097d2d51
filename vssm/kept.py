"""What takes a while to find out is kept in the user's cache folder, as long as what it was found from is the same."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vssm.files import atomic_path

_logger = logging.getLogger(__name__)
_Found = TypeVar("_Found")


def read_kept(file: Path, facts: Mapping[str, Any], make: Callable[..., _Found]) -> _Found | None:
    """Reads what :func:`keep` wrote.

    Args:
        file: In the cache folder.
        facts: What it must have been found from.
        make: Makes it of the other entries of the file, as keyword arguments; a file that it fails for is none.

    Returns:
        What ``make`` does; None if there is no such file, or one of other facts or, with a line in the log, of
        something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if any(content.pop(key) != value for key, value in facts.items()):
            return None
        return make(**content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _logger.warning("%s is not what it is read for (%r): made anew", file, error)
        return None


def keep(file: Path, facts: Mapping[str, Any], found: Mapping[str, Any], *, what: str) -> None:
    """Writes what was found from facts; where that is impossible, a line in the log says that ``what`` is not kept."""
    try:
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps({**facts, **found}), encoding="utf-8")
    except OSError as error:  # it can be found out again
        _logger.warning("%s is not kept: %s", what, error)
