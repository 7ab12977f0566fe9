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
# # What is in a KV cache: the layouts, byte by byte
#
# MLA caches one row per token: a *latent* part (what the low-rank projection left of all keys and values) and a small
# *rotary* part that carries position. DeepSeek's FP8 formats squeeze that row into 656 or 584 bytes. This notebook shows
# where every byte goes, and where the numbers 576, 584 and 656 come from.
#
# Nothing here is written down twice: each picture is drawn from the `KVFormat` objects that the quantiser and the kernels
# use.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import mla_jax
from mla_jax import BF16_576, MODEL1, V32
from mla_jax.cli.layout import ROLES, byte_map, fields, token_start

COLOURS = {"nope": "#4C72B0", "rope": "#DD8452", "scale": "#55A868", "pad": "#D9D9D9"}
LABELS = {"nope": "latent (nope)", "rope": "rotary (rope)", "scale": "scales", "pad": "padding"}
COLOUR_MAP = ListedColormap([COLOURS[role] for role in ROLES])
plt.rcParams.update({"figure.dpi": 80, "font.size": 11})

# %% [markdown]
# ## The formats
#
# `d_qk` is the width of a key row; the value row is its first `d_v` entries. For DeepSeek-V3 and V3.2 (576 and 512) the
# rotary part is key only. DeepSeek-V4 (512 and 512) uses the whole row as value too.

# %%
print(f"{'format':10}{'d_qk':>6}{'d_v':>6}{'latent':>8}{'rotary':>8}{'scales':>8}{'bytes a token':>15}")
for fmt in (BF16_576, mla_jax.BF16_512, V32, MODEL1):
    parts = f"{fmt.d_nope:8}{fmt.d_rope:8}{fmt.num_scales:8}"
    print(f"{fmt.name:10}{fmt.d_qk:6}{fmt.d_v:6}{parts}{fmt.bytes_per_token:15}")

# %% [markdown]
# ## One token, to scale
#
# One bar per format, a byte being equally wide in all of them. A token of V32 takes 57 % of the bf16 row, one of MODEL1
# 57 % of its own 1024-byte bf16 row. In both the rotary part stays in bf16: positions do not survive eight bits.

# %%
figure, axes = plt.subplots(figsize=(11, 3.2), layout="constrained")
formats = (BF16_576, mla_jax.BF16_512, V32, MODEL1)
for row, fmt in enumerate(formats):
    start = 0
    for _, _, field in fields(fmt):
        axes.barh(row, field.num_bytes, left=start, color=COLOURS[field.role], edgecolor="white", height=0.7)
        if field.num_bytes > 60:
            text = f"{field.count} {field.dtype.name.removeprefix('float8_')}"
            axes.text(start + field.num_bytes / 2, row, text, ha="center", va="center", color="white")
        start += field.num_bytes
    axes.text(start + 8, row, f"{fmt.bytes_per_token} bytes", va="center")
axes.set(yticks=range(len(formats)), yticklabels=[f.name for f in formats], xlabel="bytes of one token", xlim=(0, 1290))
axes.invert_yaxis()
axes.legend(handles=[Patch(color=COLOURS[r], label=LABELS[r]) for r in ROLES], loc="lower right", ncols=2, fontsize=9)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# The numbers, spelled out:
#
# * **656** = 512 e4m3 + 4 float32 scales (one per 128 values) + 64 bf16 = 512 + 16 + 128.
# * **584** = 448 e4m3 + 64 bf16 + 7 e8m0 scales (one per 64 values) + 1 byte of padding = 448 + 128 + 7 + 1.
# * **576** appears twice, by accident. It is V3's row *width* in values, 512 + 64; and it is the *bytes* that MODEL1 keeps
#   together, 448 + 128. A MODEL1 page is rounded up to a multiple of those 576 bytes.

