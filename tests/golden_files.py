"""Reading tests/golden/*.npz: arrays as the ops take them, and FlashMLA's tolerances."""

from __future__ import annotations

import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import mla_jax

FOLDER = pathlib.Path(__file__).parent / "golden"
DENSE = ["dense_basic", "dense_d512", "dense_empty_request", "dense_mtp_causal"]
SPARSE = [
    "v32_basic", "v32_sink_topk_length", "model1_basic", "model1_extra", "model1_lonely", "garbage_v32",
    "garbage_v32_amax", "garbage_model1",
]  # fmt: skip


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {k: file[k] for k in file.files}


def bf16(bits: np.ndarray):
    return jnp.asarray(bits.view(ml_dtypes.bfloat16))


def sparse_format(name: str) -> mla_jax.KVFormat:
    return mla_jax.V32 if "v32" in name else mla_jax.MODEL1


def assert_close(out, lse, want_out, want_lse, what=""):
    """FlashMLA's tolerances. `lse` in its convention: [b, h, s_q], +inf for empty rows."""
    out, lse = np.asarray(out, np.float64), np.asarray(lse, np.float64)
    want_out, want_lse = np.asarray(want_out, np.float64), np.asarray(want_lse, np.float64)
    error = np.abs(out - want_out)
    fine = (error <= 1e-3) | (error <= 2.01 / 128 * np.abs(want_out))
    assert fine.all(), f"{what}: out differs by up to {error[~fine].max()} in {(~fine).sum()} of {fine.size} places"
    x, y = out.ravel(), want_out.ravel()
    cosine = 1 - 2 * (x @ y) / max(x @ x + y @ y, 1e-300)
    assert cosine < 5e-6, f"{what}: out's cosine difference is {cosine}"
    np.testing.assert_array_equal(np.isposinf(lse), np.isposinf(want_lse), err_msg=what)
    assert not np.isneginf(lse).any(), what
    some = ~np.isposinf(want_lse)
    error = np.abs(lse[some] - want_lse[some])
    fine = (error <= 1e-6) | (error <= 8.01 / 65536 * np.abs(want_lse[some]))
    assert fine.all(), f"{what}: lse differs by up to {error.max()}"


def flash_lse(lse):
    """Our lse [b, s_q, h], -inf for empty rows, in FlashMLA's convention."""
    lse = np.swapaxes(np.asarray(lse), 1, 2)
    return np.where(np.isneginf(lse), np.inf, lse)
