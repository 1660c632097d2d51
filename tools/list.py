"""``vssm list`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["list", *sys.argv[1:]]))
