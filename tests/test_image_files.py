"""Image files of every kind: the pixels that timm and torchvision see, and one line for those that cannot be read."""

import io
import os
import random
import re
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageDataset
from torchvision.datasets.folder import default_loader

from fuzzing import fuzzed
from image_folders import make_folder
from vssm.data import open_dataset
from vssm.data.images import UnreadableImage, decode_image, find_images, read_image
from vssm.data.loaders import InputConfig, eval_loader

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F")
NOT_RASTER = ("EPS", "PDF", "BUFR", "GRIB", "HDF5", "WMF")  # which Pillow reads by way of other programs, if at all
ORIENTATION = 0x0112  # EXIF's tag; 6 asks to turn the image by a quarter


def picture(mode: str) -> Image.Image:
    """An image of 20x24 pixels that differ, or of one colour where Pillow cannot convert to the mode."""
    colours = np.add.outer(np.arange(24), np.arange(20))[..., None] * np.array([3, 4, 5])
    image = Image.fromarray(colours.astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((colours[..., 0] * 500).astype(np.uint16))
    if mode == "LAB":
        return Image.new("LAB", image.size, (100, 120, 130))
    return image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)


def written() -> dict[tuple[str, str], bytes]:
    """Files of every format and mode that Pillow here writes and can open again."""
    Image.init()
    files = {}
    for kind in sorted(set(Image.SAVE) & set(Image.OPEN) - set(NOT_RASTER)):
        for mode in MODES:
            buffer = io.BytesIO()
            with suppress(OSError, ValueError, KeyError), warnings.catch_warnings():  # not every format has every mode
                warnings.simplefilter("ignore")
                picture(mode).save(buffer, kind)
                Image.open(buffer).load()
                files[kind, mode] = buffer.getvalue()
    return files


FILES = written()


def by_pillow(file: bytes, mode: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(file)) as image:
            return image.convert(mode)


def test_every_kind_that_pillow_writes_is_read_to_the_same_pixels():
    assert {"PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA", "JPEG2000"} <= {kind for kind, _ in FILES}
    assert {mode for _, mode in FILES} == set(MODES)
    for (kind, mode), file in FILES.items():
        for channels, wanted in ((1, "L"), (3, "RGB")):
            image = decode_image(io.BytesIO(file), name=f"{kind} {mode}", channels=channels)
            assert image.mode == wanted
            if mode not in ("I;16", "I", "LAB"):  # which timm clips, or cannot read as grey
                assert image.tobytes() == by_pillow(file, wanted).tobytes(), (kind, mode)
            assert image.resize((3, 5)).size == (3, 5)  # after its file is closed


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_the_upper_half_of_16_bits_is_taken(tmp_path, suffix):
    values = np.array([[0, 255, 256], [3000, 40_000, 65_535]], dtype=np.uint16)
    path = tmp_path / f"wide.{suffix}"
    Image.fromarray(values).save(path)
    expected = [[0, 0, 1], [11, 156, 255]]
    assert np.asarray(read_image(path, channels=1)).tolist() == expected
    assert np.asarray(read_image(path, channels=3))[..., 2].tolist() == expected


def test_16_bits_in_the_other_order_of_bytes(tmp_path):
    path = tmp_path / "wide.tif"
    Image.frombytes("I;16B", (2, 1), bytes([11, 184, 255, 255])).save(path)
    with Image.open(path) as image:
        assert image.mode == "I;16B"
    assert np.asarray(read_image(path, channels=1)).tolist() == [[11, 255]]


def _turned(path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture("RGB").save(path, exif=exif)


def _transparent(path: Path) -> None:
    image = picture("RGB").quantize(8)
    image.save(path, transparency=bytes([0, 128, 255, 255, 255, 255, 255, 255]))


def _animated(path: Path) -> None:
    frames = [picture("RGB"), picture("RGB").transpose(Image.Transpose.ROTATE_180)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("turned.jpg", _turned),
        ("transparent.png", _transparent),
        ("animated.gif", _animated),
        ("animated.webp", _animated),
        ("animated.png", _animated),
        ("pages.tif", _animated),
        ("inks.jpg", lambda path: picture("CMYK").save(path)),
        ("grey_alpha.png", lambda path: picture("LA").save(path)),
    ],
)
def test_pixels_are_those_of_the_loaders_of_torchvision_and_timm(tmp_path, recwarn, name, write):
    path = tmp_path / "data" / "class" / name
    path.parent.mkdir(parents=True)
    write(path)
    mine = read_image(path)
    assert not [warning for warning in recwarn if "PIL" in warning.filename]
    assert mine.size == (20, 24)
    assert mine.tobytes() == default_loader(path).tobytes()
    (theirs, _) = ImageDataset(str(tmp_path / "data"), reader=_One(path))[0]
    assert mine.tobytes() == theirs.tobytes()


