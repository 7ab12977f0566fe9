"""Sizes of the two attention modules, as frozen, validated, hashable data (static under jit).

`V32Config` describes DeepSeek-V3.2 and, without its indexer, every dense model of the V3 family. `Model1Config`
describes DeepSeek-V4. Both publish `param_specs()`: name, shape and dtype of every parameter of a layer, which is what
`init_params` makes, `weights` loads and the NNX modules hold. Projections are stored as checkpoints store them,
`[out, in]`, in the config's dtype; norms, sinks and position biases in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import jax
import numpy as np

from mla_jax.quantize import ScaleRule, check_scale_rule
from pallas_kernels.formats import (
    BF16,
    BF16_512,
    BF16_576,
    F32,
    F32_512,
    F32_576,
    INDEX_F32,
    INDEX_FP8,
    MODEL1,
    V32,
    KVFormat,
)

CacheKind = Literal["fp8", "bf16", "f32"]
"""How K and V are cached: "fp8" is what serving uses, "bf16" and "f32" keep them unquantised. Attention itself computes
in bfloat16 over "fp8" and "bf16" caches, in float32 over "f32" ones."""

IndexCacheKind = Literal["fp8", "f32"]
"""How the indexer's keys are cached."""

Precision = Literal["bf16", "f32"]
"""dtype of weights and activations."""


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(config).__name__}: {name}={value!r}; accepted: an int of at least 1")


def _check_choice(config: object, name: str, accepted: Sequence[object]) -> None:
    value = getattr(config, name)
    if value not in accepted:
        raise ValueError(f"{type(config).__name__}: {name}={value!r}; accepted: {', '.join(map(repr, accepted))}")


def _check_storage(config: V32Config | Model1Config) -> None:
    _check_choice(config, "cache", get_args(CacheKind))
    _check_choice(config, "index_cache", (None, *get_args(IndexCacheKind)))
    _check_choice(config, "precision", (None, *get_args(Precision)))
    check_scale_rule(config.scale_rule, config.kv_format)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary frequencies, YaRN included (Peng et al. 2023, arXiv 2309.00071, as DeepSeek uses it).

    Attributes:
      dim: rotated dims of a row; `dim / 2` frequencies.
      theta: base of the frequencies.
      factor: context extension; 1 means plain RoPE and makes the four fields below irrelevant.
      original_positions: context the frequencies were trained on.
      beta_fast, beta_slow: rotations over that context above which a frequency is kept, below which it is divided
        by `factor`; linear in between.
      mscale: weight of the attention factor 0.1 mscale ln(factor) + 1, squared into the softmax scale (never into
        cos and sin); 0 for none.
    """

    dim: int = 64
    theta: float = 10_000.0
    factor: float = 1.0
    original_positions: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0

    def __post_init__(self) -> None:
        _check_positive(self, "dim", "original_positions")
        if self.dim % 2:
            raise ValueError(f"RopeConfig: dim={self.dim}; accepted: an even number")
        if not self.theta > 1.0:
            raise ValueError(f"RopeConfig: theta={self.theta}; accepted: above 1")
        if not self.factor >= 1.0:
            raise ValueError(f"RopeConfig: factor={self.factor}; accepted: 1 (plain RoPE) or more")
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                f"RopeConfig: beta_fast={self.beta_fast}, beta_slow={self.beta_slow}; accepted: fast > slow > 0"
            )

    @property
    def attention_factor(self) -> float:
        """What the softmax scale is multiplied by."""
        return (0.1 * self.mscale * math.log(self.factor) + 1.0) ** 2


class _Storage:
    """How a config's caches, weights and activations are stored: what its fields of those names mean."""

    cache: CacheKind
    index_cache: IndexCacheKind | None
    precision: Precision | None
    _formats: ClassVar[dict[CacheKind, KVFormat]]

    @property
    def dtype(self) -> np.dtype:
        """dtype of weights and activations."""
        return {"bf16": BF16, "f32": F32}[self.precision or ("f32" if self.cache == "f32" else "bf16")]

    @property
    def kv_format(self) -> KVFormat:
        return self._formats[self.cache]

    @property
    def index_format(self) -> KVFormat:
        return {"fp8": INDEX_FP8, "f32": INDEX_F32}[self.index_cache or ("f32" if self.cache == "f32" else "fp8")]


