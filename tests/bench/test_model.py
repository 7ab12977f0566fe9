"""The model of dense decode against times measured on an H200: every dense workload, in one run of the benchmark."""

import pytest

from mla_jax import cli
from mla_jax.bench import model, workloads
from tests.bench.h200 import RUN, TIMES

FITTED = "dense-b128-sq1-h128-sk16384"
LAUNCH_BOUND = {"dense-b1-sq1-h128-sk1024"}  # 11.5 us, of 16 blocks on 66 parts; the model says 15.5
DENSE = sorted(name for name in TIMES if name.startswith("dense-"))


def test_every_workload_was_measured():
    named = {w.name for w in workloads.WORKLOADS.values() if isinstance(w, workloads.Dense)}
    assert set(DENSE) == named and set(DENSE) > LAUNCH_BOUND


@pytest.mark.parametrize("name", sorted(set(DENSE) - LAUNCH_BOUND))
def test_reproduces_what_was_measured(name):
    assert model.predict(workloads.WORKLOADS[name], model.H200).us == pytest.approx(TIMES[name], rel=0.15)


def test_one_case_was_fitted():
    assert model.predict(workloads.WORKLOADS[FITTED], model.H200).us == pytest.approx(TIMES[FITTED], rel=0.002)


def test_the_measured_limits_are_those_of_the_run():
    assert pytest.approx(RUN["matmul_tflop_s"], rel=1e-3) == model.H200_TFLOP_S
    assert pytest.approx(RUN["dram_gb_s"] / 1e3, rel=1e-3) == model.H200_TB_S


def test_a_block_by_hand():
    """SM90, 64 rows by 64 keys: 36 products of 16 columns at 32 cycles for scores, and 1024 cycles for values."""
    block = model.sm90_block(576)
    assert block.tensor_cycles == 36 * 32 + 1024
    # Per 16 columns: Q and K, 2 KB each, but for 4 steps of Q's rope; V; P read once by a neighbour, written once; TMA.
    assert block.smem_bytes == 1024 * (32 * 4 + 4 * 2 + 64 + 8 + 8 + 72)


def test_sm100_blocks_by_hand():
    narrow, wide = model.sm100_block(64, 576), model.sm100_block(128, 576)
    assert narrow.tensor_cycles == 36 * 32 + 1024 and wide.tensor_cycles == 36 * 32 + 512
    # Scores: 36 steps of two products (2 KB of Q, 1 of K); values: 4 steps, 4 products (2 KB of P, 4 of V); P; TMA.
    assert narrow.smem_bytes == 1024 * (36 * 6 + 4 * 4 * 6 + 8 + 72)
    # 36 steps of K, 16 of which read Q as well (4 KB); 4 steps of V (8 KB); TMA.
    assert wide.smem_bytes == 1024 * (36 * 2 + 16 * 4 + 4 * 8 + 72)


def test_bounds():
    """No prediction beats the memory or the tensor core, and more tokens never take less time."""
    gpu = model.B200
    for name in (FITTED, "dense-b128-sq1-h16-sk16384", "dense-b1-sq1-h128-sk131072"):
        workload = workloads.WORKLOADS[name]
        predicted = model.predict(workload, gpu)
        assert predicted.us > workload.bytes_moved / (gpu.memory_tb_s * 1e6)
        assert predicted.us > workload.flop / (gpu.num_sms * gpu.tensor_flop * gpu.clock_ghz * 1e3)
    times = [model.predict(workloads.dense(128, 1, 128, s_k), gpu).us for s_k in (4096, 16384, 32768)]
    assert times == sorted(times)


@pytest.mark.parametrize(("arch", "device"), [("sm_90a", "H200"), ("sm_100a", "B200")])
@pytest.mark.parametrize("name", ["dense-b128-sq1-h128-sk4096", "v32-b64-sq1-h128-topk2048"])
def test_command(arch, device, name, capsys):
    assert cli.main(["aot", "--model", "--arch", arch, "--filter", name]) == 0
    out = capsys.readouterr().out
    assert device in out and name in out and "shared memory" in out


def test_command_without_such_a_workload(capsys):
    assert cli.main(["aot", "--model", "--filter", "append"]) != 0
    assert "no dense or sparse workload has 'append' in its name" in capsys.readouterr().err


def test_command_without_limits(capsys):
    assert cli.main(["aot", "--model", "--arch", "sm_103a"]) != 0
    assert "sm_90a, sm_100a" in capsys.readouterr().err
