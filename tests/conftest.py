"""Settings of every test: strict promotion, several CPU devices, no GPU preallocation, repeatable properties."""

import os

# Read when the backends start, so they stand before the first use of jax.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples in every run: a change fails for what it did. `mla-jax fuzz` is what looks further, and
# `--hypothesis-profile=default` draws new examples here.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")
