"""What FP8 costs in accuracy, measured: `python -m mla_jax.bench.accuracy` prints the tables of docs/accuracy.md.

Rows are random. "normal" draws every channel alike; "uneven" gives channels standard deviations that are spread over a
factor of 2^8, as a latent's differ in trained models; "outlier" multiplies one channel of 64 by 30. Queries are scaled
so that the scores' standard deviation is `sharpness`. Everything but the cache is float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.cache import pack_kv, unpack_kv
from mla_jax.quantize import ScaleRule
from pallas_kernels.formats import BF16_512, BF16_576, MODEL1, V32, KVFormat

CASES: tuple[tuple[KVFormat, ScaleRule], ...] = (
    (BF16_576, "pow2"), (V32, "pow2"), (V32, "amax"), (BF16_512, "pow2"), (MODEL1, "pow2"),
)  # fmt: skip
SOURCES = ("normal", "uneven", "outlier")
SHARPNESS = (0.5, 1.0, 2.0, 4.0)
KEYS, HEADS = 2048, 32


def rows(source: str, n: int, d: int, seed: int = 0) -> np.ndarray:
    """Random rows, float32 [n, d]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    if source == "uneven":
        x *= np.exp2(rng.uniform(-4, 4, d))
    elif source == "outlier":
        x[:, ::64] *= 30
    return x.astype(np.float32)


def stored(kv: np.ndarray, fmt: KVFormat, scale_rule: ScaleRule) -> np.ndarray:
    """What a cache gives back of rows [n, d_qk], float32."""
    cache = pack_kv(jnp.asarray(kv[None], jnp.bfloat16), fmt, scale_rule=scale_rule)
    return np.asarray(unpack_kv(cache), np.float32)[0]


@jax.jit
def attention(q: jax.Array, kv: jax.Array, sharpness: jax.Array) -> jax.Array:
    """q [h, d], kv [n, d], sharpness [] -> [h, 512], float32; q is scaled by the scores that `kv` gives."""
    scores = jnp.einsum("hd,nd->hn", q, kv, precision="highest")
    weights = jax.nn.softmax(sharpness * scores)
    return jnp.einsum("hn,nd->hd", weights, kv[:, :512], precision="highest")


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Norm of the difference over the norm of what it should be."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def value_error(fmt: KVFormat, scale_rule: ScaleRule, source: str) -> float:
    """Relative error of the latent part of rows."""
    kv = rows(source, KEYS, fmt.d_qk)
    return relative(stored(kv, fmt, scale_rule)[:, : fmt.d_nope], kv[:, : fmt.d_nope])


def attention_error(fmt: KVFormat, scale_rule: ScaleRule, source: str, sharpness: float) -> float:
    """Relative error of the result of attention over `KEYS` keys, `HEADS` heads together."""
    kv = rows(source, KEYS, fmt.d_qk)
    q = rows("normal", HEADS, fmt.d_qk, seed=1)
    factor = jnp.float32(sharpness / np.std(q @ kv.T))
    want = attention(q, kv, factor)
    return relative(np.asarray(attention(q, stored(kv, fmt, scale_rule), factor)), np.asarray(want))


def table() -> str:
    """The table of docs/accuracy.md, in Markdown; per cent."""
    head = ["format", "scales", "rows", "values", *(f"result, scores' std {s:g}" for s in SHARPNESS)]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|" + "--:|" * (1 + len(SHARPNESS))]
    for fmt, rule in CASES:
        for source in SOURCES:
            errors = [value_error(fmt, rule, source)]
            errors += [attention_error(fmt, rule, source, s) for s in SHARPNESS]
            scales = rule if fmt.is_quantized else "-"
            lines.append(f"| {' | '.join([fmt.name, scales, source, *(f'{100 * e:.2f}' for e in errors)])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
