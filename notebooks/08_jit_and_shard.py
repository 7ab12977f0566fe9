# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A decode step, jitted and sharded
#
# This is how the library is used: one pure function for a step, under `jax.jit`, with the cache donated so that new rows are
# written in place; then the same function over a mesh of devices. Eight CPU devices stand in for GPUs here; on GPUs the
# code is the same.

# %%
import functools
import re
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import AxisType

import mla_jax
from mla_jax import BF16_576
from mla_jax.sharding import DecodeSharding, step_cost

jax.config.update("jax_num_cpu_devices", 8)
plt.rcParams.update({"figure.dpi": 90, "font.size": 11})
COLOURS = plt.get_cmap("tab10").colors
rng = np.random.default_rng(0)

# %% [markdown]
# ## One device
#
# Eight requests, each with a block table of global page ids. A step takes the new tokens' rows and queries, writes the rows,
# and attends. Everything that changes from step to step is data.

# %%
b, h, page_size, num_pages, scale = 8, 16, 16, 256, 0.135
lengths = rng.integers(40, 300, b).astype(np.int32)  # [b] tokens so far
local = DecodeSharding(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), data="data")
table = jnp.asarray(local.make_table(lengths + 16, num_pages=num_pages, page_size=page_size, seed=0))  # [b, max_pages]
filled = jnp.asarray(rng.standard_normal((num_pages, page_size, BF16_576.d_qk)), jnp.bfloat16)  # [pages, page_size, d_qk]


@functools.partial(jax.jit, donate_argnames="cache")
def step(cache, q, row, table, length):
    slots = mla_jax.slots_from_positions(length[:, None], table, page_size)[:, 0]  # [b]
    cache = mla_jax.append_kv(cache, row, slots)
    out = mla_jax.mla_decode(q, cache, table, length + 1, sm_scale=scale)  # [b, s_q, h, d_v]
    return cache, out


def tokens(seed):
    """A step's queries [b, s_q, h, d_qk] and rows [b, d_qk]."""
    one, two = jax.random.split(jax.random.key(seed))
    return jax.random.normal(one, (b, 1, h, 576), jnp.bfloat16), jax.random.normal(two, (b, 576), jnp.bfloat16)


cache, length, milliseconds, wanted = mla_jax.pack_kv(filled, BF16_576), jnp.asarray(lengths), [], []
address = cache.data.unsafe_buffer_pointer()
for number in range(12):
    q, row = tokens(number)
    begin = time.perf_counter()
    cache, out = jax.block_until_ready(step(cache, q, row, table, length))
    milliseconds.append(1e3 * (time.perf_counter() - begin))
    wanted.append(np.asarray(out, np.float32))
    length = length + 1
print("programs compiled:", step._cache_size(), "  cache written in place:", cache.data.unsafe_buffer_pointer() == address)

figure, ax = plt.subplots(figsize=(8.5, 2.8), layout="constrained")
ax.bar(range(12), milliseconds, color=["#C44E52"] + ["#4C72B0"] * 11)
ax.set(yscale="log", xlabel="step", ylabel="milliseconds, this CPU", xticks=range(12))
ax.text(0.6, milliseconds[0] * 0.5, "the first step compiles; other lengths do not", color="#C44E52")
plt.show()

# %% [markdown]
# What would run on the device at hand, and what was passed over, and why:

# %%
print(mla_jax.explain(q, cache, table, length))

# %% [markdown]
# ## Eight devices
#
# `DecodeSharding` has the same ops with the same arguments. It spreads requests over the *data* axis, query heads over the
# *heads* axis, and the keys of every request over the *context* axis. The only new thing is where pages may lie: a request
# uses pages of its own data group, and with a context axis its columns go round the ranks. `make_table` hands them out so.

# %%
sizes = (2, 2, 2)
mesh = jax.make_mesh(sizes, ("data", "heads", "context"), axis_types=(AxisType.Auto,) * 3)
ds = DecodeSharding(mesh, data="data", heads="heads", context="context")


def make_step(ds):
    @functools.partial(jax.jit, donate_argnames="cache")
    def step(cache, q, row, table, length):
        slots = ds.slots_from_positions(length[:, None], table, page_size)[:, 0]  # [b]
        cache = ds.append_kv(cache, row, slots)
        out = ds.mla_decode(q, cache, table, length + 1, sm_scale=scale)  # [b, s_q, h, d_v]
        return cache, out

    return step


def place(ds, q, row, table, length):
    rows = ds.row_sharding()
    return (jax.device_put(q, ds.q_sharding()), *(jax.device_put(x, rows) for x in (row, table, length)))


own_table = ds.make_table(lengths + 16, num_pages=num_pages, page_size=page_size, seed=0)  # [b, max_pages]
# The pool of the first part again, every page where the new table wants it.
moved = np.zeros(filled.shape, np.float32)
for old, new in zip(np.asarray(table), own_table, strict=True):
    moved[new[new >= 0]] = np.asarray(filled, np.float32)[old[old >= 0]]
pool = mla_jax.pack_kv(jnp.asarray(moved, jnp.bfloat16), BF16_576)

