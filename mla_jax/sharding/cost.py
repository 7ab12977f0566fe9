"""What a decode step costs on every GPU of a mesh: bytes of KV read from HBM against bytes sent over NVLink.

Only what grows with the sharding is counted: KV rows, and the merge of context ranks. A decode step is bound by memory,
so its time is about `kv_read_bytes` / HBM bandwidth + `link_bytes` / NVLink bandwidth + the collectives' latency.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.formats import BF16_576, KVFormat

F32_BYTES = 4  # partial results travel in float32, and so do all log-sum-exps


@dataclasses.dataclass(frozen=True)
class StepCost:
    """One layer's decode step, on one GPU.

    Attributes:
      kv_read_bytes: KV rows read from HBM.
      pool_bytes: what the pool of these contexts takes in this GPU's memory.
      link_bytes: bytes that this GPU sends (and receives) over NVLink inside the op: the merge of context ranks.
      collectives: how many collectives the op runs; each costs latency, whatever its bytes.
    """

    kv_read_bytes: float
    pool_bytes: float
    link_bytes: float
    collectives: int

    def step_us(self, *, hbm_bytes_per_s: float, link_bytes_per_s: float, collective_us: float) -> float:
        """Time of the step in microseconds at these rates; no overlap: the merge needs the partials."""
        return (
            self.kv_read_bytes / hbm_bytes_per_s * 1e6
            + self.link_bytes / link_bytes_per_s * 1e6
            + self.collectives * collective_us
        )


def step_cost(
    fmt: KVFormat,
    *,
    batch: int,
    s_q: int,
    num_heads: int,
    keys: int,
    context_tokens: int | None = None,
    data: int = 1,
    heads: int = 1,
    context: int = 1,
) -> StepCost:
    """The cost of a step of `batch` requests that each read `keys` rows.

    Args:
      fmt: the cache's format.
      batch, s_q, num_heads: of the whole call.
      keys: rows that each request reads: its context in dense decode, its top-k in sparse.
      context_tokens: rows that each request has in the pool; default `keys`.
      data, heads, context: GPUs along each axis.

    Returns:
      The cost on one GPU. Head ranks read the same rows, so `heads` saves no KV bytes and no memory.
    """
    tokens = keys if context_tokens is None else context_tokens
    own_batch = batch / data
    rows = own_batch * s_q * (num_heads / heads)
    partial_bytes = rows * (fmt.d_v * F32_BYTES + F32_BYTES)
    merged_bytes = rows * (fmt.d_v * fmt.compute_dtype.itemsize + F32_BYTES)
    return StepCost(
        kv_read_bytes=own_batch * keys / context * fmt.bytes_per_token,
        pool_bytes=own_batch * tokens / context * fmt.bytes_per_token,
        # All-to-all of partials, all-gather of results: each moves all but a rank's own share.
        link_bytes=(context - 1) / context * (partial_bytes + merged_bytes),
        collectives=4 if context > 1 else 0,
    )


# What docs/sharding.md tabulates: (requests, keys of each).
CASES = ((128, 4096), (32, 32_768), (4, 262_144))
# Data sheet of an H200, each way over NVLink; the latency of a small collective is a guess.
RATES = dict(hbm_bytes_per_s=4.8e12, link_bytes_per_s=450e9, collective_us=10.0)


def table(gpus: int = 4, num_heads: int = 128) -> str:
    """The table of docs/sharding.md, in Markdown."""
    head = "| requests x keys | cut over | KV read, MB | pool, MB | sent, MB | estimate, us |"
    lines = [head, "|---|---|--:|--:|--:|--:|"]
    for batch, keys in CASES:
        for axis in ("none", "data", "heads", "context"):
            sizes: dict[str, int] = {} if axis == "none" else {axis: gpus}
            cost = step_cost(BF16_576, batch=batch, s_q=1, num_heads=num_heads, keys=keys, **sizes)
            megabytes = (cost.kv_read_bytes / 1e6, cost.pool_bytes / 1e6, cost.link_bytes / 1e6)
            cells = [f"{batch} x {keys}", axis, *(f"{x:.1f}" for x in megabytes), f"{cost.step_us(**RATES):.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
