"""The Engram measurement's own arithmetic, small and on the CPU: every way of fetching computes the same step."""

import jax.numpy as jnp
import pytest

from mla_jax.bench import engram as bench
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
def test_every_fetch_computes_the_same_step(capsys):
    """`measure_prefetch` compares the outputs itself; the times of a CPU mean nothing."""

    def layer(b):
        return (lambda q: q * 2), (jnp.ones((b, 1, 8, 4), jnp.bfloat16),)

    times = bench.measure_prefetch((2,), 2400, 2, layer, hidden_size=32)
    assert {fetch for _, fetch in times} == {*bench.FETCHES, "device alone", "pinned_host alone", "numpy alone"}
    assert len(capsys.readouterr().out.splitlines()) == 2
