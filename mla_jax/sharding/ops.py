"""The public ops on every shard of a mesh, under the names and with the arguments that they have on one device.

Each method is one `jax.shard_map` around the op of `mla_jax`, so the kernels run unchanged on what a device holds. Only
the context axis communicates (`mla_jax.context`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mla_jax import cache as caches
from mla_jax import checks, decode
from mla_jax.cache import PagedKVCache
from mla_jax.quantize import ScaleRule
from mla_jax.sharding.layout import Layout
from pallas_kernels import schedule
from pallas_kernels.schedule import SplitPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Array, BFloat16, Float, Float32, Int, Int32


class DecodeSharding(Layout):
    """A `Layout` and the ops over it: data, head and context parallel decode, and their products.

        ds = DecodeSharding(mesh, data="data", heads="heads", context="context")

    Frozen and hashable: close over it, or pass it as a static argument. The ops are legal in and outside jit, over Auto
    and Explicit mesh axes, with the caches donated. Page ids and slots are global; see `mla_jax.sharding.layout` for
    who holds which page, and what a dense block table must look like.
    """

    def mla_decode(
        self,
        q: BFloat16[Array, "b s_q h d_qk"],
        cache: PagedKVCache,
        block_table: Int32[Array, "b max_pages"] | None,
        cache_seqlens: Int32[Array, "b"],
        *,
        sm_scale: float | Float32[Array, ""],
        is_causal: bool = False,
        plan: SplitPlan | None = None,
        config: Any = None,
        implementation: str | Sequence[str] | None = None,
        return_lse: bool = False,
    ):
        """`mla_jax.mla_decode` over the mesh.

        Args:
          q: [b, s_q, h, d_qk]; b divides into the data groups, h into the head ranks. Any number of heads a rank.
          cache: its data placed as `cache_sharding()`.
          block_table: global page ids, made by `make_table` or to its rule. None (page i is request i's whole cache):
            only without a context axis.
          plan: from this object's `plan_decode`.
          The others: as in `mla_jax.mla_decode`.

        Returns:
          out [b, s_q, h, d_v] and, with `return_lse`, lse [b, s_q, h], placed as `q_sharding()`.

        Raises:
          ValueError: as the op, and for shapes that do not divide or operands placed in another way.
        """
        self._check_q(q)
        self._check_cache(cache, "cache", shared=False)
        checks.static(is_causal, "is_causal", (bool, np.bool_))
        rows = P(self.data)
        if block_table is None:
            if self.num_context > 1:
                raise ValueError(
                    f"block_table is None and context={self.context!r}; accepted with a context axis: a table, whose "
                    "pages are spread over the ranks (make_table); or a DecodeSharding without a context axis"
                )
        else:
            block_table = checks.int32(block_table, "block_table", (q.shape[0], "max_pages"))
            self._check_operand(block_table, "block_table", rows)
        cache_seqlens = checks.int32(cache_seqlens, "cache_seqlens", (q.shape[0],))
        self._check_operand(cache_seqlens, "cache_seqlens", rows)
        self._check_plan(plan, "plan_decode")
        options = dict(is_causal=bool(is_causal), **_options(config, implementation))
        operands = dict(
            q=(q, self._q_spec), cache=(cache, self._cache_spec()), block_table=(block_table, rows),
            cache_seqlens=(cache_seqlens, rows), sm_scale=(_scale(sm_scale), P()), plan=(plan, self._plan_spec),
        )  # fmt: skip
        out, lse = self._attend(_dense, operands, options)
        return (out, lse) if return_lse else out

    def sparse_mla_decode(
        self,
        q: BFloat16[Array, "b s_q h d_qk"],
        cache: PagedKVCache,
        indices: Int32[Array, "b s_q topk"],
        *,
        sm_scale: float | Float32[Array, ""],
        topk_length: Int32[Array, "b *s_q"] | None = None,
        attn_sink: Float32[Array, "h"] | None = None,
        extra_cache: PagedKVCache | None = None,
        extra_indices: Int32[Array, "b s_q extra_topk"] | None = None,
        extra_topk_length: Int32[Array, "b *s_q"] | None = None,
        extra_shared: bool = False,
        plan: SplitPlan | None = None,
        config: Any = None,
        implementation: str | Sequence[str] | None = None,
        return_lse: bool = False,
    ):
        """`mla_jax.sparse_mla_decode` over the mesh. Indices are global slots.

        Args:
          extra_shared: whether `extra_cache` belongs to all data groups alike, `cache_sharding(shared=True)`, as a
            system prompt does. Static.
          The others: as in `mla_decode` above and `mla_jax.sparse_mla_decode`. The sink is applied once, after the
          ranks' results are merged.

        Raises:
          ValueError: as `mla_decode`.
        """
        self._check_q(q)
        self._check_cache(cache, "cache", shared=False)
        checks.static(extra_shared, "extra_shared", (bool, np.bool_))
        rows, heads = P(self.data), P(self.heads)
        operands: dict[str, tuple[Any, P]] = {
            "q": (q, self._q_spec), "cache": (cache, self._cache_spec()), "indices": (indices, rows),
            "sm_scale": (_scale(sm_scale), P()), "topk_length": (topk_length, rows), "attn_sink": (attn_sink, heads),
            "extra_indices": (extra_indices, rows), "extra_topk_length": (extra_topk_length, rows),
            "plan": (plan, self._plan_spec),
        }  # fmt: skip
        if attn_sink is not None:
            checks.array(attn_sink, "attn_sink", (q.shape[2],), jnp.float32, "one value a head")
        for name in ("indices", "topk_length", "extra_indices", "extra_topk_length"):
            x, spec = operands[name]
            if x is None:
                continue
            shapes: dict[int, checks.Shape] = {1: (q.shape[0],), 2: q.shape[:2], 3: (*q.shape[:2], "topk")}
            if name.endswith("indices") and q.shape[1] == 1:
                shapes[2] = (q.shape[0], "topk")
            x = checks.int32(x, name, shapes.get(getattr(x, "ndim", 3), shapes[3]))
            self._check_operand(x, name, spec)
            if name.endswith("indices") and x.shape[-1] == 0:  # XLA's partitioner crashes on arrays of width 0
                x = jnp.full((*x.shape[:-1], 1), -1, jnp.int32)
            operands[name] = x, spec
        if extra_cache is not None:
            self._check_cache(extra_cache, "extra_cache", bool(extra_shared))
            if extra_indices is None:
                raise ValueError("extra_cache is given without extra_indices; accepted: both or neither")
        operands["extra_cache"] = (extra_cache, self._cache_spec(bool(extra_shared)))
        self._check_plan(plan, "plan_sparse_decode")
        options = dict(extra_shared=bool(extra_shared), **_options(config, implementation))
        out, lse = self._attend(_sparse, operands, options)
        return (out, lse) if return_lse else out

    def append_kv(
        self,
        cache: PagedKVCache,
        kv: Float[Array, "n d_qk"],
        slots: Int[Array, "n"],
        *,
        scale_rule: ScaleRule = "pow2",
        shared: bool = False,
    ) -> PagedKVCache:
        """`mla_jax.append_kv` over the mesh: every rank writes the rows whose slots it holds. No communication.

        Args:
          cache: placed as `cache_sharding(shared=shared)`. Donate it, and rows are written in place.
          kv: [n, d_qk], the rows of data group g being the g-th of D equal runs (so `[b * s_q, d_qk]` in batch order).
            A slot of another group's pages is dropped. With `shared`: any order.
          slots: [n], global.
          shared: whether the cache belongs to all data groups alike. Static.

        Raises:
          ValueError: as the op, and for shapes that do not divide or operands placed in another way.
        """
        checks.static(shared, "shared", (bool, np.bool_))
        self._check_cache(cache, "cache", bool(shared))
        fmt = cache.format
        checks.array(kv, "kv", ("n", fmt.d_qk), fmt.compute_dtype, f"of format {fmt.name}")
        slots = checks.int32(slots, "slots", (kv.shape[0],))
        rows = P() if shared else P(self.data)
        if not shared:
            self._check_divides("kv", "rows", kv.shape[0], self.num_data)
        for x, name in ((kv, "kv"), (slots, "slots")):
            self._check_operand(x, name, rows)
        spec = self._cache_spec(bool(shared))
        operands = dict(cache=(cache, spec), kv=(kv, rows), slots=(slots, rows))
        return self._run(_append, operands, spec, dict(scale_rule=scale_rule, shared=bool(shared)))

    def slots_from_positions(
        self, positions: Int[Array, "b *n"], block_table: Int[Array, "b max_pages"], page_size: int
    ) -> jax.Array:
        """`mla_jax.slots_from_positions` over the mesh: global slots, placed as `row_sharding()`."""
        size = checks.page_size(page_size)
        positions = checks.int32(positions, "positions", None)
        if positions.ndim < 1:
            raise ValueError("positions has shape []; accepted: [b, ...], one row a request")
        block_table = checks.int32(block_table, "block_table", (positions.shape[0], "max_pages"))
        self._check_divides("positions", "rows", positions.shape[0], self.num_data)
        rows = P(self.data)
        for x, name in ((positions, "positions"), (block_table, "block_table")):
            self._check_operand(x, name, rows)
        operands = dict(positions=(positions, rows), block_table=(block_table, rows))
        return self._run(_slots, operands, rows, dict(page_size=size))

    def plan_decode(
        self,
        cache_seqlens: Int32[Array, "b"],
        *,
        s_q: int,
        num_heads: int,
        page_size: int,
        batch_invariant: bool = False,
    ) -> SplitPlan:
        """`mla_jax.plan_decode` for the share of every device; num_heads counts the heads of the whole model."""
        options = dict(s_q=s_q, num_heads=self._local_heads(num_heads), page_size=page_size)
        return self._plan(_plan_dense, cache_seqlens, dict(options, batch_invariant=batch_invariant))

    def plan_sparse_decode(
        self,
        topk: int,
        *,
        batch: int,
        s_q: int,
        num_heads: int,
        topk_length: Int32[Array, "b *s_q"] | None = None,
        extra_topk: int = 0,
        extra_topk_length: Int32[Array, "b *s_q"] | None = None,
        batch_invariant: bool = False,
    ) -> SplitPlan:
        """`mla_jax.plan_sparse_decode` for the share of every device. With a context axis it assumes that every rank
        holds its share of the keys; where that is wrong the plan still is right, only less balanced."""

        def lengths(x, width):
            return jnp.full(batch, width, jnp.int32) if x is None else x

        # An empty main scope is passed as one index that names nothing, see sparse_mla_decode.
        options = dict(s_q=s_q, num_heads=self._local_heads(num_heads), topk=max(topk, 1), extra_topk=extra_topk)
        both = (lengths(topk_length, topk), lengths(extra_topk_length, extra_topk))
        return self._plan(_plan_sparse, both, dict(options, batch_invariant=batch_invariant))

    # -- one way to run them all -----------------------------------------------------------------------------------

    @property
    def _q_spec(self) -> P:
        return P(self.data, None, self.heads)

    @property
    def _plan_spec(self) -> P:
        """Plans of all shards lie one after the other; head ranks share theirs."""
        return self._cache_spec()

    def _local_heads(self, num_heads: int) -> int:
        self._check_divides("num_heads", "heads", num_heads, self.num_heads)
        return num_heads // self.num_heads

    def _plan(self, function, lengths: Any, options: dict[str, Any]) -> SplitPlan:
        for x in jax.tree.leaves(lengths):
            self._check_divides("lengths", "rows", x.shape[0], self.num_data)
            self._check_operand(x, "lengths", P(self.data))
        return self._run(function, dict(lengths=(lengths, P(self.data))), self._plan_spec, options)

    def _attend(self, local, operands: dict[str, tuple[Any, Any]], options: dict[str, Any]) -> Any:
        """(out, lse) of an op."""
        q, fmt = operands["q"][0], operands["cache"][0].format
        if 0 in q.shape:
            return jnp.zeros((*q.shape[:3], fmt.d_v), q.dtype), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
        return self._run(local, operands, (self._q_spec, self._q_spec), options)

    def _run(self, local, operands: dict[str, tuple[Any, Any]], out_specs: Any, options: dict[str, Any]) -> Any:
        def place(x, spec):  # a spec for all leaves, or a tuple of them for a tuple
            if isinstance(spec, tuple):
                return tuple(map(place, x, spec))
            return jax.tree.map(lambda leaf: self._place(leaf, spec), x)

        placed = {name: place(x, spec) for name, (x, spec) in operands.items()}
        specs = tuple((name, spec) for name, (_, spec) in operands.items())
        return _sharded(placed, self, local, specs, out_specs, tuple(options.items()))

    def _check_q(self, q: Any) -> None:
        if getattr(q, "ndim", None) != 4:
            raise ValueError(f"q is {checks.describe(q)}; accepted: [b, s_q, h, d_qk]")
        self._check_divides("q", "requests", q.shape[0], self.num_data)
        self._check_divides("q", "heads", q.shape[2], self.num_heads)
        self._check_operand(q, "q", self._q_spec)

    def _check_plan(self, plan: Any, maker: str) -> None:
        if plan is None:
            return
        if not isinstance(plan, SplitPlan) or plan.parts.shape[0] != self.num_parts * (plan.num_parts + 1):
            raise ValueError(
                f"plan is for one device ({checks.describe(getattr(plan, 'parts', plan))}); accepted: None, or what "
                f"{maker} of this DecodeSharding returned"
            )


def _options(config: Any, implementation: Any) -> dict[str, Any]:
    if isinstance(implementation, list):
        implementation = tuple(implementation)
    return dict(config=config, implementation=implementation)


def _scale(sm_scale: Any) -> Any:
    """A Python number as an array, so that changing it does not recompile."""
    return sm_scale if hasattr(sm_scale, "dtype") else np.float32(sm_scale)


@functools.partial(jax.jit, static_argnames=("ds", "local", "specs", "out_specs", "options"), inline=True)
def _sharded(operands, ds: DecodeSharding, local, specs, out_specs, options):
    """`local(ds, **shards, **options)` on every device. Every axis of the mesh is manual in it."""
    body = lambda shards: local(ds, **shards, **dict(options))  # noqa: E731
    # check_vma: kernels do not say over which axes their results vary.
    mapped = jax.shard_map(body, mesh=ds.mesh, in_specs=(dict(specs),), out_specs=out_specs, check_vma=False)
    return mapped(operands)


# -- on one shard: arrays are local, page ids and slots global ---------------------------------------------------------


def _dense(ds: DecodeSharding, q, cache, block_table, cache_seqlens, **options):
    if block_table is not None:
        block_table = ds._local(block_table, ds._first_page(cache), cache.num_pages)  # [b, max_pages]
    attend = ds._over_context.mla_decode if ds._over_context else decode.mla_decode
    return attend(q, cache, block_table, cache_seqlens, return_lse=True, **options)


def _sparse(ds: DecodeSharding, q, cache, indices, extra_cache, extra_indices, extra_shared, **options):
    def own(indices, cache, shared=False):  # [b, s_q, topk], or [b, topk]
        return ds._local(indices, ds._first_page(cache, shared) * cache.page_size, cache.num_slots)

    if extra_cache is not None:
        options |= dict(extra_cache=extra_cache, extra_indices=own(extra_indices, extra_cache, extra_shared))
    attend = ds._over_context.sparse_mla_decode if ds._over_context else decode.sparse_mla_decode
    return attend(q, cache, own(indices, cache), return_lse=True, **options)


def _append(ds: DecodeSharding, cache, kv, slots, scale_rule, shared):
    own = ds._local(slots, ds._first_page(cache, shared) * cache.page_size, cache.num_slots)  # [n]
    return caches.append_kv(cache, kv, own, scale_rule=scale_rule)


def _slots(ds: DecodeSharding, positions, block_table, page_size):
    return caches.slots_from_positions(positions, block_table, page_size)


def _plan_dense(ds: DecodeSharding, lengths, page_size, **options):
    if ds._over_context:
        lengths = ds._over_context.own_tokens(jnp.maximum(lengths, 0), page_size)
    return schedule.plan_decode(lengths, page_size=page_size, **options)


def _plan_sparse(ds: DecodeSharding, lengths, topk, extra_topk, **options):
    main, extra = (jnp.maximum(x, 0) for x in lengths)
    if ds._over_context:
        main, extra = ds._over_context.share(main), ds._over_context.share(extra)
    return schedule.plan_sparse_decode(
        topk, batch=main.shape[0], topk_length=main, extra_topk=extra_topk,
        extra_topk_length=extra if extra_topk else None, **options,
    )  # fmt: skip
