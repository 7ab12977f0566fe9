"""Both attention modules over a whole sequence at once, in float64 numpy, without caches: the oracle of these tests.

Written from the papers' formulae, unabsorbed where the module absorbs, and checked against the golden files, which
come from another implementation. Nothing here imports the code under test but its configs.
"""

from __future__ import annotations

import numpy as np

from mla_jax.nn.config import Model1Config, V32Config


def rms(x, weight, eps):
    y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)  # [..., d]
    return y if weight is None else y * weight


def angles(positions, rope):
    """positions [t] -> [t, dim/2], YaRN written from the definition: wavelengths, not pair numbers."""
    half = rope.dim // 2
    freq = rope.theta ** (-np.arange(half) / half)  # [dim/2]
    if rope.factor > 1:
        # The pair, as a real number, whose frequency makes exactly that many turns over the original context.
        bounds = [
            np.log(rope.original_positions / (2 * np.pi * turns)) / np.log(rope.theta) * half
            for turns in (rope.beta_fast, rope.beta_slow)
        ]
        low, high = np.floor(bounds[0]), np.ceil(bounds[1])
        share = np.interp(np.arange(half), [low, high], [0.0, 1.0])  # [dim/2] of the interpolated frequency
        freq = freq * (1 - share) + freq / rope.factor * share
    return positions[:, None] * freq  # [t, dim/2]


def turn(x, angle, *, halves=False):
    """Rotate x [t, ..., dim] by angle [t, dim/2] as complex numbers."""
    if halves:
        re, im = np.split(x, 2, axis=-1)
    else:
        re, im = x[..., 0::2], x[..., 1::2]
    angle = angle.reshape(angle.shape[:1] + (1,) * (x.ndim - 2) + angle.shape[1:])
    z = (re + 1j * im) * np.exp(1j * angle)  # [t, ..., dim/2]
    out = np.empty_like(x)
    if halves:
        out[..., : z.shape[-1]], out[..., z.shape[-1] :] = z.real, z.imag
    else:
        out[..., 0::2], out[..., 1::2] = z.real, z.imag
    return out


def softmax(scores, sink=None):
    """Over the last axis; `sink` [..., 1] joins the denominator only."""
    top = scores.max(-1, keepdims=True) if sink is None else np.maximum(scores.max(-1, keepdims=True), sink)
    e = np.exp(scores - top)
    return e / (e.sum(-1, keepdims=True) + (0 if sink is None else np.exp(sink - top)))


def index_scores(q, k, w):
    """sum over heads of relu(q.k) w: q [t, h, d], k [s, d], w [t, h] -> [t, s]."""
    return np.einsum("ths,th->ts", np.maximum(np.einsum("thd,sd->ths", q, k), 0), w)


def top(scores, visible, k):
    """Set of the k largest visible columns of each row, as a bool mask [t, s]."""
    mask = np.zeros(scores.shape, bool)
    for t, n in enumerate(visible):
        mask[t, np.argsort(-scores[t, :n], kind="stable")[:k]] = True
    return mask


def v32(c: V32Config, p, x):
    """x [t, hidden] -> (out [t, hidden], chosen bool [t, t])."""
    p = {name: np.asarray(value, np.float64) for name, value in p.items()}
    t = len(x)
    turnby = angles(np.arange(t), c.rope)
    qr = rms(x @ p["wq_a"].T, p["q_norm"], c.norm_eps)  # [t, q_lora]
    q = (qr @ p["wq_b"].T).reshape(t, c.num_heads, -1)  # [t, h, nope + rope]
    kv = x @ p["wkv_a"].T  # [t, rank + rope]
    latent = rms(kv[:, : c.kv_lora_rank], p["kv_norm"], c.norm_eps)  # [t, rank]
    k_pe = turn(kv[:, c.kv_lora_rank :], turnby)  # [t, rope]
    q_pe = turn(q[..., c.qk_nope_dim :], turnby)  # [t, h, rope]
    k = np.einsum("sc,hnc->shn", latent, p["w_uk"])  # [s, h, nope]
    v = np.einsum("sc,hvc->shv", latent, p["w_uv"])  # [s, h, v]
    scores = np.einsum("thn,shn->ths", q[..., : c.qk_nope_dim], k) + np.einsum("thr,sr->ths", q_pe, k_pe)
    chosen = np.tril(np.ones((t, t), bool))
    if c.is_sparse:
        rope = c.rope.dim
        qi = (qr @ p["index_wq_b"].T).reshape(t, c.index_heads, c.index_dim)
        ki = x @ p["index_wk"].T
        ki = ki - ki.mean(-1, keepdims=True)
        ki = ki / np.sqrt((ki * ki).mean(-1, keepdims=True) + c.norm_eps)
        ki = ki * p["index_k_norm_weight"] + p["index_k_norm_bias"]
        qi[..., :rope] = turn(qi[..., :rope], turnby, halves=True)
        ki[..., :rope] = turn(ki[..., :rope], turnby, halves=True)
        w = x @ p["index_weights"].T * c.index_heads**-0.5 * c.index_dim**-0.5  # [t, heads]
        chosen = top(index_scores(qi, ki, w), np.arange(1, t + 1), c.index_topk)
    scores = np.where(chosen[:, None], scores * c.sm_scale, -np.inf)  # [t, h, s]
    out = np.einsum("ths,shv->thv", softmax(scores), v)  # [t, h, v]
    return out.reshape(t, -1) @ p["wo"].T, chosen


