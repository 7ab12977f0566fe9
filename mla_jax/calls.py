"""What a call of an op consists of: a static description and a pytree of operands.

`decode.py` makes them from the public arguments once these are checked; `dispatch.py`, `vmap.py` and
`implementations.py` work on nothing else.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.cache import PagedKVCache
from pallas_kernels.formats import KVFormat
from pallas_kernels.schedule import SplitPlan


@dataclasses.dataclass(frozen=True)
class DenseCall:
    """The static side of a dense call: what decides which implementation serves it.

    `wide_out`: the results are partial and will be merged, so `out` is float32; an implementation that has it only in
    q's dtype may return that, and it is widened, at the cost of its rounding.
    """

    b: int
    s_q: int
    h: int
    fmt: KVFormat
    page_size: int
    is_causal: bool
    batch_invariant: bool
    wide_out: bool = False
    op = "mla_decode"

    @property
    def out_dtype(self) -> Any:
        """Of `out`."""
        return jnp.float32 if self.wide_out else self.fmt.compute_dtype


@dataclasses.dataclass(frozen=True)
class SparseCall:
    """The static side of a sparse call; `extra_*` are None and 0 without an extra scope, `wide_out` as above."""

    b: int
    s_q: int
    h: int
    fmt: KVFormat
    page_size: int
    topk: int
    extra_fmt: KVFormat | None
    extra_page_size: int
    extra_topk: int
    batch_invariant: bool
    wide_out: bool = False
    op = "sparse_mla_decode"

    @property
    def out_dtype(self) -> Any:
        """Of `out`."""
        return jnp.float32 if self.wide_out else self.fmt.compute_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseOperands:
    q: Any  # [b, s_q, h, d_qk]
    cache: PagedKVCache
    block_table: Any  # int32 [b, max_pages], or None
    cache_seqlens: Any  # int32 [b]
    sm_scale: Any  # float32 []
    plan: SplitPlan | None

    @property
    def d_v(self) -> int:
        return self.cache.format.d_v

    @property
    def names_no_keys(self) -> bool:
        """By its shapes alone the call can have no keys; no kernel needs to see it."""
        return self.cache.num_slots == 0 or (self.block_table is not None and self.block_table.shape[1] == 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scope:
    """One cache of a sparse call with what is read from it."""

    cache: PagedKVCache
    indices: Any  # int32 [b, s_q, topk]
    length: Any  # int32 [b, s_q], or None

    @property
    def names_no_keys(self) -> bool:
        return self.cache.num_slots == 0 or self.indices.shape[-1] == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseOperands:
    q: Any  # [b, s_q, h, d_qk]
    main: Scope
    extra: Scope | None
    sm_scale: Any  # float32 []
    attn_sink: Any  # float32 [h], or None
    plan: SplitPlan | None

    @property
    def d_v(self) -> int:
        return self.main.cache.format.d_v

    @property
    def names_no_keys(self) -> bool:
        """As for dense operands."""
        return self.main.names_no_keys and (self.extra is None or self.extra.names_no_keys)
