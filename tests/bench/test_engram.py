"""The Engram measurement's own arithmetic, small and on the CPU: every way of fetching computes the same step."""

import jax.numpy as jnp
import pytest

from mla_jax.bench import engram as bench
from mla_jax.bench.cupti import Activity
from mla_jax.nn import engram


def test_rows_are_checked():
    config = bench.config_of_rows(2400)
    assert 2400 <= config.num_rows[0] < 4800
    rows = bench.random_rows(config, 3, 1)[0]
    for where in ("device", "pinned_host", "numpy"):
        table = bench.make_table(config, where)
        engram.check_table(table, config.num_rows[0], 256)
        bench.check_lookup(table, rows)
    with pytest.raises(AssertionError):  # a table that is off by one row
        bench.check_lookup(engram.EngramTable(jnp.roll(table.values, 1, 0), table.scales, table.num_rows), rows)


@pytest.mark.slow
def test_every_fetch_is_measured(capsys):
    """The times are made up; that every way gives the same rows `measure_prefetch` checks itself."""

    def layer(b):
        return (lambda x, q: q * 2 + x[0, 0, 0, 0]), (jnp.ones((b, 1, 8, 4), jnp.bfloat16),)

    def traced(run):
        run()
        return [Activity("attention", 1000, 4000, True), Activity("mla_row_gather", 3000, 7000, True)]

    records = bench.measure_prefetch((2,), 2400, 2, layer, traced, hidden_size=32)
    assert [r["rows_from"] for r in records] == list(bench.FETCHES)
    assert all(r["us"] == 3.0 and r["gather_us"] == 2.0 and r["beside_us"] == 0.5 for r in records[:3])
    assert [("host_us" in r, "us" in r) for r in records] == [(True, True), (False, True), (False, True), (True, False)]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(records)
