"""``vssm train`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
