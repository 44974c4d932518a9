"""``python -m lorainit.cli``."""

import sys

from lorainit.cli.main import main

sys.exit(main())
