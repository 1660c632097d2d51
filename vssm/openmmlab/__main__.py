"""Runs a script of mmdetection or mmsegmentation with our backbones and operators in place.

``python -m vssm.openmmlab mmdet/test.py CONFIG CHECKPOINT`` runs the ``tools/test.py`` that the installed mmdet brings;
a path to any other script works as well. Some scripts import the frameworks before they read ``custom_imports``.
"""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import vssm.openmmlab  # noqa: F401  registers, and provides operators

_USAGE = "usage: python -m vssm.openmmlab SCRIPT [ARGUMENT ...], such as mmdet/train.py CONFIG"


def main() -> None:
    """Runs the script that the command line names."""
    if len(sys.argv) < 2:
        sys.exit(_USAGE)
    try:
        script = find_script(sys.argv[1])
    except FileNotFoundError as error:
        sys.exit(str(error))
    sys.argv = [script, *sys.argv[2:]]
    runpy.run_path(script, run_name="__main__")


def find_script(name: str) -> str:
    """Path of a script: as given, or of one of the tools of an installed framework, such as ``mmdet/train.py``.

    Raises:
        FileNotFoundError: If there is neither.
    """
    package, _, tool = name.partition("/")
    spec = find_spec(package) if package in ("mmdet", "mmseg") else None
    folders = (spec.submodule_search_locations if spec else None) or []
    places = [Path(name), *(Path(folder, ".mim", "tools", tool) for folder in folders)]
    found = next((str(place) for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"vssm.openmmlab: no script {name!r}, and no tool of an installed mmdet or mmseg")
    return found


if __name__ == "__main__":
    main()
