"""What can be chosen about the sparse kernels, and what a cache row looks like to them."""

from __future__ import annotations

import dataclasses

from pallas_kernels import formats, mgpu
from pallas_kernels.formats import KVFormat

TILE_HEADS = 64  # query heads of one CTA: the rows of a wgmma
FEW_HEADS = 16  # as many at most are columns, not rows, of the products (sm90_few.py): 32 were 4 % slower so
PAIR_HEADS = 128  # query heads of two CTAs (sm100_pair.py)
BLOCK_TOKENS = 64  # keys of one stage
STAGES = 2  # dequantised blocks in shared memory
CHUNK_BYTES = 16  # what one lane copies, reads and writes at a time
COLUMN_TILE = 64  # bf16 columns of a 128-byte swizzled tile
GROUP_ROWS = 8  # rows of a swizzled tile; a warp copies and dequantises such a group by itself
COLUMN_TILE_BYTES = GROUP_ROWS * COLUMN_TILE * 2  # one swizzled tile

# 65536 registers over 4 warpgroups of 128 threads. ptxas gives each thread 128 before the warpgroups redistribute them.
MAX_REGISTERS = 512


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """Choices about the SM90 kernel that change speed, and results by rounding only.

    Attributes:
      softmax_registers, value_registers, gather_registers, copy_registers: registers a thread of the four warpgroups.
      share_copies: whether the CTAs of two neighbouring tiles of heads are a cluster, which copies each row once for
        both. Only where the number of tiles is even.
      few_heads: whether up to `FEW_HEADS` heads have the kernel whose products are no larger than they need
        (sm90_few.py, which has registers of its own).
      rescale_above: by how much a row's maximum score, as a base-2 logarithm, may grow before O is rescaled, which
        most blocks then skip; None: O is rescaled for every block, without a branch. Not of the kernel for few heads.
    """

    softmax_registers: int = 208
    value_registers: int = 176
    gather_registers: int = 88
    copy_registers: int = 40
    share_copies: bool = True
    few_heads: bool = True
    rescale_above: float | None = None

    def __post_init__(self) -> None:
        registers = (self.softmax_registers, self.value_registers, self.gather_registers, self.copy_registers)
        if any(r % 8 or not 24 <= r <= 240 for r in registers) or sum(registers) > MAX_REGISTERS:
            raise ValueError(
                f"registers of the four warpgroups must be multiples of 8 in [24, 240] whose sum is at most "
                f"{MAX_REGISTERS} (more hangs at setmaxnreg), got {registers}"
            )
        if self.rescale_above is not None:
            mgpu.check_rescale_above(self.rescale_above)


def heuristic(fmt: KVFormat, num_heads: int, extra_fmt: KVFormat | None = None) -> SparseConfig:
    """For these formats of the main and the extra cache: registers with which ptxas spills in no loop.

    On an H200, `rescale_above` 8 made MODEL1 1 to 3 % faster, and V32 1 % slower (docs/log.md).
    """
    del num_heads
    if fmt.d_qk == fmt.d_v:
        return SparseConfig(rescale_above=8.0)
    if fmt.is_quantized and extra_fmt is not None and not extra_fmt.is_quantized:
        return SparseConfig(softmax_registers=200, gather_registers=96)
    return SparseConfig()


@dataclasses.dataclass(frozen=True)
class SparseConfigSm100:
    """The same for the SM100 kernels.

    Attributes:
      rescale_above: by how much a row's maximum score, as a base-2 logarithm, may grow before O is rescaled.
        Probabilities are then at most 2 to that power, which changes nothing but the last bits of float32 sums.
      tile_heads: query heads of one CTA, 64, or of two, 128 (sm100_pair.py).
    """

    rescale_above: float = 8.0
    tile_heads: int = TILE_HEADS

    def __post_init__(self) -> None:
        if self.tile_heads not in (TILE_HEADS, PAIR_HEADS):
            raise ValueError(f"tile_heads must be {TILE_HEADS} or {PAIR_HEADS}, got {self.tile_heads}")
        mgpu.check_rescale_above(self.rescale_above)


