"""Files that are never half-written: a temporary name beside the target, renamed when complete."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; on success it replaces ``path``, on failure it is removed.

    The temporary file keeps the suffix of ``path``, since writers choose their format by it. Folders are created.

    Args:
        path: File to be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}-{secrets.token_hex(8)}{target.suffix}")
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
