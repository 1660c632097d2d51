"""``vssm quantize`` as a script."""

import sys

from vssm.cli import main

sys.exit(main(["quantize", *sys.argv[1:]]))
