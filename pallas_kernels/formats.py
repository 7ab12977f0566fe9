"""KV-cache formats: the byte map of a page, as data.

Everything that touches cache bytes (quantiser, reference, kernels, notebooks, the README's table) derives its
numbers from a `KVFormat`; none of them is written down anywhere else. A page of P tokens holds one *area* per
record of the format, one after the other, then padding:

    [record 0 of token 0] ... [record 0 of token P-1] [record 1 of token 0] ... [padding]

A token-major format has a single record, so its page is `[P, record bytes]`. MODEL1 has two records: values first,
then scales. All integers are little-endian. An `e8m0` byte b stands for 2^(b - 127), 255 for NaN.

To add a format, add one entry at the end of this file and list it in `FORMATS`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)  # OCP e4m3: largest finite value 448, no infinity
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
U8 = np.dtype(np.uint8)

Role = Literal["nope", "rope", "scale", "pad"]


@dataclasses.dataclass(frozen=True)
class Field:
    """A run of equal values inside a token's record.

    `nope` holds the latent part, `rope` the rotated part, `scale` one factor per `KVFormat.scale_tile` values of
    `nope`; `pad` bytes are written as 0 and never read.
    """

    role: Role
    dtype: np.dtype
    count: int

    @property
    def num_bytes(self) -> int:
        bits = 8 * self.dtype.itemsize if self.dtype.kind in "iu" else ml_dtypes.finfo(self.dtype).bits
        return self.count * bits // 8


@dataclasses.dataclass(frozen=True)
class KVFormat:
    """How one token's key/value row lies in a page. Instances are compared by value, hashable, and static under jit.

    Attributes:
      name: the format's public name, unique among `FORMATS`.
      d_qk: width of a key row: latent and rotary part together.
      d_v: width of a value row: the first `d_v` entries of the key row.
      records: one tuple of fields per area of a page (see the module's docstring).
      scale_tile: how many `nope` values share one scale; 0 for formats without scales.
      page_align_bytes: a page's size is rounded up to a multiple of this.
    """

    name: str
    d_qk: int
    d_v: int
    records: tuple[tuple[Field, ...], ...]
    scale_tile: int = 0
    page_align_bytes: int = 1

    def __post_init__(self) -> None:
        if self.d_nope + self.d_rope != self.d_qk:
            raise ValueError(
                f"format {self.name}: nope ({self.d_nope}) and rope ({self.d_rope}) do not add up to d_qk={self.d_qk}"
            )
        if not 0 < self.d_v <= self.d_qk:
            raise ValueError(f"format {self.name}: d_v={self.d_v} is not within (0, d_qk={self.d_qk}]")
        scales = sum(f.count for f in self._fields("scale"))
        if scales * self.scale_tile != (self.d_nope if self.scale_tile else 0):
            raise ValueError(
                f"format {self.name}: {scales} scales of tile {self.scale_tile} do not cover {self.d_nope} nope values"
            )
        for index, num_bytes in enumerate(self.record_bytes):
            before = sum(self.record_bytes[:index])
            if before % num_bytes or (len(self.records) > 1 and self.page_align_bytes % num_bytes):
                raise ValueError(f"format {self.name}: record {index} is not aligned to its own {num_bytes} bytes")

    def __repr__(self) -> str:
        return f"<KVFormat {self.name}: d_qk {self.d_qk}, d_v {self.d_v}, {self.bytes_per_token} B/token>"

    def _fields(self, role: Role) -> list[Field]:
        return [f for record in self.records for f in record if f.role == role]

    # -- one token -----------------------------------------------------------------------------------------------

    @functools.cached_property
    def record_bytes(self) -> tuple[int, ...]:
        """Bytes of a token's record in each area."""
        return tuple(sum(f.num_bytes for f in record) for record in self.records)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all areas, page padding not counted."""
        return sum(self.record_bytes)

    @property
    def d_nope(self) -> int:
        """Width of the part of a row that RoPE leaves alone."""
        return sum(f.count for f in self._fields("nope"))

    @property
    def d_rope(self) -> int:
        """Width of the rotated part at the end of a row."""
        return sum(f.count for f in self._fields("rope"))

    @property
    def num_scales(self) -> int:
        """Scales of one token; 0 for formats that store values as they are."""
        return sum(f.count for f in self._fields("scale"))

    @property
    def largest_value(self) -> float:
        """The largest finite value of the latent part's type."""
        return float(ml_dtypes.finfo(self.locate("nope")[2].dtype).max)

    @property
    def is_quantized(self) -> bool:
        return self.num_scales > 0

    @property
    def compute_dtype(self) -> np.dtype:
        """dtype of a row once it is unpacked, and of q and out: float32 for the F32 formats, else bfloat16."""
        return F32 if not self.is_quantized and self._fields("nope")[0].dtype == F32 else BF16

    @property
    def storage_dtype(self) -> np.dtype:
        """dtype of the cache array: uint8 for quantised formats, else the values' own."""
        return U8 if self.is_quantized else self.compute_dtype

    def locate(self, role: Role) -> tuple[int, int, Field]:
        """(record index, byte offset inside that record, field) of a role that the format holds once."""
        for index, record in enumerate(self.records):
            offset = 0
            for field in record:
                if field.role == role:
                    return index, offset, field
                offset += field.num_bytes
        raise KeyError(f"format {self.name} has no {role} field")

    # -- one page ------------------------------------------------------------------------------------------------

    def page_bytes(self, page_size: int) -> int:
        """Bytes of a page of `page_size` tokens, its padding included."""
        align = self.page_align_bytes
        return -(-self.bytes_per_token * page_size // align) * align

    def area_offset_bytes(self, record: int, page_size: int) -> int:
        """Byte at which the area of `record` begins inside a page."""
        return sum(self.record_bytes[:record]) * page_size

    def area_first_row(self, record: int, page_size: int) -> int:
        """The same as a row number of the page seen as `[page_bytes / record_bytes, record_bytes]`."""
        return self.area_offset_bytes(record, page_size) // self.record_bytes[record]

    def unit_bytes(self, page_size: int) -> int:
        """The longest run of bytes that every record, every area's offset and the page are whole numbers of."""
        return math.gcd(*self.record_bytes, self.page_bytes(page_size))

    def page_shape(self, page_size: int) -> tuple[int, ...]:
        """Shape of one page in the cache array, whose leading axis is the page."""
        if not self.is_quantized:
            return (page_size, self.d_qk)
        if len(self.records) == 1 and self.page_align_bytes == 1:
            return (page_size, self.bytes_per_token)
        return (self.page_bytes(page_size),)


def _plain(name: str, dtype: np.dtype, d_nope: int, d_rope: int, d_v: int) -> KVFormat:
    return KVFormat(name, d_nope + d_rope, d_v, ((Field("nope", dtype, d_nope), Field("rope", dtype, d_rope)),))


# DeepSeek-V3 family: 512 latent values, which are also V, then 64 rotary ones.
BF16_576 = _plain("BF16_576", BF16, 512, 64, 512)
F32_576 = _plain("F32_576", F32, 512, 64, 512)
# DeepSeek-V4 family: K and V are the same row of 512, rotary part included.
BF16_512 = _plain("BF16_512", BF16, 448, 64, 512)
F32_512 = _plain("F32_512", F32, 448, 64, 512)

# DeepSeek-V3.2 ("V32" in FlashMLA): one float32 scale per 128 latent values; RoPE part kept in bf16.
V32 = KVFormat(
    name="V32",
    d_qk=576,
    d_v=512,
    records=((Field("nope", E4M3, 512), Field("scale", F32, 4), Field("rope", BF16, 64)),),
    scale_tile=128,
)

# DeepSeek-V4 ("MODEL1" in FlashMLA): values and scales in two areas of a page. 448 e4m3 + 64 bf16 make 576 bytes; with
# the page rounded up to a multiple of that, every token is a row of one [rows, 576] view: one TMA gather descriptor.
MODEL1 = KVFormat(
    name="MODEL1",
    d_qk=512,
    d_v=512,
    records=(
        (Field("nope", E4M3, 448), Field("rope", BF16, 64)),
        (Field("scale", E8M0, 7), Field("pad", U8, 1)),
    ),
    scale_tile=64,
    page_align_bytes=576,
)

# Keys of the lightning indexer (DeepSeek-V3.2 and V4): all values of a page, then one float32 scale a token. A page of
# a multiple of 32 tokens has no padding. Rows of a score, never attended to, so not among `FORMATS`.
INDEX_FP8 = KVFormat(
    name="INDEX_FP8",
    d_qk=128,
    d_v=128,
    records=((Field("nope", E4M3, 128),), (Field("scale", F32, 1),)),
    scale_tile=128,
    page_align_bytes=128,
)
INDEX_F32 = _plain("INDEX_F32", F32, 128, 0, 128)

FORMATS: dict[str, KVFormat] = {
    fmt.name: fmt for fmt in (BF16_576, BF16_512, F32_576, F32_512, V32, MODEL1)
}
