"""GPU kernels for MLA decoding and what they need: formats, plans, the combine step.

This package knows nothing of Flax, meshes or dispatch; `mla_jax` is built on top of it.
"""

from __future__ import annotations

import importlib
import importlib.util


def load_runtime() -> None:
    """Prepares this process to load executables with Mosaic GPU kernels that another process traced or compiled.

    Their host code is linked against a library whose path only this import makes known; without it loading fails with
    "Symbols not found: mosaic_gpu_init_tma_desc". It takes a second or two, so nothing happens where JAX has no CUDA
    plugin, and whoever traces a kernel here has imported it already.
    """
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        importlib.import_module("jax.experimental.mosaic.gpu")
