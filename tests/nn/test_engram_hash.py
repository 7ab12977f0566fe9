"""The hash and its histories: exact integers, in any chunking, with and without drafts."""

import dataclasses
import functools
import operator

import engram_golden as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engram_golden import BACK, CONFIG, LENGTHS, MAP, G
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_jax.nn.engram import (
    EngramConfig,
    advance,
    check_token_map,
    hash_tokens,
    hash_windows,
    init_history,
    token_windows,
)

FLASH = EngramConfig.v41_flash()
hash_batch = jax.jit(hash_tokens, static_argnums=0)


def by_integers(config, windows):
    """The hash in Python's own integers, one window at a time: the definition."""
    rows = []
    for layer, multipliers in enumerate(config.hash_multipliers.tolist()):
        row, first = [], 0
        for order in range(2, config.max_ngram + 1):
            mix = functools.reduce(operator.xor, [int(windows[s]) * multipliers[s] for s in range(order)])
            for prime in config.primes[layer, order - 2].tolist():
                row.append(mix % prime + first)
                first += prime
        rows.append(row)
    return rows


def by_int64(config, windows):
    """The same for many windows [n, N] in numpy's 64-bit integers, which no product overflows."""
    mix = np.bitwise_xor.accumulate(windows[:, None] * config.hash_multipliers.astype(np.int64), axis=-1)
    rows = mix[:, :, 1:, None] % config.primes  # [n, layers, orders, heads]
    return rows.reshape(*rows.shape[:2], -1) + config.offsets


def test_constants():
    for config, prefix in ((CONFIG, ""), (golden.PAPER, "p_"), (FLASH, "real_")):
        np.testing.assert_array_equal(config.hash_multipliers.astype(np.int64), G[prefix + "multipliers"])
        np.testing.assert_array_equal(config.primes, G[prefix + "primes"])
        np.testing.assert_array_equal(config.offsets, G[prefix + "offsets"])
    np.testing.assert_array_equal(CONFIG.num_rows, G["num_embeddings"])
    assert FLASH.num_rows == (384_006_168, 384_016_682)
    drawn = dataclasses.replace(FLASH, multipliers=None)
    np.testing.assert_array_equal(drawn.hash_multipliers, FLASH.hash_multipliers)


def test_golden_requests():
    rows, keep = hash_batch(CONFIG, MAP, golden.batch(), None, None, LENGTHS)
    assert rows.dtype == jnp.int32
    np.testing.assert_array_equal(golden.flat(rows), G["hash_ids"])
    np.testing.assert_array_equal(golden.flat(keep), G["keep"])
    for i, length in enumerate(LENGTHS):  # what pads a batch hashes like nothing at all, and is never applied
        np.testing.assert_array_equal(rows[i, length:], np.broadcast_to(G["pad_hash"], rows[i, length:].shape))
        assert not np.any(keep[i, length:])


def test_golden_windows_of_the_published_model():
    np.testing.assert_array_equal(hash_windows(FLASH, G["real_windows"]), G["real_hash"])
    np.testing.assert_array_equal(G["real_hash"][:8], [by_integers(FLASH, w) for w in G["real_windows"][:8]])


def test_golden_paper_form():
    rows, keep = hash_batch(golden.PAPER, MAP, G["p_ids"].astype(np.int32))
    np.testing.assert_array_equal(rows, G["p_hash"])
    assert np.all(keep)


def test_golden_history():
    history = advance(init_history(CONFIG, 4), jnp.asarray(golden.batch()), LENGTHS)
    np.testing.assert_array_equal(history, G["hist_after_full"][G["req_slots"]])


def test_golden_chunks():
    history, done = init_history(CONFIG, 1), 0
    for length, after in zip(G["chunk_lens"], G["chunk_hist"], strict=True):
        chunk = golden.request(0)[None, done : done + length]
        rows, _ = hash_tokens(CONFIG, MAP, chunk, history, np.array([done]))
        np.testing.assert_array_equal(rows[0], G["hash_ids"][done : done + length])
        history = advance(history, jnp.asarray(chunk), np.array([length]))
        np.testing.assert_array_equal(history[0], after)
        done += length


