"""The attention modules of `mla_jax.nn` on every shard of a mesh: data, head and context parallel, and their products.

A step runs whole on each device (`jax.shard_map` around the module's own function), on what the device holds:

* Rows of x, tables and lengths, and every pool of the caches, are cut over the data axis. Page ids and ring rows are
  global and counted within a layer, as without a mesh; of p pages (or rows), data group g owns the g-th run of p / D.
  A token whose page another group owns has no place: it is not written, and its output is NaN.
* Pools that grow with the context (latents and index keys of V3.2, compressed entries and index keys of V4) are cut
  over the context axis too, by the rule of `mla_jax.sharding.layout`: of p pages, part (g, r) owns run g * C + r, and
  column j of a table names a page of rank j % C. Elsewhere a page is as good as one of another group. V4's windows and
  rings, a few tokens a request, are the same on every rank.
* Heads are cut over the heads axis, and with them the weights that belong to heads (`weights.HEAD_AXIS`). Latents,
  caches and the indexer are the same on every rank of that axis. Each rank projects its heads' part of the output; one
  sum over the axis, the size of the output, is all that is sent.
* Over the context axis every rank computes the projections, scores the index keys that it holds, and sends its k best
  scores with their positions; all find the same k best of those, the ones that one device would choose, and attend to
  what is theirs. Partial results are merged as those of the ops are, the sink counts once.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mla_jax import checks
from mla_jax.nn import model1, v32
from mla_jax.nn.config import Model1Config, Model1Layer, V32Config
from mla_jax.nn.weights import HEAD_AXIS
from mla_jax.sharding.ops import DecodeSharding

if TYPE_CHECKING:
    from mla_jax.nn.weights import Params


@dataclasses.dataclass(frozen=True)
class ModuleSharding:
    """A config of `mla_jax.nn` and a `DecodeSharding`; its methods are those of the config's module.

        modules = ModuleSharding(config, DecodeSharding(mesh, data="data", heads="heads"))
        params = modules.place_params(params)
        cache = modules.init_cache(num_pages, page_size)
        out, cache = modules.decode(params, cache, x, block_table, cache_seqlens)

    Frozen and hashable: close over it, or pass it as a static argument. Arrays have their global shapes.

    Raises:
      ValueError: heads (or the output's groups of heads) that do not divide.
    """

    config: V32Config | Model1Config
    ds: DecodeSharding

    def __post_init__(self) -> None:
        for name in ("num_heads", "o_groups"):
            count = getattr(self.config, name, self.ds.num_heads)
            if count % self.ds.num_heads:
                raise ValueError(
                    f"{name}={count}; accepted: a multiple of {self.ds.num_heads}, the ranks of heads={self.ds.heads!r}"
                )

    # -- placing -------------------------------------------------------------------------------------------------------

    def param_shardings(self, params: Params) -> dict[str, NamedSharding]:
        """Where each parameter of a layer lies."""
        return {name: self.ds.sharding(self._param_spec(name)) for name in params}

    def place_params(self, params: Params) -> Params:
        """A layer's parameters, moved to where `decode` wants them."""
        return jax.device_put(params, self.param_shardings(params))

    def init_cache(self, *args: Any, **options: Any) -> Any:
        """Empty caches of all layers, cut over data and context; arguments as of the module's `init_cache`.

        Raises:
          ValueError: pages or rows that do not divide into the data groups, or into those and the context ranks.
        """
        counts = dict(zip(("num_pages",), args, strict=False)) | options
        parts = dict(num_pages=self.ds.num_parts, context_pages=self.ds.num_parts)
        for name in ("num_pages", "window_pages", "context_pages", "rows"):
            if name in counts:
                among = parts.get(name, self.ds.num_data)
                self.ds._check_divides("init_cache", f"{name} a layer", counts[name], among)
        places = dict(sharding=self.ds.cache_sharding())
        if isinstance(self.config, Model1Config):
            places["window_sharding"] = self.ds.row_sharding()
        return self._module.init_cache(self.config, *args, **options, **places)

    # -- running -------------------------------------------------------------------------------------------------------

    def plan(self, cache: Any, tables: Any, cache_seqlens: jax.Array, s_q: int) -> Any:
        """The split plans of one decode step, for `decode`; as the module's `plan`."""
        leaves, structure, specs = self._pools(cache)
        operands = dict(pools=(leaves, specs), tables=(tables, P(self.ds.data)))
        operands["cache_seqlens"] = (cache_seqlens, P(self.ds.data))
        self._check(cache, cache_seqlens)
        options = dict(structure=structure, config=self._local_config, s_q=s_q)
        return self.ds._run(_plan, operands, self.ds._plan_spec, options)

    def prefill(
        self,
        params: Params,
        cache: Any,
        x: jax.Array,
        tables: Any,
        lengths: jax.Array,
        start: jax.Array | None = None,
        *,
        layer: Any = None,
        chunk: int | None = None,
    ) -> tuple[jax.Array, Any]:
        """The module's `prefill`; x `[b, s, hidden]`, b a multiple of the data groups (`DecodeSharding.pad_batch`)."""
        begin = jnp.zeros(x.shape[0], jnp.int32) if start is None else start
        rows = dict(x=x, tables=tables, lengths=lengths, start=begin)
        return self._run_module("prefill", params, cache, layer, rows, chunk=chunk)

    def decode(
        self,
        params: Params,
        cache: Any,
        x: jax.Array,
        tables: Any,
        cache_seqlens: jax.Array,
        *,
        layer: Any = None,
        plan: Any = None,
    ) -> tuple[jax.Array, Any]:
        """The module's `decode`; x `[b, s_q, hidden]`, `plan` from this object's `plan`."""
        rows = dict(x=x, tables=tables, cache_seqlens=cache_seqlens, plan=plan)
        return self._run_module("decode", params, cache, layer, rows)

    def _run_module(self, name: str, params: Params, cache: Any, layer: Any, rows: dict[str, Any], **static: Any):
        self._check(cache, rows["x"])
        place: Any = 0 if layer is None else layer
        if isinstance(self.config, Model1Config):
            layer = self.config.layers[0] if layer is None else layer
            static["ratio"], place = layer.ratio, (layer.layer, layer.rank)
        operands: dict[str, tuple[Any, Any]] = {key: (value, P(self.ds.data)) for key, value in rows.items()}
        if "plan" in rows:
            operands["plan"] = (rows["plan"], self.ds._plan_spec)
        leaves, structure, specs = self._pools(cache)
        operands["pools"] = (leaves, specs)
        operands["place"] = (jax.tree.map(jnp.int32, place), P())
        for axis in (None, 0, 1):  # one operand for each way that parameters are cut
            some = {key: w for key, w in params.items() if HEAD_AXIS.get(key) == axis}
            operands[f"params_{axis}"] = (some, self._head_spec(axis))
        options = dict(name=name, config=self._local_config, structure=structure, **static)
        out, leaves = self.ds._run(_module_step, operands, (P(self.ds.data), specs), options)
        return out, jax.tree.unflatten(structure, leaves)

    # -- parts ---------------------------------------------------------------------------------------------------------

    @property
    def _module(self) -> Any:
        return _module_of(self.config)

    @property
    def _local_config(self) -> V32Config | Model1Config:
        """The config of what one rank computes."""
        ranks = self.ds.num_heads
        local = dict(num_heads=self.config.num_heads // ranks)
        if isinstance(self.config, Model1Config):
            local["o_groups"] = self.config.o_groups // ranks
        return dataclasses.replace(self.config, **local)  # type: ignore[arg-type]

    def _pools(self, cache: Any) -> tuple[tuple[Any, ...], Any, tuple[P, ...]]:
        """The pools of a cache, its structure, and how each pool is cut."""
        pools, structure = jax.tree_util.tree_flatten_with_path(cache)
        specs = [self._pool_spec(jax.tree_util.keystr(path)) for path, _ in pools]
        return tuple(pool for _, pool in pools), structure, tuple(specs)

    def _pool_spec(self, name: str) -> P:
        """`name`: of a pool within its cache."""
        return P(self.ds.data) if "window" in name or "rings" in name else self.ds._cache_spec()

    def _head_spec(self, axis: int | None) -> P:
        return P() if axis is None else P(*[None] * axis, self.ds.heads)

    def _param_spec(self, name: str) -> P:
        return self._head_spec(HEAD_AXIS.get(name))

    def _check(self, cache: Any, x: Any) -> None:
        self._module.check_cache(self.config, cache)
        for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
            name = f"cache{jax.tree_util.keystr(path)}"
            spec = self._pool_spec(name)
            among = self.ds.num_parts if spec == self.ds._cache_spec() else self.ds.num_data
            self.ds._check_divides(name, "pages or rows", leaf.shape[0], among)
            if self.ds._is_placed(leaf, spec) is False:
                raise ValueError(
                    f"{name} is not cut as {spec} over the mesh {dict(self.ds.mesh.shape)}; make the cache "
                    "with ModuleSharding.init_cache, or move it with jax.device_put: decoding never moves a cache"
                )
        if getattr(x, "ndim", 0) < 1:
            raise ValueError(f"x is {checks.describe(x)}; accepted: [b, s, hidden]")
        self.ds._check_divides("x", "requests", x.shape[0], self.ds.num_data)


# -- on one shard: arrays are local, page ids global -------------------------------------------------------------------


def _module_of(config: V32Config | Model1Config) -> Any:
    return v32 if isinstance(config, V32Config) else model1


def _local_tables(ds: DecodeSharding, cache: Any, tables: Any, ratio: int | None) -> Any:
    """Page ids and rows of this shard, -1 for those of others; in a table whose columns belong to context ranks, each
    page's number on its rank. `ratio`: of the layer, for MODEL1."""
    group = lax.axis_index(ds.data) if ds.data is not None else 0

    def own(ids: jax.Array, count: int) -> jax.Array:  # [b, columns], or [b]
        return ds._local(ids, group * count, count)

    def spread(ids: jax.Array, count: int) -> jax.Array:  # [b, columns]
        rank = lax.rem(lax.broadcasted_iota(jnp.int32, ids.shape, 1), jnp.int32(ds.num_context))
        return ds._local(ids, (group * ds.num_context + rank) * count, count)

    if isinstance(cache, v32.V32Cache):
        return spread(tables, cache.pages_per_layer)
    window = own(tables.window, cache.pages_per_layer)
    part = cache.of(ratio or 0)
    if part is None:  # context and rows are not read
        return dataclasses.replace(tables, window=window)
    context, row = spread(tables.context, part.pages_per_layer), own(tables.row, part.rows_per_layer)
    return model1.Model1Tables(window, context, row)


def _plan(ds: DecodeSharding, pools, tables, cache_seqlens, structure, config, s_q):
    cache = jax.tree.unflatten(structure, pools)
    tables = _local_tables(ds, cache, tables, None)
    return _module_of(config).plan(config, cache, tables, cache_seqlens, s_q, context=ds._over_context)


def _module_step(
    ds: DecodeSharding, pools, x, tables, place, params_None, params_0, params_1, name, config, structure, ratio=None,
    **more,
):  # fmt: skip
    cache = jax.tree.unflatten(structure, pools)
    layer = place if ratio is None else Model1Layer(ratio, *place)
    function = getattr(_module_of(config), name)
    params = {**params_None, **params_0, **params_1}
    tables = _local_tables(ds, cache, tables, ratio)
    rows = [more.pop(key) for key in ("lengths", "cache_seqlens", "start") if key in more]  # in the module's order
    out, cache = function(
        params, config, cache, x, tables, *rows, layer=layer, context=ds._over_context, **more
    )
    return (lax.psum(out, ds.heads) if ds.num_heads > 1 else out), tuple(jax.tree.leaves(cache))
