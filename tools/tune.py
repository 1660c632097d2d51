"""``vssm tune`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["tune", *sys.argv[1:]]))
