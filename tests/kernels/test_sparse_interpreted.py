"""The SM90 sparse kernels on Pallas' interpreter: results, and the order of every shared-memory access.

The kernels are the shipped ones; `dequant.SparseInterpreted`, `sm90_few.FewInterpreted` and `mgpu.Interpreted` list
what stands in for PTX. A warpgroup is one thread here: what its warps tell each other (`over_keys` and the weights of
sm90_few.py) is seen on a GPU only. Each interpreted CTA takes seconds, so the cases are few and small.
"""

import inspect
import types
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

import mla_jax
from mla_jax import reference
from pallas_kernels import schedule
from pallas_kernels.sparse_decode import config, sm90, sm90_few
from tests import golden_files, samples
from tests.kernels import interpreter

PAIRS = [
    (mla_jax.BF16_576, mla_jax.V32),
    (mla_jax.V32, mla_jax.BF16_576),
    (mla_jax.MODEL1, mla_jax.MODEL1),
    (mla_jax.MODEL1, mla_jax.BF16_512),
    (mla_jax.BF16_512, mla_jax.MODEL1),
]
FEW, MANY = 8, config.FEW_HEADS + 1  # heads: of sm90_few.py, and of sm90.py
FEW_SMS = 3  # parts of several pieces, items of several pieces


def decode(call, *, num_sms=FEW_SMS, module=sm90, **options):
    """`sparse_mla_decode`'s arguments, through the kernel: (out, lse)."""
    cache, extra = call["cache"], call.get("extra_cache")
    b, s_q, h, _ = call["q"].shape

    def length(name):
        x = call.get(name)
        return None if x is None else jnp.broadcast_to(jnp.asarray(x).reshape(b, -1), (b, s_q))

    def run():
        plan = schedule.plan_sparse_decode(
            call["indices"].shape[-1], batch=b, s_q=s_q, num_heads=h, topk_length=length("topk_length"),
            extra_topk=0 if extra is None else call["extra_indices"].shape[-1],
            extra_topk_length=length("extra_topk_length"), num_sms=num_sms,
        )  # fmt: skip
        more = {}
        if extra is not None:
            more = dict(
                extra_data=extra.data, extra_fmt=extra.format, extra_page_size=extra.page_size,
                extra_indices=call["extra_indices"], extra_topk_length=length("extra_topk_length"),
            )  # fmt: skip
        return module.sparse_decode(
            call["q"], cache.data, cache.format, cache.page_size, call["indices"], plan, call["sm_scale"],
            topk_length=length("topk_length"), attn_sink=call.get("attn_sink"),
            interpret=interpreter.parameters(), **more, **options,
        )  # fmt: skip

    return interpreter.run(run)


def check(call, **kwargs):
    got = decode(call, **kwargs)
    samples.assert_equal_results(got, reference.sparse_mla_decode(**call), call["cache"].format)


def check_float32(call, **kwargs):
    """Results that will be merged elsewhere are the usual ones before they are rounded."""
    got = decode(call, **kwargs, out_dtype=jnp.float32)
    samples.assert_equal_before_rounding(got, decode(call, **kwargs))


def golden_call(name):
    x, fmt = golden_files.load(name), golden_files.sparse_format(name)
    names = ("indices", "topk_length", "attn_sink", "extra_indices", "extra_topk_length")
    call = {k: jnp.asarray(x[k]) for k in names if k in x}
    call["q"] = golden_files.bf16(x["q"])
    call["cache"] = mla_jax.PagedKVCache(jnp.asarray(x["cache"]), fmt, int(x["page_size"]))
    if "extra_cache" in x:
        call["extra_cache"] = mla_jax.PagedKVCache(jnp.asarray(x["extra_cache"]), fmt, int(x["extra_page_size"]))
    call["sm_scale"] = float(x["softmax_scale"])
    return call, x["out"], x["lse"]


def every_index(fmt, **shapes):
    """One query that all its indices count for."""
    rng = np.random.default_rng(0)
    call = samples.sparse_call(rng, fmt, b=1, s_q=1, **shapes)
    del call["topk_length"]
    return call | {"cache": samples.random_cache(rng, fmt, 9, 7)}


