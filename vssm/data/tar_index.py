"""Where the images of a tar file are: one pass over its headers, kept in the user's cache folder."""

import hashlib
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from vssm.data.images import image_suffixes
from vssm.kept import keep, read_kept
from vssm_kernels.cache import cache_folder

_VERSION = 1  # of what a cached index holds
_BLOCK = 512  # bytes, of which a tar file is made
_LABEL_KEY = "label"  # of a webdataset sample's .json


@dataclass
class TarIndex:
    """The images of one tar file.

    Args:
        names: Path inside the file per image; a tar inside it counts as a folder.
        offsets: First byte per image.
        sizes: Bytes per image.
        labels: Class per image where a member beside it tells, an index or a name; else None.
    """

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str | int | None] = field(default_factory=list)


def read_index(path: Path, *, label_key: str | None = None) -> TarIndex:
    """Finds the images of a tar file, by a cached index if the file's size and time are those of the index.

    The class of an image may stand beside it, as in webdataset samples: in ``KEY.cls`` as an index, or in ``KEY.json``
    under a key, where KEY is the image's name up to the first dot.

    Args:
        path: An uncompressed tar file, which may hold others.
        label_key: Key of the class in the .json members; when not given, .cls counts before ``label`` in .json.

    Returns:
        The images in the order of the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no tar file, compressed, damaged or cut off, or a class in it is not one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tar file")
    status = path.stat()
    facts = {
        "version": _VERSION,
        "path": str(path.resolve()),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "label_key": label_key,
        "suffixes": sorted(image_suffixes()),
    }
    name = hashlib.sha256(f"{facts['path']}\n{label_key}".encode()).hexdigest()[:32]
    cached = cache_folder() / "tar_index" / f"{name}.json"
    index = read_kept(cached, facts, TarIndex)
    if index is None:
        index = _scan(path, label_key)
        keep(cached, facts, asdict(index), what=f"the index of {path}")
    return index


def _scan(path: Path, label_key: str | None) -> TarIndex:
    scan = _Scan(path, label_key)
    with path.open("rb") as file:
        scan.add(file, folder="", start=0)
    return scan.finish()


class _Scan:
    """One pass over a tar file.

    Args:
        path: The file, for messages.
        label_key: Key of the class in .json members.
    """

    def __init__(self, path: Path, label_key: str | None) -> None:
        self.path = path
        self.label_key = label_key
        self.suffixes = image_suffixes()
        self.index = TarIndex()
        self.labels: dict[str, str | int] = {}  # by key of the sample
        self.with_cls: set[str] = set()

    def add(self, file: IO[bytes], *, folder: str, start: int) -> None:
        """Takes in a tar file that begins ``start`` bytes into the outermost one, its members as if in ``folder``."""
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  else a million of them would be kept
                    if member.isreg() and not member.issparse():
                        self._add_member(archive, member, folder, start)
            file.seek(archive.offset)
            end = file.read(_BLOCK)
        except tarfile.TarError as error:
            raise ValueError(
                f"{self.path}: expected a complete, uncompressed tar file, got something else ({error})"
            ) from error
        if end != bytes(_BLOCK):  # where Python's reader ends without a word
            kind = "it is damaged" if len(end) == _BLOCK else "it is cut off"
            raise ValueError(f"{self.path}: no end of the archive at byte {start + archive.offset}: {kind}")

    def finish(self) -> TarIndex:
        """The images with their labels; of a sample with a label, only the image that has no further part in its name.

        Such as KEY.jpg of KEY.jpg and KEY.mask.png.
        """
        found, index = self.index, TarIndex()
        for name, offset, size in zip(found.names, found.offsets, found.sizes, strict=True):
            label = self.labels.get(_sample_key(name))
            if label is None or PurePosixPath(name).name.count(".") == 1:
                index.names.append(name)
                index.offsets.append(offset)
                index.sizes.append(size)
                index.labels.append(label)
        return index

    def _add_member(self, archive: tarfile.TarFile, member: tarfile.TarInfo, folder: str, start: int) -> None:
        name = folder + member.name.removeprefix("./")
        path = PurePosixPath(name)
        if path.name.startswith("."):
            return
        suffix = path.suffix.lower()
        if suffix in self.suffixes:
            self.index.names.append(name)
            self.index.offsets.append(start + member.offset_data)
            self.index.sizes.append(member.size)
        elif suffix in (".tar", ".cls", ".json"):
            content = archive.extractfile(member)
            assert content is not None, "a regular file has content"
            if suffix == ".tar":
                self.add(content, folder=f"{path.with_suffix('')}/", start=start + member.offset_data)
            else:
                self._add_label(name, suffix, content)

    def _add_label(self, name: str, suffix: str, content: IO[bytes]) -> None:
        key = _sample_key(name)
        if suffix == ".cls" and self.label_key is None:
            self.labels[key] = self._of_cls(name, content.read())
            self.with_cls.add(key)
        elif suffix == ".json" and key not in self.with_cls:
            label = self._of_json(name, content.read())
            if label is not None:
                self.labels[key] = label

    def _of_cls(self, name: str, content: bytes) -> int:
        text = content.decode(errors="replace").strip()
        if not text.isdecimal():
            raise ValueError(f"{self.path}: {name}: expected the index of a class, got {text[:40]!r}")
        return int(text)

    def _of_json(self, name: str, content: bytes) -> str | int | None:
        key = self.label_key or _LABEL_KEY
        try:
            sample = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{self.path}: {name}: not JSON ({error})") from error
        if not isinstance(sample, dict) or key not in sample:
            if self.label_key is None:
                return None
            keys: Sequence[str] = sorted(sample) if isinstance(sample, dict) else ()
            raise ValueError(f"{self.path}: {name}: no {key!r} in it; there are {', '.join(keys) or 'no keys'}")
        label = sample[key]
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError(f"{self.path}: {name}: expected {key!r} to be an index or a name, got {label!r}")
        return label


def _sample_key(name: str) -> str:
    """What the members of one webdataset sample share: the path up to the first dot of its last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"