def test_golden_decode():
    tokens = golden.request(2)
    history = advance(init_history(CONFIG, 1), jnp.asarray(tokens[None, :2]), np.array([2]))
    for t in range(2, 9):
        rows, _ = hash_batch(CONFIG, MAP, tokens[None, t : t + 1], history, np.array([t]))
        np.testing.assert_array_equal(rows[0, 0], G["decode_hash"][t - 2])
        history = advance(history, jnp.asarray(tokens[None, t : t + 1]), np.array([1]))


def test_golden_verify_and_commit():
    history = jnp.asarray(G["verify_hist_before"][None])
    block = G["verify_block"].astype(np.int32)[None]
    rows, _ = hash_batch(CONFIG, MAP, block, history, np.array([3]))
    np.testing.assert_array_equal(rows[0], G["verify_hash"])
    after = advance(history, jnp.asarray(block), G["verify_commit_len"][None])
    np.testing.assert_array_equal(after[0], G["verify_hist_after"])
    np.testing.assert_array_equal(advance(history, jnp.asarray(block), np.array([0])), history)


def test_a_million_windows():
    rng = np.random.default_rng(0)
    run = jax.jit(hash_windows, static_argnums=0)
    for _ in range(8):
        windows = rng.integers(0, FLASH.compressed_vocab_size, (125_000, 4), np.int64)
        windows[:4] = FLASH.compressed_vocab_size - 1, 0, 1, 2**16
        ours = np.asarray(run(FLASH, windows.astype(np.int32)))
        np.testing.assert_array_equal(ours, by_int64(FLASH, windows))
        np.testing.assert_array_equal(ours[:125], [by_integers(FLASH, w) for w in windows[:125]])


@pytest.mark.parametrize("slots", [2, 2**13 - 1, 2**24, 2**27], ids=str)
def test_other_sizes(slots):
    """Every width of digit in the division, and 63-bit multipliers."""
    config = EngramConfig(8, 300, 300, slots, (0, 3), max_ngram=3, heads=1, head_dim=32)
    windows = np.random.default_rng(1).integers(0, 300, (500, 3), np.int64)
    np.testing.assert_array_equal(hash_windows(config, windows), [by_integers(config, w) for w in windows])
    assert config.primes.min() >= slots and len(set(config.primes.flat)) == config.primes.size


def windows_by_definition(tokens, at):
    """Window of tokens[at], by the words of the definition."""
    window, going = [], True
    for shift in range(BACK + 1):
        going = going and at - shift >= 0 and tokens[at - shift] not in (-1, CONFIG.image_token_id)
        window.append(MAP[tokens[at - shift]] if going else MAP[CONFIG.pad_token_id])
    return window


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_chunking_is_one_pass(seed):
    """Blocks of 4 with any number kept, three requests side by side: prefill in chunks, decode, and verification."""
    rng = np.random.default_rng(seed)
    special = [CONFIG.image_token_id, CONFIG.pad_token_id, -1]
    draw = lambda n: np.where(rng.random(n) < 0.3, rng.choice(special, n), rng.integers(0, 239, n))  # noqa: E731
    tokens = [draw(n) for n in rng.integers(0, 10, 3)]
    history = np.full((3, BACK), rng.integers(0, 239), np.int32)  # a slot that another request used before
    done = np.zeros(3, np.int32)
    while any(done[i] < len(tokens[i]) for i in range(3)):
        kept = [rng.integers(0, min(4, len(t) - n) + 1) for t, n in zip(tokens, done, strict=True)]
        block = rng.integers(0, 239, (3, 4)).astype(np.int32)  # what is not kept may be anything
        for i, k in enumerate(kept):
            block[i, :k] = tokens[i][done[i] : done[i] + k]
        windows, keep, history = jax.device_get(step(block, history, done, np.array(kept, np.int32)))
        for i in range(3):
            for t in range(kept[i]):
                assert windows[i, t].tolist() == windows_by_definition(tokens[i], done[i] + t)
                assert keep[i, t] == (tokens[i][done[i] + t] not in (-1, CONFIG.image_token_id))
        done = done + np.array(kept, np.int32)


@jax.jit
def step(block, history, positions, kept):
    windows, keep = token_windows(CONFIG, jnp.asarray(MAP), block, history, positions)
    return windows, keep, advance(history, block, kept)


