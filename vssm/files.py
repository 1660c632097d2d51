"""Files that are never half-written: a temporary name beside the target, renamed when complete."""

import os
import tempfile
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
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, target)
    except OSError as error:
        if error.filename in (None, name) and error.strerror:
            error.filename = str(target)  # a full disk does not say which file it was, and nobody knows the other name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
