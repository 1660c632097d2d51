"""Tar files of small images, shared by the tests of data."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def png(level: int) -> bytes:
    """A grey image of 8x8 pixels, all of one level, as a file's content."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), level, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes | str | int | dict]) -> Path:
    """Writes a tar file; content that is no bytes becomes text, or JSON where it is a mapping."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            if isinstance(content, dict):
                content = json.dumps(content)
            raw = content if isinstance(content, bytes) else str(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


def write_shards(folder: Path, split: str, *, shards: int = 2, samples: int = 3, classes: int = 2) -> Path:
    """Writes webdataset shards SPLIT-0000.tar ... whose image levels are ten times their number, from 0 on."""
    for shard in range(shards):
        members = {}
        for number in range(shard * samples, (shard + 1) * samples):
            members |= {f"{number:06d}.cls": number % classes, f"{number:06d}.png": png(10 * number)}
        write_tar(folder / f"{split}-{shard:04d}.tar", members)
    return folder
