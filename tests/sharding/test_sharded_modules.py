"""`ModuleSharding`: the attention modules over meshes of CPU devices equal themselves on one device."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import collectives, make

from mla_jax import nn
from mla_jax.nn import model1, v32
from mla_jax.sharding import ModuleSharding
from tests.compiling import QUICK

B, PAGE, MORE = 4, 16, 2
ALL = dict(data=2, heads=2, context=2)
MESHES = [ALL, dict(data=2, heads=2), dict(data=4), dict(heads=2), dict(context=2), dict(data=2, context=4)]
KINDS = [("v32", "fp8"), ("v32", "f32"), ("v3", "bf16"), ("v3", "f32"), ("4", "f32"), ("4", "fp8"), ("128", "f32")]
QUICK_CASES = [("v32", "fp8", ALL), ("4", "f32", dict(context=2))]
CASES = [(*kind, axes) for axes in MESHES for kind in KINDS]


def config_of(kind, cache):
    if kind == "v32":
        return nn.V32Config.small(cache=cache, num_layers=2)
    if kind == "v3":
        return nn.V32Config.small(cache=cache, index_topk=0, num_layers=2)
    return nn.Model1Config.small(cache=cache, window=24, ratios=(0, int(kind)), page_tokens=max(16, int(kind)))


def prompt_tokens(config):
    """Some pages of every table."""
    return 3 * config.page_tokens - 9 if isinstance(config, nn.Model1Config) else 40


def tables_of(config, ds):
    """Pages by the rules of a mesh, and the sizes to give `init_cache`."""
    rng, tokens = np.random.default_rng(0), prompt_tokens(config) + MORE

    def table(columns):  # pages that all context ranks hold, in each data group's run of them
        each = (B // ds.num_data) * columns + 1
        pages = np.concatenate([g * each + rng.permutation(each)[:-1] for g in range(ds.num_data)])
        return jnp.asarray(pages.reshape(B, columns), jnp.int32), ds.num_data * each

    def spread_table(page_size):
        num = ds.num_parts * (B // ds.num_data * -(-tokens // page_size) + 1)
        table = ds.make_table([tokens] * B, num_pages=num, page_size=page_size, seed=0)
        return jnp.asarray(table), num

    if isinstance(config, nn.V32Config):
        pages, num = spread_table(PAGE)
        return pages, dict(num_pages=num, page_size=PAGE)
    window, num_window = table(model1.window_columns(config, PAGE, tokens))
    context, num_context = spread_table(config.page_tokens)
    sizes = dict(window_pages=num_window, context_pages=num_context, rows=B, window_page_size=PAGE)
    return nn.Model1Tables(window, context, jnp.arange(B, dtype=jnp.int32)), sizes


@pytest.mark.parametrize(
    "kind, cache, axes",
    [case if case in QUICK_CASES else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_equals_one_device(kind, cache, axes):
    config, number = config_of(kind, cache), 1
    ds = make(**axes)
    modules = ModuleSharding(config, ds)
    params = nn.init_params(config, number, jax.random.key(1))
    module = v32 if isinstance(config, nn.V32Config) else model1
    layer = number if module is v32 else config.layers[number]
    tables, sizes = tables_of(config, ds)
    rng, s = np.random.default_rng(1), prompt_tokens(config)
    x = jnp.asarray(rng.standard_normal((B, s + MORE, config.hidden_size)), config.dtype)
    lengths = jnp.asarray([s, s - 7, 0, 5], jnp.int32)

    s_q, chunk = (2, 16) if cache == "f32" else (1, None)  # two tokens at once and a prompt in parts, or neither

    def run(prefill, decode, plan, params, cache):
        out, cache = prefill(params, cache, x[:, :s], tables, lengths, layer=layer, chunk=chunk)
        seqlens = jnp.where(lengths > 0, lengths + s_q, 0)
        step = plan(cache, tables, seqlens, s_q)
        more, cache = decode(params, cache, x[:, s : s + s_q], tables, seqlens, layer=layer, plan=step)
        return jnp.concatenate([out, more], axis=1)

    def alone(function):
        return lambda params, cache, *args, **options: function(params, config, cache, *args, **options)

    one_plan = functools.partial(module.plan, config)
    one = jax.jit(
        functools.partial(run, alone(module.prefill), alone(module.decode), one_plan), compiler_options=QUICK
    )
    want = one(params, module.init_cache(config, **sizes))
    many = jax.jit(
        functools.partial(run, modules.prefill, modules.decode, modules.plan),
        donate_argnums=1, compiler_options=QUICK,
    )  # fmt: skip
    operands = modules.place_params(params), modules.init_cache(**sizes)
    many = many.lower(*operands).compile()
    got = many(*operands)
    assert not np.isnan(np.asarray(want, np.float32)).any()
    # Over heads, partial outputs are rounded before they are added. (XLA's own products of one row and of several are
    # not bit for bit the same, so not even data parallel is.)
    limit = 2e-6 if cache == "f32" else 4e-3 if ds.num_heads > 1 else 2e-3
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.linalg.norm(got - want) <= limit * np.linalg.norm(want)
    sent = collectives(many)
    expected = {"all-reduce"} if ds.num_heads > 1 else set()
    assert {name for name, _ in sent} == expected | ({"all-to-all", "all-gather"} if ds.num_context > 1 else set())
    if sent:  # float32 results with their LSE, or 4 bytes for each rank's best scores or their positions
        rows, heads = B // ds.num_data * s, config.num_heads // ds.num_heads
        candidates = ds.num_context * getattr(config, "index_topk", 0)
        assert max(size for _, size in sent) <= 4 * rows * max(heads * (512 + 1), candidates, config.hidden_size)


def test_flax_module_on_a_mesh():
    nnx = pytest.importorskip("flax.nnx")
    config = nn.V32Config.small(cache="f32", index_topk=0)
    ds = make(**ALL)
    one = nn.V32Attention(config, rngs=nnx.Rngs(0))
    many = nn.V32Attention(config, params=one.params, sharding=ds)
    assert len(many.params["wq_b"].sharding.device_set) == 8
    tables, sizes = tables_of(config, ds)
    s = prompt_tokens(config)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((B, s, config.hidden_size)), config.dtype)
    lengths = jnp.full(B, s, jnp.int32)
    outs = []
    for module in (one, many):
        run = jax.jit(functools.partial(module.prefill, x), compiler_options=QUICK)
        outs.append(run(module.init_cache(**sizes), tables, lengths)[0])
    chex.assert_trees_all_close(*[np.asarray(out) for out in outs], rtol=1e-4, atol=1e-5)


def test_pages_of_other_ranks_are_no_places():
    """A column's page must lie on the column's rank: elsewhere the token is not written, and its output is NaN."""
    config = nn.V32Config.small(cache="f32")
    modules = ModuleSharding(config, make(context=2))
    params = modules.place_params(nn.init_params(config, 0, jax.random.key(0)))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 32, config.hidden_size)), config.dtype)
    run = jax.jit(modules.prefill, donate_argnums=1, compiler_options=QUICK)
    for pages, lost in (([[0, 2]], ()), ([[0, 1]], (1,)), ([[3, 2]], (0,)), ([[2, 0]], (0, 1)), ([[0, 4]], (1,))):
        tables = jnp.asarray(pages, jnp.int32), jnp.full(1, 32, jnp.int32)
        out, cache = run(params, modules.init_cache(4, 16), x, *tables)
        nan = np.isnan(np.asarray(out[0])).all(axis=-1).reshape(2, 16)  # by page
        assert [column for column in (0, 1) if nan[column].any()] == list(lost) and nan[list(lost)].all()
        written = np.asarray(cache.kv.data).any(axis=(1, 2))
        assert written.sum() == 2 - len(lost)


def test_misuse_says_what_to_change():
    config = nn.V32Config.small()
    with pytest.raises(ValueError, match=r"num_heads=3; accepted: a multiple of 2"):
        ModuleSharding(nn.V32Config.small(num_heads=3), make(heads=2))
    with pytest.raises(ValueError, match=r"o_groups=2; accepted: a multiple of 4"):
        ModuleSharding(nn.Model1Config.small(), make(heads=4))
    modules = ModuleSharding(config, make(data=2, heads=2))
    with pytest.raises(ValueError, match=r"3 num_pages a layer; accepted: a multiple of 2"):
        modules.init_cache(3, PAGE)
    spread = ModuleSharding(config, make(data=2, context=2))
    with pytest.raises(ValueError, match=r"6 num_pages a layer; accepted: a multiple of 4"):
        spread.init_cache(6, PAGE)
    whole = ModuleSharding(nn.Model1Config.small(), make(data=2, context=2))
    with pytest.raises(ValueError, match=r"6 context_pages a layer; accepted: a multiple of 4"):
        whole.init_cache(window_pages=6, context_pages=6, rows=2)
    params = modules.place_params(nn.init_params(config, 0, jax.random.key(0)))
    x, table, one = jnp.zeros((2, 1, 64), config.dtype), jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match=r"cache\.kv\.data is not cut as .*ModuleSharding\.init_cache"):
        modules.decode(params, v32.init_cache(config, 4, PAGE), x, table, one)
    with pytest.raises(ValueError, match=r"cache\.kv\.data is not cut as .*'d', 'c'.*ModuleSharding\.init_cache"):
        spread.decode(params, modules.init_cache(4, PAGE), x, table, one)
    with pytest.raises(ValueError, match="x has 1 requests; accepted: a multiple of 2"):
        modules.decode(params, modules.init_cache(4, PAGE), x[:1], table[:1], one[:1])
