"""Where vssm keeps what it has found out on this machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$VSSM_CACHE``, or ``vssm`` in the user's cache folder. It need not exist."""
    cache = os.environ.get("VSSM_CACHE")
    if cache:
        return Path(cache)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "vssm"
