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
# # What eight bits cost: formats, scale rules, readers
#
# The FP8 caches keep the latent part of a row as e4m3 numbers, eight bits each, and one *scale* per tile of 128 (V32) or 64
# (MODEL1) values. A value is stored as `e4m3(value / scale)` and read as `e4m3 * scale`. How large the error is depends on
# the scale, and the programs of the field write and read scales in different ways. This notebook measures what that does,
# first to single values, then to the result of attention. The data are random; `docs/accuracy.md` has the tables.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mla_jax
from mla_jax import BF16_512, BF16_576, MODEL1, V32

plt.rcParams.update({"figure.dpi": 90, "font.size": 11})
BLUE, RED, GREEN, ORANGE = "#4C72B0", "#C44E52", "#55A868", "#DD8452"
rng = np.random.default_rng(0)


def round_trip(kv, fmt, scale_rule="pow2"):
    """kv [n, d_qk], packed and unpacked again, as float32."""
    return np.asarray(mla_jax.unpack_kv(mla_jax.pack_kv(jnp.asarray(kv)[None], fmt, scale_rule=scale_rule)), np.float32)[0]


# %% [markdown]
# ## Which values suffer
#
# Every tile below has one value of 1 and others that are smaller by powers of two. e4m3 has three mantissa bits, so most
# values are off by 2 to 3 % on average (6 % at most), whatever the rule. Values more than 2^-14 or so below the greatest of
# their tile fall under e4m3's smallest normal number and lose bit after bit; below about 2^-18 they become zero. An `amax`
# scale uses the range to the very top, a power of two wastes up to one bit of it: that is the whole difference.

# %%
ratios = np.arange(0, 22)  # log2 of (greatest value of the tile / value)
figure, ax = plt.subplots(figsize=(9.5, 4), layout="constrained")
for (fmt, rule), colour, style in (((V32, "pow2"), BLUE, "o-"), ((V32, "amax"), RED, "s--"), ((MODEL1, "pow2"), GREEN, "^:")):
    kv = np.zeros((len(ratios) * 8, fmt.d_qk), np.float32)  # [n, d_qk]
    kv[:, : fmt.d_nope] = np.exp2(-np.repeat(ratios, 8)[:, None] + rng.uniform(-0.5, 0.5, (len(kv), fmt.d_nope)))
    kv[:, : fmt.d_nope : fmt.scale_tile] = 1.5  # the tile's greatest value
    kv = np.asarray(jnp.asarray(kv, jnp.bfloat16))
    error = np.abs(round_trip(kv, fmt, rule) - kv.astype(np.float32)) / np.maximum(kv.astype(np.float32), 1e-30)
    small = np.arange(fmt.d_nope) % fmt.scale_tile != 0
    mean = error[:, : fmt.d_nope][:, small].reshape(len(ratios), -1).mean(1)
    ax.plot(ratios, 100 * mean, style, color=colour, label=f"{fmt.name}, {rule}", markersize=5)
ax.axhline(100, color="grey", linewidth=0.8)
ax.text(0, 105, "everything lost", fontsize=10, color="grey", va="bottom")
ax.set(yscale="log", xlabel="how far below the greatest value of its tile, in powers of two", ylabel="mean relative error, %", ylim=(1, 200))
ax.set_yticks([1, 2, 5, 10, 20, 50, 100], [1, 2, 5, 10, 20, 50, 100])
ax.set_xticks(range(0, 22, 2), [f"2^-{n}" if n else "1" for n in range(0, 22, 2)])
ax.legend()
plt.show()

# %% [markdown]
# ## An outlier in the tile
#
# So the width of a tile matters when a few channels are much larger than the rest. Left: rows of a normal distribution, in
# which one channel of the 512 is multiplied by some factor; the error of all *other* channels. Only the outlier's own tile
# loses, and MODEL1's tiles are half as wide: half as many channels suffer.

# %%
factors = np.exp2(np.arange(0, 25, 2))
figure, axes = plt.subplots(1, 2, figsize=(12, 3.9), layout="constrained")
for fmt, colour in ((V32, BLUE), (MODEL1, GREEN)):
    base = rng.standard_normal((64, fmt.d_qk)).astype(np.float32)  # [n, d_qk]
    others = np.arange(fmt.d_nope) != 5
    curve = []
    for factor in factors:
        kv = base.copy()
        kv[:, 5] *= factor
        kv = np.asarray(jnp.asarray(kv, jnp.bfloat16)).astype(np.float32)
        difference = (round_trip(jnp.asarray(kv, jnp.bfloat16), fmt) - kv)[:, : fmt.d_nope][:, others]
        curve.append(np.linalg.norm(difference) / np.linalg.norm(kv[:, : fmt.d_nope][:, others]))
    axes[0].plot(np.log2(factors), 100 * np.array(curve), "o-", color=colour, label=f"{fmt.name}: a scale per {fmt.scale_tile}")
axes[0].set(xlabel="outlier: times 2 to the power of", ylabel="error of the other channels, %", ylim=(0, None))
axes[0].legend()

