"""The token map, built with the `tokenizers` package from a tokenizer made here."""

import json

import engram_golden as golden
import numpy as np
import pytest

from mla_jax.nn.engram import build_token_map, check_token_map
from mla_jax.nn.engram import token_map as program

tokenizers = pytest.importorskip("tokenizers", reason="token maps need the extra `engram`")

WORDS = [
    *("<s>", "</s>", " The", "the", "THE", "Caf\u00e9", " caf\u00e9", " ", "  ", "\n"),
    *("\u0301", "a", "\u00c3", "\u00a9", " \u00e3"),
]
# Compressed ids by hand: special tokens keep their text; case, accents and outer spaces go; white space is one key; a
# lone accent leaves nothing, so it stands for itself; the bytes C3 and A9 are no text, so the vocabulary's strings do.
IDS = [0, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5, 6, 7, 8, 6]


def byte_level(text):
    """A byte-level vocabulary's spelling of a text: each byte a printable character."""
    pre = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in pre.pre_tokenize_str(text))


@pytest.fixture(scope="module")
def tokenizer():
    # "\u00c3" and "\u00a9" are the spellings of single bytes already, halves of the character \u00e9.
    spelled = [w if w in ("\u00c3", "\u00a9") or w.startswith("<") else byte_level(w) for w in WORDS]
    vocabulary = {word: i for i, word in enumerate(spelled)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def test_normaliser():
    normalize = program.normalizer().normalize_str
    pairs = [(json.loads(a), json.loads(b)) for a, b in zip(golden.G["norm_in"], golden.G["norm_out"], strict=True)]
    assert [normalize(a) for a, _ in pairs] == [b for _, b in pairs]


def test_map_of_a_small_tokenizer(tokenizer):
    token_map = build_token_map(tokenizer, 9)
    assert token_map.dtype == np.int32
    assert dict(zip(WORDS, token_map.tolist(), strict=True)) == dict(zip(WORDS, IDS, strict=True))
    check_token_map(golden.replace(vocab_size=15, compressed_vocab_size=9, image_token_id=None), token_map)


def test_wrong_size(tokenizer):
    with pytest.raises(ValueError, match="tokenizer gives 9 compressed ids; accepted: 10"):
        build_token_map(tokenizer, 10)


def test_program(tokenizer, tmp_path, capsys):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    program.main([str(tmp_path / "tokenizer.json"), str(tmp_path / "map.npy"), "9"])
    np.testing.assert_array_equal(np.load(tmp_path / "map.npy"), IDS)
    assert "15 token ids, 9 compressed ids" in capsys.readouterr().out
