"""Files that are never half-written: a temporary name beside the target, renamed when complete."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TOKEN_BYTES = 8
_TEMPORARY = re.compile(rf"\..*-[0-9a-f]{{{2 * _TOKEN_BYTES}}}(\.\w+)?")


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; on success it replaces ``path``, on failure it is removed.

    The temporary file keeps the suffix of ``path``, since writers choose their format by it. Folders are created.

    Args:
        path: File to be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}-{secrets.token_hex(_TOKEN_BYTES)}{target.suffix}")
    try:  # the name comes before the file, so that an interrupt at any moment finds it here
        temporary.touch(exist_ok=False)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if error.filename in (None, str(temporary)) and error.strerror:
            error.filename = str(target)  # a full disk does not say which file it was, and nobody knows the other name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what `atomic_path` has left in a folder, where a process was killed while it wrote.

    Args:
        folder: Of which it is known that nobody is writing into it.
    """
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)