@dataclasses.dataclass(frozen=True)
class V32Config(_Storage):
    """Attention of DeepSeek-V3.2; with `index_topk=0`, dense attention of the V3 family.

    Attributes:
      hidden_size: width of the residual stream.
      num_heads: query heads.
      q_lora_rank, kv_lora_rank: widths of the two latents; the latter is what is cached.
      qk_nope_dim, v_head_dim: per-head widths of the unrotated query/key part and of the value.
      index_heads, index_dim, index_topk: the lightning indexer; `index_topk=0` means dense attention over all keys.
      rope: `rope.dim` is the per-head width of the rotated part.
      norm_eps: epsilon of every RMSNorm and LayerNorm.
      num_layers: layers that share the pools of a cache.
      cache, index_cache, precision: see `CacheKind`, `IndexCacheKind`, `Precision`. The latter two follow `cache` by
        default: "f32" for an "f32" cache, else "fp8" and "bf16".
      scale_rule: how the fp8 cache's scales are chosen, see `mla_jax.pack_kv`.
      implementation: handed to the decode ops, see `mla_jax.sparse_mla_decode`.
    """

    _formats = {"fp8": V32, "bf16": BF16_576, "f32": F32_576}  # noqa: RUF012

    hidden_size: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int = 512
    qk_nope_dim: int = 128
    v_head_dim: int = 128
    index_heads: int = 64
    index_dim: int = 128
    index_topk: int = 2048
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-6
    num_layers: int = 1
    cache: CacheKind = "fp8"
    index_cache: IndexCacheKind | None = None
    precision: Precision | None = None
    scale_rule: ScaleRule = "pow2"
    implementation: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_positive(
            self,
            *("hidden_size", "num_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_dim", "v_head_dim", "num_layers"),
        )
        _check_storage(self)
        if self.index_topk:
            _check_positive(self, "index_heads", "index_topk")
            _check_choice(self, "index_dim", (INDEX_FP8.d_qk,))
            if self.rope.dim > self.index_dim:
                raise ValueError(f"V32Config: rope.dim={self.rope.dim}; accepted: at most index_dim={self.index_dim}")
        elif self.cache == "fp8":
            raise ValueError(
                f"V32Config: cache='fp8' with index_topk={self.index_topk}: dense decoding reads no fp8 cache; "
                "accepted: cache='bf16' or 'f32', or an index_topk of at least 1"
            )
        fmt = self.kv_format
        if (self.kv_lora_rank, self.rope.dim) != (fmt.d_nope, fmt.d_rope):
            raise ValueError(
                f"V32Config: kv_lora_rank={self.kv_lora_rank}, rope.dim={self.rope.dim}; accepted: {fmt.d_nope} and "
                f"{fmt.d_rope}, what the cache format {fmt.name} holds"
            )

    @classmethod
    def deepseek_v3_2(cls, **changes) -> V32Config:
        """DeepSeek-V3.2; keyword arguments replace fields."""
        rope = RopeConfig(factor=40.0, original_positions=4096, mscale=1.0)
        return dataclasses.replace(
            cls(hidden_size=7168, num_heads=128, q_lora_rank=1536, rope=rope, num_layers=61), **changes
        )

    @classmethod
    def deepseek_v3(cls, **changes) -> V32Config:
        """DeepSeek-V3 and R1: the same attention without an indexer, over a bf16 cache."""
        return cls.deepseek_v3_2(**{"index_topk": 0, "cache": "bf16", **changes})

    @classmethod
    def small(cls, **changes) -> V32Config:
        """A config for tests and notebooks: every mechanism of V3.2, a few hundred kilobytes of weights."""
        rope = RopeConfig(factor=40.0, original_positions=4096, mscale=1.0)
        config = cls(hidden_size=64, num_heads=4, q_lora_rank=32, index_heads=16, index_topk=16, rope=rope)
        return dataclasses.replace(config, **changes)

    @property
    def is_sparse(self) -> bool:
        """Whether an indexer chooses the keys."""
        return self.index_topk > 0

    @property
    def sm_scale(self) -> float:
        """Softmax scale: that of the *unabsorbed* head width, times YaRN's attention factor."""
        return (self.qk_nope_dim + self.rope.dim) ** -0.5 * self.rope.attention_factor

    def param_specs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter of one layer, by name."""
        h, rank, rope = self.num_heads, self.kv_lora_rank, self.rope.dim
        shapes: dict[str, tuple[int, ...]] = {
            "wq_a": (self.q_lora_rank, self.hidden_size),
            "q_norm": (self.q_lora_rank,),
            "wq_b": (h * (self.qk_nope_dim + rope), self.q_lora_rank),
            "wkv_a": (rank + rope, self.hidden_size),
            "kv_norm": (rank,),
            "w_uk": (h, self.qk_nope_dim, rank),
            "w_uv": (h, self.v_head_dim, rank),
            "wo": (self.hidden_size, h * self.v_head_dim),
        }
        if self.is_sparse:
            shapes |= {
                "index_wq_b": (self.index_heads * self.index_dim, self.q_lora_rank),
                "index_wk": (self.index_dim, self.hidden_size),
                "index_k_norm_weight": (self.index_dim,),
                "index_k_norm_bias": (self.index_dim,),
                "index_weights": (self.index_heads, self.hidden_size),
            }
        return _specs(shapes, self.dtype)


@dataclasses.dataclass(frozen=True)
class Model1Layer:
    """Where one layer of a `Model1Config` finds its caches.

    Attributes:
      ratio: 0 (sliding window only), 4 or 128; static under jit.
      layer: number among all layers: its place in the window pool. May be traced.
      rank: number among the layers of the same ratio: its place in that ratio's pools. May be traced.
    """

    ratio: int
    layer: int
    rank: int


@dataclasses.dataclass(frozen=True)
class Model1Config(_Storage):
    """Attention of DeepSeek-V4 ("MODEL1" in FlashMLA).

    Attributes:
      hidden_size, num_heads, q_lora_rank: as in `V32Config`.
      o_groups, o_lora_rank: the output projection: heads in groups, each group down to `o_lora_rank`.
      ratios: compress ratio of each layer: 0 for none, 4 (with an indexer) or 128 (all entries attended).
      window: keys of the sliding window, the query's own included.
      page_tokens: tokens that one column of the context table stands for: a page of compressed entries holds
        `page_tokens / ratio` of them.
      rollback_tokens: most tokens that a decode step may take back (rejected drafts).
      index_heads, index_dim, index_topk: the indexer of ratio-4 layers.
      rope, compressed_rope: frequencies of layers of ratio 0, and of every branch of compressed layers.
      norm_eps, cache, index_cache, precision, scale_rule, implementation: as in `V32Config`.
    """

    _formats = {"fp8": MODEL1, "bf16": BF16_512, "f32": F32_512}  # noqa: RUF012

    hidden_size: int
    num_heads: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    ratios: tuple[int, ...]
    window: int = 128
    page_tokens: int = 256
    rollback_tokens: int = 4
    index_heads: int = 64
    index_dim: int = 128
    index_topk: int = 512
    rope: RopeConfig = RopeConfig()
    compressed_rope: RopeConfig = RopeConfig(theta=160_000.0, factor=16.0, original_positions=65_536)
    norm_eps: float = 1e-6
    cache: CacheKind = "fp8"
    index_cache: IndexCacheKind | None = None
    precision: Precision | None = None
    scale_rule: ScaleRule = "pow2"
    implementation: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_positive(
            self,
            *("hidden_size", "num_heads", "q_lora_rank", "o_groups", "o_lora_rank", "window", "page_tokens"),
            *("index_heads", "index_topk"),
        )
        _check_storage(self)
        _check_choice(self, "index_dim", (INDEX_FP8.d_qk,))
        if not self.ratios or any(ratio not in (0, 4, 128) for ratio in self.ratios):
            raise ValueError(f"Model1Config: ratios={self.ratios}; accepted: one of 0, 4, 128 for each layer")
        if self.num_heads % self.o_groups:
            raise ValueError(f"Model1Config: o_groups={self.o_groups} does not divide num_heads={self.num_heads}")
        for ratio in set(self.ratios) - {0}:
            if self.page_tokens % ratio:
                raise ValueError(f"Model1Config: page_tokens={self.page_tokens}; accepted: a multiple of {ratio}")
        for name in ("rope", "compressed_rope"):
            rope: RopeConfig = getattr(self, name)
            if rope.dim != self.kv_format.d_rope:
                raise ValueError(f"Model1Config: {name}.dim={rope.dim}; accepted: {self.kv_format.d_rope}")
            if rope.mscale:
                raise ValueError(f"Model1Config: {name}.mscale={rope.mscale}; accepted: 0, the model has none")

    @classmethod
    def deepseek_v4_flash(cls, **changes) -> Model1Config:
        """DeepSeek-V4-Flash, 43 layers; keyword arguments replace fields."""
        config = cls(
            *(4096, 64, 1024),
            o_groups=8,
            o_lora_rank=1024,
            ratios=(0, 0, *(128 if i % 2 else 4 for i in range(41))),
        )
        return dataclasses.replace(config, **changes)

    @classmethod
    def deepseek_v4_pro(cls, **changes) -> Model1Config:
        """DeepSeek-V4-Pro, 61 layers; keyword arguments replace fields."""
        config = cls(
            *(7168, 128, 1536),
            o_groups=16,
            o_lora_rank=1024,
            ratios=(128, 128, *(128 if i % 2 else 4 for i in range(59))),
            index_topk=1024,
        )
        return dataclasses.replace(config, **changes)

    @classmethod
    def small(cls, **changes) -> Model1Config:
        """A config for tests and notebooks: one layer of each kind."""
        config = cls(64, 16, 32, o_groups=2, o_lora_rank=16, ratios=(0, 4, 128), index_heads=16, index_topk=8)
        return dataclasses.replace(config, **changes)

    @property
    def num_layers(self) -> int:
        return len(self.ratios)

    @functools.cached_property
    def layers(self) -> tuple[Model1Layer, ...]:
        """Every layer's place in the pools."""
        return tuple(Model1Layer(r, i, self.ratios[:i].count(r)) for i, r in enumerate(self.ratios))

    @property
    def head_dim(self) -> int:
        return self.kv_format.d_qk

    @property
    def sm_scale(self) -> float:
        return self.head_dim**-0.5

    def rope_of(self, ratio: int) -> RopeConfig:
        return self.compressed_rope if ratio else self.rope

    def param_specs(self, ratio: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter of one layer of that compress ratio, by name."""
        d, hidden = self.head_dim, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "wq_a": (self.q_lora_rank, hidden),
            "q_norm": (self.q_lora_rank,),
            "wq_b": (self.num_heads * d, self.q_lora_rank),
            "wkv": (d, hidden),
            "kv_norm": (d,),
            "sink": (self.num_heads,),
            "wo_a": (self.o_groups, self.o_lora_rank, self.num_heads // self.o_groups * d),
            "wo_b": (hidden, self.o_groups * self.o_lora_rank),
        }
        if ratio:
            shapes |= self._compressor_shapes("compress", ratio, d)
        if ratio == 4:
            shapes |= {
                "index_wq_b": (self.index_heads * self.index_dim, self.q_lora_rank),
                "index_weights": (self.index_heads, hidden),
            }
            shapes |= self._compressor_shapes("index_compress", ratio, self.index_dim)
        return _specs(shapes, self.dtype)

    def _compressor_shapes(self, prefix: str, ratio: int, d: int) -> dict[str, tuple[int, ...]]:
        width = num_parts(ratio) * d
        return {
            f"{prefix}_wkv": (width, self.hidden_size),
            f"{prefix}_wgate": (width, self.hidden_size),
            f"{prefix}_ape": (ratio, width),
            f"{prefix}_norm": (d,),
        }


def _specs(shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> dict[str, jax.ShapeDtypeStruct]:
    small = {name: len(shape) == 1 or name.endswith("_ape") for name, shape in shapes.items()}
    return {name: jax.ShapeDtypeStruct(shape, F32 if small[name] else dtype) for name, shape in shapes.items()}


def num_parts(ratio: int) -> int:
    """Windows that one compressed entry draws from: ratio 4 looks one window back, ratio 128 does not."""
    return 2 if ratio == 4 else 1
