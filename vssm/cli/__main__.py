"""``python -m vssm.cli`` is the ``vssm`` command."""

import sys

from vssm.cli import main

sys.exit(main())
