"""Token-level sparse MLA decode: one kernel a GPU architecture (docs/sparse-decode.md)."""

from pallas_kernels.formats import KVFormat
from pallas_kernels.sparse_decode import config as _config
from pallas_kernels.sparse_decode.config import SparseConfig
from pallas_kernels.sparse_decode.sm90 import sparse_decode

__all__ = ["SparseConfig", "check", "sparse_decode"]


def check(fmt: KVFormat, extra_fmt: KVFormat | None, capability: tuple[int, int]) -> None:
    """Raises NotImplementedError, with the reason, for calls that `sparse_decode` cannot serve.

    Args:
      fmt, extra_fmt: formats of the main and the extra cache (None without one).
      capability: CUDA compute capability of the device that is compiled for.
    """
    if capability != (9, 0):
        raise NotImplementedError(
            f"the sparse kernel uses wgmma, which needs compute capability 9.0; this is {capability[0]}.{capability[1]}"
        )
    for scope_fmt in (fmt, extra_fmt):
        if scope_fmt is not None and (reason := _config.unsupported(scope_fmt)):
            raise NotImplementedError(reason)
