"""What the sharded benchmark makes of the devices' activity, and one measurement on CPUs."""

import numpy as np
import pytest

from mla_jax.bench import sharded
from mla_jax.bench.cupti import Activity
from mla_jax.bench.timer import TimingError


def activity(name, device, start_us, us):
    return Activity(name, int(start_us * 1e3), int((start_us + us) * 1e3), False, device)


def steps(n, *, late=10):
    """n steps of 100 us on two devices: device 1 comes `late` us later to the collective, which takes 7 us."""
    ran = []
    for t in range(0, 100 * n, 100):
        for device, attention in ((0, 40), (1, 40 + late)):
            begin = t + attention
            ran += [
                activity("mla_plan", device, t, 3), activity("mla_dense_decode", device, t + 3, attention - 3),
                activity("ncclDevKernel_SendRecv", device, begin, t + 40 + late + 7 - begin),
                activity("loop_reduce_fusion", device, t + 47 + late, 2),
            ]  # fmt: skip
    return sorted(ran, key=lambda a: a.start_ns)


def test_nccl_counts_from_the_last_rank_on():
    times = sharded.times_of_steps(steps(6), 5)
    assert times == pytest.approx(
        dict(device_us=(400 + 59) / 5, attention_us=50, nccl_us=7, nccl_wait_us=10, other_us=2)
    )


def test_no_collectives():
    ran = [a for a in steps(3) if "nccl" not in a.name]
    times = sharded.times_of_steps(ran, 2)
    assert (times["nccl_us"], times["nccl_wait_us"]) == (0, 0) and times["attention_us"] == pytest.approx(50)


def test_unequal_steps_are_no_measurement():
    with pytest.raises(TimingError, match="23 kernels and copies ran on device 1 in 6 equal steps"):
        ran = steps(6)
        sharded.times_of_steps([a for a in ran if a is not ran[-1]], 5)
    with pytest.raises(TimingError, match=r"the devices ran \[5, 0\] collectives"):
        sharded.times_of_steps([a for a in steps(6) if a.device == 0 or "nccl" not in a.name], 5)


def test_on_cpus(monkeypatch):
    monkeypatch.setattr(sharded, "STEPS", 1)
    monkeypatch.setattr(sharded, "MERGES", 2)
    one, want = sharded.measure(None, 2, 512, 2, "xla")
    times, out = sharded.measure("context", 2, 512, 2, "xla")
    assert set(one) == {"step_us"} and set(times) == {"step_us", "merge_us"} and min(times.values()) > 0
    assert np.linalg.norm(out - want) < 2e-3 * np.linalg.norm(want)
