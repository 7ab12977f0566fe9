"""Sizes of an Engram: which layers, how many slots, and the integers of its hash. Frozen, validated, hashable.

Everything the hash needs follows from these few numbers and is derived here once, in exact Python integers: a
multiplier per layer and look-back, a prime per layer, N-gram order and head, and where each head's rows begin in the
layer's table. Source: Cheng et al. 2026 (arXiv 2601.07372), in the form DeepSeek-V4.1 ships.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Literal, get_args

import jax
import numpy as np

from pallas_kernels.formats import BF16, F32

Form = Literal["v41", "paper"]
"""v41: DeepSeek-V4.1's, one fused projection and no convolution. paper: biases and a short causal convolution."""

Precision = Literal["bf16", "f32"]

_LAYER_SEED = 10007  # multipliers of model layer l come from numpy's default_rng(seed + _LAYER_SEED * l)
_INT63 = 2**63 - 1
_MAX_ROWS = 2**31 - 1  # row ids are int32


@dataclasses.dataclass(frozen=True)
class EngramConfig:
    """Sizes of all Engram layers of a model.

    A function's argument `layer` counts these layers, 0 being the first of `layer_ids`.

    Attributes:
      hidden_size: width d of one residual stream.
      vocab_size: token ids are in [0, vocab_size).
      compressed_vocab_size: compressed ids are in [0, compressed_vocab_size); the multipliers depend on it.
      slots: smallest number of rows of one head's table, which is the next prime not used yet; one number, or one per
        order.
      layer_ids: the model's layer numbers, from 0, that have an Engram.
      hc_mult: residual streams of a token.
      max_ngram: the longest N-gram, N; orders 2 to N are looked up.
      heads: hash heads, so rows looked up, of each order.
      head_dim: width of a row.
      pad_token_id: the token whose compressed id stands for "no token" in a window.
      image_token_id: a token that breaks N-grams and gets no update; None for none.
      seed: of the multipliers, where `multipliers` is None.
      multipliers: one per layer and look-back, `[layers][max_ngram]`, as they were when the model was trained. None
        draws them as the trainer did, which ties them to numpy's generator.
      form: see `Form`.
      norm_eps: epsilon of the norms in the gate.
      conv_width, conv_eps: taps and norm epsilon of the paper form's convolution; its dilation is `max_ngram`.
      precision: dtype of weights and activations.
    """

    hidden_size: int
    vocab_size: int
    compressed_vocab_size: int
    slots: int | tuple[int, ...]
    layer_ids: tuple[int, ...]
    hc_mult: int = 4
    max_ngram: int = 4
    heads: int = 8
    head_dim: int = 256
    pad_token_id: int = 2
    image_token_id: int | None = None
    seed: int = 0
    multipliers: tuple[tuple[int, ...], ...] | None = None
    form: Form = "v41"
    norm_eps: float = 1e-6
    conv_width: int = 4
    conv_eps: float = 1e-5
    precision: Precision = "bf16"

    def __post_init__(self) -> None:
        sizes = (
            *("hidden_size", "vocab_size", "compressed_vocab_size", "hc_mult"),
            *("max_ngram", "heads", "head_dim", "conv_width"),
        )
        for name in sizes:
            smallest = 2 if name == "max_ngram" else 1
            if not _is_int(getattr(self, name), smallest):
                _refuse(name, getattr(self, name), f"an int of at least {smallest}")
        for name, choices in (("form", get_args(Form)), ("precision", get_args(Precision))):
            if getattr(self, name) not in choices:
                _refuse(name, getattr(self, name), " or ".join(map(repr, choices)))
        ids = self.layer_ids
        if not (isinstance(ids, tuple) and ids and all(_is_int(i, 0) for i in ids) and len(set(ids)) == len(ids)):
            _refuse("layer_ids", ids, "a tuple of different layer numbers, at least one")
        bases = self.slots if isinstance(self.slots, tuple) else (self.slots,)
        if not all(_is_int(base, 1) for base in bases) or len(bases) not in (1, self.orders):
            _refuse("slots", self.slots, f"an int of at least 1, or a tuple of {self.orders}, one per order")
        if not _is_int(self.pad_token_id, 0) or self.pad_token_id >= self.vocab_size:
            _refuse("pad_token_id", self.pad_token_id, f"a token id, 0 to {self.vocab_size - 1}")
        image = self.image_token_id
        if image is not None and not (_is_int(image, 0) and image < self.vocab_size):
            _refuse("image_token_id", image, f"None or a token id, 0 to {self.vocab_size - 1}")
        if not self.norm_eps > 0 or not self.conv_eps > 0:
            _refuse("norm_eps and conv_eps", (self.norm_eps, self.conv_eps), "positive numbers")
        if self.multipliers is not None:
            limit = _INT63 // self.compressed_vocab_size
            rows = self.multipliers
            if [len(row) for row in rows] != [self.max_ngram] * len(ids) or not all(
                _is_int(m, 1) and m <= limit for row in rows for m in row
            ):
                _refuse("multipliers", rows, f"{len(ids)} tuples of {self.max_ngram} ints, 1 to {limit}")
        if max(self.num_rows) > _MAX_ROWS:
            raise NotImplementedError(f"EngramConfig: tables of {self.num_rows} rows; row ids are int32, below 2^31")

    @classmethod
    def v41_flash(cls, **changes) -> EngramConfig:
        """DeepSeek-V4.1-Flash: 2 layers, 24 rows of 256 a token, 384 million rows a table."""
        config = cls(
            hidden_size=5120,
            vocab_size=129_280,
            compressed_vocab_size=99_092,
            slots=16_000_000,
            layer_ids=(1, 14),
            image_token_id=129_264,
            norm_eps=1e-20,
            multipliers=(
                (76632096046245, 4839876093313, 35959672319349, 73987337458391),
                (67716810739261, 51510806800915, 30921347202721, 82619226485591),
            ),
        )
        return dataclasses.replace(config, **changes)

    @classmethod
    def small(cls, **changes) -> EngramConfig:
        """A config for tests and notebooks: tables of about 1500 rows."""
        return dataclasses.replace(cls(48, 240, 150, 101, (1, 14), heads=4, head_dim=64, precision="f32"), **changes)

    @property
    def orders(self) -> int:
        """N-gram orders looked up: 2 to `max_ngram`."""
        return self.max_ngram - 1

    @property
    def columns(self) -> int:
        """Rows looked up for a token: order 2's heads first."""
        return self.orders * self.heads

    @property
    def embedding_dim(self) -> int:
        """Width of a token's rows, one after another."""
        return self.columns * self.head_dim

    @property
    def dtype(self) -> np.dtype:
        """dtype of weights and activations."""
        return {"bf16": BF16, "f32": F32}[self.precision]

    @property
    def conv_rows(self) -> int:
        """Past rows that the paper form's convolution reads."""
        return (self.conv_width - 1) * self.max_ngram

    @functools.cached_property
    def hash_multipliers(self) -> np.ndarray:
        """uint64 `[layers, max_ngram]`: odd, and times any compressed id below 2^63, so that the hash never wraps."""
        if self.multipliers is not None:
            return np.array(self.multipliers, np.uint64)
        bound = max(1, _INT63 // self.compressed_vocab_size // 2)
        draws = [
            np.random.default_rng(self.seed + _LAYER_SEED * layer).integers(0, bound, self.max_ngram, np.int64)
            for layer in self.layer_ids
        ]
        return 2 * np.array(draws, np.uint64) + np.uint64(1)

    @functools.cached_property
    def primes(self) -> np.ndarray:
        """int64 `[layers, orders, heads]`: rows of each head's table, no two alike in the whole model."""
        bases = self.slots if isinstance(self.slots, tuple) else (self.slots,) * self.orders
        found: list[int] = []
        used: set[int] = set()
        for _, base in itertools.product(self.layer_ids, bases):
            fresh = (n for n in itertools.count(base) if n not in used and _is_prime(n))
            found += itertools.islice(fresh, self.heads)
            used.update(found)
        return np.array(found, np.int64).reshape(len(self.layer_ids), self.orders, self.heads)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64 `[layers, columns]`: first row of each column in its layer's table."""
        sizes = self.primes.reshape(len(self.layer_ids), -1)  # [layers, columns]
        return np.cumsum(sizes, axis=1) - sizes  # [layers, columns]

    @functools.cached_property
    def num_rows(self) -> tuple[int, ...]:
        """Rows of each layer's table."""
        return tuple(int(n) for n in self.primes.sum(axis=(1, 2)))

    def check_layer(self, layer: int) -> None:
        """Raises ValueError unless `layer` counts one of `layer_ids`."""
        if not 0 <= layer < len(self.layer_ids):
            raise ValueError(f"layer={layer}; accepted: 0 to {len(self.layer_ids) - 1}, counting {self.layer_ids}")

    def param_specs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter of a layer by name, the table aside; `[out, in]` like checkpoints."""
        hc, d = self.hc_mult, self.hidden_size
        specs = {
            "wkv": jax.ShapeDtypeStruct(((hc + 1) * d, self.embedding_dim), self.dtype),  # hc keys, then the value
            "q_weight": jax.ShapeDtypeStruct((hc, d), self.dtype),
            "k_weight": jax.ShapeDtypeStruct((hc, d), self.dtype),
        }
        if self.form == "paper":
            specs |= {
                "wkv_bias": jax.ShapeDtypeStruct(((hc + 1) * d,), self.dtype),
                "conv_norm": jax.ShapeDtypeStruct((hc, d), self.dtype),
                "conv_weight": jax.ShapeDtypeStruct((hc, d, self.conv_width), self.dtype),  # last tap: the token itself
            }
        return specs


def _is_int(value: object, smallest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= smallest


def _refuse(name: str, value: object, accepted: str) -> None:
    raise ValueError(f"EngramConfig: {name}={value!r}; accepted: {accepted}")


def _is_prime(n: int) -> bool:
    return n == 2 or (n > 2 and n % 2 == 1 and all(n % k for k in range(3, int(n**0.5) + 1, 2)))
