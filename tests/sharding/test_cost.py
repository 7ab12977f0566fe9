"""The cost model, and that the page of documentation shows what it says."""

from pathlib import Path

import pytest

import mla_jax
from mla_jax.sharding import cost, step_cost

CALL = dict(batch=8, s_q=2, num_heads=16, keys=1000)
PAGE = Path(__file__).parents[2] / "docs" / "sharding.md"


def test_bytes():
    one = step_cost(mla_jax.V32, **CALL)
    assert one.kv_read_bytes == 8 * 1000 * mla_jax.V32.bytes_per_token and one.link_bytes == one.collectives == 0
    assert step_cost(mla_jax.V32, **CALL, heads=4) == one
    for axis in ("data", "context"):
        cut = step_cost(mla_jax.V32, **CALL, **{axis: 4})
        assert cut.kv_read_bytes == one.kv_read_bytes / 4 and cut.pool_bytes == one.pool_bytes / 4
    # Three quarters of a float32 partial result and of a bf16 result, and twice of the log-sum-exps.
    assert cut.link_bytes == 3 / 4 * 8 * 2 * 16 * (512 * (4 + 2) + 8)
    rates = dict(hbm_bytes_per_s=1e12, link_bytes_per_s=1e11, collective_us=5.0)
    assert cut.step_us(**rates) == pytest.approx(cut.kv_read_bytes / 1e6 + cut.link_bytes / 1e5 + 20)


def test_the_documentation_shows_this_table():
    assert cost.table() in PAGE.read_text(), "run: python -m mla_jax.sharding.cost, and put its table into the page"
