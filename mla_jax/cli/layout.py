"""`mla-jax layout`: draws a cache format's byte map, and dumps and decodes one token's bytes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from mla_jax.cli import CommandError
from mla_jax.cli.table import print_table
from pallas_kernels.formats import FORMATS, Field, KVFormat

ROLES = ("nope", "rope", "scale", "pad")  # what a byte can be for; past the last area a page holds padding too
_LETTERS = {"nope": "n", "rope": "R", "scale": "S", "pad": "."}
_WIDTH = 72  # columns of a drawn record
_DUMP_BYTES = 32  # a line of the dump


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "layout",
        help="draw a cache format's byte map, dump one token",
        description="Without FORMAT: lists the formats. With one: draws a page, then packs random rows and shows one "
        "token's bytes next to what they decode to.",
    )
    parser.add_argument("format", nargs="?", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--page-size", type=int, default=64, metavar="P", help="tokens a page (default 64)")
    parser.add_argument("--token", type=int, default=0, metavar="I", help="which token of the page to dump (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random rows (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.page_size < 1:
        raise CommandError(f"--page-size is {args.page_size}; a page holds at least 1 token")
    if args.format is None:
        _list(args.page_size)
        return 0
    fmt = FORMATS.get(args.format.upper())
    if fmt is None:
        raise CommandError(f"format {args.format!r} does not exist; there are {', '.join(FORMATS)}")
    if not 0 <= args.token < args.page_size:
        raise CommandError(f"--token is {args.token}; a page of {args.page_size} has tokens 0 to {args.page_size - 1}")
    print(draw(fmt, args.page_size))
    print()
    print(dump(fmt, args.page_size, args.token, args.seed))
    return 0


def fields(fmt: KVFormat) -> Iterator[tuple[int, int, Field]]:
    """Every field of a token, in the order of its bytes: (area, byte offset inside the token's record, field)."""
    for area, record in enumerate(fmt.records):
        offset = 0
        for field in record:
            yield area, offset, field
            offset += field.num_bytes


def byte_map(fmt: KVFormat, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """What each byte of a page is for.

    Returns:
      roles int8 [page_bytes]: an index into `ROLES`; tokens int32 [page_bytes]: whose it is, -1 past the last area.
    """
    roles = np.full(fmt.page_bytes(page_size), ROLES.index("pad"), np.int8)  # [page_bytes]
    tokens = np.full(fmt.page_bytes(page_size), -1, np.int32)  # [page_bytes]
    for area, offset, field in fields(fmt):
        for token in range(page_size):
            start = token_start(fmt, page_size, area, token) + offset
            roles[start : start + field.num_bytes] = ROLES.index(field.role)
            tokens[start : start + field.num_bytes] = token
    return roles, tokens


def token_start(fmt: KVFormat, page_size: int, area: int, token: int) -> int:
    """Byte of a page at which a token's record in `area` begins."""
    return fmt.area_offset_bytes(area, page_size) + token * fmt.record_bytes[area]


def _list(page_size: int) -> None:
    columns = ("format", "d_qk", "d_v", "scales", "B/token", "page shape", "B/page")
    rows = [
        (
            fmt.name, str(fmt.d_qk), str(fmt.d_v), f"{fmt.num_scales or '-'}", str(fmt.bytes_per_token),
            f"{fmt.storage_dtype.name}{list(fmt.page_shape(page_size))}", str(fmt.page_bytes(page_size)),
        )
        for fmt in FORMATS.values()
    ]  # fmt: skip
    print_table(f"cache formats; pages of {page_size} tokens", columns, rows)


def draw(fmt: KVFormat, page_size: int) -> str:
    """The byte map of a page as text: one bar per area, to scale within a record."""
    page_bytes = fmt.page_bytes(page_size)
    lines = [
        f"{fmt.name}: {fmt.bytes_per_token} bytes a token, d_qk {fmt.d_qk}, d_v {fmt.d_v}",
        f"a page of {page_size} tokens: {fmt.storage_dtype.name}{list(fmt.page_shape(page_size))}, {page_bytes} bytes",
    ]
    for area, record in enumerate(fmt.records):
        size = fmt.record_bytes[area]
        begin, end = (fmt.area_offset_bytes(area, page_size) + n * size for n in (0, page_size))
        lines += ["", f"bytes [{begin}, {end}): {page_size} x {size}, one record a token"]
        bar, ruler = "", ""
        offset = 0
        for field in record:
            width = max(round(_WIDTH * field.num_bytes / size), len(str(offset)) + 1)
            bar += _LETTERS[field.role] * (width - 1) + "|"
            ruler += str(offset).ljust(width)
            offset += field.num_bytes
        lines += [f"  |{bar}", f"  {ruler}{offset}"]
        offset = 0
        for field in record:
            what = {
                "nope": "latent part" + (f", one scale per {fmt.scale_tile} values" if fmt.scale_tile else ""),
                "rope": "rotary part, after rotation",
                "scale": f"scale j for latent values [{fmt.scale_tile} j, {fmt.scale_tile} (j + 1))",
                "pad": "padding, never read",
            }[field.role]
            span = f"[{offset}, {offset + field.num_bytes})"
            lines.append(f"  {_LETTERS[field.role]} {span:>12}  {field.count} x {field.dtype.name}: {what}")
            offset += field.num_bytes
    used = fmt.bytes_per_token * page_size
    if used < page_bytes:
        align = fmt.page_align_bytes
        lines += ["", f"bytes [{used}, {page_bytes}): padding, so that a page is a multiple of {align} bytes"]
    return "\n".join(lines)


def dump(fmt: KVFormat, page_size: int, token: int, seed: int) -> str:
    """One token of a page packed from seeded random rows: its bytes by field, and what they decode to."""
    import jax.numpy as jnp

    import mla_jax

    rng = np.random.default_rng(seed)
    kv = rng.standard_normal((1, page_size, fmt.d_qk)).astype(fmt.compute_dtype)  # [1, page_size, d_qk]
    cache = mla_jax.pack_kv(jnp.asarray(kv), fmt)
    page = np.asarray(cache.data).reshape(-1).view(np.uint8)  # [page_bytes]
    row = np.asarray(mla_jax.unpack_kv(cache))[0, token].astype(np.float32)  # [d_qk]
    lines = [f"token {token} of a page of random rows (seed {seed}), bytes in hex"]
    for area, offset, field in fields(fmt):
        start = token_start(fmt, page_size, area, token) + offset
        raw = page[start : start + field.num_bytes]  # [num_bytes]
        span = f"[{start}, {start + field.num_bytes})"
        lines += ["", f"{field.role}: page bytes {span}, {field.count} x {field.dtype.name}"]
        for i in range(0, raw.size, _DUMP_BYTES):
            lines.append(f"  {start + i:6d}  {raw[i : i + _DUMP_BYTES].tobytes().hex(' ', -4)}")
        if field.role != "pad":
            values = np.frombuffer(raw.tobytes(), field.dtype).astype(np.float32)  # [count]
            lines.append(f"  as {field.dtype.name}: {_numbers(values)}")
    source = kv[0, token].astype(np.float32)  # [d_qk]
    lines += ["", f"decoded row: {_numbers(row)}", f"packed from: {_numbers(source)}"]
    lines.append(f"largest difference: {np.abs(row - source).max():.3g}")
    return "\n".join(lines)


def _numbers(values: np.ndarray, count: int = 8) -> str:
    more = f" ... ({values.size} values)" if values.size > count else ""
    return " ".join(f"{v:.5g}" for v in values[:count]) + more
