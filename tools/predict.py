"""``vssm predict`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["predict", *sys.argv[1:]]))
