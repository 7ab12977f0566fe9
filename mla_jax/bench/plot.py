"""Achieved rate against the roofline, drawn from stored results. Needs matplotlib (the `bench` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mla_jax.bench.report import Result, Run
from mla_jax.bench.workloads import SUITES


def roofline(files: Sequence[tuple[Run, list[Result]]], target: Path) -> None:
    """Writes one picture: FLOP per byte against TFLOP/s, log-log, a roof per run, ours filled and the peer hollow.

    Raises ValueError where no result has a rate.
    """
    suite_of = {w.name: suite for suite, workloads in SUITES.items() for w in workloads}
    points = [(run, r) for run, results in files for r in results if r.tflop_s and r.bytes_moved]
    if not points:
        raise ValueError("none of these results has a FLOP rate to draw")
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    intensity = np.geomspace(0.5 * min(map(_intensity, points)), 2 * max(map(_intensity, points)), 200)
    for run in dict.fromkeys(run for run, _ in points):
        roof = np.minimum(intensity * run.dram_gb_s / 1e3, run.matmul_tflop_s)  # TFLOP/s
        label = f"{run.device}: {run.dram_gb_s:.0f} GB/s, {run.matmul_tflop_s:.0f} TFLOP/s"
        axes.plot(intensity, roof, color="black", linewidth=1.2, label=label)
    suites = list(dict.fromkeys(suite_of.get(r.workload, "other") for _, r in points))
    colours = dict(zip(suites, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for suite in suites:
        ours = [p for p in points if suite_of.get(p[1].workload, "other") == suite]
        x = [_intensity(p) for p in ours]
        axes.scatter(x, [r.tflop_s or 0 for _, r in ours], color=colours[suite], s=28, zorder=3, label=suite)
        y = [r.flop / r.peer_us / 1e6 if r.peer_us else np.nan for _, r in ours]  # nan: not drawn
        axes.scatter(x, y, facecolors="none", edgecolors=colours[suite], s=60, zorder=2)
    if any(r.peer_us for _, r in points):
        axes.scatter([], [], facecolors="none", edgecolors="gray", s=60, label="hollow: peer")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(which="both", linewidth=0.3)
    axes.legend(fontsize="small")
    figure.savefig(target, dpi=150)
    plt.close(figure)


def _intensity(point: tuple[Run, Result]) -> float:
    return point[1].flop / point[1].bytes_moved
