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
# # Sparse against dense: how many keys are enough?
#
# DeepSeek-V3.2 and V4 do not read a request's whole cache. A small network, the *indexer*, gives every key a score, and
# attention reads the k best. This notebook shows how the result approaches that of dense attention as k grows, and what
# that depends on: how concentrated attention is, and how good the indexer.
#
# There is no trained model here. Keys and queries are random, with a few keys made relevant, so the curves show the
# mechanism and not what a given model loses.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mla_jax
from mla_jax import BF16_576, F32_576, V32

plt.rcParams.update({"figure.dpi": 90, "font.size": 11})
KEYS, HEADS, PAGE = 4096, 16, 64
rng = np.random.default_rng(0)

# %% [markdown]
# ## Attention of different sharpness
#
# One request of 4,096 keys, 16 heads; all heads share the choice of keys. The picture sorts the keys by weight (mean over
# heads) and adds the weights up. Flat attention is spread over thousands of keys, sharp attention over a hundred.

# %%
rows = rng.standard_normal((KEYS, F32_576.d_qk)) + 0.5 * rng.standard_normal(F32_576.d_qk)  # [keys, d_qk]
relevant = rng.choice(KEYS, 150, replace=False)
topic = ((rows - rows.mean(0))[relevant] * rng.uniform(0.5, 1, (150, 1))).sum(0)  # [d_qk]: what all heads look for
q = rng.standard_normal((HEADS, F32_576.d_qk)) + 1.2 * topic / topic.std()  # [h, d_qk]
rows, q = rows.astype(np.float32), jnp.asarray(q[None, None], jnp.float32)  # q [b, s_q, h, d_qk]
cache = mla_jax.pack_kv(jnp.asarray(rows).reshape(KEYS // PAGE, PAGE, F32_576.d_qk), F32_576)
SCALES = {"flat": 0.01, "medium": 0.06, "sharp": 0.1}
COLOURS = dict(zip(SCALES, ("#55A868", "#4C72B0", "#C44E52"), strict=True))

scores = np.asarray(q[0, 0]) @ rows.T  # [h, keys]
weights = {name: np.exp(s * scores - (s * scores).max(1, keepdims=True)) for name, s in SCALES.items()}
weights = {name: (w / w.sum(1, keepdims=True)).mean(0) for name, w in weights.items()}  # [keys]
figure, ax = plt.subplots(figsize=(8.5, 3.5), layout="constrained")
for name, w in weights.items():
    total = np.cumsum(np.sort(w)[::-1])
    ax.plot(np.arange(1, KEYS + 1), total, color=COLOURS[name], label=f"{name}: 90 % in {np.searchsorted(total, 0.9)} keys")
ax.set(xscale="log", xlabel="keys, the heaviest first", ylabel="sum of weights", ylim=(0, 1.02))
ax.set_xticks([1, 10, 100, 1000, 4096], [1, 10, 100, 1000, 4096])
ax.legend()
plt.show()

# %% [markdown]
# ## The error as k grows
#
# The k keys of the greatest weight, against dense attention over all. One set of indices sorted by weight serves every k:
# `topk_length` says how many of the leftmost count. Lengths are data, so the whole curve is one compiled program.

# %%
TOPK = np.array([16, 32, 64, 128, 256, 512, 1024, 2048, 4096], np.int32)
table = jnp.arange(KEYS // PAGE, dtype=jnp.int32)[None]  # [b, max_pages]


@jax.jit
def sparse(q, cache, order, k, scale):
    """Attention over the k leftmost keys of `order` [keys]."""
    return mla_jax.sparse_mla_decode(q, cache, order[None, None], topk_length=k[None], sm_scale=scale)


def errors(order, scale):
    """Relative error of the result for every k of TOPK."""
    scale = jnp.float32(scale)
    dense = mla_jax.mla_decode(q, cache, table, jnp.array([KEYS], jnp.int32), sm_scale=scale)  # [b, s_q, h, d_v]
    order = jnp.asarray(order, jnp.int32)
    found = [sparse(q, cache, order, k, scale) for k in jnp.asarray(TOPK)]
    return [float(jnp.linalg.norm(x - dense) / jnp.linalg.norm(dense)) for x in found]


figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
best = {name: errors(np.argsort(-weights[name]), scale) for name, scale in SCALES.items()}
for name in SCALES:
    axes[0].plot(TOPK[:-1], best[name][:-1], "o-", color=COLOURS[name], label=name)
axes[0].set(title="the k keys of the greatest weight")

noise = rng.standard_normal(KEYS)
logits = np.log(weights["sharp"])
indexers = {
    "perfect": (-logits, "#C44E52", "o-"),
    "slightly noisy": (-(logits + 0.5 * noise), "#DD8452", "s-"),
    "noisy": (-(logits + 2 * noise), "#8172B3", "^-"),
    "the latest k keys": (-np.arange(KEYS), "#937860", "v--"),
    "random keys": (rng.standard_normal(KEYS), "#8C8C8C", "x--"),
}
for name, (order, colour, style) in indexers.items():
    axes[1].plot(TOPK[:-1], errors(np.argsort(order), SCALES["sharp"])[:-1], style, color=colour, label=name)
axes[1].set(title="sharp attention, keys chosen by indexers of all sorts")
for ax in axes:
    ax.set(xscale="log", yscale="log", xlabel="k, of 4096 keys", ylabel="relative error", ylim=(1e-4, 2))
    ax.set_xticks(TOPK[:-1], TOPK[:-1])
    ax.minorticks_off()
    ax.legend(fontsize=10, loc="lower left")
plt.show()
assert max(errors(np.argsort(-weights["sharp"]), SCALES["sharp"])[-1:]) < 1e-5  # all keys: the dense result
print("one compiled program:", sparse._cache_size() == 1)

# %% [markdown]
# Sharp attention is nearly exact with a few hundred keys; flat attention needs most of them, whichever are taken. An
# indexer need not be perfect, since it only has to get the heavy keys in, and their order does not matter. Recent or random
# keys do not do: attention looks for content.
#
# ## What it buys
#
# Bytes of cache that one request's step reads in one layer, by length of context. The indexer reads its own keys for every
# token, 132 bytes each; then attention reads k = 2,048 rows of the V32 cache.

# %%
from pallas_kernels.formats import INDEX_FP8  # noqa: E402

context = 2 ** np.arange(10, 18)
topk = np.minimum(context, 2048)
figure, ax = plt.subplots(figsize=(8.5, 3.6), layout="constrained")
mib = 2.0**-20
ax.plot(context, context * BF16_576.bytes_per_token * mib, "o-", color="#8C8C8C", label="dense, bf16")
ax.plot(context, context * V32.bytes_per_token * mib, "o-", color="#C44E52", label="dense, V32")
both = (topk * V32.bytes_per_token + context * INDEX_FP8.bytes_per_token) * mib
ax.plot(context, both, "o-", color="#4C72B0", label="sparse: 2,048 rows and all index keys")
ax.plot(context, topk * V32.bytes_per_token * mib, ":", color="#4C72B0", label="of which the rows")
ax.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="MiB read")
ax.set_xticks(context, [f"{n // 1024}k" for n in context])
ax.minorticks_off()
ax.set_yticks([1, 10, 100], ["1", "10", "100"])
ax.legend(fontsize=10)
plt.show()
print(f"at 128k tokens: {context[-1] * V32.bytes_per_token * mib / both[-1]:.1f} times less than dense V32")
