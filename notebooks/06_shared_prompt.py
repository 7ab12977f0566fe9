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
# # A system prompt, cached once
#
# Often all requests begin with the same text: a system prompt, a document, a set of examples. Its keys are the same for
# all, so they need to be in memory only once. `sparse_mla_decode` reads from two caches under one softmax: the request's own
# tokens in the *main* cache, the shared ones in the *extra* cache, each with its own page size and format.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mla_jax
from mla_jax import V32

plt.rcParams.update({"figure.dpi": 90, "font.size": 11})
COLOURS = plt.get_cmap("tab10").colors
PROMPT = "#9C9C9C"
rng = np.random.default_rng(1)

# %% [markdown]
# ## Two ways to hold six requests
#
# A prompt of 200 tokens and six requests with some tokens of their own. Every square is a page of 16 tokens; grey ones hold
# the prompt.

# %%
PAGE, PROMPT_TOKENS = 16, 200
own = np.array([40, 90, 10, 64, 120, 25], np.int32)  # [b] tokens of each request
b, prompt_pages = len(own), -(-PROMPT_TOKENS // PAGE)
own_pages = -(-own // PAGE)  # [b]


def squares(axes, colours, y):
    for x, colour in enumerate(colours):
        axes.add_patch(plt.Rectangle((x, y), 0.86, 0.8, color=colour))


figure, axes = plt.subplots(1, 2, figsize=(12, 3.1), layout="constrained")
for request in range(b):
    pages = [COLOURS[request]] * int(own_pages[request])
    squares(axes[0], [PROMPT] * prompt_pages + pages, request)
    squares(axes[1], pages, request + 1.3)
squares(axes[1], [PROMPT] * prompt_pages, 0)
copied, shared = b * prompt_pages + own_pages.sum(), prompt_pages + own_pages.sum()
axes[0].set(title=f"each with a copy: {copied} pages", yticks=np.arange(b) + 0.4, yticklabels=[f"request {i}" for i in range(b)])
axes[1].set(title=f"the prompt in an extra cache: {shared} pages", yticks=[0.4, *(np.arange(b) + 1.7)])
axes[1].set_yticklabels(["prompt", *(f"request {i}" for i in range(b))])
for ax, bottom in zip(axes, (b, b + 1.3), strict=True):
    ax.set(xlim=(-0.2, 21.5), ylim=(bottom, -0.2), xticks=[])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
plt.show()

# %% [markdown]
# ## The same result
#
# Both ways, with random rows in V32 pages. The one call reads a copy and the request's own tokens from one cache, the other
# names the shared slots as `extra_indices`, the same ones for all requests.

# %%
h, scale = 16, 0.08
rows = jnp.asarray(rng.standard_normal((PROMPT_TOKENS + own.sum(), V32.d_qk)), jnp.bfloat16)  # [tokens, d_qk]
prompt_rows, own_rows = rows[:PROMPT_TOKENS], rows[PROMPT_TOKENS:]
q = jnp.asarray(rng.standard_normal((b, 1, h, V32.d_qk)), jnp.bfloat16)  # [b, s_q, h, d_qk]
append = jax.jit(mla_jax.append_kv, donate_argnums=0)

main = mla_jax.PagedKVCache.zeros(V32, num_pages=int(own_pages.sum()), page_size=PAGE)
prompt = mla_jax.PagedKVCache.zeros(V32, num_pages=4, page_size=64)  # another page size: no matter
first = np.concatenate([[0], np.cumsum(own_pages)[:-1]]) * PAGE  # [b] first slot of each request
own_slots = [first[i] + np.arange(own[i]) for i in range(b)]
main = append(main, own_rows, jnp.asarray(np.concatenate(own_slots), jnp.int32))
prompt = append(prompt, prompt_rows, jnp.arange(PROMPT_TOKENS, dtype=jnp.int32))

indices = np.full((b, 1, own.max()), -1, np.int32)  # [b, s_q, topk]
for i in range(b):
    indices[i, 0, : own[i]] = own_slots[i]
extra_indices = jnp.broadcast_to(jnp.arange(PROMPT_TOKENS, dtype=jnp.int32), (b, 1, PROMPT_TOKENS))  # [b, s_q, extra_topk]
out_shared, lse = mla_jax.sparse_mla_decode(
    q, main, jnp.asarray(indices), sm_scale=scale, extra_cache=prompt, extra_indices=extra_indices, return_lse=True
)

lengths = PROMPT_TOKENS + own  # [b]
begin = np.concatenate([[0], np.cumsum(prompt_pages + own_pages + 1)[:-1]]) * PAGE  # [b]
big = mla_jax.PagedKVCache.zeros(V32, num_pages=int((prompt_pages + own_pages + 1).sum()), page_size=PAGE)
copy_slots = [begin[i] + np.arange(lengths[i]) for i in range(b)]
split = np.split(np.asarray(own_rows), np.cumsum(own)[:-1])
big = append(big, jnp.concatenate([x for part in split for x in (prompt_rows, jnp.asarray(part))]), jnp.asarray(np.concatenate(copy_slots), jnp.int32))
copied_indices = np.full((b, 1, lengths.max()), -1, np.int32)  # [b, s_q, topk]
for i in range(b):
    copied_indices[i, 0, : lengths[i]] = copy_slots[i]
out_copied = mla_jax.sparse_mla_decode(q, big, jnp.asarray(copied_indices), sm_scale=scale)
difference = jnp.abs(out_shared.astype(jnp.float32) - out_copied.astype(jnp.float32)).max()
print(f"largest difference: {float(difference):.1e}, of values up to {float(jnp.abs(out_copied).max()):.2f}")
assert difference < 0.01

# %% [markdown]
# ## How much of each answer comes from the prompt
#
# The log-sum-exp tells: exp(lse of the prompt's keys - lse of all). Every dot is a head.

# %%
none = jnp.zeros((b, 1, 0), jnp.int32)
_, prompt_lse = mla_jax.sparse_mla_decode(
    q, main, none, sm_scale=scale, extra_cache=prompt, extra_indices=extra_indices, return_lse=True
)
share = np.exp(np.asarray(prompt_lse - lse))[:, 0]  # [b, h]
figure, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
expected = PROMPT_TOKENS / (PROMPT_TOKENS + own)  # [b], if all keys counted alike
for i in range(b):
    ax.plot(np.full(h, i) + rng.uniform(-0.15, 0.15, h), share[i], "o", color=COLOURS[i], alpha=0.7)
    ax.plot([i - 0.3, i + 0.3], [expected[i]] * 2, color="black")
ax.plot([], [], color="black", label="share of the keys")
ax.set(xticks=range(b), ylim=(0, 1.02), ylabel="share of the prompt")
ax.set_xticklabels([f"request {i}\n{own[i]} tokens" for i in range(b)])
ax.legend(loc="lower left")
plt.show()

# %% [markdown]
# ## What it saves
#
# Memory for the keys of one layer, V32, a prompt of 8,192 tokens and 1,024 of each request's own. (A GPU also reads a shared
# prompt from DRAM less often, since its L2 cache serves requests that read the same rows at about the same time; how much is
# not measured here.)

# %%
requests = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256])
mib = V32.bytes_per_token / 2**20
figure, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
ax.plot(requests, requests * (8192 + 1024) * mib, "o-", color="#C44E52", label="each with a copy")
ax.plot(requests, (8192 + requests * 1024) * mib, "o-", color="#4C72B0", label="prompt cached once")
ax.set(xscale="log", yscale="log", xlabel="requests", ylabel="MiB a layer")
ax.set_xticks(requests, requests)
ax.minorticks_off()
ax.set_yticks([10, 100, 1000], ["10", "100", "1000"])
ratio = (8192 + 1024) * 256 / (8192 + 256 * 1024)
ax.annotate(f"{ratio:.1f} times", (256, (8192 + 256 * 1024) * mib), xytext=(150, 420), ha="center", arrowprops={"arrowstyle": "-", "color": "grey"})
ax.legend()
plt.show()

# %% [markdown]
# `mla_jax.serve` (notebook 09) serves requests this way. Over a mesh such a cache is placed by
# `DecodeSharding.cache_sharding(shared=True)`, and the op is told with `extra_shared=True`.