def compress(c: Model1Config, p, prefix, ratio, x):
    """x [t, hidden] -> entries before RoPE [t // ratio, d]."""
    d = p[f"{prefix}_norm"].shape[0]
    n = len(x) // ratio
    if n == 0:
        return np.zeros((0, d))
    kv = (x @ p[f"{prefix}_wkv"].T)[: n * ratio].reshape(n, ratio, -1)
    z = (x @ p[f"{prefix}_wgate"].T)[: n * ratio].reshape(n, ratio, -1) + p[f"{prefix}_ape"]
    if ratio == 4:  # [Ca | Cb]: Ca of the window before, Cb of this one
        before_kv = np.concatenate([np.zeros((1, ratio, d)), kv[:-1, :, :d]])
        before_z = np.concatenate([np.full((1, ratio, d), -np.inf), z[:-1, :, :d]])
        kv = np.concatenate([before_kv, kv[..., d:]], axis=1)  # [n, 8, d]
        z = np.concatenate([before_z, z[..., d:]], axis=1)
    weight = np.exp(z - z.max(1, keepdims=True))
    entry = (weight * kv).sum(1) / weight.sum(1)  # [n, d]
    return rms(entry, p[f"{prefix}_norm"], c.norm_eps)


def model1(c: Model1Config, ratio, p, x):
    """x [t, hidden] -> (out [t, hidden], chosen bool [t, t // ratio] or None)."""
    p = {name: np.asarray(value, np.float64) for name, value in p.items()}
    t, rd = len(x), c.rope.dim
    rope = c.compressed_rope if ratio else c.rope
    turnby = angles(np.arange(t), rope)
    qr = rms(x @ p["wq_a"].T, p["q_norm"], c.norm_eps)
    q = rms((qr @ p["wq_b"].T).reshape(t, c.num_heads, -1), None, c.norm_eps)  # [t, h, d]
    q[..., -rd:] = turn(q[..., -rd:], turnby)
    keys = rms(x @ p["wkv"].T, p["kv_norm"], c.norm_eps)  # [t, d]
    keys[:, -rd:] = turn(keys[:, -rd:], turnby)
    row = np.arange(t)
    see = (row[None] <= row[:, None]) & (row[None] > row[:, None] - c.window)  # [t, s]
    chosen = None
    if ratio:
        entries = compress(c, p, "compress", ratio, x)  # [n, d]
        n = len(entries)
        first = angles(np.arange(n) * ratio, rope)
        entries[:, -rd:] = turn(entries[:, -rd:], first)
        visible = (row + 1) // ratio
        chosen = np.arange(n)[None] < visible[:, None]
        if ratio == 4:
            qi = (qr @ p["index_wq_b"].T).reshape(t, c.index_heads, c.index_dim)
            qi[..., -rd:] = turn(qi[..., -rd:], turnby)
            ki = compress(c, p, "index_compress", ratio, x)
            ki[:, -rd:] = turn(ki[:, -rd:], first)
            w = x @ p["index_weights"].T * c.index_heads**-0.5 * c.index_dim**-0.5
            chosen = top(index_scores(qi, ki, w), visible, c.index_topk)
        keys = np.concatenate([keys, entries])
        see = np.concatenate([see, chosen], axis=1)
    scores = np.einsum("thd,sd->ths", q, keys) * c.sm_scale
    scores = np.where(see[:, None], scores, -np.inf)
    out = np.einsum("ths,sd->thd", softmax(scores, p["sink"][None, :, None]), keys)  # [t, h, d]
    out[..., -rd:] = turn(out[..., -rd:], -turnby)
    out = np.einsum("tgi,goi->tgo", out.reshape(t, c.o_groups, -1), p["wo_a"])
    return out.reshape(t, -1) @ p["wo_b"].T, chosen
