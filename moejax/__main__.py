"""`python -m moejax` is `moejax`."""

import sys

from moejax.cli import main

sys.exit(main())
