"""The token map: many token ids to one compressed id, so that " The", "the" and "THE" hash alike. Built offline, once.

    python -m mla_jax.nn.engram.token_map tokenizer.json token_map.npy 99092

An id's key is its text, normalised: NFKC, NFD, accents dropped, lower case, white space collapsed and stripped (a text
of nothing but white space is one space). Where that leaves nothing the text itself is the key, and where the id's bytes
are no text by themselves (U+FFFD), the vocabulary's own string is. Keys are numbered as they first appear.

The normaliser must be the one of the `tokenizers` package (extra `engram`), with which these models were trained: its
Unicode tables are not Python's. A map that differs by one id has other multipliers and so hashes everything
elsewhere, without an error; hence the expected size.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer

_SPACE = "\ue000"  # stands for a lone space while the others are stripped
_UNDECODABLE = "\ufffd"


def normalizer() -> Normalizer:
    """The normaliser of keys. Raises ImportError without the extra `engram`."""
    tokenizers = _tokenizers()
    n = tokenizers.normalizers
    return n.Sequence(
        [
            *(n.NFKC(), n.NFD(), n.StripAccents(), n.Lowercase()),
            n.Replace(tokenizers.Regex(r"[ \t\r\n]+"), " "),
            n.Replace(tokenizers.Regex(r"^ $"), _SPACE),
            n.Strip(),
            n.Replace(_SPACE, " "),
        ]
    )


def build_token_map(tokenizer: Tokenizer | str | os.PathLike[str], expected_size: int | None = None) -> np.ndarray:
    """Compressed id of every token id.

    Args:
      tokenizer: a `tokenizers.Tokenizer`, or the path of its tokenizer.json.
      expected_size: number of compressed ids, `EngramConfig.compressed_vocab_size`. None: whatever comes out.

    Returns:
      int32 `[vocab]`, added tokens included.

    Raises:
      ValueError: another number of compressed ids than expected: another tokenizer, or another version of
        `tokenizers`, than the model's.
      ImportError: the extra `engram` is missing.
    """
    loaded: Tokenizer
    if isinstance(tokenizer, (str, os.PathLike)):
        loaded = _tokenizers().Tokenizer.from_file(os.fspath(tokenizer))
    else:
        loaded = tokenizer
    normalize = normalizer().normalize_str
    compressed: dict[str, int] = {}
    token_map = np.empty(loaded.get_vocab_size(with_added_tokens=True), np.int32)  # [vocab]
    for token in range(len(token_map)):
        text = loaded.decode([token], skip_special_tokens=False)
        if _UNDECODABLE in text:
            key = loaded.id_to_token(token) or text
        else:
            key = normalize(text) or text
        token_map[token] = compressed.setdefault(key, len(compressed))
    if expected_size is not None and len(compressed) != expected_size:
        raise ValueError(
            f"tokenizer gives {len(compressed)} compressed ids; accepted: {expected_size}, or the rows looked up are "
            f"not those the model was trained with (tokenizers {_tokenizers().__version__})"
        )
    return token_map


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("token maps need the extra `engram`: pip install 'mla-jax[engram]'") from error
    return tokenizers


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the token map of a tokenizer as an int32 .npy file.")
    parser.add_argument("tokenizer", help="tokenizer.json")
    parser.add_argument("output", help="file to write, .npy")
    parser.add_argument("expected_size", type=int, help="number of compressed ids, engram_compressed_vocab_size")
    args = parser.parse_args(argv)
    token_map = build_token_map(args.tokenizer, args.expected_size)
    np.save(args.output, token_map)
    print(f"{args.output}: {len(token_map)} token ids, {args.expected_size} compressed ids")


if __name__ == "__main__":
    main()
