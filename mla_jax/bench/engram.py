"""Measures Engram on a GPU: what a lookup costs as the table grows, and what fetching from host memory adds to a layer.

    python -m mla_jax.bench.engram lookup            # device tables of 1e5 to 3e7 rows: us per lookup, rows checked
    python -m mla_jax.bench.engram prefetch          # tables in device, pinned host and numpy memory beside attention

`lookup` gives device time in the isolated regime of `mla_jax.bench.timer` (idle GPU, cold L2). In `prefetch` a step
hashes its tokens, fetches rows, runs one attention layer, then an Engram layer of DeepSeek-V4.1's sizes, and every step
depends on the one before. `us a step` is device time of a chain of steps in one program, first kernel's start to last
kernel's end, which no dispatch is part of; then how much of it the kernel ran that gathers from host memory, and how
much of that beside other kernels. A fetch that is hidden adds nothing to the step whose rows were fetched beforehand
(`none`), whatever it takes alone. With numpy arrays the host is part of the step, three dispatches of it: `host us a
step` is wall time, to compare with `none` in as many dispatches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.bench import cupti, inputs, timer, workloads
from mla_jax.nn import engram
from mla_jax.nn.engram import EngramConfig, EngramTable
from pallas_kernels.formats import BF16, E4M3

LOOKUP_ROWS = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000)
LOOKUP_TOKENS = (1, 128, 4096)
PREFETCH_BATCH = (8, 32, 128)
PREFETCH_ROWS = 4_000_000  # 1 GiB: far beyond the host's caches
FETCHES = ("none", "device", "pinned_host", "numpy")
COLUMNS = dict(us="us a step", gather_us="of it gathering", beside_us="beside others", host_us="host us a step")


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


def make_step(config: EngramConfig, token_map: jax.Array) -> tuple[Callable, Callable]:
    """What a step does around a layer of attention: `before(state) -> rows, keep` hashes its tokens, and
    `after(params, state, out, embeddings, keep) -> state` runs an Engram layer. All depend on the step before."""

    def before(state):
        _, tokens, history, position = state
        rows, keep = engram.hash_tokens(config, token_map, tokens, history, position)
        return rows[:, :, 0], keep

    def after(params, state, out, embeddings, keep):
        x, tokens, history, position = state
        x = x + out[:, :, : config.hc_mult, :1].astype(x.dtype)  # [b, 1, hc, d]
        x = engram.forward(params, config, x, embeddings, keep)
        sampled = tokens * 5 + 1 + jnp.max(jnp.abs(x[..., 0, :8]), axis=-1).astype(jnp.int32)  # other ones every step
        history = engram.advance(history, tokens, jnp.ones_like(position))
        return x * 0.5, sampled % config.vocab_size, history, position + 1

    return before, after


def measure_prefetch(
    batches: tuple[int, ...] = PREFETCH_BATCH,
    size: int = PREFETCH_ROWS,
    steps: int = 50,
    layer_of: Callable[[int], tuple[Callable, tuple]] | None = None,
    traced: Callable[[Callable[[], Any]], list[cupti.Activity]] | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Prints, and returns, a record a batch and way to fetch. `layer_of` and `traced` stand in for a GPU in tests."""
    config = config_of_rows(size, **changes)
    params = engram.init_params(config, jax.random.key(0))
    token_map = jnp.arange(config.vocab_size, dtype=jnp.int32) % config.compressed_vocab_size
    tables = {fetch: None if fetch == "none" else make_table(config, fetch) for fetch in FETCHES}
    on_host = tables["numpy"]
    assert on_host is not None
    before, after = make_step(config, token_map)
    hashed, rest = jax.jit(before), jax.jit(after)
    records: list[dict[str, Any]] = []
    print(f"{'batch':>6}{'rows from':>13}" + "".join(f"{title:>18}" for title in COLUMNS.values()))
    for b in batches:
        layer, layer_args = (layer_of or dense_layer)(b)
        attention = jax.jit(layer)
        x = jax.random.normal(jax.random.key(1), (b, 1, config.hc_mult, config.hidden_size), jnp.float32)
        tokens = jax.random.randint(jax.random.key(2), (b, 1), 0, config.vocab_size, jnp.int32)
        start = (x.astype(config.dtype), tokens, engram.init_history(config, b), jnp.zeros(b, jnp.int32))
        rows = hashed(start)[0]
        fixed = engram.lookup(on_host, rows)  # [b, 1, embedding_dim]; of the first step
        for fetch, table in tables.items():

            def one_program(params, state, table, fixed, layer_args, layer=layer):
                rows, keep = before(state)
                if table is None:  # as much to do for them as for rows that were fetched
                    embeddings = jnp.where(rows[:, :, :1] >= 0, fixed, 0)
                else:
                    embeddings = engram.lookup(table, rows)
                return after(params, state, layer(state[0], *layer_args), embeddings, keep)

            def three_dispatches(params, state, table, fixed, layer_args, attention=attention):
                rows, keep = hashed(state)
                out = attention(state[0], *layer_args)
                embeddings = fixed if table is None else engram.lookup(table, rows)  # while attention runs
                return rest(params, state, out, embeddings, keep)

            record: dict[str, Any] = dict(batch=b, rows_from=fetch)
            arguments = (params, start, table, fixed, layer_args)
            if fetch != "numpy":
                record |= _device_times(one_program, arguments, steps, traced or _traced)
            if fetch in ("none", "numpy"):

                def chain(n, arguments=arguments, step=three_dispatches):
                    params, state, *others = arguments
                    for _ in range(n):
                        state = step(params, state, *others)
                    return jax.block_until_ready(state)

                chain(1)
                record["host_us"] = per_step(chain, steps)
            got = fixed if table is None else engram.lookup(table, rows)
            np.testing.assert_array_equal(np.asarray(got), np.asarray(fixed))
            cells = ("" if (cell := record.get(name)) is None else f"{cell:.2f}" for name in COLUMNS)
            print(f"{b:6}{fetch:>13}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
            records.append(record)
    return records


def _device_times(
    step: Callable, arguments: tuple, steps: int, traced: Callable[[Callable[[], Any]], list[cupti.Activity]]
) -> dict[str, float]:
    """Of a chain of dependent steps in one program, so that the host's dispatch is no part of it."""

    @jax.jit
    def chain(params, state, *others):
        return jax.lax.scan(lambda state, _: (step(params, state, *others), None), state, None, length=steps)[0]

    def run():
        return jax.block_until_ready(chain(*arguments))

    run()
    runs = [traced(run) for _ in range(3)]
    activities = sorted(runs, key=cupti.span_us)[1]
    gathers = [a for a in activities if "row_gather" in a.name]
    times = dict(us=cupti.span_us(activities) / steps, kernels=len(activities) / steps)
    if gathers:
        beside = sum(_beside(g, activities) for g in gathers)
        times |= dict(gather_us=cupti.busy_us(gathers) / steps, beside_us=beside / steps)
    return times


def _beside(gather: cupti.Activity, activities: list[cupti.Activity]) -> float:
    """Microseconds of a gather during which other kernels ran."""
    spans = [(max(a.start_ns, gather.start_ns), min(a.end_ns, gather.end_ns)) for a in activities if a is not gather]
    found, reached = 0, gather.start_ns
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        found += max(0, end - max(start, reached))
        reached = max(reached, end)
    return found / 1e3


def _traced(run: Callable[[], Any]) -> list[cupti.Activity]:
    with cupti.trace() as activities:
        run()
    return activities


def dense_layer(b: int) -> tuple[Callable, tuple]:
    """Attention of a decode step over 4096 keys a request, `(x, *arguments) -> out`, and its arguments."""
    workload = workloads.dense(b, 1, 128, 4096)
    built = inputs.build(workload)

    def layer(x, caches, args):
        return inputs.call(workload, caches, args | timer.linked({"q": args["q"]}, x))[0]

    return layer, (built.caches, built.sets[0])


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
    parser.add_argument("--batches", type=int, nargs="+", default=PREFETCH_BATCH, help="requests, for prefetch")
    parser.add_argument("--json", type=Path, help="where to write prefetch's records")
    args = parser.parse_args(argv)
    timer.require_gpu()
    if args.what == "lookup":
        measure_lookup()
        return
    records = measure_prefetch(tuple(args.batches))
    if args.json:
        args.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
