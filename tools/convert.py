"""``vssm convert`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["convert", *sys.argv[1:]]))
