"""``vssm prune`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["prune", *sys.argv[1:]]))
