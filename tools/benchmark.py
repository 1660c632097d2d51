"""``vssm benchmark`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["benchmark", *sys.argv[1:]]))
