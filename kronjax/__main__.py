"""`python -m kronjax` is the command line."""

import sys

from kronjax.cli import main

sys.exit(main())