kv = np.asarray(jnp.asarray(rng.standard_normal((32, V32.d_qk)) * np.where(np.arange(V32.d_qk) == 5, 2.0**16, 1), jnp.bfloat16), np.float32)
lost = np.abs(round_trip(jnp.asarray(kv, jnp.bfloat16), V32) - kv) / np.abs(kv)  # [n, d_qk]
image = axes[1].imshow(np.minimum(lost, 1), aspect="auto", cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
axes[1].set(xlabel="channel (V32)", ylabel="row", title="relative error, outlier 2^16 in channel 5")
axes[1].set_xticks([0, 128, 256, 384, 512, 576])
figure.colorbar(image)
plt.show()

# %% [markdown]
# The right picture shows that outlier's tile, 128 channels, in V32: dark means lost. The rotary part (512 and up) is bf16
# and exact.
#
# ## What it does to attention
#
# One query against n random keys, all in float32: once with the rows as they are, once after a round trip through the
# format. The result is off by 2 to 3.5 % of its own size, about as much as the values are, at any length. The harder the
# softmax concentrates on few keys (larger scale), the more an error of a score counts. bf16 is the row's own rounding, for
# comparison.

# %%
HEADS = 16


@jax.jit
def attend(q, kv, scale):  # [h, d_qk], [n, d_qk], [] -> [h, 512], float32
    weights = jax.nn.softmax(scale * jnp.einsum("hd,nd->hn", q, kv, precision="highest"))
    return jnp.einsum("hn,nd->hd", weights, kv[:, :512], precision="highest")


def attention_error(fmt, n, scale, rule="pow2"):
    """Relative error of the result, over heads, for normal rows in float32."""
    exact = rng.standard_normal((n, fmt.d_qk)).astype(np.float32)  # [n, d_qk]
    q = rng.standard_normal((HEADS, fmt.d_qk)).astype(np.float32)  # [h, d_qk]
    stored = round_trip(jnp.asarray(exact, jnp.bfloat16), fmt, rule)
    want, got = np.asarray(attend(q, exact, scale)), np.asarray(attend(q, stored, scale))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


figure, axes = plt.subplots(1, 2, figsize=(12, 3.9), layout="constrained")
formats = ((BF16_576, "grey"), (BF16_512, "black"), (V32, BLUE), (MODEL1, GREEN))
lengths = [64, 256, 1024, 4096]
for fmt, colour in formats:
    axes[0].plot(lengths, [100 * attention_error(fmt, n, fmt.d_qk**-0.5) for n in lengths], "o-", color=colour, label=fmt.name)
sharpness = np.array([0.25, 0.5, 1, 2, 4])
for fmt, colour in formats:
    axes[1].plot(sharpness, [100 * attention_error(fmt, 1024, s * fmt.d_qk**-0.5) for s in sharpness], "o-", color=colour, label=fmt.name)
axes[0].set(xscale="log", xlabel="keys", ylabel="error of the result, %", title="softmax scale d_qk^-0.5")
axes[0].set_xticks(lengths, lengths)
axes[1].set(xscale="log", xlabel="softmax scale times d_qk^0.5", title="1024 keys")
axes[1].set_xticks(sharpness, [f"{s:g}" for s in sharpness])
axes[1].minorticks_off()
axes[0].minorticks_off()
for ax in axes:
    ax.set(yscale="log", ylim=(0.05, 20))
    ax.set_yticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
    ax.grid(axis="y", linewidth=0.3)
axes[0].legend(ncols=2)
plt.show()

# %% [markdown]
# ## Writers and readers that disagree
#
# A cache is written by one program and read by another. V32's scale is a float32, and some writers store amax / 448 as it
# is. A reader that takes the scale for a power of two and drops its mantissa is then wrong by up to a factor of 2, one that
# rounds it to bf16 by up to 0.4 %. mla-jax multiplies by the scale that is there. With power-of-two scales all agree, which
# is why `pow2` is the default for writing.

# %%
def read_with(scales_of, rule, n=512):
    """V32 rows written by `rule`, read with scales changed by `scales_of`; error of the latent values."""
    kv = jnp.asarray(rng.standard_normal((1, n, V32.d_qk)), jnp.bfloat16)
    data = np.asarray(mla_jax.pack_kv(kv, V32, scale_rule=rule).data)[0]  # uint8 [n, 656]
    _, at, field = V32.locate("scale")
    scale = data[:, at : at + field.num_bytes].copy().view(field.dtype)  # [n, 4]
    value = data[:, : V32.d_nope].copy().view(V32.locate("nope")[2].dtype).astype(np.float32)  # [n, 512]
    read = value * np.repeat(scales_of(scale), V32.scale_tile, axis=1)
    exact = np.asarray(kv, np.float32)[0, :, : V32.d_nope]
    return np.linalg.norm(read - exact) / np.linalg.norm(exact)


readers = {
    "as it is\n(mla-jax)": lambda s: s,
    "rounded to bf16": lambda s: np.asarray(jnp.asarray(s, jnp.bfloat16), np.float32),
    "mantissa dropped\n(e8m0)": lambda s: np.exp2(np.floor(np.log2(s))),
}
figure, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
for place, (rule, colour) in enumerate((("pow2", BLUE), ("amax", RED))):
    errors = [100 * read_with(reader, rule) for reader in readers.values()]
    bars = ax.bar(np.arange(len(readers)) + 0.36 * place, errors, 0.34, color=colour, label=f"written with {rule}")
    ax.bar_label(bars, [f"{e:.2f} %" for e in errors], fontsize=10)
ax.set(xticks=np.arange(len(readers)) + 0.18, ylabel="error of values, %", yscale="log", ylim=(1, 120))
ax.set_xticklabels(list(readers))
ax.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
ax.legend(title="how a reader takes the scale:", loc="upper left")
plt.show()
