"""Times of the benchmark on an H200, jax 0.11.2, regime `graph`: what the models are compared with.

Two runs: that of the dense workloads is older than the kernel of a single tile of rows (docs/sm100.md)."""

import json
import pathlib

_LINES = [json.loads(line) for line in (pathlib.Path(__file__).parent / "h200_times.jsonl").read_text().splitlines()]
RUN = _LINES[0]
"""Where and how the dense workloads ran, and what a copy and a matrix product reached in the same process."""
TIMES: dict[str, float] = {line["workload"]: line["us"] for line in _LINES if "workload" in line}
"""Workload -> microseconds a call, all kernels and gaps but the plan's."""
