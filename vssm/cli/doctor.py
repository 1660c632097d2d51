"""Say what is installed, test the scan on every device here, and name what is missing.

The test takes less than a second a device; where kernels have to be compiled first, some twenty. Exit status 1 if one
fails.
"""

import argparse
import json
import logging
from typing import Any

from vssm.engine.doctor import BACKEND_VARIABLE, examine
from vssm.engine.records import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument("--json", action="store_true", help="print the record as JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Prints what was found; exit status 1 if a self-test fails."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")  # what backends say of themselves, the tables say
    record = examine()
    if args.json:
        print(json.dumps(record, indent=2))
    else:
        _print(record)
    return 0 if record["passed"] else 1


def _print(record: dict[str, Any]) -> None:
    versions = [{"what": name.replace("_", " "), "version": found} for name, found in record["environment"].items()]
    print_table(versions, ["what", "version"])
    print()
    print_table(record["devices"], ["device", "name", "capability", "memory_gib", "auto"])
    if record["environment"]["nvidia_driver"] and len(record["devices"]) == 1:
        why = "" if record["environment"]["cuda_runtime"] else ": this torch is built without CUDA"
        print(f"there is a driver of NVIDIA's, but torch sees no GPU{why}")
    if record["scan_backend_variable"]:
        print(f"{BACKEND_VARIABLE}={record['scan_backend_variable']} asks for another scan than auto")
    print()
    _print_tests(record["self_tests"])
    print()
    extras = [
        each | {"state": "incomplete" if each["missing"] else "complete", "missing": each["missing"] or None}
        for each in record["extras"]
    ]
    print_table(extras, ["extra", "for", "state", "missing", "get"])
    print()
    _print_cache(record["cache"])


def _print_tests(tests: list[dict[str, Any]]) -> None:
    rows = [test | {"self-test": "passed" if test["passed"] else "FAILED"} for test in tests]
    print_table(rows, ["device", "backend", "self-test", "largest_error", "of", "seconds"])
    for test in tests:
        if not test["passed"]:
            reason = test.get("reason") or f"{test['of']} is off by {test['largest_error']:.1e}"
            print(f"{test['backend']} on {test['device']} does not compute the scan: {reason}")


def _print_cache(cache: dict[str, Any]) -> None:
    reason = cache["not_writable"]
    print(f"cache folder  {cache['folder']}, " + (f"NOT writable ({reason})" if reason else "writable"))
    if cache["launch_table_problem"]:
        print(f"launch table  {cache['launch_table_problem']}")
    for device, sizes in cache["launch_sizes"].items():
        print(f"launch table  {sizes} sizes for {device}")
    if cache["launch_table"] is None:
        print("launch table  none; on a GPU, vssm tune makes one")
