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
# # A serving loop: pages, joins, leaves
#
# A server decodes for many users at once. Requests arrive and end at any time, their caches grow token by token, memory is
# limited, and the compiled step must never see a new shape. `mla_jax.serve` is a small loop that does all this with a random
# model; `mla-jax serve-demo` runs it. This notebook runs it too and draws what happens.
#
# Its parts: `pages` hands out pages (host), `model` is one decode step as a pure function (device), `engine` lets requests
# join and leave between steps (host).

# %%
import itertools

import jax
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import AxisType

from mla_jax.serve import Engine, ModelConfig, init_params
from mla_jax.serve import model as serve_model
from mla_jax.sharding import DecodeSharding

jax.config.update("jax_num_cpu_devices", 8)
plt.rcParams.update({"figure.dpi": 90, "font.size": 11})
COLOURS = plt.get_cmap("tab20").colors
AXES = ("data", "heads", "context")

# %% [markdown]
# ## A small pool, on purpose
#
# Five rows in the batch, sixteen requests, and a pool that is too small for five long ones, so that it runs dry now and
# then. A system prompt of 24 tokens comes before every request's own tokens; it is fed once and kept in a cache of its own
# (notebook 06).

# %%
config = ModelConfig(kind="v3", num_layers=1, num_heads=8, page_size=8, max_pages=6, prompt_pages=3, exact=True)
rng = np.random.default_rng(3)
SYSTEM_PROMPT = rng.integers(0, config.vocab_size, 24).tolist()
REQUESTS = [(rng.integers(0, config.vocab_size, int(rng.integers(2, 9))).tolist(), int(rng.integers(14, 49))) for _ in range(16)]


def run(mesh_shape, batch, pages, requests, watch=None):
    """Serves `requests` to the end; logits by (request, position)."""
    count = int(np.prod(mesh_shape))
    mesh = jax.make_mesh(mesh_shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:count])
    ds = DecodeSharding(mesh, *AXES)
    logits = {}
    engine = Engine(
        config, ds, init_params(config, ds), batch=batch, num_pages=pages, system_prompt=SYSTEM_PROMPT, temperature=0.0,
        on_logits=lambda request, position, x: logits.__setitem__((request.id, position), x),
    )
    for prompt, max_tokens in requests:
        engine.submit(prompt, max_tokens)
    while not engine.is_idle:
        engine.step()
        if watch is not None:
            watch(engine)
    engine.pages.check()  # no page lost, none held twice
    return engine, logits


history = []


def watch(engine):
    table = engine.pages.table  # int32 [b, max_pages]
    owner = np.full(engine.pages.layer_stride, -1)  # [pages]: id of the request that holds each
    for row, request in enumerate(engine.rows):
        if request is not None:
            owner[table[row][table[row] >= 0]] = request.id
    history.append(([r.id if r else -1 for r in engine.rows], owner, len(engine.waiting), engine.num_preempted, serve_model.step._cache_size()))


engine, logits = run((1, 1, 1), 5, 20, REQUESTS, watch)
steps, fed = len(history), len(logits)
print(f"{len(engine.finished)} requests in {steps} steps, {engine.num_preempted} times a request had to give its pages back")
print("programs compiled after the first step:", history[-1][-1] - history[0][-1])

# %% [markdown]
# ## Who is in the batch
#
# Each line is a row of the batch, each colour a request. A row is taken again in the step after its request has ended. Where
# the pool runs dry, the request that joined last gives its pages back and waits (black mark); it comes back later, its
# tokens are fed again, and it goes on where it was.

# %%
rows = np.array([h[0] for h in history]).T  # [batch, steps]
figure, ax = plt.subplots(figsize=(12, 3.2), layout="constrained")
for row, line in enumerate(rows):
    edges = [0, *(np.flatnonzero(np.diff(line)) + 1), steps]
    for start, stop in itertools.pairwise(edges):
        if line[start] >= 0:
            ax.barh(row, stop - start, left=start, height=0.85, color=COLOURS[line[start] % 20], edgecolor="white")
            if stop - start > 4:
                ax.text((start + stop) / 2, row, line[start], ha="center", va="center")
