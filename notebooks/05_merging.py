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
# # Attention in parts: log-sum-exp merging and context parallel
#
# Attention over a set of keys can be computed over parts of the set, on several SMs or several GPUs, and put together
# exactly. All it takes is one number more for each part and head: the *log-sum-exp* of its scores. One function of the
# library does it, `mla_jax.merge_partials`, for split-KV, for two caches, and for requests that are spread over GPUs.

# %%
import itertools
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mla_jax
from mla_jax.sharding import DecodeSharding

jax.config.update("jax_num_cpu_devices", 8)  # CPU devices stand in for GPUs
plt.rcParams.update({"figure.dpi": 90, "font.size": 11})
COLOURS = ("#4C72B0", "#DD8452", "#55A868", "#8172B3")
rng = np.random.default_rng(4)

# %% [markdown]
# ## One query, 48 keys, three parts
#
# Above: each part is a softmax of its own, and its weights add up to 1. Below: the weights of attention over all keys.
# Within a part they have the same shape; only the part's share differs, and that is exp(lse_part - lse_all).

# %%
scores = rng.normal(0, 1.4, 48) + np.repeat([0.0, 1.3, -0.8], 16)  # [keys]
parts = scores.reshape(3, 16)  # [parts, keys]
lses = np.log(np.exp(parts).sum(1))  # [parts]
lse = np.log(np.exp(scores).sum())  # []
figure, axes = plt.subplots(2, 1, figsize=(11, 4.8), layout="constrained", sharex=True)
for i, colour in enumerate(COLOURS[:3]):
    at = np.arange(16) + 16 * i
    axes[0].bar(at, np.exp(parts[i] - lses[i]), color=colour)
    axes[1].bar(at, np.exp(parts[i] - lse), color=colour)
    axes[0].text(at.mean(), 0.53, f"part {i}: lse {lses[i]:.2f}", ha="center", color=colour)
    axes[1].text(at.mean(), 0.29, f"share exp({lses[i]:.2f} - {lse:.2f}) = {np.exp(lses[i] - lse):.2f}", ha="center", color=colour)
axes[0].set(ylim=(0, 0.6), ylabel="weight", title="a softmax a part")
axes[1].set(ylim=(0, 0.33), ylabel="weight", title=f"one softmax over all: lse {lse:.2f}", xlabel="key")
plt.show()

# %% [markdown]
# ## What goes wrong when it is done wrong
#
# The same attention over 300 keys of a cache, cut into four unequal parts, merged in ways that have been seen in the wild.
# The bars are the relative error of the result, on a logarithmic scale.

# %%
b, h, page_size, num_pages = 2, 8, 16, 64
fmt, scale = mla_jax.F32_576, 0.05
kv = jnp.asarray(rng.standard_normal((num_pages, page_size, fmt.d_qk)), jnp.float32)  # [pages, page_size, d_qk]
cache = mla_jax.pack_kv(kv, fmt)
q = jnp.asarray(rng.standard_normal((b, 1, h, fmt.d_qk)), jnp.float32)  # [b, s_q, h, d_qk]
slots = jnp.asarray(rng.permutation(cache.num_slots)[: b * 300].reshape(b, 1, 300), jnp.int32)  # [b, s_q, topk]
sink = jnp.asarray(rng.normal(5, 1, h), jnp.float32)  # [h]

attend = lambda slots, **more: mla_jax.sparse_mla_decode(q, cache, slots, sm_scale=scale, return_lse=True, **more)  # noqa: E731
cuts = (0, 20, 60, 140, 300)
outs, lses = zip(*(attend(slots[..., a:z]) for a, z in itertools.pairwise(cuts)), strict=True)
outs, lses = jnp.stack(outs), jnp.stack(lses)  # [parts, b, s_q, h, d_v], [parts, b, s_q, h]
whole, whole_lse = attend(slots)
with_sink, _ = attend(slots, attn_sink=sink)


def error(got, want):
    return float(jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want))


