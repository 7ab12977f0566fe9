"""`python -m mla_jax` is the command `mla-jax`."""

import sys

from mla_jax.cli import main

if __name__ == "__main__":  # processes that `bench` starts import this too
    sys.exit(main())
