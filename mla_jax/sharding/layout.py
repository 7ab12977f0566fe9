"""Who holds what: the parts of a pool of pages, the specs of every operand, and block tables that respect them.

The rules, all of them:

* The batch is cut over the data axis: data group g serves rows [g * b / D, (g + 1) * b / D). Rows of length 0 pad it.
* Heads are cut over the heads axis. The cache has none, so every rank of that axis holds the same pages.
* A pool of n pages is cut, in order, into D * C equal *parts*. Part (g, r) belongs to data group g, context rank r; it
  holds pages [(g * C + r) * n / (D * C), ...). A *shared* pool (a system prompt, say) belongs to every data group
  alike and is cut into C parts.
* Page ids and slots are **global**: they count over the whole pool, whoever holds the page. The same tables and
  indices serve one device that holds the whole pool. A page of another part is no key here, and is not written here.
* Dense decode with a context axis: the page in column j of a request's table lies in the part of rank j % C. Every
  rank thus reads 1/C of any context, and the new tokens of a long one do not all go to the same rank. Sparse decode
  reads a slot wherever in its data group it lies.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mla_jax import checks
from mla_jax.cache import PagedKVCache
from mla_jax.context import ContextAxis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Array, Int32


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the names of those of its axes that decoding is spread over.

    Attributes:
      mesh: its axes may be Auto or Explicit; axes not named below hold copies.
      data: axis that cuts the batch, or None.
      heads: axis that cuts the query heads, or None.
      context: axis that cuts the keys of every request, or None.

    Raises:
      ValueError: no such axis in the mesh, or one axis in two roles.
    """

    mesh: Mesh
    data: str | None = None
    heads: str | None = None
    context: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh):
            raise ValueError(f"mesh is {checks.describe(self.mesh)}; accepted: a jax.sharding.Mesh (jax.make_mesh)")
        named: dict[str, str] = {}
        for role in ("data", "heads", "context"):
            axis = getattr(self, role)
            if axis is None:
                continue
            if axis not in self.mesh.axis_names:
                raise ValueError(
                    f"{role}={axis!r} is no axis of the mesh; accepted: None, or one of {list(self.mesh.axis_names)} "
                    f"(name the axis in jax.make_mesh, or give {role} the name that the mesh has)"
                )
            if axis in named:
                raise ValueError(f"{role}={axis!r} is already {named[axis]}; accepted: a mesh axis in one role only")
            named[axis] = role

    # -- sizes -----------------------------------------------------------------------------------------------------

    def _size(self, axis: str | None) -> int:
        return 1 if axis is None else self.mesh.shape[axis]

    @property
    def num_data(self) -> int:
        """D: data groups."""
        return self._size(self.data)

    @property
    def num_heads(self) -> int:
        """Ranks that the heads are cut over."""
        return self._size(self.heads)

    @property
    def num_context(self) -> int:
        """C: ranks that the keys of a request are cut over."""
        return self._size(self.context)

    @property
    def num_parts(self) -> int:
        """Parts of a pool that is not shared."""
        return self.num_data * self.num_context

    # -- specs and shardings ---------------------------------------------------------------------------------------

    def _parts_axes(self, shared: bool = False) -> tuple[str, ...]:
        axes = (self.context,) if shared else (self.data, self.context)
        return tuple(axis for axis in axes if axis is not None)

    def _cache_spec(self, shared: bool = False) -> P:
        axes = self._parts_axes(shared)
        return P(axes if len(axes) > 1 else axes[0]) if axes else P()

    def sharding(self, spec: P) -> NamedSharding:
        """A spec over this mesh."""
        return NamedSharding(self.mesh, spec)

    def cache_sharding(self, *, shared: bool = False) -> NamedSharding:
        """Of a cache's `data`: for `PagedKVCache.zeros(sharding=...)`, `jax.device_put`, or jit's out_shardings."""
        return self.sharding(self._cache_spec(shared))

    def row_sharding(self) -> NamedSharding:
        """Of arrays whose first axis is the batch: tables, lengths, indices; rows and slots of `append_kv`."""
        return self.sharding(P(self.data))

    def q_sharding(self) -> NamedSharding:
        """Of q, out [b, s_q, h, d] and lse [b, s_q, h]."""
        return self.sharding(P(self.data, None, self.heads))

    def head_sharding(self) -> NamedSharding:
        """Of attn_sink [h]."""
        return self.sharding(P(self.heads))

    # -- pages -----------------------------------------------------------------------------------------------------

    def pages_of(self, group: int, rank: int, num_pages: int, *, shared: bool = False) -> range:
        """Ids of the pages that data group `group` and context rank `rank` hold, of a pool of `num_pages`."""
        self._check_divides("the pool", "pages", num_pages, self.num_context if shared else self.num_parts)
        if not (0 <= group < self.num_data and 0 <= rank < self.num_context):
            raise ValueError(
                f"group={group}, rank={rank}; accepted: below {self.num_data} groups and {self.num_context} ranks"
            )
        part = rank if shared else group * self.num_context + rank
        each = num_pages // (self.num_context if shared else self.num_parts)
        return range(part * each, (part + 1) * each)

    def group_of(self, row: int, b: int) -> int:
        """The data group that serves row `row` of a batch of b."""
        self._check_divides("the batch", "rows", b, self.num_data)
        return row // (b // self.num_data)

    def make_table(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        num_pages: int,
        page_size: int,
        max_pages: int | None = None,
        seed: int | None = None,
    ) -> np.ndarray:
        """A block table that respects the rules, for requests that all begin with an empty pool. Runs on the host.

        Args:
          lengths: [b] tokens that each request shall have room for; b must divide into the data groups.
          num_pages: pages of the whole pool.
          page_size: tokens a page.
          max_pages: columns; by default what the longest request needs.
          seed: hand pages out in a random order; None: in order.

        Returns:
          int32 [b, max_pages] of global page ids, -1 where a request has no page.

        Raises:
          ValueError: a part of the pool has too few pages, or shapes that do not divide.
        """
        lengths = np.asarray(lengths, np.int64)
        need = -(-np.maximum(lengths, 0) // page_size)  # [b]
        columns = int(need.max(initial=0)) if max_pages is None else max_pages
        if need.max(initial=0) > columns:
            raise ValueError(f"max_pages={columns}; accepted: at least {need.max()}, for {lengths.max()} tokens")
        rng = np.random.default_rng(seed)
        free: dict[tuple[int, int], list[int]] = {}
        table = np.full((len(lengths), columns), -1, np.int32)
        for row, pages in enumerate(need):
            group = self.group_of(row, len(lengths))
            for column in range(pages):
                rank = column % self.num_context
                if (group, rank) not in free:
                    ids = np.asarray(self.pages_of(group, rank, num_pages))
                    free[group, rank] = list((ids if seed is None else rng.permutation(ids))[::-1])
                if not free[group, rank]:
                    raise ValueError(
                        f"num_pages={num_pages}: data group {group}, context rank {rank} has "
                        f"{num_pages // self.num_parts} pages, too few for its requests; accepted: more pages"
                    )
                table[row, column] = free[group, rank].pop()
        return table

    def check_table(
        self, block_table: np.ndarray | jax.Array, lengths: np.ndarray | jax.Array, *, num_pages: int, page_size: int
    ) -> None:
        """Raises ValueError if a page that dense decode would read lies in the wrong part. Runs on the host.

        Inside jit a table is data: a page in the wrong part is no key, without a word.
        """
        table, lengths = np.asarray(block_table), np.asarray(lengths)
        for row in range(table.shape[0]):
            group = self.group_of(row, table.shape[0])
            for column in range(min(-(-int(lengths[row]) // page_size), table.shape[1])):
                pages = self.pages_of(group, column % self.num_context, num_pages)
                if table[row, column] not in pages:
                    raise ValueError(
                        f"block_table[{row}, {column}] is page {table[row, column]}; accepted: {pages.start} to "
                        f"{pages.stop - 1}, the part of data group {group}, context rank {column % self.num_context} "
                        "(make_table and pages_of know the rule)"
                    )

    def pad_batch(self, x: Any, fill: int | float = 0) -> Any:
        """Pads the first axis of every array of a tree to the next multiple of the data groups.

        Pad lengths with 0 and slots with -1; what other operands hold in padded rows does not matter.
        """

        def pad(a):
            rows = -a.shape[0] % self.num_data
            return jnp.pad(a, [(0, rows)] + [(0, 0)] * (a.ndim - 1), constant_values=jnp.asarray(fill, a.dtype))

        return jax.tree.map(pad, x)

    # -- inside shard_map ------------------------------------------------------------------------------------------

    @property
    def _over_context(self) -> ContextAxis | None:
        """The context axis, if it has more than one rank."""
        if self.context is None or self.num_context == 1:
            return None
        return ContextAxis(self.context, self.num_context)

    def _rank(self) -> jax.Array | int:
        """Context rank of this shard."""
        return self._over_context.rank if self._over_context else 0

    def _first_page(self, cache: PagedKVCache, shared: bool = False) -> jax.Array | int:
        """Global id of this shard's page 0; the number 0 if it holds the whole pool."""
        part: Any = self._rank()
        if self.num_data > 1 and not shared:
            part = lax.axis_index(self.data) * self.num_context + part
        return part * cache.num_pages

    def _local(self, ids: Int32[Array, "*n"], first: Any, count: int) -> jax.Array:
        """Global ids -> ids of this shard, which holds [first, first + count); -1 for those of others.

        Where it holds all, ids stay as they are, garbage included: to the ops that is no page either.
        """
        if isinstance(first, int):
            return ids
        here = (ids >= first) & (ids < first + count)
        return jnp.where(here, ids - first, -1)

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check_divides(self, name: str, what: str, count: int, among: int) -> None:
        if count % among:
            raise ValueError(
                f"{name} has {count} {what}; accepted: a multiple of {among}, so that all ranks of the mesh "
                f"{dict(self.mesh.shape)} hold equally many (next: {-(-count // among) * among}; pad_batch pads rows)"
            )

    def _check_cache(self, cache: Any, name: str, shared: bool) -> None:
        checks.cache(cache, name)
        self._check_divides(name, "pages", cache.num_pages, self.num_context if shared else self.num_parts)
        if self._is_placed(cache.data, self._cache_spec(shared)) is False:
            got = getattr(_known_sharding(cache.data), "spec", _known_sharding(cache.data))
            raise ValueError(
                f"{name}.data is placed as {got}; accepted: {self._cache_spec(shared)} over the mesh "
                f"{dict(self.mesh.shape)}. Make it with PagedKVCache.zeros(..., sharding=ds.cache_sharding("
                f"{'shared=True' if shared else ''})), or move it with jax.device_put: decoding never moves a cache"
            )

    def _check_operand(self, x: Any, name: str, spec: P) -> None:
        """An operand is partitioned as it is needed, or not at all (which costs nothing to cut)."""
        if self._is_placed(x, spec) is False and not _is_whole(x):
            raise ValueError(
                f"{name} is partitioned as {_known_sharding(x).spec}; accepted: {spec} over the mesh "
                f"{dict(self.mesh.shape)}, or unpartitioned. Move it with jax.sharding.reshard or jax.device_put"
            )

    def _is_placed(self, x: Any, spec: P) -> bool | None:
        """Whether x lies as `spec` says; None where nobody knows yet (Auto axes under jit)."""
        known = _known_sharding(x)
        if known is None:
            return None
        if isinstance(known, NamedSharding) and not isinstance(x, jax.core.Tracer):
            return known.is_equivalent_to(self.sharding(spec), x.ndim)
        if isinstance(known, NamedSharding):
            return self._entries(known.spec, x.ndim) == self._entries(spec, x.ndim)
        return known.is_equivalent_to(self.sharding(spec), x.ndim)

    def _entries(self, spec: P, ndim: int) -> list[tuple[str, ...]]:
        """A spec as one tuple of axes a dimension, without axes of one device."""
        entries = [e if isinstance(e, tuple) else () if e is None else (e,) for e in spec]
        entries += [()] * (ndim - len(entries))
        return [tuple(axis for axis in entry if self.mesh.shape.get(axis, 0) != 1) for entry in entries]

    @property
    def _is_explicit(self) -> bool:
        return any(kind == AxisType.Explicit for kind in self.mesh.axis_types)

    def _place(self, x: Any, spec: P) -> Any:
        """x (None passes) cut as `spec` says, where that is not left to XLA."""
        if x is None:
            return None
        if not isinstance(x, jax.core.Tracer):
            return jax.device_put(x, self.sharding(spec))
        return jax.sharding.reshard(x, self.sharding(spec)) if self._is_explicit else x


def _known_sharding(x: Any) -> Any:
    """x's sharding, or None where it is not known: numpy arrays, and tracers over Auto axes."""
    if isinstance(x, jax.core.Tracer):
        sharding = getattr(jax.typeof(x), "sharding", None)
        mesh = getattr(sharding, "mesh", None)
        if mesh is None or mesh.empty or not any(kind == AxisType.Explicit for kind in mesh.axis_types):
            return None
        return sharding
    return getattr(x, "sharding", None)


def _is_whole(x: Any) -> bool:
    """Whether every device that has x has all of it."""
    sharding = _known_sharding(x)
    if isinstance(x, jax.core.Tracer):
        return all(entry is None for entry in sharding.spec)
    return sharding.is_fully_replicated
