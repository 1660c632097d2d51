"""Data sets of the Hugging Face Hub, or of its format on disk, by timm's reader (``hfds/NAME``)."""

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from PIL import Image
from timm.data.readers import create_reader

from vssm.data.images import LabelledImages, decode_image
from vssm.data.labels import some
from vssm.data.listing import Listing
from vssm.data.parts import Wanted

PREFIX = "hfds/"
_IMAGE, _LABEL = "image", "label"  # the usual columns


class HubImages(LabelledImages):
    """Images of a Hugging Face data set.

    Args:
        reader: timm's reader.
        source: Name of the data set, for messages.
        classes: Names of the classes.
        targets: Class index per image.
    """

    def __init__(self, reader: Any, *, source: str, classes: Sequence[str], targets: Sequence[int]) -> None:
        super().__init__(source=source, classes=classes, targets=targets)
        self._reader = reader

    def load(self, index: int, *, channels: int) -> Image.Image:
        """Reads an image to 1 (grey) or 3 (colour) channels; raises `UnreadableImage`."""
        file, _ = self._reader[index]
        with file:
            return decode_image(file, name=self.name(index), channels=channels)

    def name(self, index: int) -> str:
        """The name that the data set gives to the image, if it does, after its place."""
        return f"{self.source}/{index}"


def list_hub(data: str, wanted: Wanted, *, image_key: str | None = None, label_key: str | None = None) -> Listing:
    """Opens a part of a data set of the Hugging Face Hub, which is downloaded if it is not at hand.

    Args:
        data: ``hfds/NAME``, where NAME is what ``datasets.load_dataset`` takes: a name on the Hub, or a folder.
        wanted: The part; a name of it may be any split that ``load_dataset`` takes, such as ``train[:90%]``.
        image_key: Column of the images, ``image`` when not given.
        label_key: Column of the classes, ``label`` when not given.

    Returns:
        The images in their order, with the indices of their classes and the names of these.

    Raises:
        ConnectionError: The data set cannot be fetched.
        ValueError: ``datasets`` is not installed, there is no such data set or part, or it has other columns.
    """
    if find_spec("datasets") is None:
        raise ValueError(f"{data}: Hugging Face data sets need the package datasets: pip install datasets")
    name = data.removeprefix(PREFIX)
    split = wanted.name or _split(data, name, wanted)
    columns = {"input_key": image_key or _IMAGE, "target_key": label_key or _LABEL}
    try:
        reader: Any = create_reader(data, split=split, **columns)
    except (KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{data}: cannot read {split!r} by the columns {some([*columns.values()])}: {reason}"
        ) from error
    labels = [row[columns["target_key"]] for row in reader.dataset.remove_columns(columns["input_key"])]
    if wrong := [label for label in labels if isinstance(label, bool) or not isinstance(label, int | str)]:
        raise ValueError(f"{data}: expected one class per image in {columns['target_key']!r}, got {wrong[0]!r}")
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__) or None
    source = f"{data} ({split})"
    layout = "expected a column of images and one of their classes"
    return Listing(
        source, layout, [f"{index}" for index in range(len(labels))], labels, partial(HubImages, reader), names
    )


def _split(data: str, name: str, wanted: Wanted) -> str:
    """The first of the part's usual names that the data set has."""
    datasets: Any = import_module("datasets")
    found = datasets.get_dataset_split_names(name)
    for each in wanted.names:
        if each in found:
            return each
    raise ValueError(f"{data}: no part {' or '.join(wanted.names)} in it, it holds {some(found)}")
