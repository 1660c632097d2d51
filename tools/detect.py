"""``vssm detect`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["detect", *sys.argv[1:]]))
