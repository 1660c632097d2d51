"""``vssm visualize`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["visualize", *sys.argv[1:]]))
