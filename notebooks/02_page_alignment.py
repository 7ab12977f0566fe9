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
# # Why pages are padded to a multiple of 576 bytes
#
# Sparse attention reads a few thousand tokens that lie anywhere in the cache. A GPU has a unit for that: a *gather* copy
# (TMA) takes a list of row numbers and fetches those rows of **one** two-dimensional array. That array is described once,
# by a *descriptor*: where it begins, how long a row is, how many there are. So the question is whether all tokens of all
# pages can be rows of one array. For DeepSeek-V4's format, MODEL1, the answer is yes because of a little padding.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

import mla_jax
from mla_jax import MODEL1

plt.rcParams.update({"figure.dpi": 90, "font.size": 11})
VALUES, SCALES = MODEL1.record_bytes  # of one token: e4m3 and bf16 values, and its scales
print(f"a MODEL1 token: {VALUES} bytes of values and {SCALES} bytes of scales, kept apart in a page")

# %% [markdown]
# ## Three pages in memory, drawn in rows of 576 bytes
#
# A page of 4 tokens holds 4 records of values and then 4 records of scales. On the left pages follow each other without a
# gap, on the right each is rounded up to a multiple of 576. Read it like text, line by line; a number marks where a token's
# values begin.


# %%
PAGE_SIZE, NUM_PAGES = 4, 3
PAGE_COLOURS, SCALE_COLOUR, GAP = ("#4C72B0", "#DD8452", "#8172B3"), "#55A868", "#D9D9D9"


def draw(axes, stride_bytes, title):
    """Pages at a distance of `stride_bytes`, as lines of 576 bytes."""
    for page in range(NUM_PAGES):
        pieces = [(page * stride_bytes + i * VALUES, VALUES, PAGE_COLOURS[page], i) for i in range(PAGE_SIZE)]
        used = PAGE_SIZE * MODEL1.bytes_per_token
        pieces.append((page * stride_bytes + PAGE_SIZE * VALUES, PAGE_SIZE * SCALES, SCALE_COLOUR, None))
        pieces.append((page * stride_bytes + used, stride_bytes - used, GAP, None))
        for start, length, colour, token in pieces:
            at = start
            while at < start + length:  # cut where a line ends
                line, column = divmod(at, VALUES)
                width = min(start + length - at, VALUES - column)
                axes.barh(line, width, left=column, height=0.86, color=colour)
                at += width
            if token is not None:
                line, column = divmod(start, VALUES)
                axes.barh(line, 5, left=column, height=0.86, color="black")
                axes.text(column + 12, line, f"page {page}, token {token}", va="center", color="white", fontsize=8.5)
    axes.set(xlim=(0, VALUES), xlabel="byte within a line", ylabel="line", title=title, ylim=(14.6, -0.6))
    axes.set_yticks(range(15))
    axes.set_xticks([0, 144, 288, 432, 576])


figure, axes = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
draw(axes[0], PAGE_SIZE * MODEL1.bytes_per_token, f"no padding: a page every {PAGE_SIZE * MODEL1.bytes_per_token} bytes")
draw(axes[1], MODEL1.page_bytes(PAGE_SIZE), f"padded: a page every {MODEL1.page_bytes(PAGE_SIZE)} bytes")
legend = [Patch(color=c, label=f"values, page {i}") for i, c in enumerate(PAGE_COLOURS)]
legend += [Patch(color=SCALE_COLOUR, label="scales"), Patch(color=GAP, label="padding")]
figure.legend(handles=legend, loc="outside lower center", ncols=5)
plt.show()

# %% [markdown]
# Without padding every page begins 32 bytes later within a line, and no single array of 576-byte rows has all tokens as its
# rows. With padding **every token is a row, from edge to edge**:
#
#     row of a token = page * (page_bytes / 576) + place in the page
#
# ## The same with numpy
#
# The whole pool as one `[rows, 576]` array, and a gather by row number. A second view in rows of 8 bytes serves the scales:
# 576 is a multiple of 8, so they are aligned as well.

# %%
rng = np.random.default_rng(0)
page_size = 64
kv = jnp.asarray(rng.standard_normal((5, page_size, MODEL1.d_qk)), jnp.bfloat16)  # [pages, page_size, d_qk]
cache = mla_jax.pack_kv(kv, MODEL1)
pool = np.asarray(cache.data)  # uint8 [pages, page_bytes]

