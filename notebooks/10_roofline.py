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
# # Roofline: where the kernels stand
#
# No kernel runs in this notebook. It draws what was measured on GPUs and stored in `docs/results`, one file a run, as
# `mla-jax bench` writes it. Each file also holds what that very GPU reached in the same run when it only read memory, and
# when it only multiplied matrices: the two ceilings below which every kernel lives.
#
# The *peer* is FlashMLA, run in the same process, call by call in turns. Cases that nobody has measured are not here.

# %%
import collections
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from mla_jax.bench import report
from mla_jax.bench.workloads import SUITES, WORKLOADS

plt.rcParams.update({"figure.dpi": 90, "font.size": 11})
OURS, PEER = "#4C72B0", "#C44E52"
folder = next(p for p in (Path("docs/results"), Path("../docs/results")) if p.is_dir())
files = {path.stem: report.loads(path.read_text()) for path in sorted(folder.glob("*.jsonl"))}
suite_of = {w.name: suite for suite, workloads in SUITES.items() for w in workloads}
order = {name: place for place, name in enumerate(suite_of)}  # as the suites have it, not as the run did
timed = [(run, r) for run, results in files.values() for r in results if r.us and r.flop and r.regime == "graph"]
timed.sort(key=lambda both: order.get(both[1].workload, len(order)))
for name, (run, results) in files.items():
    suites = collections.Counter(suite_of.get(r.workload, "other") for r in results)
    print(f"{name}: {run.device}, jax {run.jax}, peer {run.peer}; {dict(suites)}")
    print(f"  ceilings: {run.dram_gb_s:.0f} GB/s read from DRAM, {run.matmul_tflop_s:.0f} TFLOP/s in a bf16 matmul")

# %% [markdown]
# ## The roofline
#
# Right is more arithmetic for every byte that must be read, up is faster. The slanted part of the roof is memory, the flat
# part the tensor cores. A decode step with 128 heads does about 240 operations for a byte of bf16 cache and lies near the
# corner, where neither may wait for the other; few heads lie to the left of it.

# %%
figure, ax = plt.subplots(figsize=(10, 5), layout="constrained")
intensity = np.geomspace(8, 1200, 100)
for run in dict.fromkeys(run for run, _ in timed):
    roof = np.minimum(intensity * run.dram_gb_s / 1e3, run.matmul_tflop_s)  # TFLOP/s
    ax.plot(intensity, roof, color="black", linewidth=1.3)
run = timed[0][0]
ax.text(30, 30 * run.dram_gb_s / 1e3 * 1.12, "reading memory", rotation=38, ha="center", fontsize=10)
ax.text(700, run.matmul_tflop_s * 1.06, "multiplying", ha="center", fontsize=10)
markers = dict(zip(dict.fromkeys(suite_of.get(r.workload, "other") for _, r in timed), "os^Dv*", strict=False))
for _, r in timed:
    x, marker = r.flop / r.bytes_moved, markers[suite_of.get(r.workload, "other")]
    if r.peer_us:
        ax.plot(x, r.flop / r.peer_us / 1e6, marker, color=PEER, markersize=11, markerfacecolor="none")
    ax.plot(x, r.tflop_s, marker, color=OURS, markersize=6)
for suite, marker in markers.items():
    ax.plot([], [], marker, color=OURS, label=f"mla-jax, {suite}")
ax.plot([], [], "o", color=PEER, markerfacecolor="none", markersize=10, label="FlashMLA")
for h in (16, 32, 64, 128):
    workload = WORKLOADS[f"dense-b128-sq1-h{h}-sk{ {16: 4096, 32: 8192, 64: 4096, 128: 4096}[h] }"]
    x = workload.flop / workload.bytes_moved
    ax.axvline(x, color="grey", linestyle=":", linewidth=0.8)
    ax.text(x, 4.6, f"dense,\n{h} heads", ha="center", fontsize=9, color="grey", backgroundcolor="white")
ax.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="TFLOP/s", ylim=(4, 1300), xlim=(8, 1200))
ax.set_xticks([10, 30, 100, 300, 1000], [10, 30, 100, 300, 1000])
ax.set_yticks([5, 10, 20, 50, 100, 200, 500, 1000], [5, 10, 20, 50, 100, 200, 500, 1000])
ax.minorticks_off()
ax.legend(loc="upper left", fontsize=10)
plt.show()

# %% [markdown]
# ## Against FlashMLA, case by case
#
# FlashMLA's time over ours: right of the line mla-jax is faster, left of it FlashMLA is.

# %%
compared = [(run, r) for run, r in timed if r.ratio]
figure, ax = plt.subplots(figsize=(10, 0.7 + 0.28 * len(compared)), layout="constrained")
ratios = np.array([r.ratio for _, r in compared])
bars = ax.barh([r.workload for _, r in compared], ratios, color=[OURS if x >= 1 else "#DD8452" for x in ratios], height=0.7)
ax.bar_label(bars, [f"{x:.2f}" for x in ratios], label_type="center", color="white", fontsize=10)
for place, (_, r) in enumerate(compared):
    text = f"{r.us:.0f} us, FlashMLA {r.peer_us:.0f} us"
    ax.text(max(r.ratio, 1) + 0.02, place, text, va="center", fontsize=10)
ax.axvline(1, color="black", linewidth=1.2)
ax.margins(y=0.01)
ax.set(xlim=(0, max(1.45, ratios.max() * 1.4)), xlabel="time of FlashMLA / time of mla-jax")
ax.invert_yaxis()
plt.show()
print(f"geometric mean of {len(ratios)} cases: {np.exp(np.log(ratios).mean()):.3f}")

# %% [markdown]
# ## How much of the GPU is used
#
# The share of each ceiling. Near the corner of the roofline both matter; the taller bar tells what a case leans on.

# %%
shares = np.array([r.shares(run) for run, r in timed])  # [cases, 2]
figure, ax = plt.subplots(figsize=(10, 0.8 + 0.4 * len(timed)), layout="constrained")
at = np.arange(len(timed))
for i, (label, colour) in enumerate((("of DRAM bandwidth", "#8172B3"), ("of matmul rate", "#55A868"))):
    bars = ax.barh(at + 0.36 * i - 0.18, 100 * shares[:, i], 0.34, color=colour, label=label)
    ax.bar_label(bars, [f" {100 * x:.0f} %" for x in shares[:, i]], fontsize=9)
ax.margins(y=0.01)
ax.set(yticks=at, yticklabels=[r.workload for _, r in timed], xlim=(0, 118), xlabel="per cent")
ax.invert_yaxis()
ax.legend(loc="upper right", fontsize=10)
plt.show()

# %% [markdown]
# ## What has not been measured
#
# Named workloads of `mla-jax bench` without a stored result, by suite. docs/sparse-decode.md and docs/log.md hold more numbers,
# of earlier versions or taken in another way.

# %%
measured = {r.workload for _, results in files.values() for r in results if r.us}
for suite, workloads in SUITES.items():
    done = sum(w.name in measured for w in workloads)
    print(f"{suite:11}{done:3} of {len(workloads):2}  {'#' * done}{'.' * (len(workloads) - done)}")
