"""`python -m mla_jax` is the command `mla-jax`."""

import sys

from mla_jax.cli import main

sys.exit(main())
