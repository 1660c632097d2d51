"""Images that have been found, before their classes are numbered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vssm.data.images import LabelledImages

# From the names of all images to the places of those wanted and the folder they are in.
Select = Callable[[Sequence[str]], tuple[list[int], str]]


class Create(Protocol):
    """Makes the images of a listing usable."""

    def __call__(self, *, source: str, classes: Sequence[str], targets: Sequence[int]) -> LabelledImages:
        """Takes a name for messages, the names of the classes, and the class index per image."""
        ...


@dataclass(frozen=True)
class Listing:
    """Images found in one place.

    Args:
        source: The place, for messages.
        layout: How the data should lie, for messages.
        names: What each image is called.
        labels: Class per image, a name or an index; the empty text where nothing tells.
        create: Makes them usable.
        class_names: Names of the classes where labels are indices and the data set names them.
    """

    source: str
    layout: str
    names: Sequence[str]
    labels: Sequence[str | int]
    create: Create
    class_names: Sequence[str] | None = None
