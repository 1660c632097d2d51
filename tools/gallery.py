"""Makes the pictures of model_cards/gallery.md by running its commands, and keeps what these say (some minutes)."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

from PIL import Image

from vssm.cli import main
from vssm.engine.records import environment, write_results
from vssm.files import atomic_path

_PAGE = Path("model_cards/gallery.md")
_RECORD = Path("benchmarks/results/gallery_digits.json")
_MOST_BYTES = 150_000  # of a picture


def run(command: str) -> str:
    """What a command of vssm says; it goes to standard output, too."""
    sys.stdout.write(f"$ {command}\n")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = main(shlex.split(command)[1:])
    sys.stdout.write(said.getvalue())
    if status != 0:
        sys.exit(status)
    return said.getvalue().strip()


def shrink(picture: Path) -> None:
    """Writes the pixels of a picture in fewer bytes."""
    with Image.open(picture) as image, atomic_path(picture) as temporary:
        image.convert("RGB").save(temporary, optimize=True, dpi=image.info["dpi"])
    if picture.stat().st_size > _MOST_BYTES:
        sys.exit(f"{picture}: expected at most {_MOST_BYTES} bytes, got {picture.stat().st_size}")


if __name__ == "__main__":
    place = environment("cpu")  # before the pictures change the checkout
    page = _PAGE.read_text(encoding="utf-8")
    records = [{"command": each, "says": run(each)} for each in re.findall(r"^vssm .+$", page, re.MULTILINE)]
    for name in re.findall(r"\]\((images/gallery_\w+\.png)\)", page):
        shrink(_PAGE.parent / name)
    write_results(_RECORD, [{**record, **place} for record in records])