# %%
for fmt in (V32, MODEL1):
    terms = [f"{f.count} x {f.num_bytes // f.count} {f.role}" for _, _, f in fields(fmt)]
    assert sum(f.num_bytes for _, _, f in fields(fmt)) == fmt.bytes_per_token
    print(f"{fmt.name}: {' + '.join(terms)} = {fmt.bytes_per_token} bytes")

# %% [markdown]
# ## A page
#
# A page holds `page_size` tokens; small pages of 8 are drawn here, 64 is usual. V32 simply repeats its token. MODEL1 keeps
# all values first, 576 bytes a token, and then all scales, 8 bytes a token. Drawn in rows of 576 bytes the reason shows:
# **token i of a page is row i**, and since the page is padded to whole rows, token i of page p is row
# `p * page_bytes / 576 + i` of one big array. The GPU's copy engine can then fetch any set of tokens by row number.


# %%
def draw_page(axes, fmt, page_size, row_bytes):
    """A page as an image, `row_bytes` bytes a row, coloured by what each byte is for."""
    roles, tokens = byte_map(fmt, page_size)
    rows = -(-roles.size // row_bytes)
    image = np.full(rows * row_bytes, np.nan)
    image[: roles.size] = roles
    axes.imshow(
        image.reshape(rows, row_bytes), cmap=COLOUR_MAP, vmin=-0.5, vmax=len(ROLES) - 0.5, aspect="auto",
        interpolation="nearest", extent=(0, row_bytes, rows, 0),
    )  # fmt: skip
    for row in range(1, rows):
        axes.axhline(row, color="white", linewidth=1.5)
    axes.set(yticks=np.arange(rows) + 0.5, yticklabels=range(rows), ylabel="row")
    axes.set_title(f"{fmt.name}, {page_size} tokens: {roles.size} bytes in rows of {row_bytes}", loc="left", fontsize=11)
    return tokens


figure, axes = plt.subplots(3, 1, figsize=(11, 10), layout="constrained")
for ax, fmt in zip(axes, (BF16_576, V32, MODEL1), strict=True):
    row_bytes = fmt.record_bytes[0]
    draw_page(ax, fmt, 8, row_bytes)
    edges = [0, *np.cumsum([f.num_bytes for area, _, f in fields(fmt) if area == 0])]
    ax.set_xticks(edges, [str(e) for e in edges])
    for label, before, edge, after in zip(ax.get_xticklabels(), [-99, *edges], edges, [*edges[1:], 9999], strict=False):
        label.set_ha("right" if after - edge < 30 else "left" if edge - before < 30 else "center")
axes[-1].set_xlabel("byte within a row")
axes[-1].annotate(
    "8 scale records of 8 bytes", xy=(32, 8.5), xytext=(110, 8.5), va="center", arrowprops={"arrowstyle": "->"}
)
axes[-1].text(400, 8.5, "padding to the next multiple of 576", va="center", ha="center", fontsize=10)
figure.legend(handles=[Patch(color=COLOURS[r], label=LABELS[r]) for r in ROLES], loc="outside upper right", ncols=4)
plt.show()

# %% [markdown]
# The scale records of MODEL1's last row are too small to see above. Enlarged: seven e8m0 bytes and one byte of padding for
# each token. Readers must not look at the padding: writers disagree on what to leave there.

# %%
page_size = 8
roles, tokens = byte_map(MODEL1, page_size)
start = MODEL1.area_offset_bytes(1, page_size)
stop = MODEL1.area_offset_bytes(2, page_size)  # behind the last area
figure, axes = plt.subplots(figsize=(11, 1.7), layout="constrained")
axes.imshow(roles[None, start:stop], cmap=COLOUR_MAP, vmin=-0.5, vmax=len(ROLES) - 0.5, aspect="auto", extent=(start, stop, 0, 1))
for token in range(page_size):
    left = token_start(MODEL1, page_size, 1, token)
    axes.axvline(left, color="white", linewidth=2)
    axes.text(left + 3.5, 0.5, f"token {token}", ha="center", va="center", color="white", fontsize=10)
axes.set(yticks=[], xticks=range(start, stop + 1, MODEL1.record_bytes[1]), xlabel="byte within the page")
plt.show()

# %% [markdown]
# ## How much padding?
#
# Little, unless pages are tiny. A page of 2 (DeepSeek-V4's ratio-128 layers) wastes a third.

# %%
print("tokens a page   page bytes   rows of 576   padding")
for page_size in (2, 32, 61, 64, 128, 256):
    page_bytes = MODEL1.page_bytes(page_size)
    padding = page_bytes - page_size * MODEL1.bytes_per_token
    print(f"{page_size:13}{page_bytes:13}{page_bytes // MODEL1.record_bytes[0]:14}{padding / page_bytes:10.1%}")

# %% [markdown]
# ## Reading a token by hand
#
# The layout is all there is: with `numpy` alone, find a token's bytes, view them in their types, multiply by the scales.
# The result equals `unpack_kv`, bit for bit.

# %%
rng = np.random.default_rng(0)
kv = jnp.asarray(rng.standard_normal((2, 64, MODEL1.d_qk), np.float32), jnp.bfloat16)  # [pages, page_size, d_qk]
cache = mla_jax.pack_kv(kv, MODEL1)
page, token = 1, 17
page_bytes = np.asarray(cache.data)[page]  # [page_bytes]

parts = {}
for area, offset, field in fields(MODEL1):
    first = token_start(MODEL1, cache.page_size, area, token) + offset
    parts[field.role] = np.frombuffer(page_bytes[first : first + field.num_bytes].tobytes(), field.dtype)

scales = np.repeat(parts["scale"].astype(np.float32), MODEL1.scale_tile)  # [448]
latent = (parts["nope"].astype(np.float32) * scales).astype(kv.dtype)  # [448]: rounded once
row = np.concatenate([latent, parts["rope"]])  # [512]
assert np.array_equal(row, np.asarray(mla_jax.unpack_kv(cache))[page, token])
print("scales, as powers of two:", np.log2(parts["scale"].astype(np.float32)).astype(int))
print("latent, decoded:         ", latent[:6])
print("latent, before packing:  ", np.asarray(kv)[page, token, :6])

# %% [markdown]
# ## What eight bits cost
#
# The rotary part comes back exactly. In the latent part e4m3 keeps three mantissa bits: an error of at most 1/16 of the
# value, with tiny values losing more once they fall below the smallest normal number of their tile. Values that vary over
# a wide range show both.

# %%
wide = jnp.asarray(rng.standard_normal((4, 64, V32.d_qk)) * np.exp2(rng.uniform(-12, 4, (4, 64, V32.d_qk))), jnp.bfloat16)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
for ax, fmt in zip(axes, (V32, MODEL1), strict=True):
    source = np.asarray(wide[..., : fmt.d_qk], np.float32)  # [pages, page_size, d_qk]
    back = np.asarray(mla_jax.unpack_kv(mla_jax.pack_kv(wide[..., : fmt.d_qk], fmt)), np.float32)
    assert np.array_equal(source[..., fmt.d_nope :], back[..., fmt.d_nope :])
    x, y = np.abs(source[..., : fmt.d_nope]).ravel(), np.abs(source - back)[..., : fmt.d_nope].ravel()
    chosen = rng.choice(x.size, 6000, replace=False)
    ax.plot(x[chosen], (y / x)[chosen], ".", markersize=2.5, color=COLOURS["nope"])
    ax.axhline(1 / 16, color="black", linewidth=1, linestyle="--")
    ax.set(xscale="log", xlabel="magnitude of the value", title=f"{fmt.name}: one scale per {fmt.scale_tile} values")
axes[0].set_ylabel("relative error")
axes[0].text(x[chosen].min(), 1 / 16 + 0.02, "1/16", fontsize=10)
plt.show()
