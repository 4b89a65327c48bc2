"""`python -m saw_int4_jax` is `saw-int4`."""

import sys

from saw_int4_jax.cli import main

sys.exit(main())
