"""``vssm doctor`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["doctor", *sys.argv[1:]]))
