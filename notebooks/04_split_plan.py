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
# # The split plan: who reads which keys, and when
#
# A decode step reads every request's whole cache, and requests are not equally long. If one SM (one of the GPU's 132
# multiprocessors) served one request, all would wait for the longest. *Split-KV* cuts long requests into pieces that
# several SMs work on; a second, tiny kernel merges their results. Who does what is the *plan*, a pure function of the
# lengths: `mla_jax.plan_decode`. This notebook draws plans as timelines.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mla_jax
from pallas_kernels.schedule import BLOCK_TOKENS, PIECE_OVERHEAD_BLOCKS, TO_THE_END

plt.rcParams.update({"figure.dpi": 90, "font.size": 11})
COLOURS = plt.get_cmap("tab20").colors
plan_decode = jax.jit(
    mla_jax.plan_decode, static_argnames=("s_q", "num_heads", "page_size", "num_sms", "batch_invariant")
)


def pieces_of(plan, lengths):
    """The plan as rows (part, request, first block, number of blocks), in the order in which they are worked on."""
    parts, pieces = np.asarray(plan.parts), np.asarray(plan.pieces)  # [parts + 1], [max_pieces, 4]
    rows = []
    for part in range(plan.num_parts):
        for request, first, last, _ in pieces[parts[part] : parts[part + 1]]:
            if last == TO_THE_END:
                last = -(-int(lengths[request]) // BLOCK_TOKENS)
            rows.append((part, int(request), int(first), int(last - first)))
    return rows


def makespan(rows):
    """Blocks' time until the last SM is done; a piece costs a few blocks' time beside its own blocks."""
    busy = {}
    for part, _, _, blocks in rows:
        busy[part] = busy.get(part, 0) + blocks + PIECE_OVERHEAD_BLOCKS
    return max(busy.values())


# %% [markdown]
# ## Eight requests on twelve SMs
#
# Each line is an SM, each bar a piece of a request, as long as it has blocks of 64 keys. The grey tip of a bar is what a
# piece costs beside its blocks (loading q, writing the result): about two blocks' time. Above, every request on an SM of
# its own; below, the plan. The dashed line is where all would end if work could be divided without any cost.


# %%
def timeline(axes, rows, num_parts, title):
    clock = np.zeros(num_parts)
    for part, request, first, blocks in rows:
        axes.barh(part, blocks, left=clock[part], height=0.82, color=COLOURS[request % 20], edgecolor="white")
        axes.barh(part, PIECE_OVERHEAD_BLOCKS, left=clock[part] + blocks, height=0.82, color="#C8C8C8", edgecolor="white")
        if blocks >= 9:
            text = f"{request}" if first == 0 else f"{request} from {first}" if blocks >= 26 else f"{request}"
            axes.text(clock[part] + blocks / 2, part, text, ha="center", va="center", fontsize=9)
        clock[part] += blocks + PIECE_OVERHEAD_BLOCKS
    axes.set(yticks=range(num_parts), ylabel="SM", title=title)
    axes.invert_yaxis()


lengths = np.array([9000, 700, 16500, 2500, 2500, 64, 5200, 1100], np.int32)  # [b] tokens
plan = plan_decode(jnp.asarray(lengths), s_q=1, num_heads=64, page_size=64, num_sms=12)
planned = pieces_of(plan, lengths)
alone = [(r, r, 0, int(-(-n // BLOCK_TOKENS))) for r, n in enumerate(lengths)]
ideal = sum(blocks for *_, blocks in planned) / 12

figure, axes = plt.subplots(2, 1, figsize=(11, 7), layout="constrained", sharex=True)
timeline(axes[0], alone, 12, f"a request an SM: done after {makespan(alone)} blocks' time")
timeline(axes[1], planned, 12, f"the plan: done after {makespan(planned)}")
for ax in axes:
    ax.axvline(ideal, color="black", linestyle="--", linewidth=1)
axes[1].set_xlabel("time, in blocks of 64 keys (the numbers in the bars are requests)")
plt.show()

# %% [markdown]
# Requests 0 and 2 are cut into several pieces, short ones share an SM. Cuts fall on even blocks, since the dense kernel
# works on pairs of them, and may move a little to avoid a piece of next to nothing.
#
# ## What the arrays say
#
# The plan is three small int32 arrays. Part p (an SM, or a few that share a request's heads) runs the pieces from
# `parts[p]` to `parts[p + 1]`.

# %%
print("parts ", np.asarray(plan.parts))
print("splits", np.asarray(plan.splits), " (request i owns the pieces from splits[i] to splits[i + 1])")
print("\n piece  request  blocks")
for number, (_, request, first, blocks) in enumerate(planned[:6]):
    print(f"{number:6}{request:9}  {first}..{first + blocks - 1}")

# %% [markdown]
# ## From one long request to many equal ones
#
# The same twelve SMs. One request alone is spread over all of them; twelve equal ones get one each and nothing is cut;
# with thirteen, one too many, the plan cuts so that nobody waits for a whole second round.

# %%
cases = {"1 request of 24,576": [24576], "12 requests of 2,048": [2048] * 12, "13 requests of 2,048": [2048] * 13}
figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained", sharey=True)
for ax, (name, case) in zip(axes, cases.items(), strict=True):
    made = plan_decode(jnp.asarray(case, jnp.int32), s_q=1, num_heads=64, page_size=64, num_sms=12)
    rows = pieces_of(made, case)
    timeline(ax, rows, 12, f"{name}: {makespan(rows)}")
    ax.set_xlabel("time, in blocks")
    if ax is not axes[0]:
        ax.set_ylabel("")
axes[0].set_ylim(11.6, -0.6)  # shared: each panel inverted it
plt.show()

# %% [markdown]
# ## The same bits whoever else is in the batch
#
# Floating-point sums depend on where they are cut. A balanced plan cuts a request by what else is in the batch, so its last
# bits may change when a neighbour joins. With `batch_invariant=True` a request's pieces depend on its own length alone: the
# timeline is less even, the result is reproducible bit for bit. Request 2, of 16,500 tokens, in two batches:

# %%
other = np.array([300, 12000, 16500, 8000, 500, 7000, 64, 4096], np.int32)  # [b]; request 2 as before
figure, axes = plt.subplots(2, 1, figsize=(11, 3.8), layout="constrained", sharex=True)
for ax, invariant in zip(axes, (False, True), strict=True):
    for line, batch in enumerate((lengths, other)):
        made = plan_decode(
            jnp.asarray(batch), s_q=1, num_heads=64, page_size=64, num_sms=12, batch_invariant=invariant
        )
        for _, request, first, blocks in pieces_of(made, batch):
            if request == 2:
                ax.barh(line, blocks, left=first, height=0.7, color="#55A868" if invariant else "#C44E52", edgecolor="black")
    ax.set(yticks=(0, 1), yticklabels=("batch A", "batch B"), title=f"batch_invariant={invariant}: where request 2 is cut")
    ax.invert_yaxis()
axes[1].set_xlabel("block of request 2")
plt.show()

# %% [markdown]
# ## How even is it?
#
# Random batches, 132 SMs, 64 heads. The height is the time of the busiest SM over that of perfectly divided work. With four
# requests pieces are short, and what each costs beside its blocks weighs; nobody could divide the work as evenly as the
# measure supposes. The plan is a closed form of the lengths, so it runs inside `jit` with the step it belongs to: it never
# goes stale, and changing lengths recompile nothing.

# %%
make = jax.jit(lambda n: mla_jax.plan_decode(n, s_q=1, num_heads=64, page_size=64))
rng = np.random.default_rng(0)
batches = {b: [rng.integers(64, 32768, b).astype(np.int32) for _ in range(8)] for b in (4, 16, 64, 256)}
figure, ax = plt.subplots(figsize=(8.5, 3.8), layout="constrained")
for place, (b, samples) in enumerate(batches.items()):
    split, whole = [], []
    for n in samples:
        blocks = -(-n // BLOCK_TOKENS)  # [b]
        share = (blocks.sum() + PIECE_OVERHEAD_BLOCKS * b) / 132
        split.append(makespan(pieces_of(make(jnp.asarray(n)), n)) / share)
        dealt = np.zeros(132)  # without splitting: the longest request first, each to the SM that has least to do
        for x in np.sort(blocks)[::-1]:
            dealt[dealt.argmin()] += x + PIECE_OVERHEAD_BLOCKS
        whole.append(dealt.max() / share)
    ax.plot(np.full(8, place - 0.1), whole, "o", color="#C44E52", alpha=0.5, label="whole requests, dealt well" if not place else None)
    ax.plot(np.full(8, place + 0.1), split, "o", color="#4C72B0", alpha=0.5, label="split plan" if not place else None)
ax.set(xticks=range(len(batches)), xticklabels=list(batches), xlabel="requests", ylabel="busiest SM / even share", yscale="log")
ax.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
ax.legend()
plt.show()
assert make._cache_size() == len(batches)  # one compilation a batch size, none for other lengths
