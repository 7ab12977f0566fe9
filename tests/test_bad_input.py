# ruff: noqa: E501
"""Each kind of wrong argument: ValueError that names the argument, says what came and what is accepted."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mla_jax
from mla_jax import compat
from tests import samples

i32, f32, bf16 = jnp.int32, jnp.float32, jnp.bfloat16
V32, MODEL1, BF16_576, BF16_512, F32_576 = (
    mla_jax.V32, mla_jax.MODEL1, mla_jax.BF16_576, mla_jax.BF16_512, mla_jax.F32_576
)  # fmt: skip


def dense(**changes):
    call = dict(
        q=jnp.zeros((2, 1, 4, 576), bf16),
        cache=mla_jax.PagedKVCache.zeros(BF16_576, 6, 8),
        block_table=jnp.zeros((2, 3), i32),
        cache_seqlens=jnp.zeros(2, i32),
        sm_scale=0.1,
    )
    return lambda: mla_jax.mla_decode(**(call | changes))


def sparse(**changes):
    call = dict(
        q=jnp.zeros((2, 2, 4, 512), bf16),
        cache=mla_jax.PagedKVCache.zeros(MODEL1, 6, 8),
        indices=jnp.zeros((2, 2, 5), i32),
        sm_scale=0.1,
    )
    return lambda: mla_jax.sparse_mla_decode(**(call | changes))


def cache(fmt=MODEL1, pages=6, page_size=8):
    return mla_jax.PagedKVCache.zeros(fmt, pages, page_size)


def flash(**changes):
    call = dict(
        q=jnp.zeros((2, 1, 4, 576), bf16),
        k_cache=jnp.zeros((6, 8, 1, 576), bf16),
        block_table=jnp.zeros((2, 3), i32),
        cache_seqlens=jnp.zeros(2, i32),
        head_dim_v=512,
        tile_scheduler_metadata=compat.get_mla_metadata()[0],
    )
    return lambda: compat.flash_mla_with_kvcache(**(call | changes))


extra = dict(extra_cache=cache(), extra_indices=jnp.zeros((2, 2, 3), i32))
plan = mla_jax.plan_decode(jnp.zeros(2, i32), s_q=1, num_heads=8, page_size=8)
sparse_plan = mla_jax.plan_sparse_decode(7, batch=2, s_q=2, num_heads=4)

CASES = {
    # name of the argument that the message must begin with, what must be in it, the call
    "q dtype": ("q ", r"float32\[2, 1, 4, 576\].*bfloat16", dense(q=jnp.zeros((2, 1, 4, 576), f32))),
    "q rank": ("q ", r"\[2, 4, 576\].*\[b, s_q, h, 576\]", dense(q=jnp.zeros((2, 4, 576), bf16))),
    "q width": ("q ", "512.*576", dense(q=jnp.zeros((2, 1, 4, 512), bf16))),
    "q no heads": ("q ", "at least one head", dense(q=jnp.zeros((2, 1, 0, 576), bf16))),
    "q list": ("q ", "list", dense(q=[1.0])),
    "q of another format": ("q ", "MODEL1", sparse(q=jnp.zeros((2, 2, 4, 576), bf16))),
    "q for F32": ("q ", "F32_576", dense(cache=cache(F32_576))),
    "cache array": ("cache ", "PagedKVCache", dense(cache=jnp.zeros((6, 8, 576), bf16))),
    "cache dtype": ("cache.data ", "uint8.*bfloat16", dense(cache=cache(BF16_576).replace(jnp.zeros((6, 8, 576), jnp.uint8)))),
    "cache page": ("cache.data ", r"\[num_pages, 8, 576\]", dense(cache=cache(BF16_576).replace(jnp.zeros((6, 9, 576), bf16)))),
    "cache stride": ("cache.data ", "MODEL1, page_size 8", sparse(cache=cache().replace(jnp.zeros((6, 4673), jnp.uint8)))),
    "block_table batch": ("block_table ", r"int32\[3, 3\].*\[2, max_pages\]", dense(block_table=jnp.zeros((3, 3), i32))),
    "block_table float": ("block_table ", "float32", dense(block_table=jnp.zeros((2, 3), f32))),
    "block_table bool": ("block_table ", "bool", dense(block_table=jnp.zeros((2, 3), bool))),
    "block_table missing": ("block_table ", "2 pages", dense(block_table=None)),
    "cache_seqlens rank": ("cache_seqlens ", r"\[2, 1\].*\[2\]", dense(cache_seqlens=jnp.zeros((2, 1), i32))),
    "cache_seqlens int": ("cache_seqlens ", "int 3", dense(cache_seqlens=3)),
    "sm_scale None": ("sm_scale ", "NoneType", dense(sm_scale=None)),
    "sm_scale array": ("sm_scale ", r"float32\[2\]", dense(sm_scale=jnp.zeros(2))),
    "sm_scale int": ("sm_scale ", "int32", dense(sm_scale=jnp.int32(1))),
    "is_causal": ("is_causal ", "str", dense(is_causal="yes")),
    "is_causal array": ("is_causal ", "static_argnames", dense(is_causal=jnp.bool_(True))),
    "return_lse": ("return_lse ", "int", dense(return_lse=1)),
    "implementation": ("implementation ", "'cuda'.*'mosaic', 'triton', 'xla'", dense(implementation="cuda")),
    "implementation in a list": ("implementation ", "'nope'", sparse(implementation=["xla", "nope"])),
    "implementation empty": ("implementation ", "empty", sparse(implementation=())),
    "implementation number": ("implementation ", "int", sparse(implementation=3)),
    "config": ("config ", "xla", dense(config=object(), implementation="xla")),
    "plan": ("plan ", "str", dense(plan="fast")),
    "plan of other shapes": ("plan ", "num_heads", dense(plan=plan)),
    "plan of the other op": ("plan ", "op", dense(plan=sparse_plan)),
    "sparse plan of other top-k": ("plan ", "topk", sparse(plan=sparse_plan)),
    "indices float": ("indices ", "float32", sparse(indices=jnp.zeros((2, 2, 5), f32))),
    "indices rank": ("indices ", r"\[2, 5\].*\[2, 2, topk\]", sparse(indices=jnp.zeros((2, 5), i32))),
    "indices batch": ("indices ", r"\[1, 2, 5\]", sparse(indices=jnp.zeros((1, 2, 5), i32))),
    "topk_length": ("topk_length ", r"\[3\].*\[2\]", sparse(topk_length=jnp.zeros(3, i32))),
    "topk_length rank 2": ("topk_length ", r"\[2, 3\].*\[2, 2\]", sparse(topk_length=jnp.zeros((2, 3), i32))),
    "attn_sink dtype": ("attn_sink ", "bfloat16.*float32", sparse(attn_sink=jnp.zeros(4, bf16))),
    "attn_sink shape": ("attn_sink ", r"\[5\].*\[4\]", sparse(attn_sink=jnp.zeros(5, f32))),
    "extra without indices": ("extra_cache ", "extra_indices", sparse(extra_cache=cache())),
    "extra indices alone": ("extra_indices ", "extra_cache", sparse(extra_indices=jnp.zeros((2, 2, 3), i32))),
    "extra length alone": ("extra_topk_length ", "extra_cache", sparse(extra_topk_length=jnp.zeros(2, i32))),
    "extra format": ("extra_cache ", "V32.*MODEL1", sparse(**(extra | dict(extra_cache=cache(V32))))),
    "extra dtype": ("extra_cache ", "F32_512", sparse(**(extra | dict(extra_cache=cache(mla_jax.F32_512))))),
    "extra cache array": ("extra_cache ", "PagedKVCache", sparse(**(extra | dict(extra_cache=jnp.zeros(3))))),
    "extra length": ("extra_topk_length ", "float32", sparse(**extra, extra_topk_length=jnp.zeros(2, f32))),
    "page_size 0": ("page_size ", "0.*>= 1", lambda: cache(page_size=0)),
    "page_size float": ("page_size ", "float", lambda: cache(page_size=8.0)),
    "page_size of a shell": ("page_size ", "-1", lambda: mla_jax.PagedKVCache(None, V32, -1)),
    "num_pages": ("num_pages ", "-3", lambda: cache(pages=-3)),
    "fmt": ("fmt ", "str 'V32'", lambda: mla_jax.PagedKVCache.zeros("V32", 1, 1)),
    "pack rank": ("kv ", r"\[8, 576\]", lambda: mla_jax.pack_kv(jnp.zeros((8, 576), bf16), V32)),
    "pack width": ("kv ", "512.*576", lambda: mla_jax.pack_kv(jnp.zeros((1, 8, 512), bf16), V32)),
    "pack dtype": ("kv ", "float32.*bfloat16", lambda: mla_jax.pack_kv(jnp.zeros((1, 8, 576), f32), V32)),
    "pack page_size 0": ("page_size ", "0", lambda: mla_jax.pack_kv(jnp.zeros((1, 0, 576), bf16), V32)),
    "amax with MODEL1": ("scale_rule", "float8_e8m0fnu.*MODEL1", lambda: mla_jax.pack_kv(jnp.zeros((1, 8, 512), bf16), MODEL1, scale_rule="amax")),
    "amax with BF16": ("scale_rule", "BF16_512", lambda: mla_jax.append_kv(cache(BF16_512), jnp.zeros((1, 512), bf16), jnp.zeros(1, i32), scale_rule="amax")),
    "scale_rule": ("scale_rule", "'mean'.*'pow2', 'amax'", lambda: mla_jax.pack_kv(jnp.zeros((1, 8, 576), bf16), V32, scale_rule="mean")),
    "append width": ("kv ", "512", lambda: mla_jax.append_kv(cache(), jnp.zeros((3, 576), bf16), jnp.zeros(3, i32))),
    "append slots": ("slots ", r"\[2\].*\[3\]", lambda: mla_jax.append_kv(cache(), jnp.zeros((3, 512), bf16), jnp.zeros(2, i32))),
    "append float slots": ("slots ", "float32", lambda: mla_jax.append_kv(cache(), jnp.zeros((3, 512), bf16), jnp.zeros(3))),
    "gather slots": ("slots ", "float32", lambda: mla_jax.gather_kv(cache(), jnp.zeros(3))),
    "unpack": ("cache.data ", "uint8", lambda: mla_jax.unpack_kv(cache().replace(jnp.zeros((2, 3), jnp.uint8)))),
    "positions": ("positions ", "float32", lambda: mla_jax.slots_from_positions(jnp.zeros((2, 3)), jnp.zeros((2, 3), i32), 4)),
    "positions scalar": ("positions ", r"\[\]", lambda: mla_jax.slots_from_positions(jnp.int32(3), None, 4)),
    "positions table": ("block_table ", r"\[3, 3\]", lambda: mla_jax.slots_from_positions(jnp.zeros((2, 3), i32), jnp.zeros((3, 3), i32), 4)),
    "merge lses": ("lses ", r"\[2, 3\].*\[2, 4\]", lambda: mla_jax.merge_partials(jnp.zeros((2, 4, 8)), jnp.zeros((2, 3)))),
    "merge dtype": ("outs ", "int32", lambda: mla_jax.merge_partials(jnp.zeros((2, 4, 8), i32), jnp.zeros((2, 4)))),
    "merge nothing": ("outs ", "at least one part", lambda: mla_jax.merge_partials(jnp.zeros((0, 4, 8)), jnp.zeros((0, 4)))),
    "merge sink": ("attn_sink ", r"\[3\].*\[4\]", lambda: mla_jax.merge_partials(jnp.zeros((2, 4, 8)), jnp.zeros((2, 4)), attn_sink=jnp.zeros(3))),
    "compat cache": ("k_cache ", "accepted", flash(k_cache=jnp.zeros((6, 8, 576), bf16))),
    "compat stride": ("k_cache ", "584", flash(k_cache=jnp.zeros((6, 1000), jnp.uint8))),
    "compat head_dim_v": ("head_dim_v ", "576.*512", flash(head_dim_v=576)),
    "compat fp8 flag": ("is_fp8_kvcache ", "BF16_576", flash(is_fp8_kvcache=True)),
    "compat sink": ("attn_sink ", "indices", flash(attn_sink=jnp.zeros(4))),
    "compat causal": ("causal ", "indices", flash(causal=True, indices=jnp.zeros((2, 1, 3), i32))),
    "plan lengths": ("cache_seqlens ", "float32", lambda: mla_jax.plan_decode(jnp.zeros(2), s_q=1, num_heads=1, page_size=1)),
    "plan heads": ("num_heads ", "0", lambda: mla_jax.plan_decode(jnp.zeros(2, i32), s_q=1, num_heads=0, page_size=1)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case):
    argument, said, call = CASES[case]
    with pytest.raises(ValueError, match=re.compile(said, re.DOTALL)) as caught:
        call()
    assert str(caught.value).startswith(argument), str(caught.value)


@pytest.mark.parametrize("name", ["is_causal", "return_lse", "implementation", "config"])
def test_traced_static_arguments(name):
    def f(value):
        return dense(**{name: value})()

    with pytest.raises(ValueError, match=rf"{name} is a traced value.*static_argnames"):
        jax.jit(f)(True)


def test_nothing_is_written_before_the_checks():
    before = cache()
    with pytest.raises(ValueError, match="kv"):
        mla_jax.append_kv(before, jnp.zeros((3, 7), bf16), jnp.zeros(3, i32))
    assert not before.data.is_deleted() and not np.asarray(before.data).any()


def test_named_implementations_that_cannot_run_here():
    with pytest.raises(NotImplementedError):
        jax.block_until_ready(dense(implementation="mosaic")())
    with pytest.raises(NotImplementedError):
        jax.block_until_ready(sparse(implementation=["mosaic", "triton"])())
    chex.assert_trees_all_equal(dense(implementation=["mosaic", "xla"])(), dense(implementation="xla")())


def test_explain():
    call = samples.dense_call(np.random.default_rng(0), V32)
    call.pop("sm_scale")
    found = mla_jax.explain(**call, platform="cpu")
    assert found.implementation == "xla" and set(found.refusals) == {"mosaic", "triton"}
    assert "mla_decode on cpu: runs 'xla'" in str(found)
    by_shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), call)
    q, c = by_shape.pop("q"), by_shape.pop("cache")
    assert mla_jax.explain(q, c, *by_shape.values(), platform="cpu") == found
    call = samples.sparse_call(np.random.default_rng(0), MODEL1, MODEL1)
    found = mla_jax.explain(**call)
    assert found.op == "sparse_mla_decode" and found.implementation == "xla"
    with pytest.raises(ValueError, match="q "):
        mla_jax.explain(call["q"][0], call["cache"], call["indices"])
