"""``vssm info`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["info", *sys.argv[1:]]))
