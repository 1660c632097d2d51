"""``vssm export`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["export", *sys.argv[1:]]))
