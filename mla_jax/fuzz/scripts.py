"""A case as a script that needs nothing but mla-jax: its arrays, the call, and what must come out."""

from __future__ import annotations

import base64
import dataclasses
import zlib

import numpy as np

from mla_jax.fuzz.cases import Case, Spec
from pallas_kernels.formats import KVFormat

_LITERAL = 64  # arrays of at most so many elements are written out
_WIDTH = 110

_HEAD = '''\
"""{title}

{problem}
"""

import base64
import zlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import mla_jax
from mla_jax import fuzz
from mla_jax.fuzz import oracle


def packed(dtype, shape, text):
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype).reshape(shape)


'''


def snippet(case: Case, implementation: str = "xla", *, title: str = "", problem: str = "") -> str:
    """A script. Run, it fails with an AssertionError that says what is wrong, or passes where nothing is (any more).

    Args:
      case: the case, best a shrunk one.
      implementation: whose result is wrong; may be "reference".
      title, problem: go into the script's docstring.
    """
    head = _HEAD.format(title=title, problem=problem.replace("\\", "/").replace('"""', "'''"))
    arrays = "".join(f"{name} = {_array(x)}\n" for name, x in case.arrays.items())
    plain = case.spec.kind in ("dense", "sparse") and case.spec.entry == "op" and case.spec.plan != "invariant"
    return head + arrays + "\n" + (_plain_call(case, implementation) if plain else _checked_case(case, implementation))


def _plain_call(case: Case, implementation: str) -> str:
    """The op's own call, its result beside the oracle's."""
    spec, x = case.spec, case.arrays
    lines = [f"pages = {_cache('cache', spec.fmt, spec.page_size)}"]
    lines += [f"keys = oracle.decode_pages(cache, mla_jax.{spec.fmt.name}, {spec.page_size})  # [pages, page_size, d]"]
    if spec.kind == "dense":
        table = "None" if spec.contiguous else "block_table"
        name, causal = "mla_decode", f"is_causal={spec.is_causal}"
        call = ["jnp.asarray(q)", "pages", table if spec.contiguous else "jnp.asarray(block_table)"]
        call += ["jnp.asarray(cache_seqlens)", "sm_scale=jnp.asarray(sm_scale)", causal]
        want = ["q", "keys", table, "cache_seqlens", "sm_scale", causal, f"d_v={spec.fmt.d_v}"]
    else:
        name = "sparse_mla_decode"
        call = ["jnp.asarray(q)", "pages", "jnp.asarray(indices)", "sm_scale=jnp.asarray(sm_scale)"]
        call += [f"{n}=jnp.asarray({n})" for n in ("topk_length", "attn_sink") if n in x]
        scopes = [f"(keys, indices, {'topk_length' if 'topk_length' in x else None})"]
        if spec.extra_fmt is not None:
            fmt, size = spec.extra_fmt, spec.extra_page_size
            lines += [f"extra_pages = {_cache('extra_cache', fmt, size)}"]
            lines += [f"extra_keys = oracle.decode_pages(extra_cache, mla_jax.{fmt.name}, {size})"]
            call += ["extra_cache=extra_pages"]
            call += [f"{n}=jnp.asarray({n})" for n in ("extra_indices", "extra_topk_length") if n in x]
            length = "extra_topk_length" if "extra_topk_length" in x else None
            scopes += [f"(extra_keys, extra_indices, {length})"]
        sink = "attn_sink" if "attn_sink" in x else "None"
        want = ["q", f"[{', '.join(scopes)}]", "sm_scale", sink, f"d_v={spec.fmt.d_v}"]
    if implementation == "reference":
        name = f"reference.{name}"
    else:
        lines += _plan(case)
        call += ["plan=plan", f'implementation="{implementation}"', "return_lse=True"]
    lines += [_wrapped(f"out, lse = mla_jax.{name}", call)]
    lines += [_wrapped(f"want = oracle.{spec.kind}", want)]
    lines += ['print("out", np.asarray(out)[..., :4], "expected", want.out[..., :4], sep="\\n")']
    lines += ['print("lse", np.asarray(lse), "expected", want.lse, sep="\\n")']
    tolerance = "tolerance=oracle.OUT_TOLERANCE[np.dtype(out.dtype)]"
    lines += [f"problem = want.problem(out, lse, {tolerance}, nan_is_fine={spec.plan == 'stale'})"]
    return "\n".join([*lines, "assert problem is None, problem", ""])