class _One(list):
    """A reader of timm with a single file."""

    def __init__(self, path: Path) -> None:
        super().__init__([(open(path, "rb"), 0)])  # noqa: SIM115  timm closes nothing either


def _mutated(file: bytes, rng: random.Random) -> bytes:
    content = bytearray(file)
    if rng.random() < 0.3:
        return bytes(content[: rng.randrange(len(content))])
    for _ in range(rng.choice([1, 2, 8])):
        content[rng.randrange(min(len(content), rng.choice([40, 200, 10_000])))] = rng.randrange(256)
    return bytes(content)


def test_damage_of_any_kind_is_unreadable_in_one_line_or_harmless():
    messages = []

    @fuzzed(60 * len(FILES))
    def decode(rng: random.Random) -> None:
        file = FILES[rng.choice(sorted(FILES))]
        try:
            image = decode_image(io.BytesIO(_mutated(file, rng)), name="it.img", channels=rng.choice([1, 3]))
        except UnreadableImage as error:
            messages.append(str(error))
        else:
            assert min(image.size) > 0

    decode()
    assert len(messages) > len(FILES)
    assert all(re.fullmatch(r"it\.img: not a readable image \(.+\)", message) for message in messages)


@pytest.mark.parametrize("error", [RuntimeError("no\n plane"), AttributeError("no size"), NotImplementedError()])
def test_whatever_a_decoder_raises_is_one_line(tmp_path, monkeypatch, error):
    def refuse(image):
        raise error

    path = tmp_path / "image.bmp"
    picture("RGB").save(path)
    monkeypatch.setattr(Image.Image, "load", refuse)
    with pytest.raises(UnreadableImage) as caught:
        read_image(path)
    reason = " ".join(str(error).split()) or type(error).__name__
    assert str(caught.value) == f"{path}: not a readable image ({reason})"


def test_want_of_memory_is_not_taken_for_damage(tmp_path, monkeypatch):
    def refuse(image):
        raise MemoryError

    path = tmp_path / "image.bmp"
    picture("RGB").save(path)
    monkeypatch.setattr(Image.Image, "load", refuse)
    with pytest.raises(MemoryError):
        read_image(path)


def test_empty_files_are_called_empty(tmp_path):
    path = tmp_path / "image.jpg"
    path.touch()
    with pytest.raises(UnreadableImage, match=r"image.jpg: not a readable image \(it is empty\)$"):
        read_image(path)
    with pytest.raises(UnreadableImage, match=r"x: not a readable image \(it is empty\)$"):
        decode_image(io.BytesIO(), name="x")


def test_folders_are_searched_for_the_suffixes_of_timm_and_torchvision(tmp_path):
    names = ["a.AVIF", "b.bmp", "c.gif", "d.jpeg", "e.jpg", "f.pgm", "g.png", "h.ppm", "i.tif", "j.TIFF", "k.webp"]
    for name in [*names, "notes.txt", "weights.pth"]:
        (tmp_path / name).touch()
    assert [path.name for path in find_images(tmp_path)] == names


def test_loaders_leave_out_files_that_went_away_and_strips_too_long_to_resize(tmp_path):
    make_folder(tmp_path, val=4)
    gone, strip = (tmp_path / "val" / "dark" / name for name in ("001.png", "002.png"))
    images = open_dataset(tmp_path, "val")
    gone.unlink()
    Image.new("L", (1, 20_000)).save(strip)
    os.symlink(tmp_path / "nowhere.png", gone)
    for workers in (0, 1):
        (batch,) = eval_loader(images, InputConfig(height=8, width=8), batch_size=8, workers=workers)
        assert batch.indices.tolist() == [0, 3, 4, 5, 6, 7]
        assert batch.unreadable == [
            f"{gone}: no such image file",
            f"{strip}: 1 x 20000 pixels, one side more than 1000 times the other",
        ]
