"""A picture of images in a grid, each with what a model takes it for; wrong ones stand out in red."""

import math
import os
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vssm.data import LabelledImages
from vssm.files import atomic_path

_TILE = 136  # side of an image, in pixels; so are all lengths
_GAP = 12
_BORDER = 4
_LINE = 18
_FONT = 15
_TITLE = 22
_INK, _GREY, _RED, _PAPER = "#202020", "#6B6B6B", "#D0021B", "#FFFFFF"
_MOST = 100  # images; more are not readable on one sheet

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def draw_contact_sheet(
    path: str | os.PathLike, images: LabelledImages, records: Sequence[dict[str, Any]], *, title: str
) -> int:
    """Draws images with their predicted classes and probabilities, and the true class where it is another.

    Args:
        path: Picture to write; its suffix chooses the format.
        images: The images.
        records: Predictions from `vssm.engine.predict.predict`, in the order in which to draw them.
        title: Heading.

    Returns:
        Number of images drawn, at most 100.
    """
    shown = records[:_MOST]
    columns = min(len(shown), max(4, math.ceil(math.sqrt(len(shown)))))
    rows = math.ceil(len(shown) / columns)
    cell = (_TILE + _GAP, _TILE + 2 * _LINE + _GAP)
    font, bold = ImageFont.load_default(_FONT), ImageFont.load_default(_TITLE)
    width = max(columns * cell[0] + _GAP, math.ceil(bold.getlength(title)) + 2 * _GAP)
    top = _TITLE + 2 * _GAP
    sheet = Image.new("RGB", (width, top + rows * cell[1] + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), title, fill=_INK, font=bold)
    for place, record in enumerate(shown):
        corner = (_GAP + place % columns * cell[0], top + place // columns * cell[1])
        _draw_tile(sheet, pen, corner, images.load(record["index"], channels=3), record, font)
    with atomic_path(path) as temporary:
        sheet.save(temporary)
    return len(shown)


def _draw_tile(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    image: Image.Image,
    record: dict[str, Any],
    font: Font,
) -> None:
    left, top = corner
    wrong = record["correct"] is False
    tile = _fit(image)
    frame = (left - _BORDER, top - _BORDER, left + _TILE + _BORDER - 1, top + _TILE + _BORDER - 1)
    if wrong:
        pen.rectangle(frame, fill=_RED)
        pen.rectangle((left, top, left + _TILE - 1, top + _TILE - 1), fill=_PAPER)
    sheet.paste(tile, (left + (_TILE - tile.width) // 2, top + (_TILE - tile.height) // 2))
    best = record["predictions"][0]
    share = f" ({best['probability']:.0%})"
    first = _shortened(best["class"], font, _TILE - font.getlength(share)) + share
    pen.text((left, top + _TILE + _BORDER), first, fill=_RED if wrong else _INK, font=font)
    if record["true"] is not None:
        second = _shortened(f"true: {record['true']}", font, _TILE)
        pen.text((left, top + _TILE + _BORDER + _LINE), second, fill=_RED if wrong else _GREY, font=font)


def _fit(image: Image.Image) -> Image.Image:
    """The image in the size of a tile; smoothed, since digits of 8x8 pixels are hard to recognise as squares."""
    scale = _TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _shortened(text: str, font: Font, width: float) -> str:
    """The text, or as much of it as fits, with dots."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
