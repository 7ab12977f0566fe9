"""Measures Engram on a GPU: what a lookup costs as the table grows, and what fetching from host memory adds to a layer.

    python -m mla_jax.bench.engram lookup            # device tables of 1e5 to 3e7 rows: us per lookup, rows checked
    python -m mla_jax.bench.engram prefetch          # tables in device, pinned host and numpy memory beside attention

`lookup` gives device time in the isolated regime of `mla_jax.bench.timer` (idle GPU, cold L2). `prefetch` gives wall
time per step of a chain of dependent steps, since part of the work is the host's: a step hashes its tokens, fetches
rows, runs one attention layer, then an Engram layer of DeepSeek-V4.1's sizes. A fetch that is hidden behind attention
adds nothing to the column `none` (rows fetched once, beforehand), whatever it takes alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.bench import inputs, timer, workloads
from mla_jax.nn import engram
from mla_jax.nn.engram import EngramConfig, EngramTable
from pallas_kernels.formats import BF16, E4M3

LOOKUP_ROWS = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000)
LOOKUP_TOKENS = (1, 128, 4096)
PREFETCH_BATCH = (8, 32, 128)
PREFETCH_ROWS = 4_000_000  # 1 GiB: far beyond the host's caches
FETCHES = ("none", "device", "pinned_host", "numpy")


def config_of_rows(rows: int, **changes: Any) -> EngramConfig:
    """DeepSeek-V4.1-Flash with one Engram layer, whose table has about `rows` rows."""
    config = EngramConfig.v41_flash(norm_eps=1e-6)
    assert config.multipliers is not None
    slots = rows // config.columns
    return EngramConfig.v41_flash(
        slots=slots, layer_ids=config.layer_ids[:1], multipliers=config.multipliers[:1], norm_eps=1e-6, **changes
    )


def row_bytes(rows: Any, width: int, xp: Any) -> Any:
    """A row's stored bytes as a function of its number, for checking: uint8 `[*n, width]`, finite as e4m3."""
    column = xp.arange(width, dtype=xp.int32).reshape((1,) * rows.ndim + (-1,))  # [*1, width]
    mixed = rows[..., None] * 73 + rows[..., None] // 256 * 31 + column * 7  # [*n, width]; int32 wraps alike anywhere
    return (mixed & 0x77).astype(xp.uint8)


