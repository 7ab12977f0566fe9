"""Settings every test runs under: strict promotion, several CPU devices, no GPU preallocation."""

import os

# Read when the backends start, so they stand before the first use of jax.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
