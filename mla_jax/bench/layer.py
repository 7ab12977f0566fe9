"""Device time of one attention layer at its published size, part by part: DeepSeek-V3.2 and DeepSeek-V4-Pro.

    python -m mla_jax.bench.layer [--batch 64] [--context 32768] [--out layer.json] [--parts attention,...]

Random bfloat16 weights, full caches in random page order, one decode step. Times are kernel times from CUPTI: the
median over calls of the sum of a call's kernels (`busy`), and of first start to last end (`span`, launch gaps included:
outside a CUDA graph those are the host's). Parts run one after the other, each jitted alone; "step" is the whole layer
in one program. Alternatives of a part are checked against each other before they are timed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import PagedKVCache, pack_kv, slots_from_positions, sparse_mla_decode
from mla_jax.bench import cupti
from mla_jax.nn import Model1Config, Model1Tables, V32Config, indexer, init_params, model1, rope, steps, topk, v32
from mla_jax.nn.layers import project, rms_norm

CALLS = 10
WARM_CALLS = 2


@dataclasses.dataclass(frozen=True)
class Part:
    """One row of the table: `run(*arguments)`. With `carry` it returns a pair and donates its first argument, whose
    place the first of the pair takes."""

    model: str
    name: str
    variant: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    carry: bool = False


@dataclasses.dataclass(frozen=True)
class Time:
    model: str
    part: str
    variant: str
    busy_us: float
    span_us: float
    kernels: int
    longest: str


def compiled(part: Part) -> Callable[..., Any] | NotImplementedError:
    """The part's executable, or why there is none."""
    try:
        return jax.jit(part.run, donate_argnums=0 if part.carry else ()).lower(*part.arguments).compile()
    except NotImplementedError as reason:  # no such kernel in this version
        return reason


def measure(part: Part, run: Callable[..., Any]) -> Time:
    """Kernel times of one part, in microseconds."""
    arguments = part.arguments
    busy, span, activities = [], [], []
    for call in range(WARM_CALLS + CALLS):
        if call < WARM_CALLS:
            result = jax.block_until_ready(run(*arguments))
        else:
            with cupti.trace() as activities:
                result = jax.block_until_ready(run(*arguments))
            busy.append(cupti.busy_us(activities))
            span.append(cupti.span_us(activities))
        if part.carry:
            arguments = (result[0], *arguments[1:])
    longest = max(activities, key=lambda a: a.end_ns - a.start_ns).name
    median = statistics.median
    return Time(part.model, part.name, part.variant, median(busy), median(span), len(activities), longest)


def random_pool(pool: PagedKVCache, key: jax.Array) -> PagedKVCache:
    """A pool full of rows: 61 random pages over and over."""
    rows = jax.random.normal(key, (61, pool.page_size, pool.format.d_qk)).astype(pool.format.compute_dtype)
    pages = pack_kv(rows, pool.format).data  # [61, *page]
    return pool.replace(jnp.take(pages, jnp.arange(pool.num_pages) % 61, axis=0))


def random_table(rng: np.random.Generator, batch: int, columns: int) -> jax.Array:
    return jnp.asarray(rng.permutation(batch * columns).reshape(batch, columns), jnp.int32)


def indexer_parts(model: str, k: int, scoring: tuple[Any, ...]) -> Iterator[Part]:
    """Scores by both implementations and every top-k, after checking that they agree."""
    visible = scoring[-1]  # [b, 1]
    score = {name: functools.partial(indexer.scores, implementation=name) for name in ("kernel", "xla")}
    scores = {name: jax.jit(f)(*scoring) for name, f in score.items()}
    limit = int(visible.max())
    difference = jnp.max(jnp.abs(scores["kernel"] - scores["xla"])[..., :limit]) / jnp.max(jnp.abs(scores["xla"]))
    print(f"# {model}: greatest difference of the two scores {float(difference):.2e} of the largest")
    for name, f in score.items():
        yield Part(model, "indexer scores", name, f, scoring)
    values = jax.random.normal(jax.random.key(9), scores["xla"].shape)  # distinct, unlike those of one page many times
    columns = {}
    for method in ("kernel", "radix", "chunked", "sort"):
        f = functools.partial(topk.select_topk, k=k, method=method)
        columns[method] = np.sort(np.asarray(jax.jit(f)(values, visible)), axis=-1)
        same = np.array_equal(columns[method], columns["kernel"])
        print(f"# {model}: top-k by {method} {'agrees' if same else 'DIFFERS'}")
        yield Part(model, "top-k", method, f, (values, visible))


def _append(pool, rows, slots, rule):
    return steps.append_rows(pool, rows, slots, rule), ()


