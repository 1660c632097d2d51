"""Model cards: prose from the file, numbers that are filled in between markers, and what both have to keep."""

import re
from collections.abc import Callable, Mapping, Sequence

SECTIONS = (
    "What it is",
    "Inputs and outputs",
    "Variants",
    "Checkpoints and licences",
    "Measured",
    "What differs from the official code",
    "Limits",
    "Citation",
)
_BLOCK = re.compile(r"<!-- vssm card: (\w+) -->\n(.*?)<!-- end of (\w+) -->", re.DOTALL)
_MARKER = re.compile(r"<!-- (?:vssm card:|end of) \w+ -->")
_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_UNITS = r"images/s|images a second|ms|MiB|GiB|MB|GB|%|[MG]|(?:milli|micro)?seconds?|s|minutes?|hours?"
_QUANTITY = re.compile(rf"(?<![\w.])\d(?:[\d.,]*\d)?(?:\s| · 10\S+ )?(?:{_UNITS})(?![\w·])")
_METRIC = re.compile(r"top-[15]|FLOPs|\bAP\d*\b|mIoU|images/s|\bms\b|MiB|GiB|, (?:%|[MGs]\b)")  # of a table's columns
# A record, a page or paper, or the test that holds it.
_SOURCE = re.compile(r"\(\S*benchmarks/results/\S+\)|https?://|arXiv:\d{4}\.\d{5}|`tests/\S+\.py`|`configs/\S+`")


def fill(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """Replaces what stands between markers.

    Args:
        text: A card. A line ``<!-- vssm card: NAME -->`` begins a block, and ``<!-- end of NAME -->`` ends it.
        blocks: What makes the lines of a block, by its name; those that the card has are called.

    Returns:
        The card with today's numbers.

    Raises:
        ValueError: A block is unknown, or its markers do not come in pairs.
    """

    def replaced(match: re.Match) -> str:
        begin, end = match[1], match[3]
        if begin != end:
            raise ValueError(f"expected <!-- end of {begin} --> after <!-- vssm card: {begin} -->, got that of {end}")
        if begin not in blocks:
            raise ValueError(f"unknown block {begin!r}; known are {', '.join(sorted(blocks))}")
        return f"<!-- vssm card: {begin} -->\n{blocks[begin]()}\n<!-- end of {begin} -->"

    left_over = _MARKER.search(_BLOCK.sub("", text))
    if left_over is not None:
        raise ValueError(f"{left_over[0]} belongs to no pair of markers")
    return _BLOCK.sub(replaced, text)


def problems(text: str, *, sections: Sequence[str] | None = None) -> list[str]:
    """What a card has to keep and does not.

    Args:
        text: The card.
        sections: Its headings of the second level, in order; any if not given.

    Returns:
        A line for each problem: headings, and numbers with units outside of blocks that have neither record nor
        reference in their paragraph, list item or table.
    """
    found = re.findall(r"^## (.+)$", _CODE.sub("", text), re.MULTILINE)
    wrong = []
    if sections is not None and found != list(sections):
        wrong.append(f"expected the sections {', '.join(sections)}, got {', '.join(found)}")
    return wrong + [f"no record or reference for the numbers in {part!r}" for part in _without_source(text)]


def _without_source(text: str) -> list[str]:
    """Beginnings of the parts of a text that give quantities and no source."""
    bare = []
    for part in _parts(_BLOCK.sub("", _CODE.sub("", text))):
        quantity = _QUANTITY.search(part) or (_is_table(part) and _METRIC.search(_header(part)))
        if quantity and not _SOURCE.search(part):
            bare.append(" ".join(part.split())[:100])
    return bare


def _parts(text: str) -> list[str]:
    """Paragraphs and list items; a table belongs to the paragraph before it."""
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.lstrip().startswith("|") and parts and not _is_table(parts[-1]):
            parts[-1] += f"\n{paragraph}"
        else:
            parts += re.split(r"\n(?=- )", paragraph)
    return parts


def _is_table(part: str) -> bool:
    return re.search(r"^\|", part, re.MULTILINE) is not None


def _header(part: str) -> str:
    """A table's first line and the text before it."""
    return re.split(r"^\|[ :|-]+\|$", part, maxsplit=1, flags=re.MULTILINE)[0]