def growing_call(h):
    """O is rescaled in some blocks only: scores of later blocks are far above, just above and below earlier ones."""
    call = every_index(mla_jax.BF16_512, h=h, topk=448)
    data = np.asarray(call["cache"].data, np.float32)  # [pages, page size, d]
    rng = np.random.default_rng(5)
    indices = rng.permutation(data.shape[0] * data.shape[1])[: 7 * 64 // 8]
    indices = np.repeat(indices, 8)[: 7 * 64]  # [448]
    factors = np.repeat([0.01, 1.0, 1.05, 0.5, 30.0, 31.0, 0.1], 8)  # of 8 slots a block
    flat = data.reshape(-1, data.shape[-1])
    flat[indices[::8]] *= factors[:, None]
    call["cache"] = mla_jax.PagedKVCache(jnp.asarray(data, jnp.bfloat16), mla_jax.BF16_512, call["cache"].page_size)
    call["indices"] = jnp.asarray(indices.reshape(1, 1, -1), jnp.int32)
    return call


def test_maximum_that_grows_and_shrinks():
    check(growing_call(MANY), num_sms=1)


QUICK = ("v32_sink_topk_length", "garbage_model1")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in golden_files.SPARSE]
)
def test_golden(name):
    # FlashMLA's tolerance per element is for hundreds of keys; P's rounding to bf16 averages out less over a few dozen.
    call, want_out, want_lse = golden_call(name)
    out, lse = decode(call)
    assert samples.relative_error(out, want_out) < 4e-3
    np.testing.assert_allclose(golden_files.flash_lse(lse), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("h", [FEW, MANY])
def test_many_blocks_one_item_in_pieces(h):
    """Stages are reused, and the combine kernel merges."""
    check(every_index(mla_jax.MODEL1, h=h, topk=470))


@pytest.mark.slow
@pytest.mark.parametrize("h", [FEW, MANY])
@pytest.mark.parametrize("fmt, extra_fmt", PAIRS)
def test_pairs_of_formats(fmt, extra_fmt, h):
    check(samples.sparse_call(np.random.default_rng(1), fmt, extra_fmt, b=2, s_q=1, h=h, topk=75, extra_topk=70))


@pytest.mark.slow
@pytest.mark.parametrize("fmt, stages", [(mla_jax.V32, 2), (mla_jax.MODEL1, 3)])
@pytest.mark.parametrize("h", [1, 8, 9, 16])
def test_few_heads(fmt, stages, h):
    """Every number of columns, the padded ones too; MODEL1 has three stages."""
    columns = -(-h // 8) * 8
    scratch = sm90_few.scratch_types(fmt, columns, sm90_few.FEW_INTERPRETED)
    assert scratch["q"].shape == (1, columns, fmt.d_qk)
    assert scratch["kv"].shape[0] == stages
    check(samples.sparse_call(np.random.default_rng(h), fmt, b=2, s_q=2, h=h, topk=300))


@pytest.mark.parametrize("h", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_plain_and_quantized_blocks_take_turns_in_a_stage(h):
    """One CTA for all items: every block counts as one use of its stage, whoever copies it."""
    rng = np.random.default_rng(1)
    call = samples.sparse_call(rng, mla_jax.MODEL1, mla_jax.BF16_512, b=1, s_q=2, h=h, topk=70, extra_topk=65)
    check(call, num_sms=1)


@pytest.mark.slow
def test_the_kernel_of_64_heads_takes_few():
    """`few_heads=False` says the same, rounded otherwise; a head's NaN stays with that head in both."""
    call = samples.sparse_call(np.random.default_rng(4), mla_jax.V32, b=2, s_q=1, h=FEW, topk=200)
    call["q"] = call["q"].at[0, 0, FEW // 2].set(jnp.nan)
    few, many = (decode(call, config=config.SparseConfig(few_heads=few)) for few in (True, False))
    for x, y in zip(few, many, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.isnan(x).any()
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        assert samples.relative_error(np.nan_to_num(x, posinf=0, neginf=0), np.nan_to_num(y, posinf=0, neginf=0)) < 4e-3


@pytest.mark.slow
def test_two_tiles_of_heads():
    """Two CTAs as a cluster. Each copies for itself here: no stand-in for a copy that goes to both is known."""
    check(samples.sparse_call(np.random.default_rng(2), mla_jax.V32, b=1, s_q=2, h=72, topk=130))


def test_float32_results():
    """Items that are whole and items in pieces."""
    check_float32(samples.sparse_call(np.random.default_rng(5), mla_jax.MODEL1, b=2, s_q=1, h=3, topk=140))


# -- planted mistakes ------------------------------------------------------------------------------------------------

PRODUCTS = "        acc = pl.run_state(products)(tuple(map(plgpu.ACC.init, acc)))\n"
PLANTED = {
    "P is handed over before it is written": (
        "        p[...] = probabilities\n        rows[RESCALE_ROW] = rescale\n        plgpu.barrier_arrive(p_ready)\n",
        "        plgpu.barrier_arrive(p_ready)\n        p[...] = probabilities\n        rows[RESCALE_ROW] = rescale\n",
    ),
    "P is overwritten without waiting for its reader": (
        "        plgpu.barrier_wait(p_free)\n        p[...] = probabilities\n",
        "        p[...] = probabilities\n        plgpu.barrier_wait(p_free)\n",
    ),
    "P is given back before it is read": (
        "        plgpu.barrier_wait(p_ready)\n        probabilities = plgpu.load(p, layout=WGMMA)",
        "        plgpu.barrier_wait(p_ready)\n        plgpu.barrier_arrive(p_free)\n"
        "        probabilities = plgpu.load(p, layout=WGMMA)",
    ),
    "a stage is refilled while it is read": (
        "        plgpu.barrier_wait(empty.at[stage])\n"
        "        ops.start_copy(data[k], slots, kv, rows, stage, scopes[k], share, **copied)\n",
        "        ops.start_copy(data[k], slots, kv, rows, stage, scopes[k], share, **copied)\n"
        "        plgpu.barrier_wait(empty.at[stage])\n",
    ),
    "a stage is given back before it is multiplied": (
        f"{PRODUCTS}        release(stage)\n        return acc\n",
        f"        release(stage)\n{PRODUCTS}        return acc\n",
    ),
    "a stage is announced before it is full": (
        "        ops.finish_block(slots, kv, rows, stage, parity, data[k], scopes[k], groups, **copied)\n"
        "        plgpu.barrier_arrive(full.at[stage])\n",
        "        plgpu.barrier_arrive(full.at[stage])\n"
        "        ops.finish_block(slots, kv, rows, stage, parity, data[k], scopes[k], groups, **copied)\n",
    ),
}
PLANTED_FEW = {
    "a stage is given back before it is multiplied": (
        "        acc = pl.run_state(values)(plgpu.ACC.init(acc * _columns(rescale, acc.shape)))\n"
        "        plgpu.barrier_arrive(empty.at[stage])\n",
        "        plgpu.barrier_arrive(empty.at[stage])\n"
        "        acc = pl.run_state(values)(plgpu.ACC.init(acc * _columns(rescale, acc.shape)))\n",
    ),
    "the next queries come while scores need these": (
        "        plgpu.barrier_wait(q_ready)\n        carry = ",
        "        plgpu.barrier_wait(q_ready)\n        load_q(*following)\n        carry = ",
    ),
    "both warpgroups dequantise the same half": ("groups=(group,)", "groups=(0,)"),
    "the mask is read before it is there": (
        "        plgpu.barrier_wait(full.at[stage])\n\n",
        "        bias = plgpu.load(rows.at[BIAS_ROW + stage], layout=WGMMA_ROW)\n"
        "        plgpu.barrier_wait(full.at[stage])\n\n",
    ),
}


def planted(source, right, wrong):
    assert source.count(right) == 1, "the kernel has changed; plant the mistake anew"
    module = types.ModuleType("planted")
    exec(compile(source.replace(right, wrong), "planted", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(
    "what", [w if n == 0 else pytest.param(w, marks=pytest.mark.slow) for n, w in enumerate(PLANTED_FEW)]
)
def test_mistake_planted_in_the_kernel_for_few_heads_is_found(what):
    module = planted(inspect.getsource(sm90_few), *PLANTED_FEW[what])
    call = samples.sparse_call(np.random.default_rng(0), mla_jax.MODEL1, b=1, s_q=2, h=FEW, topk=300)
    del call["topk_length"]
    with mock.patch.object(sm90, "sm90_few", module), pytest.raises(interpreter.RaceFound):
        decode(call, num_sms=1)


@pytest.mark.parametrize(
    "what", [w if n in (0, 3) else pytest.param(w, marks=pytest.mark.slow) for n, w in enumerate(PLANTED)]
)
def test_planted_mistake_is_found(what):
    source = inspect.getsource(sm90)
    right, wrong = PLANTED[what]
    if what == "P is given back before it is read":  # and not a second time after
        late = "        plgpu.barrier_arrive(p_free)\n        acc = _scaled(acc, rescale)\n        products"
        assert source.count(late) == 1
        source = source.replace(late, late.split("\n", 1)[1])
    module = planted(source, right, wrong)
    call = every_index(mla_jax.MODEL1, h=MANY, topk=300)
    with pytest.raises(interpreter.RaceFound):
        decode(call, num_sms=1, module=module)


@pytest.mark.slow
@pytest.mark.parametrize("h", [FEW, MANY])
def test_planted_wrong_phase_is_found(h):
    """A wait for the wrong parity of the copies' mbarrier, which on a GPU comes back too early or never."""
    right = "lax.div(number, jnp.int32(stages))"
    module = planted(inspect.getsource(sm90), right, f"{right} + 1")
    out, _ = decode(every_index(mla_jax.MODEL1, h=h, topk=300), num_sms=1, module=module)
    assert np.isnan(np.asarray(out, np.float32)).all()