def v32_parts(batch: int, context: int) -> Iterator[Part]:
    config = V32Config.deepseek_v3_2(num_layers=1)
    rng, page = np.random.default_rng(0), 64
    params = init_params(config, 0, jax.random.key(0))
    table = random_table(rng, batch, -(-context // page))
    cache = v32.init_cache(config, table.size, page)
    assert cache.index is not None
    kv, index = random_pool(cache.kv, jax.random.key(1)), random_pool(cache.index, jax.random.key(2))
    x = jax.random.normal(jax.random.key(3), (batch, 1, config.hidden_size), jnp.bfloat16)
    seqlens = jnp.full((batch,), context, jnp.int32)
    step = steps.decode_step(seqlens, 1)
    cos, sin = rope.cos_sin(step.positions, config.rope)

    def projections(params, x):
        q_latent = rms_norm(project(x, params["wq_a"]), params["q_norm"], config.norm_eps)
        q = v32.absorbed_query(params, config, q_latent, cos, sin)
        row = v32.latent_row(params, config, x, cos, sin)
        key = v32.index_key(params, config, x, cos, sin)
        iq = project(q_latent, params["index_wq_b"]).reshape(batch, 1, config.index_heads, -1)
        iq = indexer.hadamard(rope.rotate_head(iq, cos[:, :, None], sin[:, :, None]))
        return q, row, key, iq, indexer.head_weights(x, params["index_weights"], config.index_dim)

    yield Part("V3.2", "projections", "", projections, (params, x))
    q, row, key, iq, weights = jax.jit(projections)(params, x)
    slots = slots_from_positions(step.positions, table, page)

    appending = (("kv", kv, row, "pow2"), ("index", index, key, indexer.SCALE_RULE))
    for name, pool, rows, rule in appending:
        for times in (1, 2):
            many, places = jnp.tile(rows, (times, 1, 1)), jnp.concatenate([slots, slots - 1])[: times * batch]
            run = functools.partial(_append, rule=rule)
            arguments = (jax.tree.map(jnp.copy, pool), many, places)
            yield Part("V3.2", "append", f"{name}, b={times * batch}", run, arguments, carry=True)
    yield from indexer_parts("V3.2", config.index_topk, (iq, weights, index, table, step.visible))
    chosen = np.stack([rng.permutation(context)[: config.index_topk] for _ in range(batch)])[:, None]
    indices = slots_from_positions(jnp.asarray(chosen, jnp.int32), table, page)
    plan = jax.jit(functools.partial(v32.plan, config, s_q=1))(cache, table, seqlens)

    def attention(q, kv, indices, plan, implementation):
        return sparse_mla_decode(q, kv, indices, sm_scale=config.sm_scale, plan=plan, implementation=implementation)

    for name in ("mosaic", "xla"):
        run = functools.partial(attention, implementation=name)
        yield Part("V3.2", "attention", name, run, (q, kv, indices, plan))
    o = jnp.zeros((batch, 1, config.num_heads, 512), jnp.bfloat16) + 0.1
    yield Part("V3.2", "output", "", v32.output, (params, o))

    def whole(cache, params, x, table, seqlens):
        plan = v32.plan(config, cache, table, seqlens, 1)
        return v32.decode(params, config, cache, x, table, seqlens, plan=plan)[::-1]

    yield Part("V3.2", "step", "", whole, (v32.V32Cache(kv, index, 1), params, x, table, seqlens), carry=True)


def model1_parts(batch: int, context: int) -> Iterator[Part]:
    for ratio in (4, 128):
        yield from _model1_layer(ratio, batch, context)


def _model1_layer(ratio: int, batch: int, context: int) -> Iterator[Part]:
    model = f"V4-Pro ratio {ratio}"
    config = dataclasses.replace(Model1Config.deepseek_v4_pro(), ratios=(ratio,))
    rng, page = np.random.default_rng(0), 64
    params = init_params(config, 0, jax.random.key(0))
    columns = model1.window_columns(config, page, 1)
    tables = Model1Tables(
        random_table(rng, batch, columns),
        random_table(rng, batch, -(-context // config.page_tokens)),
        jnp.arange(batch, dtype=jnp.int32),
    )
    cache = model1.init_cache(
        config,
        window_pages=batch * columns,
        context_pages=tables.context.size,
        rows=batch,
        window_page_size=page,
    )
    part = cache.of(ratio)
    assert part is not None
    entries = random_pool(part.entries, jax.random.key(1))
    index = None if part.index is None else random_pool(part.index, jax.random.key(2))
    part = dataclasses.replace(part, entries=entries, index=index)
    window = random_pool(cache.window, jax.random.key(3))
    cache = model1.Model1Cache(window, part if ratio == 4 else None, part if ratio == 128 else None, 1)
    x = jax.random.normal(jax.random.key(4), (batch, 1, config.hidden_size), jnp.bfloat16)
    seqlens = jnp.full((batch,), context, jnp.int32)
    step = steps.decode_step(seqlens, 1)
    cos, sin = rope.cos_sin(step.positions, config.rope_of(ratio))

    def projections(params, x):
        q_latent = rms_norm(project(x, params["wq_a"]), params["q_norm"], config.norm_eps)
        q = model1.query(params, config, q_latent, cos, sin)
        out = [q, model1.window_row(params, config, x, cos, sin)]
        prefixes = ["compress", "index_compress"] if ratio == 4 else ["compress"]
        out += [project(x, params[f"{p}_{w}"], dtype=jnp.float32) for p in prefixes for w in ("wkv", "wgate")]
        if ratio == 4:
            iq = project(q_latent, params["index_wq_b"]).reshape(batch, 1, config.index_heads, -1)
            out.append(indexer.hadamard(rope.rotate_tail(iq, cos[:, :, None], sin[:, :, None])))
            out.append(indexer.head_weights(x, params["index_weights"], config.index_dim))
        return out

    yield Part(model, "projections", "", projections, (params, x))
    q, row, *rest = jax.jit(projections)(params, x)
    slots = slots_from_positions(step.positions % (columns * page), tables.window, page)
    append = functools.partial(_append, rule="pow2")
    yield Part(model, "append", f"window, b={batch}", append, (jax.tree.map(jnp.copy, window), row, slots), carry=True)

    def compress(rings, params, x, row, start, count):
        here = dataclasses.replace(step, start=start, count=count)
        return model1._new_entries(params, config, "compress", x, rings, row, here, ratio)[::-1]

    arguments = (jnp.copy(part.rings), params, x, tables.row, step.start, step.count)
    yield Part(model, "compressor", "with its projections", compress, arguments, carry=True)
    visible = step.visible // ratio
    capacity = tables.context.shape[1] * part.entries.page_size
    if index is not None:
        iq, weights = rest[-2:]
        yield from indexer_parts(model, config.index_topk, (iq, weights, index, tables.context, visible))
        chosen = np.stack([rng.permutation(context // 4)[: config.index_topk] for _ in range(batch)])[:, None]
    else:
        chosen = np.tile(np.arange(capacity), (batch, 1, 1))
    extra = slots_from_positions(jnp.asarray(chosen, jnp.int32), tables.context, part.entries.page_size)
    last = context - 1 - np.tile(np.arange(config.window), (batch, 1, 1))
    main = slots_from_positions(jnp.asarray(last % (columns * page), jnp.int32), tables.window, page)
    plan = jax.jit(functools.partial(model1.plan, config, s_q=1))(cache, tables, seqlens)[ratio]

    def attention(q, window, main, entries, extra, sink, plan, implementation):
        return sparse_mla_decode(
            *(q, window, main),
            sm_scale=config.sm_scale,
            attn_sink=sink,
            extra_cache=entries,
            extra_indices=extra,
            plan=plan,
            implementation=implementation,
        )

    for name in ("mosaic", "xla"):
        run = functools.partial(attention, implementation=name)
        yield Part(model, "attention", name, run, (q, window, main, entries, extra, params["sink"], plan))
    o = jnp.zeros((batch, 1, config.num_heads, config.head_dim), jnp.bfloat16) + 0.1
    run = functools.partial(model1.output, config=config, cos=cos, sin=sin)
    yield Part(model, "output", "", lambda params, o: run(params, o=o), (params, o))

    def whole(cache, params, x, tables, seqlens):
        plan = model1.plan(config, cache, tables, seqlens, 1)
        return model1.decode(params, config, cache, x, tables, seqlens, plan=plan)[::-1]

    yield Part(model, "step", "", whole, (cache, params, x, tables, seqlens), carry=True)


def table(times: list[Time]) -> str:
    """The results as Markdown."""
    lines = ["| model | part | variant | busy us | span us | kernels | longest kernel |", "|---" * 7 + "|"]
    for t in times:
        cells = (t.model, t.part, t.variant, f"{t.busy_us:.1f}", f"{t.span_us:.1f}", t.kernels, t.longest[:48])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--models", default="v32,model1")
    parser.add_argument("--parts", default="", help="comma-separated names of parts; default: all")
    parser.add_argument("--out", help="write the times as JSON")
    options = parser.parse_args()
    jax.config.update("jax_default_device", jax.devices("cuda")[0])
    wanted = set(filter(None, options.parts.split(",")))
    times = []
    for models in options.models.split(","):
        parts = list({"v32": v32_parts, "model1": model1_parts}[models](options.batch, options.context))
        parts = [part for part in parts if not wanted or part.name in wanted]
        with concurrent.futures.ThreadPoolExecutor() as pool:  # compiling is all of the waiting
            runs = list(pool.map(compiled, parts))
        for part, run in zip(parts, runs, strict=True):
            if isinstance(run, NotImplementedError):
                print(f"# {part.model}, {part.name}, {part.variant}: {run}")
                continue
            times.append(measure(part, run))
            print(table(times[-1:]).splitlines()[-1], flush=True)
            if options.out:
                with open(options.out, "w") as f:
                    json.dump([dataclasses.asdict(t) for t in times], f, indent=1)
    print(table(times))


if __name__ == "__main__":
    main()