def sm100_heuristic(fmt: KVFormat, num_heads: int, extra_fmt: KVFormat | None = None) -> SparseConfigSm100:
    """Tiles of 128 heads where they are as many CTAs as tiles of 64, for which plans are made."""
    del fmt
    return SparseConfigSm100(tile_heads=TILE_HEADS if -(-num_heads // TILE_HEADS) % 2 else PAIR_HEADS)


@dataclasses.dataclass(frozen=True)
class Scope:
    """One cache and its index array, as the kernel sees them. Everything is static.

    Attributes:
      fmt: byte map of a token.
      page_size: tokens a page.
      num_slots: tokens the cache holds; a slot outside `[0, num_slots)` is no key.
      topk: columns of the index array.
    """

    fmt: KVFormat
    page_size: int
    num_slots: int
    topk: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's first record: all of it, but for MODEL1's scales."""
        return self.fmt.record_bytes[0]

    @property
    def page_bytes(self) -> int:
        if not self.fmt.is_quantized:
            return self.page_size * self.row_bytes
        return self.fmt.page_bytes(self.page_size)

    @property
    def is_row_major(self) -> bool:
        """Whether slot s lies at s * row_bytes, pages or not."""
        return self.page_bytes == self.page_size * self.row_bytes

    @property
    def row_chunks(self) -> int:
        return self.row_bytes // CHUNK_BYTES

    @property
    def staged_row_bytes(self) -> int:
        """Distance of raw rows in shared memory: an odd number of chunks, so that the same chunk of 8 consecutive rows
        lies in 8 different bank groups."""
        return (self.row_chunks | 1) * CHUNK_BYTES

    @property
    def staged_offset_bytes(self) -> int:
        """Where they begin in the memory of the 8 rows' bf16 values: they end where it does."""
        return GROUP_ROWS * (self.fmt.d_qk * 2 - self.staged_row_bytes)

    @property
    def has_scales_apart(self) -> bool:
        """Whether a token's scales are a record of their own. Staged, they lie behind its row, in its padding."""
        return self.scale_record != 0

    @property
    def rope_offset_bytes(self) -> int:
        return self.fmt.locate("rope")[1]

    @property
    def scale_record(self) -> int:
        return self.fmt.locate("scale")[0]

    @property
    def scale_offset_bytes(self) -> int:
        return self.fmt.locate("scale")[1]

    @property
    def scale_record_bytes(self) -> int:
        return self.fmt.record_bytes[self.scale_record]

    @property
    def scale_area_bytes(self) -> int:
        """Where the records that hold the scales begin inside a page."""
        return self.fmt.area_offset_bytes(self.scale_record, self.page_size)


def unsupported(fmt: KVFormat) -> str | None:
    """Why the kernel cannot read a cache of this format; None if it can."""
    if fmt.compute_dtype != formats.BF16:
        return f"{fmt.name}: the kernel multiplies in bfloat16"
    if fmt.d_nope % COLUMN_TILE or fmt.d_rope != COLUMN_TILE or fmt.d_v % (2 * COLUMN_TILE):
        return f"{fmt.name}: the kernel needs multiples of {COLUMN_TILE} latent columns and {COLUMN_TILE} rotary ones"
    if not fmt.is_quantized:
        return None
    scope = Scope(fmt, 1, 1, 1)
    nope, scale = fmt.locate("nope"), fmt.locate("scale")
    in_row = scale[0] == 0 and fmt.num_scales * 4 == CHUNK_BYTES and scale[2].dtype == formats.F32
    apart = scale[0] == 1 and scope.scale_record_bytes == 8 and scale[2].dtype == formats.E8M0
    if nope[2].dtype != formats.E4M3 or nope[:2] != (0, 0) or fmt.locate("rope")[0] != 0 or not (in_row or apart):
        return f"{fmt.name}: the kernel reads e4m3 with four float32 scales, or with e8m0 scales in a record of 8 bytes"
    if fmt.scale_tile % COLUMN_TILE:
        return f"{fmt.name}: the kernel needs scale tiles in multiples of {COLUMN_TILE}"
    group_bytes = GROUP_ROWS * fmt.d_qk * 2
    if scope.row_bytes % CHUNK_BYTES or GROUP_ROWS * scope.staged_row_bytes > group_bytes:
        return f"{fmt.name}: {GROUP_ROWS} raw rows do not fit where their dequantised values go"
    return None
