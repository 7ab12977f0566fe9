"""Runs a golden (or random) layer through prefill and decode in the ways the tests compare."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.nn import model1, v32
from mla_jax.nn.config import V32Config
from tests.compiling import QUICK

PAGE = 16


@functools.cache
def compiled(function, **options):
    """The jitted `prefill` or `decode` of a module for one layer, the same object for all runners: compiled once per
    shape. The layer's ratio is static, so it is bound here. Unoptimised: compiling is what takes the time in tests."""
    names = inspect.signature(function).parameters
    return jax.jit(
        functools.partial(function, **options),
        static_argnames=[name for name in ("config", "chunk") if name in names],
        donate_argnames="cache",
        compiler_options=QUICK,
    )


class Runner:
    """One layer and its caches, for `batch` requests of up to `capacity` tokens each.

    Pages lie in the pools in a random order, and every pool starts full of NaN (or 0xff bytes): whatever is read must
    have been written first.
    """

    def __init__(self, config, params, *, batch=1, capacity=512, layer=0, step_tokens=512, seed=0, page_size=PAGE):
        self.config, self.params = config, params
        self.module = v32 if isinstance(config, V32Config) else model1
        rng = np.random.default_rng(seed)

        def table(columns, spare=3):
            pages = rng.permutation(batch * columns + spare)[: batch * columns]
            return jnp.asarray(pages.reshape(batch, columns), jnp.int32), batch * columns + spare

        if self.module is v32:
            self.tables, pages = table(-(-capacity // page_size))
            self.cache = v32.init_cache(config, pages, page_size)
            options = dict(layer=layer)
        else:
            window, window_pages = table(model1.window_columns(config, page_size, step_tokens))
            context, context_pages = table(-(-capacity // config.page_tokens))
            row = jnp.asarray(rng.permutation(batch + 2)[:batch], jnp.int32)
            self.tables = model1.Model1Tables(window, context, row)
            self.cache = model1.init_cache(
                config,
                window_pages=window_pages,
                context_pages=context_pages,
                rows=batch + 2,
                window_page_size=page_size,
            )
            options = dict(layer=config.layers[layer])
        self.cache = jax.tree.map(_poison, self.cache)
        self._prefill = compiled(self.module.prefill, **options)
        self._decode = compiled(self.module.decode, **options)

    def prefill(self, x, lengths=None, start=None, **options):
        """x [b, s, hidden] numpy -> out numpy float32."""
        b, s, _ = x.shape
        lengths = jnp.full(b, s, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
        start = jnp.zeros(b, jnp.int32) if start is None else jnp.asarray(start, jnp.int32)
        x = jnp.asarray(x, self.config.dtype)
        out, self.cache = self._prefill(
            self.params, self.config, self.cache, x, self.tables, lengths, start, **options
        )
        return np.asarray(out, np.float32)

    def decode(self, x, seqlens, **options):
        """x [b, s_q, hidden] numpy, seqlens [b] with the new tokens -> out numpy float32."""
        x, seqlens = jnp.asarray(x, self.config.dtype), jnp.asarray(seqlens, jnp.int32)
        out, self.cache = self._decode(self.params, self.config, self.cache, x, self.tables, seqlens, **options)
        return np.asarray(out, np.float32)


def _poison(leaf):
    value = 0xFF if leaf.dtype == jnp.uint8 else jnp.nan
    return jnp.full(leaf.shape, value, leaf.dtype)


def relative(got, want):
    """|got - want| / |want|, Frobenius."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def cosine(got, want):
    """Smallest cosine similarity over rows (the last axis)."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    dot = (got * want).sum(-1)
    return (dot / (np.linalg.norm(got, axis=-1) * np.linalg.norm(want, axis=-1))).min()
