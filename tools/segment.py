"""``vssm segment`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["segment", *sys.argv[1:]]))
