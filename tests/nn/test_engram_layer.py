"""The gate, both forms of the layer, and the NNX shell, against the golden files."""

import engram_golden as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engram_golden import CONFIG, PAPER, G
from flax import nnx

from mla_jax.nn import Engram
from mla_jax.nn.engram import advance, forward, forward_conv, gate, hash_tokens, init_conv, init_params, place

EPS20 = golden.replace(norm_eps=1e-20)
BF16 = golden.replace(precision="bf16")
run_gate, run = (jax.jit(f, static_argnums=1) for f in (gate, forward))
run_conv = jax.jit(forward_conv, static_argnums=1)
PAPER_LIMIT = 2e-6  # of the convolution form; seen: 7e-7 with jax 0.11.2, 1.7e-6 with 0.12.0.1


def close(got, want, limit=1e-6):
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape and np.isfinite(got).all()
    assert np.abs(got - want).max() < limit


@pytest.mark.parametrize(
    "config, x, gates, out",
    [
        (CONFIG, "x", "gate_f64", "out_f64"),
        (EPS20, "x", "gate_f64_eps1e20", "out_f64_eps1e20"),
        (EPS20, "x_small", "gate_small_f64_eps1e20", "out_small_f64_eps1e20"),
    ],
    ids=["eps 1e-6", "eps 1e-20", "eps 1e-20, small x"],
)
def test_golden_float32(config, x, gates, out):
    keep = G["keep"]
    got, value = run_gate(golden.params(), config, G[x], G["emb"])
    close(got[keep], G[gates][keep])
    close(value, G["kv_f64"][:, -CONFIG.hidden_size :])
    if gates == "gate_f64":
        logit = np.log(got / (1 - got))[keep]
        close(logit * np.abs(logit), G["dot_f64"][keep], 1e-5)
    got = run(golden.params(), config, G[x], G["emb"], keep)
    assert got.dtype == jnp.float32
    close(got, G[out])
    np.testing.assert_array_equal(got[~keep], G[x][~keep])
    if out == "out_f64":
        close(got, G["out_sglang_f32"])
        close(got, G["out_vllm_f32"])


def test_golden_bfloat16():
    x, e = (jnp.asarray(G[name], jnp.bfloat16) for name in ("x", "emb"))
    params = golden.params(BF16)
    _, value = run_gate(params, BF16, x, e)
    close(value, G["kv_bf16"][:, -CONFIG.hidden_size :], 8e-3)
    out = run(params, BF16, x, e, G["keep"])
    assert out.dtype == jnp.bfloat16
    close(out, G["out_sglang_bf16"], 8e-3)


def test_a_dot_of_zero():
    """V4.1 clamps |dot| and takes 0 as positive, the paper's sign makes 0 of it."""
    embeddings = jnp.zeros((1, CONFIG.embedding_dim))
    gates, _ = run_gate(golden.params(), CONFIG, jnp.ones((1, 4, 48)), embeddings)
    close(gates, np.full((1, 4), 1 / (1 + np.exp(-1e-3))))
    params = init_params(PAPER, jax.random.key(0))
    gates, _ = run_gate(params, PAPER, jnp.ones((1, 4, 24)), jnp.zeros((1, PAPER.embedding_dim)))
    close(gates, np.full((1, 4), 0.5), 1e-7)


def paper_inputs():
    x = G["p_x"].astype(np.float32)  # [2, 13, 4, 24]
    rows = G["p_hash"][:, :, int(G["p_layer_index"])]  # [2, 13, columns]
    return x, G["p_table"].astype(np.float32)[rows].reshape(2, 13, -1)


def test_golden_paper_form():
    x, e = paper_inputs()
    params = golden.paper_params()
    gates, value = run_gate(params, PAPER, x, e)
    close(gates, G["p_gate"])
    close(gates[..., None] * value[..., None, :], G["p_gated"], PAPER_LIMIT)
    out, rows = run_conv(params, PAPER, x, e, init_conv(PAPER, 2))
    close(out, G["p_out"], PAPER_LIMIT)
    close(out - x, G["p_gated"] + G["p_conv_out"], 2e-6)
    assert rows.shape == x.shape and PAPER.conv_rows == 9 and PAPER.max_ngram == int(G["p_dilation"])


