"""Fill the numbers into model cards.

The prose of a card stands in its file. What is counted, published or measured stands between markers, <!-- vssm card:
NAME --> and <!-- end of NAME -->, and is filled from the models, from the published figures and from all records in
benchmarks/results, of which the newest of each model and setting counts. Blocks are variants, detectors, measured and
exported. With --check nothing is written: the exit status is 1 if a card would change, if its sections are not those of
all cards, or if a number with a unit outside of the markers has neither record nor reference.
"""

import argparse
from pathlib import Path

import vssm
from vssm.cli import UsageError
from vssm.cli._options import nearest
from vssm.engine.card import SECTIONS, fill, problems
from vssm.engine.card_blocks import blocks, read_records
from vssm.engine.zoo import family_of
from vssm.files import atomic_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument("names", nargs="*", metavar="FAMILY", help="whose card to fill: vim ..., or README")
    parser.add_argument("--all", action="store_true", help="fill all cards, and the README beside their folder")
    parser.add_argument("--check", action="store_true", help="write nothing, say what would change and what is wrong")
    parser.add_argument("--cards", type=Path, default=Path("model_cards"), metavar="DIR", help="folder of the cards")
    parser.add_argument(
        "--records", type=Path, default=Path("benchmarks/results"), metavar="DIR", help="folder of the records"
    )


def run(args: argparse.Namespace) -> int:
    """Fills the cards, or says what is wrong with them."""
    paths = _paths(args)
    families = {family_of(name) for name in vssm.list_models()}
    records = read_records(args.records)
    wrong = 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        family = path.stem if path.stem in families else None
        try:
            filled = fill(text, blocks(family, folder=path.parent, records=records))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        found = [] if path.parent != args.cards else problems(filled, sections=family and SECTIONS)
        if args.check and filled != text:
            found.append("numbers are not those of today's models and records; run vssm card")
        elif filled != text:
            with atomic_path(path) as temporary:
                temporary.write_text(filled, encoding="utf-8")
            print(f"{path}: filled")
        for problem in found:
            print(f"{path}: {problem}")
        wrong += len(found)
    if not wrong:
        print(f"{len(paths)} {'card is' if len(paths) == 1 else 'cards are'} as they should be")
    return 1 if wrong else 0


def _paths(args: argparse.Namespace) -> list[Path]:
    """The files to fill."""
    if args.all == bool(args.names):
        raise UsageError(f"expected families or --all, got {'both' if args.all else 'neither'}")
    known = {path.stem: path for path in sorted(args.cards.glob("*.md"))}
    if not known:
        raise UsageError(f"--cards {args.cards}: no cards there; they are part of a checkout")
    readme = args.cards.parent / "README.md"
    known |= {"README": readme} if readme.is_file() else {}
    unknown = next((name for name in args.names if name not in known), None)
    if unknown is not None:
        raise UsageError(f"no card of {unknown!r} in {args.cards}{nearest(unknown, known)}")
    return list(known.values()) if args.all else [known[name] for name in args.names]