each_sink = 1 / (1 + jnp.exp(sink - lses))  # [parts, b, s_q, h]: the sink in every part
counts = jnp.diff(jnp.asarray(cuts)) / 300  # [parts]
ways = {
    "merge_partials": error(mla_jax.merge_partials(outs, lses)[0], whole),
    "merge_partials, with a sink": error(mla_jax.merge_partials(outs, lses, attn_sink=sink)[0], with_sink),
    "parts rounded to bf16 before": error(mla_jax.merge_partials(outs.astype(jnp.bfloat16), lses)[0], whole),
    "lse in base 2, taken as natural": error(mla_jax.merge_partials(outs, lses / np.log(2))[0], whole),
    "parts weighted by their lengths": error(jnp.einsum("p,p...->...", counts, outs), whole),
    "plain mean of the parts": error(outs.mean(0), whole),
    "sink applied in every part": error(mla_jax.merge_partials(outs * each_sink[..., None], lses)[0], with_sink),
}
figure, ax = plt.subplots(figsize=(10, 3.8), layout="constrained")
bars = ax.barh(list(ways), list(ways.values()), color=["#55A868"] * 2 + ["#DD8452"] + ["#C44E52"] * 4)
ax.bar_label(bars, [f" {v:.1g}" for v in ways.values()])
ax.invert_yaxis()
ax.set(xscale="log", xlim=(1e-8, 30), xlabel="relative error of the result")
plt.show()
assert ways["merge_partials"] < 1e-5 and ways["merge_partials, with a sink"] < 1e-5

# %% [markdown]
# Parts without keys are no special case: their result is 0 and their lse minus infinity, which counts for nothing.
#
# ## Context parallel: a request over four GPUs
#
# `DecodeSharding` with a context axis spreads the keys of every request over the devices of that axis. The rule for dense
# decode: the page in column j of a block table belongs to device j mod 4. `make_table` hands out pages that way. Left, the
# block table of two requests; right, the pool, whose pages lie on the devices in equal runs. Numbers are page ids: global
# ones, so the same table also serves one device that holds the whole pool.

# %%
mesh = jax.make_mesh((4,), ("context",), devices=jax.devices()[:4])
ds = DecodeSharding(mesh, context="context")
lengths = np.array([180, 110], np.int32)  # [b] tokens
table = ds.make_table(lengths, num_pages=num_pages, page_size=page_size, seed=0)  # [b, max_pages]
owner = {page: rank for rank in range(4) for page in ds.pages_of(0, rank, num_pages)}

figure, axes = plt.subplots(1, 2, figsize=(12, 3), layout="constrained", width_ratios=(1.2, 1))
for (request, column), page in np.ndenumerate(table):
    if page >= 0:
        axes[0].add_patch(plt.Rectangle((column, request), 0.94, 0.9, color=COLOURS[owner[page]]))
        axes[0].text(column + 0.47, request + 0.45, page, ha="center", va="center", color="white")
axes[0].set(xlim=(0, table.shape[1]), ylim=(2, 0), xlabel="column of the block table", title="block table, coloured by device")
axes[0].set_yticks((0.45, 1.45), ("request 0", "request 1"))
axes[0].set_xticks(np.arange(table.shape[1]) + 0.47, range(table.shape[1]))
used = set(table[table >= 0].tolist())
for page in range(num_pages):
    row, column = divmod(page, 16)
    colour = COLOURS[owner[page]]
    axes[1].add_patch(plt.Rectangle((column, row), 0.9, 0.86, facecolor=colour if page in used else "none", edgecolor=colour))
axes[1].set(xlim=(-0.1, 16), ylim=(4, -0.1), title="the pool: filled pages are in use", xticks=[])
axes[1].set_yticks(np.arange(4) + 0.43, [f"device {i}: pages {16 * i} to {16 * i + 15}" for i in range(4)])
plt.show()

# %% [markdown]
# ## The result, and what is sent for it
#
# Each device attends to its own pages; the devices then exchange partial results and log-sum-exps and merge. What XLA
# compiled shows it: an all-to-all gives each device all parts of some rows, an all-gather returns the merged rows. Nothing
# that is sent grows with the context.

# %%
placed = jax.device_put(cache, ds.cache_sharding())
step = jax.jit(lambda q, cache, table, lengths: ds.mla_decode(q, cache, table, lengths, sm_scale=scale))
out = step(q, placed, jnp.asarray(table), jnp.asarray(lengths))  # [b, s_q, h, d_v]
alone = mla_jax.mla_decode(q, cache, jnp.asarray(table), jnp.asarray(lengths), sm_scale=scale)  # [b, s_q, h, d_v]
print(f"four devices against one: relative difference {error(out, alone):.1e}")

text = step.lower(q, placed, jnp.asarray(table), jnp.asarray(lengths)).compile().as_text()
found = re.findall(r" = (.*?) (all-gather|all-to-all|all-reduce)(?:-start)?\(", text)
for result, name in found:
    print(f"{name:11} {re.sub(r'{[^}]*}', '', result)}")
assert {name for _, name in found} == {"all-gather", "all-to-all"}
