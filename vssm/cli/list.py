"""List the registered models."""

import argparse
import json

from vssm.engine.listing import list_records
from vssm.engine.records import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument("filter", nargs="?", default="", help="part of a name, or a pattern with *")
    parser.add_argument("--pretrained", action="store_true", help="only models with weights")
    parser.add_argument("--family", help="only models of this family, such as vim")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Prints names with parameters in millions, input size and tags of the weights."""
    records = list_records(args.filter, pretrained=args.pretrained, family=args.family)
    if args.json:
        print(json.dumps(records, indent=2))
    else:
        rows = [record | {"input_size": "x".join(map(str, record["input_size"]))} for record in records]
        print_table(rows, ["model", "params_m", "input_size", "tags"])
    return 0
