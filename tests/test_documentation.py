"""Code blocks of README.md and of the guides run as they stand there; the few that cannot say why, and are parsed."""

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import NamedTuple

import pytest
from PIL import Image

from test_api import NAMES
from vssm.cli import main
from vssm.cli._options import Parser
from vssm.cli.config import parse_with_config

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "quickstart.md", *GUIDES]
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
# An HTML comment before a block, which readers of the page do not see: <!-- not run: downloads weights -->
REASONS = {
    "downloads weights",
    "installs",
    "needs ImageNet",
    "needs an authors' checkpoint",
    "needs the extra mm",
    "needs trained runs",
}
MOST_NOT_RUN = 18
CODE = ("python", "bash")
_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?```(?P<language>[^\n`]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_OF_A_SHELL = set("$|;&<>*`~(){}")  # characters for which a line needs one


class Block(NamedTuple):
    page: Path
    line: int  # of the code's first line, from 1
    language: str
    code: str
    reason: str | None  # why it is not run

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start("code")) + 1, match["language"], match["code"], match["reason"])
        for match in _FENCE.finditer(text)
        if not match["language"].startswith("{")  # a directive of the site
    ]


def lines_of(block: Block) -> list[str]:
    return [line for line in block.code.replace("\\\n", " ").splitlines() if line.strip()]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
NOT_RUN = [block for block in BLOCKS if block.reason]


@pytest.fixture
def desk(tmp_path, monkeypatch) -> None:
    """A working folder as the pages assume it: the recipes, a photo, and nothing else that is the reader's."""
    from sklearn.datasets import load_sample_image

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    Image.fromarray(load_sample_image("flower.jpg")).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def namespace(monkeypatch) -> ModuleType:
    """What the Python of one page shares; scan orders that it adds go away with it."""
    module = ModuleType("documentation_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    orders = importlib.import_module("vssm.scan_order")
    monkeypatch.setattr(orders, "BUILDERS", dict(orders.BUILDERS))
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_run(page, desk, namespace):
    blocks = [block for block in blocks_of(page) if block.language in CODE and not block.reason]
    assert blocks
    for block in blocks:
        if block.language == "python":  # with the page's own line numbers in tracebacks
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), vars(namespace))
        else:
            run_commands(block)


def run_commands(block: Block) -> None:
    """Runs a block in bash, or here, without the seconds that an import takes, where it is commands of vssm alone."""
    lines = lines_of(block)
    if all(line.startswith("vssm ") and not _OF_A_SHELL & set(line.partition("#")[0]) for line in lines):
        for line in lines:
            assert main(shlex.split(line, comments=True)[1:]) == 0, f"{block.place}: {line}"
    else:
        done = subprocess.run(["bash", "-euc", block.code], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{block.place}:\n{done.stdout}{done.stderr}"


def test_every_block_says_its_language():
    blocks = [*BLOCKS, *(block for card in CARDS for block in blocks_of(card))]
    assert not [block.place for block in blocks if block.language not in (*CODE, "text", "bibtex")]


def test_blocks_that_are_not_run_are_few_and_say_why():
    assert {block.reason for block in NOT_RUN} <= REASONS
    assert len(NOT_RUN) <= MOST_NOT_RUN
    assert len(NOT_RUN) < len([block for block in BLOCKS if block.language in CODE]) / 3


def test_commands_that_are_not_run_are_understood(monkeypatch):
    """Each by the parser of the command, with the recipes that it names; lines with variables are left out."""
    monkeypatch.chdir(ROOT)
    blocks = [*NOT_RUN, *(block for card in CARDS for block in blocks_of(card) if block.language == "bash")]
    lines = [line for block in blocks for line in lines_of(block) if line.startswith("vssm ") and "$" not in line]
    assert len(lines) > 10
    for _, command, *options in (shlex.split(line, comments=True) for line in lines):
        parser = Parser(prog=f"vssm {command}")
        importlib.import_module(f"vssm.cli.{command}").add_arguments(parser)
        parse_with_config(parser, options)


def test_guides_are_as_short_as_their_titles_say():
    for page, most in {"backbone": 60, "scan_order": 5}.items():
        text = (ROOT / "docs" / "guides" / f"{page}.md").read_text(encoding="utf-8")
        assert f"in {most} lines" in text.partition("\n")[0]
    assert blocks_of(ROOT / "docs" / "guides" / "backbone.md")[0].code.count("\n") <= 60
    function = re.search(
        r"^def .+\n((?: {4}.+\n)+)", blocks_of(ROOT / "docs" / "guides" / "scan_order.md")[0].code, re.M
    )
    assert function[0].count("\n") <= 5


@pytest.mark.parametrize("module", NAMES)
def test_reference_has_every_public_name(module):
    """Functions and classes by autodoc, which takes those of ``__all__`` or a list; others, such as tables, by hand."""
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md")]
    (page,) = (text for text in pages if f"automodule:: {module}\n" in text)
    listed = re.search(r"^ +:members:(.*)$", page, re.MULTILINE)[1]
    found = importlib.import_module(module)
    for name in set(NAMES[module].split()) - {"__version__"}:
        documented = isinstance(inspect.unwrap(getattr(found, name)), type | FunctionType)
        automatic = documented and not listed and name in found.__all__
        assert automatic or re.search(rf"\b{name}\b", page.replace(module, "")), name