def test_paper_form_in_blocks():
    """Blocks of 4 of which some tokens are kept, then thrown-away drafts: the same outputs as in one pass."""
    x, e = paper_inputs()
    params = golden.paper_params()
    past, done = init_conv(PAPER, 2), np.zeros(2, np.int32)
    out = np.full_like(x, np.nan)
    for kept in ((4, 1), (2, 0), (4, 4), (3, 4), (0, 4)):
        take = np.minimum(done[:, None] + np.arange(4), 12)  # [2, 4]
        block = [np.take_along_axis(a, take.reshape(2, 4, *(1,) * (a.ndim - 2)), axis=1) for a in (x, e)]
        got, rows = run_conv(params, PAPER, *block, past)
        for i, k in enumerate(kept):
            out[i, done[i] : done[i] + k] = got[i, :k]
        past = advance(past, rows, np.array(kept))
        done = done + np.array(kept, np.int32)
    assert done.tolist() == [13, 13]
    close(out, G["p_out"], PAPER_LIMIT)


def test_module_end_to_end():
    """Tokens in, residual streams out, under split, merge and jit; equal to the golden output."""
    params = {name: jnp.asarray(x) for name, x in golden.params().items()}
    module = Engram(CONFIG, 1, params=params, table=place(golden.table()))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    assert len(jax.tree.leaves(params)) == len(CONFIG.param_specs()) and len(jax.tree.leaves(rest)) == 2
    x = np.zeros((4, 11, 4, 48), np.float32)
    for i, length in enumerate(golden.LENGTHS):
        x[i, :length] = G["x"][golden.STARTS[i] :][:length]

    @jax.jit
    def step(params, rest, x):
        module = nnx.merge(graph, params, rest)
        rows, keep = hash_tokens(CONFIG, jnp.asarray(golden.MAP), jnp.asarray(golden.batch()), lengths=golden.LENGTHS)
        return module(x, module.lookup(rows[:, :, module.layer]), keep)

    out = step(params, rest, x)
    close(golden.flat(out), G["out_f64"])
    for i, length in enumerate(golden.LENGTHS):
        np.testing.assert_array_equal(out[i, length:], x[i, length:])


def test_module_of_the_paper_form():
    module = Engram(PAPER, 0, params={k: jnp.asarray(v) for k, v in golden.paper_params().items()})
    x, e = paper_inputs()
    out, _ = nnx.jit(lambda m, x, e: m(x, e, init_conv(PAPER, 2)))(module, x, e)
    close(out, G["p_out"], PAPER_LIMIT)
    fresh = Engram(PAPER, 1, rngs=nnx.Rngs(0))
    assert set(fresh.params) == set(PAPER.param_specs()) and not np.any(fresh.params["conv_weight"])


def test_bad_arguments():
    params, x, e = golden.params(), G["x"], G["emb"]
    for arguments, message in (
        ((x[:, :3], e), r"x is float32\[29, 3, 48\]; accepted: float32\[29, 4, 48\]"),
        ((x.astype(jnp.bfloat16), e), r"x is bfloat16\[29, 4, 48\]; accepted: float32"),
        ((x, e[:, :64]), r"embeddings is float32\[29, 64\]; accepted: float32\[29, 768\]"),
        ((x, e, G["keep"][1:]), r"keep is bool\[28\]; accepted: bool\[29\]"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(params, CONFIG, *arguments)
    with pytest.raises(ValueError, match=r"config.form is 'paper'"):
        forward(golden.paper_params(), PAPER, *paper_inputs())
    with pytest.raises(ValueError, match=r"config.form is 'v41'"):
        forward_conv(params, CONFIG, x[None], e[None], init_conv(CONFIG, 1))
    with pytest.raises(ValueError, match=r"past is float32\[1, 9, 4, 24\]; accepted: float32\[2, 9, 4, 24\]"):
        forward_conv(golden.paper_params(), PAPER, *paper_inputs(), init_conv(PAPER, 1))


def test_bad_modules():
    params = {k: jnp.asarray(v) for k, v in golden.params().items()}
    with pytest.raises(ValueError, match="either rngs"):
        Engram(CONFIG)
    with pytest.raises(ValueError, match="params do not fit"):
        Engram(CONFIG, params={**params, "wkv": params["wkv"][1:]})
    with pytest.raises(ValueError, match="layer=2; accepted: 0 to 1"):
        Engram(CONFIG, 2, params=params)
    with pytest.raises(ValueError, match="table has 2304 rows; accepted: 1524"):
        Engram(CONFIG, 0, params=params, table=place(golden.table()))
    with pytest.raises(ValueError, match="table is in numpy arrays"):
        Engram(CONFIG, 1, params=params, table=golden.table())
    with pytest.raises(ValueError, match="has no table"):
        Engram(CONFIG, 1, params=params).lookup(jnp.zeros((1, 12), jnp.int32))
