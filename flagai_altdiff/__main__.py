"""``python -m flagai_altdiff`` is the command ``altdiff``."""

import sys

from flagai_altdiff.cli import main

sys.exit(main())
