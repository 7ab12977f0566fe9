"""The workloads' arithmetic against rates published for these shapes, and that every one of them can be built."""

import jax
import numpy as np
import pytest

from mla_jax.bench import inputs, workloads
from mla_jax.bench.workloads import SUITES, WORKLOADS, Append, Dense, Plan, Sparse


# (name, microseconds, TFLOP/s) as measured with FlashMLA on an H100: the FLOP count must reproduce the rate.
@pytest.mark.parametrize(
    ("name", "us", "tflop_s"),
    [
        ("dense-b128-sq1-h128-sk4096", 255.9, 571),
        ("dense-b128-sq2-h128-sk32768", 3628, 644),
        ("v32-b128-sq1-h128-topk2048", 176.6, 413),
        ("v32-b148-sq2-h128-topk16384", 2989, 452),
        ("model1-c1-b128-sq2-h64", 93.6, 229),
        ("model1-c2-b256-sq2-h128", 397.1, 389),
    ],
)
def test_flop_count(name, us, tflop_s):
    assert WORKLOADS[name].flop / us / 1e6 == pytest.approx(tflop_s, rel=5e-3)


def test_flop_count_of_differing_lengths():
    # C3 on FlashMLA: 121.3 us at 172 TFLOP/s. Its lengths were drawn like ours, uniform in [0, topk], but are others.
    assert WORKLOADS["model1-c3-b128-sq2-h64"].flop / 121.3 / 1e6 == pytest.approx(172, rel=0.1)


@pytest.mark.parametrize(
    ("name", "us", "gb_s"),
    [("dense-b128-sq1-h16-sk4096", 207.7, 2929), ("dense-b8-sq1-h16-sk8192", 37.4, 2027)],
)
def test_byte_count(name, us, gb_s):
    assert WORKLOADS[name].bytes_moved / us / 1e3 == pytest.approx(gb_s, rel=5e-3)


def test_lengths_are_the_same_everywhere():
    scope = WORKLOADS["model1-c3-b128-sq2-h64"].extra
    lengths = scope.lengths(128)
    np.testing.assert_array_equal(lengths, scope.lengths(128))
    assert lengths.shape == (128,) and 0 <= lengths.min() < lengths.max() <= scope.topk


def test_names_are_unique():
    assert len(WORKLOADS) == sum(map(len, SUITES.values()))


def test_select():
    assert workloads.select([], "") == list(WORKLOADS.values())
    assert {w.name for w in workloads.select(["small"], "v32-b8")} == {f"v32-b8-sq1-h{h}-topk2048" for h in (8, 16, 32)}
    with pytest.raises(ValueError, match="'huge' does not exist; there are dense"):
        workloads.select(["huge"])
    with pytest.raises(ValueError, match="contains 'b77'"):
        workloads.select(["dense"], "b77")


def _small_enough(w):
    """Index arrays of the largest sparse workloads take seconds to draw."""
    return not isinstance(w, Sparse) or w.b <= 8


@pytest.mark.parametrize("name", [name for name, w in WORKLOADS.items() if _small_enough(w)])
def test_every_call_has_the_right_shapes(name):
    w = WORKLOADS[name]
    arrays = inputs.abstract(w)
    args = arrays.sets[0] | ({} if arrays.carry is None else {"carry": arrays.carry})
    out = jax.eval_shape(lambda caches, args: inputs.call(w, caches, args), arrays.caches, args)
    match w:
        case Dense() | Sparse():
            assert out[0].shape == (w.b, w.s_q, w.h, w.fmt.d_v)
            assert out[1].shape == (w.b, w.s_q, w.h)
        case Append():
            assert out.data.shape == arrays.carry.data.shape
        case Plan():
            assert out.batch == w.of.b and out.num_heads == w.of.h
