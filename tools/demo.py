"""``vssm demo`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["demo", *sys.argv[1:]]))
