"""``vssm validate`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["validate", *sys.argv[1:]]))
