"""Encoding of key/value rows into cache records and back, for every `KVFormat`.

A *record* is what one token keeps in one area of a page (`pallas_kernels.formats`): uint8 bytes for quantised formats,
the values themselves for the others. Everything here works on the last axis and leaves leading axes alone, so packing
whole pages, appending single tokens and gathering rows share one code.

Scale rules (the writers of the field disagree; a reader must accept any scale), with m the format's `largest_value`:
  pow2  the smallest power of two that keeps a tile within the e4m3 range, at least that of an amax / m of 1e-4:
        2^ceil(log2(max(amax / m, 1e-4))), FlashMLA's rule. Exact: it is read off the bits of amax.
  pow2_low  the same with the lower bound on amax instead: 2^ceil(log2(max(amax, 1e-4) / m)) (DeepSeek's indexer, and
        vLLM's rule for MODEL1).
  amax  amax / m itself, at least the smallest normal float32 (vLLM's rule for V32). Needs a float32 scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.formats import E8M0, F32, KVFormat

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Shaped

ScaleRule = Literal["pow2", "amax", "pow2_low"]
SCALE_RULES: tuple[ScaleRule, ...] = ("pow2", "amax", "pow2_low")

_MANTISSA_BITS = 23  # of float32
_EXPONENT_BIAS = 127
_SMALLEST = 1e-4  # lower bound of amax / largest value under pow2, of amax under pow2_low


def check_scale_rule(scale_rule: str, fmt: KVFormat) -> None:
    """Raises ValueError unless `scale_rule` is known and `fmt` can hold the scales it makes."""
    if scale_rule not in SCALE_RULES:
        raise ValueError(f"scale_rule is {scale_rule!r}; accepted: {', '.join(map(repr, SCALE_RULES))}")
    if scale_rule == "amax":
        if not fmt.is_quantized:
            raise ValueError(f"scale_rule='amax' needs a format with scales; {fmt.name} stores values as they are")
        scale_dtype = fmt.locate("scale")[2].dtype
        if scale_dtype != F32:
            raise ValueError(
                f"scale_rule='amax' makes arbitrary float32 scales, which the {scale_dtype} scales of {fmt.name} "
                "cannot hold; accepted: 'pow2'"
            )


def _float_bits(x: float) -> int:
    return int(np.float32(x).view(np.int32))


def pow2_exponents(
    amax: Float32[Array, "*tiles"], largest: float, smallest_ratio: float = _SMALLEST
) -> jax.Array:
    """Biased float32 exponents of the pow2 scales: int32 e, scale 2^(e - 127).

    ceil(log2(amax / largest)) without a logarithm or a division, neither of which XLA computes exactly: with
    amax = m * 2^a and largest = n * 2^b (m, n in [1, 2)), it is a - b where m <= n, else a - b + 1.
    """
    mantissa_mask = (1 << _MANTISSA_BITS) - 1
    top_exponent, top_mantissa = divmod(_float_bits(largest), 1 << _MANTISSA_BITS)
    bits = lax.bitcast_convert_type(amax, jnp.int32)  # [*tiles], amax >= 0
    exponent = lax.shift_right_logical(bits, jnp.int32(_MANTISSA_BITS)) - (top_exponent - _EXPONENT_BIAS)
    exponent = exponent + ((bits & mantissa_mask) > top_mantissa).astype(jnp.int32)
    smallest = int(np.ceil(np.log2(smallest_ratio))) + _EXPONENT_BIAS
    return jnp.maximum(exponent, smallest)


def _power_of_two(biased_exponent: jax.Array) -> jax.Array:
    """2^(e - 127) for int32 e in [1, 254]."""
    return lax.bitcast_convert_type(lax.shift_left(biased_exponent, jnp.int32(_MANTISSA_BITS)), jnp.float32)


def _quantize(nope: Float[Array, "*n d"], fmt: KVFormat, scale_rule: ScaleRule) -> tuple[jax.Array, jax.Array]:
    """Values in the format's dtype [*n, d] and scales in the scale's dtype [*n, num_scales]."""
    value, scale = fmt.locate("nope")[2], fmt.locate("scale")[2]
    largest = fmt.largest_value
    x = nope.astype(jnp.float32).reshape(*nope.shape[:-1], fmt.num_scales, fmt.scale_tile)  # [*n, tiles, tile]
    amax = jnp.max(jnp.abs(x), axis=-1)  # [*n, tiles]
    if scale_rule != "amax":
        smallest_ratio = _SMALLEST if scale_rule == "pow2" else _SMALLEST / largest
        exponent = pow2_exponents(amax, largest, smallest_ratio)  # [*n, tiles]
        y = x * _power_of_two(2 * _EXPONENT_BIAS - exponent)[..., None]  # exact: a power of two
        scales = exponent.astype(jnp.uint8) if scale.dtype == E8M0 else _power_of_two(exponent)
        if scale.dtype == E8M0:
            scales = lax.bitcast_convert_type(scales, scale.dtype)
    else:
        # amax >= 0, so this is `largest`; but XLA cannot know, and so cannot turn the division by a constant into a
        # multiplication, which rounds differently (it does so even across an optimization barrier).
        divisor = jnp.maximum(-amax, largest)
        scales = jnp.maximum(amax / divisor, jnp.finfo(jnp.float32).tiny)  # [*n, tiles]
        y = x / scales[..., None]
    # The cast does not saturate: past the largest value it would give NaN. A NaN stays one.
    y = jnp.clip(y, -largest, largest).astype(value.dtype)
    return y.reshape(nope.shape), scales


def _to_bytes(x: Shaped[Array, "*n k"]) -> jax.Array:
    """Little-endian bytes of the last axis: uint8 [*n, k * itemsize].

    By shifts, since XLA fuses those into the write that follows, and a bitcast to narrower elements into nothing: on a
    GPU an append of V32 rows is one kernel in place of four.
    """
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")  # [*n, k]
    shifts = 8 * jnp.arange(x.dtype.itemsize, dtype=bits.dtype)
    b = lax.shift_right_logical(*jnp.broadcast_arrays(bits[..., None], shifts.reshape(*[1] * x.ndim, -1)))
    return b.astype(jnp.uint8).reshape(*x.shape[:-1], x.shape[-1] * x.dtype.itemsize)


def _from_bytes(b: Shaped[Array, "*n bytes"], dtype: np.dtype) -> jax.Array:
    """The inverse of `_to_bytes`."""
    if dtype.itemsize > 1:
        b = b.reshape(*b.shape[:-1], b.shape[-1] // dtype.itemsize, dtype.itemsize)
    return lax.bitcast_convert_type(b, dtype)


def encode_rows(kv: Float[Array, "*n d_qk"], fmt: KVFormat, scale_rule: ScaleRule = "pow2") -> tuple[jax.Array, ...]:
    """Rows in `fmt.compute_dtype` -> one array per record: [*n, record_bytes] uint8, or the row itself."""
    if not fmt.is_quantized:
        return (kv,)
    nope, rope = kv[..., : fmt.d_nope], kv[..., fmt.d_nope :]
    values, scales = _quantize(nope, fmt, scale_rule)
    parts = {"nope": values, "scale": scales, "rope": rope}

    def one(record):
        fields = []
        for field in record:
            if field.role == "pad":
                fields.append(jnp.zeros((*kv.shape[:-1], field.num_bytes), jnp.uint8))
            else:
                fields.append(_to_bytes(parts[field.role].astype(field.dtype)))
        return jnp.concatenate(fields, axis=-1)

    return tuple(one(record) for record in fmt.records)


def decode_rows(records: tuple[jax.Array, ...], fmt: KVFormat) -> jax.Array:
    """The inverse of `encode_rows`: rows [*n, d_qk] in `fmt.compute_dtype`.

    Values are dequantised as value * scale in float32 with one rounding to bfloat16, for any scale; an e8m0 byte 255
    (NaN) makes its tile NaN.
    """
    if not fmt.is_quantized:
        return records[0]
    parts = {}
    for record, fields in zip(records, fmt.records, strict=True):
        offset = 0
        for field in fields:
            if field.role != "pad":
                parts[field.role] = _from_bytes(record[..., offset : offset + field.num_bytes], field.dtype)
            offset += field.num_bytes
    values = parts["nope"].astype(jnp.float32)  # [*n, d_nope]
    scales = parts["scale"].astype(jnp.float32)  # [*n, tiles]
    tiles = values.reshape(*values.shape[:-1], fmt.num_scales, fmt.scale_tile)
    nope = (tiles * scales[..., None]).reshape(values.shape).astype(fmt.compute_dtype)
    if "rope" not in parts:
        return nope
    return jnp.concatenate([nope, parts["rope"].astype(fmt.compute_dtype)], axis=-1)
