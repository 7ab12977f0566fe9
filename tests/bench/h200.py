"""Times of the benchmark on an H200, jax 0.11.2, regime `graph`, in one run: what the models are compared with."""

import json
import pathlib

_LINES = [json.loads(line) for line in (pathlib.Path(__file__).parent / "h200_times.jsonl").read_text().splitlines()]
RUN = _LINES[0]
"""Where and how they ran, and what a copy and a matrix product reached in the same process."""
TIMES: dict[str, float] = {line["workload"]: line["us"] for line in _LINES if "workload" in line}
"""Workload -> microseconds a call, all kernels and gaps but the plan's."""
