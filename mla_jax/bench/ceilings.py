"""What this GPU can do at best, measured in the same run as everything else: DRAM reads and bf16 matrix products."""

from __future__ import annotations

import dataclasses
import statistics

import jax
import jax.numpy as jnp

from mla_jax.bench import cupti

_READ_BYTES = 4 << 30  # many times the L2
_MATMUL = 8192
_MATMUL_CALLS = 10  # short enough that the power limit has not yet lowered the clock


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Best rates seen on this GPU: read-only DRAM bandwidth in GB/s and a bf16 8192^3 matmul in TFLOP/s."""

    dram_gb_s: float
    matmul_tflop_s: float


def measure(repeats: int = 5) -> Ceilings:
    """Measures both, medians of `repeats`. Needs 5 GiB of GPU memory for a moment."""
    return Ceilings(dram_gb_s=_dram_gb_s(repeats), matmul_tflop_s=_matmul_tflop_s(repeats))


def _dram_gb_s(repeats: int) -> float:
    x = jax.random.normal(jax.random.key(0, impl="unsafe_rbg"), (_READ_BYTES // 4 // 4096, 4096), jnp.float32)
    read = jax.jit(lambda x: jnp.max(x, axis=1))  # [rows]: one pass, hardly any output
    return _READ_BYTES / 1e3 / _median_span_us(lambda: read(x), repeats)


def _matmul_tflop_s(repeats: int) -> float:
    a = jax.random.normal(jax.random.key(1), (_MATMUL, _MATMUL), jnp.bfloat16)
    b = (jax.random.normal(jax.random.key(2), (_MATMUL, _MATMUL), jnp.bfloat16) / 90).astype(jnp.bfloat16)

    @jax.jit
    def products(a, b):
        for _ in range(_MATMUL_CALLS):
            a = a @ b  # 90 = sqrt(8192): magnitudes stay as they are
        return a

    flop = 2 * _MATMUL**3 * _MATMUL_CALLS
    return flop / 1e6 / _median_span_us(lambda: products(a, b), repeats)


def _median_span_us(launch, repeats: int) -> float:
    jax.block_until_ready(launch())
    spans = []
    for _ in range(repeats):
        with cupti.trace() as activities:
            jax.block_until_ready(launch())
        spans.append(cupti.span_us(activities))
    return statistics.median(spans)