cache, length, sharded_step = jax.device_put(pool, ds.cache_sharding()), jnp.asarray(lengths), make_step(ds)
worst = 0.0
for number in range(4):
    arguments = place(ds, *tokens(number), jnp.asarray(own_table), length)
    cache, out = sharded_step(cache, *arguments)
    got = np.asarray(out, np.float32)
    worst = max(worst, np.linalg.norm(got - wanted[number]) / np.linalg.norm(wanted[number]))
    length = length + 1
print(f"eight devices against one: relative difference {worst:.1e}, programs compiled: {sharded_step._cache_size()}")
assert worst < 2e-3

# %% [markdown]
# ## Who holds what
#
# Colours are devices. Queries are cut over data and heads, and both context ranks hold them; the pool's pages are cut over
# data and context, and both head ranks hold a copy, since all heads read the same rows.

# %%
figure, axes = plt.subplots(1, 2, figsize=(12, 3.7), layout="constrained", width_ratios=(1, 1.5))


def holders(x, axes_of_interest):
    """For each block of an array: (slices of the named axes, ids of the devices that hold it)."""
    found = {}
    for shard in x.addressable_shards:
        where = tuple((s.start or 0, s.stop if s.stop is not None else x.shape[i]) for i, s in enumerate(shard.index) if i in axes_of_interest)
        found.setdefault(where, []).append(shard.device.id)
    return found


def block(axes, x, y, width, height, devices):
    """A block in the colour of its device, hatched in that of the second one if two hold it."""
    first, *second = sorted(devices)
    hatch = dict(hatch="//", edgecolor=COLOURS[second[0]]) if second else dict(edgecolor="white")
    axes.add_patch(plt.Rectangle((x, y), width, height, facecolor=COLOURS[first], **hatch))
    text = " and ".join(map(str, sorted(devices)))
    label = dict(boxstyle="round", facecolor="white", edgecolor="none")
    axes.text(x + width / 2, y + height / 2, f"device{'s' * bool(second)} {text}", ha="center", va="center", bbox=label, fontsize=10)


for ((b0, b1), (h0, h1)), devices in holders(arguments[0], (0, 2)).items():
    block(axes[0], h0, b0, h1 - h0, b1 - b0, devices)
for ((p0, p1),), devices in holders(cache.data, (0,)).items():
    for i, device in enumerate(sorted(devices)):
        block(axes[1], p0, i, p1 - p0, 0.94, [device])
axes[0].set(xlim=(0, h), ylim=(b, 0), xlabel="head", ylabel="request", title="queries (and results)", xticks=range(0, h + 1, 4))
axes[1].set(xlim=(0, num_pages), ylim=(2, 0), xlabel="page of the pool", title="the cache", yticks=(0.5, 1.5), yticklabels=("head\nrank 0", "head\nrank 1"))
axes[1].set_xticks(range(0, num_pages + 1, 64))
plt.show()

# %% [markdown]
# ## What is sent
#
# The compiled step says it. Data and head parallel send nothing; context parallel exchanges partial results, whose size does
# not depend on the length of the contexts.

# %%
text = sharded_step.lower(cache, *arguments).compile().as_text()
found = re.findall(r" = (.*?) (all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\(", text)
print("collectives:", {name: sum(n == name for _, n in found) for _, name in found})
assert {name for _, name in found} <= {"all-gather", "all-to-all"}

# %% [markdown]
# ## Which axis when
#
# `mla_jax.sharding.step_cost` counts the bytes of one layer's step on each of four GPUs; the times come from an H200's data
# sheet (4.8 TB/s of memory, 450 GB/s of NVLink each way, collectives at an assumed 10 us each). Estimates, not measurements.

# %%
rates = dict(hbm_bytes_per_s=4.8e12, link_bytes_per_s=450e9, collective_us=10.0)
cases = {"128 requests\nof 4,096": (128, 4096), "32 requests\nof 32,768": (32, 32768), "4 requests\nof 262,144": (4, 262144), "1 request\nof 1,048,576": (1, 2**20)}
ways = {"one GPU": {}, "heads=4": {"heads": 4}, "context=4": {"context": 4}, "data=4": {"data": 4}}
figure, ax = plt.subplots(figsize=(11, 3.8), layout="constrained")
for i, (way, axis_sizes) in enumerate(ways.items()):
    for j, (requests, keys) in enumerate(cases.values()):
        if way == "data=4" and requests < 4:
            ax.text(j + 0.2 * i - 0.3, 8, "no", ha="center", fontsize=8, color="grey")
            continue
        cost = step_cost(BF16_576, batch=requests, s_q=1, num_heads=128, keys=keys, **axis_sizes)
        read = cost.kv_read_bytes / rates["hbm_bytes_per_s"] * 1e6
        bar = dict(width=0.18, color=COLOURS[i])
        ax.bar(j + 0.2 * i - 0.3, read, **bar, label=way if j == 0 else None)
        ax.bar(j + 0.2 * i - 0.3, cost.step_us(**rates) - read, bottom=read, hatch="////", edgecolor="white", **bar)
ax.bar(0, 0, color="grey", hatch="////", edgecolor="white", label="merging")
ax.set(xticks=range(len(cases)), xticklabels=list(cases), ylabel="us a layer, estimated")
ax.legend(ncols=5, loc="upper center")
ax.set_ylim(0, 330)
plt.show()
