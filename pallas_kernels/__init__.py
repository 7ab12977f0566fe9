"""GPU kernels for MLA decoding and what they need: formats, plans, the combine step.

This package knows nothing of Flax, meshes or dispatch; `mla_jax` is built on top of it.
"""
