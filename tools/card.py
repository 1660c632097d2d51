"""``vssm card`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["card", *sys.argv[1:]]))
