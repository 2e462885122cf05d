"""`python -m kronjax` is the command line."""

import sys

from kronjax.cli.main import main

sys.exit(main())
