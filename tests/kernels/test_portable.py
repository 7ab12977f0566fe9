"""The portable kernels, interpreted on the CPU, against the reference and the golden files.

Interpreted, a kernel is an XLA program that takes seconds to compile and milliseconds to run: most cases share a few
compilations (`compiled`), and what stands for a matrix of shapes is slow.
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import mla_jax
from mla_jax import reference
from pallas_kernels import portable
from pallas_kernels.formats import BF16_512, BF16_576, E4M3, E8M0, F32_512, F32_576, MODEL1, V32
from pallas_kernels.portable import PortableConfig
from pallas_kernels.schedule import plan_decode, plan_sparse_decode
from pallas_kernels.wide_offsets import with_wide_offsets
from tests import golden_files as gf
from tests import samples
from tests.test_golden import _sparse_arguments

NO_E4M3, WITH_E4M3 = (8, 0), (8, 9)
# A few parts cut the longer items of a call into several pieces and leave the others whole.
PARTS = 3
SMEM_KIB = {"sm_80": 163, "sm_89": 99, "sm_90a": 227, "sm_100a": 227, "sm_120": 99}  # of a CTA
AOT_ARCHS = tuple(SMEM_KIB)
MAX_SPILL_BYTES = 96  # docs/portable.md has the table
TINY = PortableConfig(tile_rows=16, block_keys=16)


def dense(args, is_causal, capability, config, batch_invariant, out_dtype):
    q, cache = args["q"], args["cache"]
    plan = plan_decode(
        args["cache_seqlens"], s_q=q.shape[1], num_heads=q.shape[2], page_size=cache.page_size, num_sms=PARTS,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    return portable.dense_decode(
        q, cache.data, cache.format, cache.page_size, args["block_table"], args["cache_seqlens"], plan,
        args["sm_scale"], is_causal=is_causal, capability=capability, config=config, interpret=True,
        out_dtype=out_dtype,
    )  # fmt: skip


def sparse(args, is_causal, capability, config, batch_invariant, out_dtype):
    q, cache, extra = args["q"], args["cache"], args.get("extra_cache")
    more = {}
    if extra is not None:
        more = dict(
            extra_data=extra.data, extra_fmt=extra.format, extra_page_size=extra.page_size,
            extra_indices=args["extra_indices"], extra_topk_length=args.get("extra_topk_length"),
        )  # fmt: skip
    plan = plan_sparse_decode(
        args["indices"].shape[-1], batch=q.shape[0], s_q=q.shape[1], num_heads=q.shape[2],
        topk_length=args.get("topk_length"), num_sms=PARTS, batch_invariant=batch_invariant,
        extra_topk=0 if extra is None else args["extra_indices"].shape[-1],
        extra_topk_length=args.get("extra_topk_length"),
    )  # fmt: skip
    return portable.sparse_decode(
        q, cache.data, cache.format, cache.page_size, args["indices"], plan, args["sm_scale"],
        topk_length=args.get("topk_length"), attn_sink=args.get("attn_sink"), capability=capability, config=config,
        interpret=True, out_dtype=out_dtype, **more,
    )  # fmt: skip


@functools.cache
def compiled(op, **static):
    # Without optimisation: compiling is what takes the time.
    return jax.jit(functools.partial(op, **static), compiler_options={"xla_backend_optimization_level": 0})


def run(op, args, *, is_causal=False, capability=NO_E4M3, config=TINY, batch_invariant=False, out_dtype=None):
    args = args | {"sm_scale": jnp.float32(args["sm_scale"])}
    static = dict(
        is_causal=is_causal, capability=capability, config=config, batch_invariant=batch_invariant, out_dtype=out_dtype
    )
    return compiled(op, **static)(args)


def check_dense(args, is_causal=False, **options):
    want = reference.mla_decode(**args, is_causal=is_causal)
    samples.assert_equal_results(run(dense, args, is_causal=is_causal, **options), want, args["cache"].format)


def check_sparse(args, **options):
    want = reference.sparse_mla_decode(**args)
    samples.assert_equal_results(run(sparse, args, **options), want, args["cache"].format)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# -- dense ---------------------------------------------------------------------------------------------------------

# One shape for most dense tests: 3 rows of 9 heads are two tiles of 16, pages of 5 tokens cross blocks of keys.
SHAPE = dict(b=4, page_size=5, s_q=3, h=9, max_pages=40)
LENGTHS = [0, 2, 200, 137]


def test_dense_over_lengths(rng):
    """Empty, short, cut into pieces, causal."""
    check_dense(samples.dense_call(rng, BF16_576, **SHAPE, lengths=LENGTHS), is_causal=True)
    check_dense(samples.dense_call(rng, BF16_576, **SHAPE, lengths=[1, 1, 199, 1]), is_causal=True)


EXTREMES = np.array([-(2**31), 2**31 - 1, -1, -2, 2**30, 655, 10**9], np.int32)


def test_dense_integer_garbage(rng):
    args = samples.dense_call(rng, BF16_576, **SHAPE, lengths=[150] * 4, spare_pages=0)
    args["cache"] = samples.random_cache(rng, BF16_576, args["cache"].num_pages, 5)
    table, lengths = np.array(args["block_table"]), np.array(args["cache_seqlens"])
    table[1] = rng.choice(EXTREMES, table.shape[1])
    table[2, 3] = 2**31 - 1
    for length in EXTREMES:
        lengths[3] = length
        dirty = args | dict(block_table=jnp.asarray(table), cache_seqlens=jnp.asarray(lengths))
        check_dense(dirty, is_causal=True)


def test_dense_without_a_table(rng):
    cache = samples.random_cache(rng, BF16_512, 3, 70)
    q = samples.rows(rng, 3, 1, 17, fmt=BF16_512)
    lengths = jnp.asarray([70, 0, 33], jnp.int32)
    args = dict(q=q, cache=cache, block_table=None, cache_seqlens=lengths, sm_scale=0.1)
    check_dense(args, capability=WITH_E4M3)


def test_nan_in_one_request_stays_there(rng):
    args = samples.dense_call(rng, BF16_576, **SHAPE, lengths=LENGTHS)
    want = run(dense, args, is_causal=True)
    got = run(dense, args | {"q": args["q"].at[2].set(jnp.nan)}, is_causal=True)
    assert np.isnan(np.asarray(got[0][2], np.float32)).all() and np.isnan(got[1][2]).all()
    for row in (0, 1, 3):
        np.testing.assert_array_equal(np.asarray(got[0][row], np.float32), np.asarray(want[0][row], np.float32))
        np.testing.assert_array_equal(got[1][row], want[1][row])


@pytest.mark.slow  # 6 minutes: a compilation each
@pytest.mark.parametrize("fmt", samples.FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(64, 2, 4, False), (1, 1, 1, True), (61, 1, 40, False), (16, 4, 16, True)], ids=str)
def test_dense_shapes(rng, fmt, shape):
    page_size, s_q, h, is_causal = shape
    args = samples.dense_call(rng, fmt, page_size=page_size, s_q=s_q, h=h, lengths=[0, 3, 4 * page_size])
    for config in (TINY, PortableConfig(32, 64, 8, 2)):
        check_dense(args, is_causal, capability=WITH_E4M3, config=config)


# -- sparse --------------------------------------------------------------------------------------------------------


def test_sparse_two_scopes(rng):
    """Garbage indices, lengths below 0 and above top-k, sinks of every kind, NaN in what is not named."""
    shape = dict(topk=150, extra_topk=140, page_size=16, extra_page_size=9)
    args = samples.sparse_call(rng, MODEL1, MODEL1, **shape)
    check_sparse(args)
    for name in ("topk_length", "extra_topk_length"):
        check_sparse(args | {name: jnp.zeros_like(args[name])})
    zeros = {n: jnp.zeros_like(args[n]) for n in ("topk_length", "extra_topk_length")}
    out, lse = run(sparse, args | zeros)
    assert (np.asarray(out) == 0).all() and np.isneginf(lse).all()
    for name in ("indices", "extra_indices"):
        dirty = np.array(args[name])
        dirty[1] = rng.choice(EXTREMES[:5], dirty[1].shape)
        args[name] = jnp.asarray(dirty)
    check_sparse(args)


@pytest.mark.parametrize("op", ["dense", pytest.param("sparse", marks=pytest.mark.slow)])
def test_float32_results(rng, op):
    """Results that will be merged elsewhere are the usual ones before they are rounded."""
    if op == "dense":
        args, function = samples.dense_call(rng, BF16_576, **SHAPE, lengths=LENGTHS), dense
    else:
        args, function = samples.sparse_call(rng, MODEL1, b=2, s_q=1, topk=70), sparse
    got = run(function, args, out_dtype=jnp.float32)
    samples.assert_equal_before_rounding(got, run(function, args))


def test_nan_scale_on_a_valid_key(rng):
    """e8m0 255 on a key that counts makes its row NaN; on one that does not, nothing."""
    shape = dict(topk=150, extra_topk=140, page_size=16, extra_page_size=9)  # as above: the same compilation
    args = samples.sparse_call(rng, MODEL1, MODEL1, **shape) | {"attn_sink": jnp.zeros(4)}
    args["topk_length"] = jnp.full((3, 2), 150, jnp.int32)
    args["cache"] = samples.random_cache(rng, MODEL1, args["cache"].num_pages, 16)
    slot = 35
    at = MODEL1.area_offset_bytes(1, 16) + MODEL1.record_bytes[1] * (slot % 16)
    bad = args["cache"].replace(args["cache"].data.at[slot // 16, at].set(255))
    named = args["indices"].at[:].set(jnp.where(args["indices"] == slot, -1, args["indices"])).at[2, 1, 5].set(slot)
    out, lse = run(sparse, args | {"cache": bad, "indices": named})
    nan = np.isnan(np.asarray(lse)).all(-1)
    assert nan[2, 1] and nan.sum() == 1 and np.isnan(np.asarray(out[2, 1], np.float32)).all()


@pytest.mark.parametrize(
    "name", ["v32_sink_topk_length", *(pytest.param(n, marks=pytest.mark.slow) for n in gf.SPARSE if "sink" not in n)]
)
def test_golden_sparse(name):
    g = gf.load(name)
    args = _sparse_arguments(name, g)
    b, s_q, _, _ = args["q"].shape
    for key in ("indices", "extra_indices"):
        if key in args:
            args[key] = args[key].reshape(b, s_q, -1)
    for key in ("topk_length", "extra_topk_length"):
        if key in args:
            args[key] = jnp.broadcast_to(args[key].reshape(b, -1), (b, s_q))
    out, lse = run(sparse, args, config=None)
    if "garbage" in name:
        # Weights are rounded to bfloat16, and these values have a standard deviation of 1: up to 54 of 12288 places are
        # off by more than FlashMLA's 1e-3 (4.4e-3 at most), which is made for 0.1.
        assert samples.relative_error(out, g["out"]) < 4e-3
        out = jnp.asarray(g["out"])
    gf.assert_close(out, gf.flash_lse(lse), g["out"], g["lse"], name)


@pytest.mark.parametrize("name", ["dense_mtp_causal", *(pytest.param(n, marks=pytest.mark.slow) for n in gf.DENSE[:3])])
def test_golden_dense(name):
    g = gf.load(name)
    q, kv = gf.bf16(g["q"]), gf.bf16(g["kv"])
    cache = mla_jax.pack_kv(kv[:, :, 0], {576: BF16_576, 512: BF16_512}[q.shape[-1]])
    args = dict(q=q, cache=cache, sm_scale=q.shape[-1] ** -0.5)
    args |= dict(block_table=jnp.asarray(g["block_table"]), cache_seqlens=jnp.asarray(g["cache_seqlens"]))
    out, lse = run(dense, args, is_causal=bool(g["causal"]), config=None)
    gf.assert_close(out, gf.flash_lse(lse), g["out"], g["lse"], name)


@pytest.mark.slow  # 4 minutes
@pytest.mark.parametrize(
    ("fmt", "extra"),
    [(V32, BF16_576), (BF16_576, V32), (MODEL1, BF16_512), (BF16_512, MODEL1), (V32, None), (BF16_576, None),
     (F32_512, F32_512), (F32_576, None)],
    ids=lambda f: getattr(f, "name", None),
)  # fmt: skip
def test_sparse_formats(rng, fmt, extra):
    for shape in (dict(topk=37, s_q=2, h=4), dict(topk=300, extra_topk=5, s_q=1, h=33, page_size=1)):
        for config in (TINY, PortableConfig(16, 32, 4, 1)):
            check_sparse(samples.sparse_call(rng, fmt, extra, **shape), config=config, capability=WITH_E4M3)
    args = samples.sparse_call(rng, fmt, extra)
    check_sparse({k: v for k, v in args.items() if k not in ("topk_length", "extra_topk_length", "attn_sink")} | (
        {"cache": samples.random_cache(rng, fmt, 9, 7)}
        | ({"extra_cache": samples.random_cache(rng, extra, 30, 2)} if extra else {})
    ))  # fmt: skip


@pytest.mark.slow  # half a minute
def test_batch_invariance_is_bitwise(rng):
    args = samples.dense_call(rng, BF16_576, b=3, page_size=64, max_pages=140, s_q=1, h=3, lengths=[8900, 5000, 64])
    results = [
        run(dense, args | {"cache_seqlens": jnp.asarray(lengths, jnp.int32)}, batch_invariant=True)
        for lengths in ([8900, 5000, 64], [0, 5000, 8900], [1, 5000, 1])
    ]
    for out, lse in results[1:]:
        np.testing.assert_array_equal(np.asarray(out[1], np.float32), np.asarray(results[0][0][1], np.float32))
        np.testing.assert_array_equal(lse[1], results[0][1][1])


@pytest.mark.slow  # half a minute
def test_a_plan_for_other_lengths(rng, monkeypatch):
    args = samples.dense_call(rng, BF16_576, **SHAPE, lengths=LENGTHS)
    want = reference.mla_decode(**args)
    for stale in ([1, 9999, 64, 0], [200] * 4, [0] * 4):
        plan = plan_decode(jnp.asarray(stale, jnp.int32), s_q=3, num_heads=9, page_size=5, num_sms=PARTS)
        monkeypatch.setattr("tests.kernels.test_portable.plan_decode", lambda *_, plan=plan, **__: plan)
        compiled.cache_clear()
        samples.assert_equal_results(run(dense, args), want, BF16_576)
    compiled.cache_clear()


# -- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [False, True])
def test_every_e4m3_byte(native):
    byte = np.arange(256, dtype=np.uint8)
    got = np.asarray(portable._e4m3(jnp.asarray(byte), native))
    np.testing.assert_array_equal(got, byte.view(E4M3).astype(np.float32))


def test_every_e8m0_byte():
    byte = np.arange(256, dtype=np.uint8)
    got = np.asarray(jax.lax.bitcast_convert_type(portable._e8m0(jnp.asarray(byte)), jnp.int32))
    want = byte.view(E8M0).astype(np.float64).astype(np.float32).view(np.int32)
    np.testing.assert_array_equal(got[:255], want[:255])
    assert np.isnan(got[255:].view(np.float32)).all() and np.isnan(byte[255:].view(ml_dtypes.float8_e8m0fnu)).all()


def test_float32_from_bytes(rng):
    values = np.array([0, -0.0, 1e-40, 3.5, -np.inf, np.nan, 1e38], np.float32)
    got = np.asarray(portable._float32(jnp.asarray(values.view(np.uint8).reshape(-1, 4))))[:, 0]
    np.testing.assert_array_equal(got.view(np.int32), values.view(np.int32))


@pytest.mark.parametrize("formats", [(f,) for f in samples.FORMATS] + [(V32, BF16_576), (BF16_512, MODEL1)], ids=str)
def test_chunks_tile_a_row(formats):
    chunks = portable.row_chunks(*formats)
    assert [start for start, _ in chunks] == list(np.cumsum([0] + [w for _, w in chunks])[:-1])
    assert sum(w for _, w in chunks) == formats[0].d_qk
    assert sum(w for start, w in chunks if start < formats[0].d_v) == formats[0].d_v
    for fmt in formats:
        for start, width in chunks if fmt.is_quantized else ():
            assert start >= fmt.d_nope or start // fmt.scale_tile == (start + width - 1) // fmt.scale_tile


@pytest.mark.parametrize(
    "wrong", [dict(tile_rows=8), dict(tile_rows=48), dict(block_keys=128), dict(num_warps=3), dict(num_stages=0)],
)
def test_config_is_validated(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is .*accepted"):
        PortableConfig(**wrong)


def test_pools_between_2_and_4_gib_claim_more():
    """Pallas would compute 32-bit offsets for them. (tests/gpu/test_portable_gpu.py reads such pools.)"""
    for gib, claims in ((1, False), (3, True), (5, False)):
        for fmt in (V32, MODEL1):
            shape = (gib * 2**30 // fmt.page_bytes(64), *fmt.page_shape(64))
            got = jax.eval_shape(with_wide_offsets, jax.ShapeDtypeStruct(shape, jnp.uint8)).shape
            assert (got != shape) == claims and got[1:] == shape[1:]
            assert not claims or got[0] * fmt.page_bytes(64) > 2**32


@pytest.mark.aot
@pytest.mark.parametrize(
    ("arch", "case"),
    [("sm_120", "sparse-V32+BF16_576-h128"), *(pytest.param(arch, "", marks=pytest.mark.slow) for arch in AOT_ARCHS)],
)  # slow: 15 cases an architecture, 3 to 5 minutes each
def test_compiles(arch, case):
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        pytest.skip("compiling for CUDA needs jax's CUDA plugin: install the aot dependency group")
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.kernels.portable_aot", arch, *filter(None, [case])]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    child = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=1500, check=False)
    assert child.returncode == 0, child.stderr[-4000:]
    rows = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    assert rows and (len(rows) == 1 or not case)
    for row in rows:
        assert row["target"] == arch and row["merge_spill_bytes"] == 0
        assert row["spill_bytes"] <= MAX_SPILL_BYTES, row
        assert row["smem_bytes"] <= SMEM_KIB[arch] * 1024, row


def test_check_names_the_reason():
    portable.check(V32, 64, (8, 0))
    portable.check(V32, 2**24, (12, 0))
    with pytest.raises(NotImplementedError, match=r"needs compute capability 8\.0 or above; this is 7\.5"):
        portable.check(V32, 64, (7, 5))
    with pytest.raises(NotImplementedError, match=r"a page of \d+ bytes"):
        portable.check(MODEL1, 2**24, (8, 0))