def make_table(config: EngramConfig, where: str) -> EngramTable:
    """A table of `row_bytes`, every scale 1."""
    rows, width = config.num_rows[0], config.head_dim
    if where == "device":
        made = jax.jit(lambda: row_bytes(jnp.arange(rows, dtype=jnp.int32), width, jnp).view(E4M3))()
        return EngramTable(made, jnp.full((rows, width // 32), 127, jnp.uint8), rows)
    values = np.empty((rows, width), np.uint8)  # [rows, width]
    for start in range(0, rows, 1 << 20):
        part = np.arange(start, min(start + (1 << 20), rows), dtype=np.int32)
        values[start : start + len(part)] = row_bytes(part, width, np)
    table = EngramTable(values.view(E4M3), np.full((rows, width // 32), 127, np.uint8), rows)
    return table if where == "numpy" else engram.place(table, "pinned_host")


def random_rows(config: EngramConfig, tokens: int, sets: int, seed: int = 0) -> list[jax.Array]:
    """Rows as the hash spreads them: `sets` times int32 `[tokens, columns]`."""
    rng = np.random.default_rng(seed)
    windows = rng.integers(0, config.compressed_vocab_size, (sets, tokens, config.max_ngram)).astype(np.int32)
    return list(engram.hash_windows(config, jnp.asarray(windows))[:, :, 0])


def check_lookup(table: EngramTable, rows: jax.Array) -> None:
    """Raises AssertionError unless these rows, and the table's last ones, come back as they were made."""
    last = np.arange(table.num_rows - rows.shape[-1], table.num_rows, dtype=np.int32)[None]
    for asked in (np.asarray(rows), last):
        want = row_bytes(asked, table.head_dim, np).view(E4M3).astype(BF16)
        got = engram.lookup(table, jnp.asarray(asked))
        np.testing.assert_array_equal(np.asarray(got), want.reshape(got.shape))


def measure_lookup(sizes: tuple[int, ...] = LOOKUP_ROWS, repeats: int = 10) -> None:
    timer.require_gpu()
    lookup = jax.jit(engram.lookup)
    print(f"{'rows':>12}{'GiB':>8}" + "".join(f"{f'us, {t} tokens':>18}" for t in LOOKUP_TOKENS))
    for size in sizes:
        config = config_of_rows(size)
        table = make_table(config, "device")
        line = f"{table.num_rows:12}{table.num_rows * table.bytes_per_row / 2**30:8.2f}"
        for tokens in LOOKUP_TOKENS:
            sets = random_rows(config, tokens, repeats)
            check_lookup(table, sets[0])
            jax.block_until_ready(lookup(table, sets[0]))
            sample = timer.isolated(lambda i: jax.block_until_ready(lookup(table, sets[i])), repeats)  # noqa: B023
            line += f"{sample.us:18.1f}"
        print(line, flush=True)
        del table


def make_step(config: EngramConfig, token_map: jax.Array, layer: Callable, table: EngramTable | None) -> Callable:
    """One step, `(params, state, embeddings) -> state`: hash and fetch, a layer of attention, an Engram layer.

    A table in numpy arrays makes three dispatches of it: the host gathers rows while the GPU runs attention, having
    waited for the hash alone. Any other is one jitted function. No table: embeddings come with the call.
    """

    @jax.jit
    def before(tokens, history, position):
        rows, keep = engram.hash_tokens(config, token_map, tokens, history, position)
        return rows[:, :, 0], keep

    @jax.jit
    def after(params, state, out, embeddings, keep):
        x, tokens, history, position = state
        x = x + out[:, :, : config.hc_mult, :1].astype(x.dtype)  # [b, 1, hc, d]
        x = engram.forward(params, config, x, embeddings, keep)
        sampled = jnp.max(jnp.abs(x[..., 0, :8]), axis=-1).astype(jnp.int32) + tokens  # depends on the layers
        history = engram.advance(history, tokens, jnp.ones_like(position))
        return x, sampled % config.vocab_size, history, position + 1

    def step(params, state, table, layer_args, embeddings):
        rows, keep = before(*state[1:])
        if table is not None and not isinstance(table.values, np.ndarray):
            embeddings = engram.lookup(table, rows)  # [b, 1, embedding_dim]
        out = layer(*layer_args)
        if table is not None and isinstance(table.values, np.ndarray):
            embeddings = engram.lookup(table, rows)
        return after(params, state, out, embeddings, keep)

    on_host = table is not None and isinstance(table.values, np.ndarray)
    return step if on_host else jax.jit(step)


def measure_prefetch(
    batches: tuple[int, ...] = PREFETCH_BATCH,
    size: int = PREFETCH_ROWS,
    steps: int = 30,
    layer_of: Callable[[int], tuple[Callable, tuple]] | None = None,
    **changes: Any,
) -> dict[tuple[int, str], float]:
    """Prints, and returns by (batch, what), microseconds per step. `layer_of` replaces the layer (tests)."""
    config = config_of_rows(size, **changes)
    params = engram.init_params(config, jax.random.key(0))
    token_map = jnp.arange(config.vocab_size, dtype=jnp.int32) % config.compressed_vocab_size
    tables = {fetch: None if fetch == "none" else make_table(config, fetch) for fetch in FETCHES}
    columns = (*FETCHES, *(f"{fetch} alone" for fetch in FETCHES[1:]))
    print(f"{'batch':>6}" + "".join(f"{column:>20}" for column in columns) + "   (us per step)")
    times: dict[tuple[int, str], float] = {}
    for b in batches:
        layer, layer_args = (layer_of or dense_layer)(b)
        x = jax.random.normal(jax.random.key(1), (b, 1, config.hc_mult, config.hidden_size), jnp.float32)
        tokens = jax.random.randint(jax.random.key(2), (b, 1), 0, config.vocab_size, jnp.int32)
        start = (x.astype(config.dtype), tokens, engram.init_history(config, b), jnp.zeros(b, jnp.int32))
        rows = engram.hash_tokens(config, token_map, tokens)[0][:, :, 0]
        on_host = tables["numpy"]
        assert on_host is not None
        embeddings = engram.lookup(on_host, rows)
        results = {}
        for fetch, table in tables.items():
            step = make_step(config, token_map, layer, table)

            def chain(n, table=table, step=step, state=start, fixed=embeddings, layer_args=layer_args):
                for _ in range(n):
                    state = step(params, state, table, layer_args, fixed)
                return jax.block_until_ready(state)

            results[fetch] = np.asarray(chain(1)[0], np.float32)
            times[b, fetch] = per_step(chain, steps)
            np.testing.assert_allclose(results[fetch], results["none"], rtol=2e-2, atol=2e-2)
            if table is not None:
                lookup = engram.lookup if fetch == "numpy" else jax.jit(engram.lookup)

                def alone(n, table=table, lookup=lookup, rows=rows):
                    for _ in range(n):
                        jax.block_until_ready(lookup(table, rows))

                alone(2)
                times[b, f"{fetch} alone"] = per_step(alone, steps)
        print(f"{b:6}" + "".join(f"{times[b, column]:20.1f}" for column in columns), flush=True)
    return times


def dense_layer(b: int) -> tuple[Callable, tuple]:
    """Attention of a decode step over 4096 keys a request, and its arguments."""
    workload = workloads.dense(b, 1, 128, 4096)
    built = inputs.build(workload)
    return jax.jit(lambda caches, args: inputs.call(workload, caches, args)[0]), (built.caches, built.sets[0])


def per_step(chain: Callable[[int], Any], steps: int) -> float:
    """Microseconds a further step adds to a chain, by the host's clock; the median of 3."""

    def seconds(n: int) -> float:
        start = time.perf_counter()
        chain(n)
        return time.perf_counter() - start

    return statistics.median(seconds(1 + steps) - seconds(1) for _ in range(3)) / steps * 1e6


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure Engram lookups on a GPU.")
    parser.add_argument("what", choices=("lookup", "prefetch"))
    what = parser.parse_args(argv).what
    timer.require_gpu()
    if what == "lookup":
        measure_lookup()
    else:
        measure_prefetch()


if __name__ == "__main__":
    main()