preempted = np.diff([0, *(h[3] for h in history)])  # [steps]
for step in np.flatnonzero(preempted):
    ax.plot(step, -0.75, "v", color="black", clip_on=False, label=None if ax.get_legend_handles_labels()[1] else "gave its pages back")
ax.set(yticks=range(len(rows)), ylabel="row of the batch", xlabel="step", xlim=(0, steps), ylim=(len(rows) - 0.5, -0.95))
ax.legend(loc="lower right", fontsize=10)
plt.show()

# %% [markdown]
# ## Who has which page
#
# The same run, seen from the pool: a line is a page, its colour the request that holds it. Pages of ended requests go to
# whoever needs one next, so a request's pages lie anywhere: that is what block tables are for. Below, the free pages.

# %%
owners = np.stack([h[1] for h in history], axis=1)  # [pages, steps]
image = np.ones((*owners.shape, 3))
image[owners >= 0] = np.array(COLOURS)[owners[owners >= 0] % 20]
figure, axes = plt.subplots(2, 1, figsize=(12, 5.4), layout="constrained", sharex=True, height_ratios=(3, 1))
axes[0].imshow(image, aspect="auto", interpolation="nearest", extent=(0, steps, len(owners), 0))
axes[0].set(ylabel="page of the pool", yticks=range(0, len(owners) + 1, 4))
free = (owners < 0).sum(0)  # [steps]
axes[1].fill_between(np.arange(steps), free, step="post", color="#B8CCE4")
axes[1].step(np.arange(steps), [h[2] for h in history], where="post", color="#C44E52", label="requests that wait")
axes[1].fill_between([], [], color="#B8CCE4", label="free pages")
axes[1].set(xlabel="step", ylim=(0, None))
axes[1].legend(loc="upper right", fontsize=10)
plt.show()

# %% [markdown]
# ## Neighbours do not matter
#
# A request's tokens must not depend on who else was in the batch, on its pages, or on having been interrupted. Two requests
# alone, with the whole pool to itself: the same tokens and logits. The same again over eight devices, two data groups, two
# head ranks, two context ranks: sums are cut elsewhere, so logits differ by rounding.

# %%
def differences(other):
    """Of every token's logits: the greatest difference, relative to the greatest logit."""
    return np.array([np.abs(x - logits[key]).max() / np.abs(logits[key]).max() for key, x in other.items()])


alone = {}
for number in (5, 9):
    single, found = run((1, 1, 1), 5, 20, [REQUESTS[number]])
    assert single.finished[0].tokens == engine.finished[number].tokens
    alone |= {(number, position): x for (_, position), x in found.items()}
sharded_engine, sharded = run((2, 2, 2), 6, 40, REQUESTS[:6])
assert all(r.tokens == engine.finished[r.id].tokens for r in sharded_engine.finished.values())

print(f"requests 5 and 9 alone: {len(alone)} tokens, largest difference {differences(alone).max():.1e}")
figure, ax = plt.subplots(figsize=(9, 2.8), layout="constrained")
ax.hist(differences(sharded), np.logspace(-8, -5, 31), color="#DD8452")
ax.set(xscale="log", xlabel="largest difference of a token's logits, relative to the largest logit", ylabel="tokens")
ax.set_title(f"requests 0 to 5 on eight devices against one: {len(sharded)} tokens", fontsize=11)
plt.show()
assert differences(alone).max() < 1e-4 and differences(sharded).max() < 1e-4

# %% [markdown]
# ## The loop itself
#
# Without the drawing, a step of the loop is this (`mla_jax/serve/engine.py`):
#
# 1. *Join*: waiting requests take free rows, as long as there are pages to begin with.
# 2. *Grow*: each running request gets a place for one token, at the cost of the one that joined last where there is none.
# 3. *Feed*: the compiled step takes one token a row, int32 lengths and the block table. Rows without a request have length -1
#    and touch nothing.
# 4. *Sample*: from the logits; a draw depends on request and position alone.
# 5. *Leave*: requests that have reached their length give their pages back.
#
# `mla-jax serve-demo --mesh data=2,heads=2,context=2` runs it from the command line.