slots = rng.integers(0, cache.num_slots, 1000)  # [n]: any tokens, in any order
page, offset = np.divmod(slots, page_size)  # [n] each
page_bytes = MODEL1.page_bytes(page_size)
value_rows = pool.reshape(-1, VALUES)[page * (page_bytes // VALUES) + offset]  # [n, 576]: the gather
scales_begin = MODEL1.area_first_row(1, page_size)
scale_rows = pool.reshape(-1, SCALES)[page * (page_bytes // SCALES) + scales_begin + offset]  # [n, 8]

e4m3, bf16 = MODEL1.locate("nope")[2], MODEL1.locate("rope")[2]
latent = value_rows[:, : e4m3.num_bytes].view(e4m3.dtype).astype(np.float32)  # [n, 448]
rotary = value_rows[:, e4m3.num_bytes :].copy().view(bf16.dtype)  # [n, 64]
scale = scale_rows[:, : MODEL1.num_scales].copy().view(MODEL1.locate("scale")[2].dtype).astype(np.float32)  # [n, 7]
rows = np.concatenate([(latent * np.repeat(scale, MODEL1.scale_tile, axis=1)).astype(bf16.dtype), rotary], axis=1)
assert np.array_equal(rows, np.asarray(mla_jax.gather_kv(cache, jnp.asarray(slots, jnp.int32))))
print(f"{len(slots)} tokens fetched by row number, equal to gather_kv bit for bit")

# %% [markdown]
# ## What it would take otherwise, and what it costs
#
# Unpadded pages begin at different bytes within a line; each such beginning would need a descriptor of its own, and each
# gather would have to be sorted by descriptor. The left picture counts them. The right one shows the price of padding: at
# most 575 bytes a page, which matters only where pages are tiny. DeepSeek-V4's ratio-128 layers use pages of 2 tokens.

# %%
sizes = np.arange(1, 257)
unpadded = VALUES // np.gcd(VALUES, sizes * MODEL1.bytes_per_token)  # different page beginnings modulo 576
padding = np.array([1 - n * MODEL1.bytes_per_token / MODEL1.page_bytes(int(n)) for n in sizes])
usual = [2, 32, 61, 64, 128, 256]

figure, axes = plt.subplots(1, 2, figsize=(12, 3.9), layout="constrained")
axes[0].plot(sizes, unpadded, ".", color="#B0B0B0", markersize=5)
axes[0].plot(usual, unpadded[np.array(usual) - 1], "o", color="#C44E52", label="no padding")
axes[0].axhline(1, color="#4C72B0", linewidth=2.5, label="padded to 576")
for n in usual:
    label = dict(textcoords="offset points", xytext=(-6, 9), fontsize=10, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes[0].annotate(f"{n}: {unpadded[n - 1]}", (n, unpadded[n - 1]), **label)
axes[0].set(title="gather descriptors needed", xlabel="tokens a page", ylim=(0, 82))
axes[0].legend(loc=(0.02, 0.62), fontsize=10)
axes[1].plot(sizes, 100 * padding, color="#B0B0B0", linewidth=1)
axes[1].plot(usual, 100 * padding[np.array(usual) - 1], "o", color="#4C72B0")
for n in usual:
    if n <= 32:
        axes[1].annotate(f"{n}: {padding[n - 1]:.1%}", (n, 100 * padding[n - 1]), textcoords="offset points", xytext=(4, 8), fontsize=10)
axes[1].text(130, 6, f"61 and more: {max(padding[n - 1] for n in usual if n > 32):.1%}", ha="center", fontsize=10)
axes[1].set(title="share of a page that is padding", xlabel="tokens a page", ylabel="per cent", ylim=(0, 55))
for ax in axes:
    ax.set(xscale="log", xlim=(0.9, 420))
    ax.set_xticks([1, 2, 4, 8, 16, 32, 64, 128, 256], [1, 2, 4, 8, 16, 32, 64, 128, 256])
    ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# `KVFormat.page_align_bytes` is the one number behind all this: 576 for MODEL1, 1 for V32, whose 656-byte tokens follow each
# other without a gap anyway and so are rows of one array whatever the page size.