def _plan(case: Case) -> list[str]:
    spec, x = case.spec, case.arrays
    if spec.plan == "none":
        return ["plan = None"]
    stale = spec.plan == "stale"
    _, s_q, h, _ = x["q"].shape
    if spec.kind == "dense":
        lengths = "plan_lengths" if stale else "cache_seqlens"
        sizes = [f"s_q={s_q}", f"num_heads={h}", f"page_size={spec.page_size}"]
        return [_wrapped("plan = mla_jax.plan_decode", [f"jnp.asarray({lengths})", *sizes])]
    arguments = [str(x["indices"].shape[-1]), f"batch={len(x['q'])}", f"s_q={s_q}", f"num_heads={h}"]
    if stale or "topk_length" in x:
        arguments += [f"topk_length=jnp.asarray({'plan_lengths' if stale else 'topk_length'})"]
    if spec.extra_fmt is not None and x["extra_indices"].shape[-1]:
        arguments += [f"extra_topk={x['extra_indices'].shape[-1]}"]
        if not stale and "extra_topk_length" in x:
            arguments += ["extra_topk_length=jnp.asarray(extra_topk_length)"]
    return [_wrapped("plan = mla_jax.plan_sparse_decode", arguments)]


def _checked_case(case: Case, implementation: str) -> str:
    """Caches, compat, and what takes two calls to see: through the fuzzer's own check."""
    spec = []
    for field in dataclasses.fields(Spec):
        value = getattr(case.spec, field.name)
        if value != field.default:
            shown = f"mla_jax.{value.name}" if isinstance(value, KVFormat) else repr(value)
            spec.append(f"{field.name}={shown}")
    names = ", ".join(f"{name}={name}" for name in case.arrays)
    implementations = [] if implementation == "reference" or case.spec.kind in ("cache", "bytes") else [implementation]
    return (
        _wrapped("spec = fuzz.Spec", spec)
        + f"\nproblem = fuzz.check(fuzz.Case(spec, dict({names})), {implementations}).problem\n"
        + "assert problem is None, problem\n"
    )


def _wrapped(function: str, arguments: list[str]) -> str:
    line = f"{function}({', '.join(arguments)})"
    return line if len(line) < _WIDTH else "\n".join([f"{function}(", *(f"    {a}," for a in arguments), ")"])


def _cache(name: str, fmt: KVFormat, page_size: int) -> str:
    return f"mla_jax.PagedKVCache(jnp.asarray({name}), mla_jax.{fmt.name}, {page_size})"


def _array(x: np.ndarray) -> str:
    dtype = f"ml_dtypes.{x.dtype}" if x.dtype.kind == "V" else "bool" if x.dtype == bool else f"np.{x.dtype}"
    flat = x.reshape(-1)
    if x.ndim == 0:
        return f"{dtype}({_literal(x.item())})"
    if x.size > 1 and len(set(flat[i : i + 1].tobytes() for i in range(x.size))) == 1:
        return f"np.full({x.shape}, {_literal(_values(flat[:1])[0])}, {dtype})"
    if x.size <= _LITERAL:
        return f"np.array({_literal(_values(flat))}, {dtype}).reshape({x.shape})"
    text = base64.b85encode(zlib.compress(np.ascontiguousarray(x).tobytes(), 9)).decode()
    lines = "\n".join(f'    "{text[i : i + _WIDTH]}"' for i in range(0, len(text), _WIDTH))
    return f"packed({dtype}, {x.shape}, (\n{lines}\n))"


def _values(x: np.ndarray) -> list:
    return (x if x.dtype.kind in "iub" else x.astype(np.float64)).tolist()


def _literal(value) -> str:
    return repr(value).replace("nan", "np.nan").replace("inf", "np.inf")
