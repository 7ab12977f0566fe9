"""combine.py under Pallas' GPU interpreter, against float64."""

import itertools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import combine, mgpu


def expected(partial_out, partial_lse2, splits, sink):
    """[items, rows, d_v], [items, rows] in float64."""
    outs, lses = [], []
    for first, behind in itertools.pairwise(splits):
        lse2 = partial_lse2[first:behind].astype(np.float64)  # [pieces, rows]
        weight = np.exp2(lse2 - np.maximum(lse2.max(0), -1e30))  # [pieces, rows]
        total = weight.sum(0)  # [rows]
        out = (weight[..., None] * partial_out[first:behind]).sum(0) / np.where(total, total, 1)[:, None]
        with np.errstate(divide="ignore"):
            lse = np.where(total != 0, (np.maximum(lse2.max(0), -1e30) + np.log2(total)) * np.log(2), -np.inf)
        if sink is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                factor = 1 / (1 + np.exp(np.resize(sink, lse.shape).astype(np.float64) - lse))
            out = np.where(total != 0, factor, 0)[:, None] * out
        outs.append(out)
        lses.append(lse)
    return np.stack(outs), np.stack(lses)


@pytest.mark.parametrize("rows_per_cta, with_sink", [(1, False), (1, True), (2, True), (8, False)])
def test_merge(rows_per_cta, with_sink):
    items, rows, padded_rows, d_v = 3, 3, 8, 512
    splits = np.array([0, 1, 4, 22])  # one piece; three; more than are loaded at once
    rng = np.random.default_rng(0)
    partial_out = rng.standard_normal((24, padded_rows, d_v)).astype(np.float32)
    partial_lse2 = (rng.standard_normal((24, padded_rows)) * 4).astype(np.float32)
    partial_lse2[1:4, 1] = -np.inf  # a row without keys in any piece
    partial_out[1:4, 1] = 0
    partial_lse2[2, 0] = -np.inf  # a piece without keys
    partial_out[2, 0] = 0
    partial_out[10, 2], partial_lse2[10, 2] = np.nan, np.nan  # a piece with a key that is NaN
    partial_out[22:], partial_lse2[22:] = np.nan, np.nan  # places that no piece owns
    sink = np.array([0.5, -np.inf, np.inf], np.float32) if with_sink else None
    # Padded rows in one of the two: there the other says how many count.
    padded = dict(out=padded_rows, lse=rows) if rows_per_cta == 8 else dict(out=rows, lse=padded_rows)
    out = jnp.full((items, padded["out"], d_v), 7, jnp.bfloat16)
    lse = jnp.full((items, padded["lse"]), 7, jnp.float32)
    options = {"rows_per_cta": rows_per_cta, "interpret": plgpu.InterpretGPUParams(detect_races=True)}
    operands = (out, lse, partial_out, partial_lse2, jnp.asarray(splits, jnp.int32))
    operands += (jnp.asarray(sink),) if with_sink else ()
    got_out, got_lse = jax.jit(lambda *operands: combine.combine(*operands, **options))(*operands)
    want_out, want_lse = expected(partial_out, partial_lse2, splits, sink)
    got_rows = np.asarray(got_out[1:, :rows], np.float32)
    np.testing.assert_allclose(got_rows, want_out[1:, :rows], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(got_lse[1:, :rows], want_lse[1:, :rows], rtol=1e-5, atol=1e-5)
    assert (got_out[0] == 7).all() and (got_lse[0] == 7).all(), "an item of one piece is not touched"
    assert (got_lse[:, rows:] == 7).all() and (got_out[:, rows:] == 7).all(), "padding is not touched"


def test_interpreted_table_covers_what_the_interpreter_lacks():
    own = {name for name in vars(mgpu.Hardware) if not name.startswith("_")}
    assert own == {name for name in vars(mgpu.Interpreted) if not name.startswith("_")}
