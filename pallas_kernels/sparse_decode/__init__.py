"""Token-level sparse MLA decode: one kernel a GPU architecture.

`sparse_decode` picks (pallas_kernels/architectures.py); docs/sparse-decode.md describes the SM90 kernel.
"""

from __future__ import annotations

import jax

from pallas_kernels import architectures
from pallas_kernels.formats import KVFormat
from pallas_kernels.sparse_decode import config as _config
from pallas_kernels.sparse_decode.config import SparseConfig as SparseConfig
from pallas_kernels.sparse_decode.config import SparseConfigSm100 as SparseConfigSm100

MODULES = {9: "sm90", 10: "sm100"}
"""Major compute capability -> module."""
CONFIGS = {"sm90": SparseConfig, "sm100": SparseConfigSm100}
"""Module -> type of its `config`."""


def check(fmt: KVFormat, extra_fmt: KVFormat | None, capability: tuple[int, int]) -> None:
    """Raises NotImplementedError, with the reason, for calls that `sparse_decode` cannot serve.

    Args:
      fmt, extra_fmt: formats of the main and the extra cache (None without one).
      capability: CUDA compute capability of the device that is compiled for.
    """
    architectures.module_name(MODULES, capability, "sparse")
    for scope_fmt in (fmt, extra_fmt):
        if scope_fmt is not None and (reason := _config.unsupported(scope_fmt)):
            raise NotImplementedError(reason)


def config_type(capability: tuple[int, int]) -> type:
    """What `config` of `sparse_decode` must be on such a GPU."""
    return CONFIGS[architectures.module_name(MODULES, capability, "sparse")]


def sparse_decode(*args, capability: tuple[int, int], **options) -> tuple[jax.Array, jax.Array]:
    """`sparse_decode` of the module for `capability`, the compute capability that is compiled for."""
    return architectures.module(__name__, MODULES, capability, "sparse").sparse_decode(*args, **options)