def test_blocks_of_every_size_give_the_same_rows():
    tokens = golden.request(0)[None]
    whole, _ = hash_tokens(CONFIG, MAP, tokens)
    for size in (1, 3, 4):
        history, parts = init_history(CONFIG, 1), []
        for start in range(0, 11, size):
            block = tokens[:, start : start + size]
            parts.append(hash_tokens(CONFIG, MAP, block, history, np.array([start]))[0])
            history = advance(history, jnp.asarray(block), np.array([block.shape[1]]))
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_bad_ids():
    tokens = golden.batch()
    for bad in (240, -2, 2**40):
        with pytest.raises(ValueError, match=rf"tokens has 1 ids that are none, the first {bad}; accepted: 0 to 239"):
            hash_tokens(CONFIG, MAP, np.where(tokens == 146, bad, tokens.astype(np.int64))[:1])
    with pytest.raises(ValueError, match="history has 3 ids that are none"):
        hash_tokens(CONFIG, MAP, tokens[:1], jnp.full((1, 3), 240, jnp.int32))
    with pytest.raises(ValueError, match="windows has ids from 0 to 150; accepted: compressed ids, 0 to 149"):
        hash_windows(CONFIG, np.array([[0, 150, 1, 2]], np.int32))
    # Traced ids cannot raise: they break N-grams, like no token, and their rows stay within the table.
    rows, keep = hash_batch(CONFIG, MAP, np.array([[3, 240, 4]], np.int32))
    want, _ = hash_batch(CONFIG, MAP, np.array([[3, -1, 4]], np.int32))
    np.testing.assert_array_equal(rows, want)
    np.testing.assert_array_equal(keep, [[True, False, True]])


def test_bad_shapes():
    tokens = golden.batch()
    for wrong, message in (
        (dict(tokens=tokens[0]), r"tokens is int32\[11\]; accepted: int32\[b, s\]"),
        (dict(tokens=tokens.astype(np.float32)), r"tokens is float32\[4, 11\]"),
        (dict(history=jnp.zeros((4, 2), jnp.int32)), r"history is int32\[4, 2\]; accepted: int32\[4, 3\]"),
        (dict(positions=np.zeros(3, np.int32)), r"positions is int32\[3\]; accepted: int32\[4\]"),
        (dict(lengths=7), r"lengths is int 7; accepted: int32\[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            hash_tokens(CONFIG, MAP, **{"tokens": tokens, **wrong})
    with pytest.raises(ValueError, match=r"windows is int32\[5, 3\]"):
        hash_windows(CONFIG, np.zeros((5, 3), np.int32))
    with pytest.raises(ValueError, match=r"block is float32\[1, 2\]; accepted: int32\[1, s\]"):
        advance(init_history(CONFIG, 1), jnp.zeros((1, 2)), np.array([1]))


def test_bad_maps():
    with pytest.raises(ValueError, match=r"token_map is int32\[239\]; accepted: int32\[240\]"):
        check_token_map(CONFIG, MAP[1:])
    with pytest.raises(ValueError, match=r"token_map is int64\[240\]; accepted: int32"):
        hash_tokens(CONFIG, G["token_map"], golden.batch())
    with pytest.raises(ValueError, match="has 149 compressed ids, 0 to 148; accepted: all of 0 to 149"):
        hash_tokens(CONFIG, np.minimum(MAP, 148), golden.batch())
    with pytest.raises(ValueError, match="has 150 compressed ids, 0 to 150"):
        check_token_map(CONFIG, np.where(MAP == 149, 150, MAP).astype(np.int32))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(max_ngram=1), "max_ngram=1; accepted: an int of at least 2"),
        (dict(heads=0), "heads=0"),
        (dict(form="v5"), "form='v5'; accepted: 'v41' or 'paper'"),
        (dict(layer_ids=(1, 1)), "layer_ids"),
        (dict(slots=(101, 103)), "slots=.*accepted: an int of at least 1, or a tuple of 3"),
        (dict(pad_token_id=240), "pad_token_id=240; accepted: a token id, 0 to 239"),
        (dict(image_token_id=-1), "image_token_id=-1"),
        (dict(multipliers=((1, 3, 5, 7),)), "multipliers=.*accepted: 2 tuples of 4 ints"),
        (dict(multipliers=((1, 3, 5, 2**60),) * 2), "multipliers="),
        (dict(norm_eps=0.0), "norm_eps"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        golden.replace(**changes)


def test_tables_beyond_int32_rows_are_refused():
    with pytest.raises(NotImplementedError, match="below 2\\^31"):
        golden.replace(slots=2**28)
    with pytest.raises(ValueError, match="layer=2; accepted: 0 to 1"):
        CONFIG.check_layer(2)
