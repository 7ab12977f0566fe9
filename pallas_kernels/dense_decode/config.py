"""Configurations of the dense decode kernels, and the choice of one."""

from __future__ import annotations

import dataclasses
import math

from pallas_kernels import mgpu
from pallas_kernels.schedule import BLOCK_TOKENS

# TMA writes whole 8-row tiles of shared memory; pages that share fewer rows with a block are copied row by row.
TMA_MIN_ROWS = 8


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """How the SM90 kernel runs. Static and hashable; results differ by rounding only.

    Attributes:
      consumer_registers: registers a thread of the two warpgroups that multiply.
      producer_registers: registers a thread of the warpgroup that loads.
      rescale_above: how far, in powers of two, scores may grow beyond the maximum that they are scaled by before the
        accumulator is scaled anew.
      combine_rows: query rows that one CTA of the combine kernel merges; None lets it choose.
    """

    consumer_registers: int = 240
    producer_registers: int = 24
    rescale_above: float = 8.0
    combine_rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("consumer_registers", "producer_registers"):
            value = getattr(self, name)
            if not 24 <= value <= 256 or value % 8:
                raise ValueError(f"{name} must be a multiple of 8 from 24 to 256, got {value}")
        total = 2 * self.consumer_registers + self.producer_registers
        if total > mgpu.MAX_REGISTERS:
            raise ValueError(
                f"two consumers of {self.consumer_registers} registers and a producer of {self.producer_registers} ask "
                f"for {total}; more than {mgpu.MAX_REGISTERS} would hang the GPU"
            )
        mgpu.check_rescale_above(self.rescale_above)
        _check_combine_rows(self.combine_rows)


@dataclasses.dataclass(frozen=True)
class DenseSm100Config:
    """How the SM100 kernel runs. Static and hashable; results differ by rounding only. See docs/sm100.md.

    Attributes:
      tile_rows: query rows of a tile: 64, one CTA a tile, or 128, two CTAs a tile with half of the output columns each.
      rescale_above: how far, in powers of two, scores may grow beyond the maximum that they are scaled by before the
        accumulator is scaled anew.
      combine_rows: query rows that one CTA of the combine kernel merges; None lets it choose.
    """

    tile_rows: int
    rescale_above: float = 8.0
    combine_rows: int | None = None

    def __post_init__(self) -> None:
        if self.tile_rows not in (64, 128):
            raise ValueError(f"tile_rows must be 64 or 128, got {self.tile_rows}")
        mgpu.check_rescale_above(self.rescale_above)
        _check_combine_rows(self.combine_rows)


def _check_combine_rows(rows: int | None) -> None:
    if rows is not None and rows not in (1, 2, 4, 8):
        raise ValueError(f"combine_rows must be 1, 2, 4, 8 or None, got {rows}")


def chunk_rows(page_size: int, contiguous: bool) -> int:
    """How many consecutive tokens, aligned to themselves, always lie in one page: what one TMA copy can fetch.

    `contiguous`: there is no block table, a request's tokens are one page of `page_size` rows; TMA clips at its end.
    """
    if contiguous and page_size % TMA_MIN_ROWS == 0:
        return BLOCK_TOKENS
    return math.gcd(page_size, BLOCK_TOKENS)


def choose_config(page_size: int, contiguous: bool) -> DenseConfig:
    """The configuration for a call's static shapes."""
    # Small pages need registers for addresses. With these figures no loop spills (`mla-jax aot`).
    if chunk_rows(page_size, contiguous) < TMA_MIN_ROWS:
        return DenseConfig(consumer_registers=224, producer_registers=56)
    if chunk_rows(page_size, contiguous) < BLOCK_TOKENS:
        return DenseConfig(consumer_registers=232, producer_registers=40)
    return DenseConfig()


def choose_sm100_config(rows: int) -> DenseSm100Config:
    """The configuration for a call's query rows (s_q * heads).

    A tile of 128 rows costs two CTAs about 0.8 of what two tiles of 64 rows cost them (docs/sm100.md): worth it where
    it does not fill up with absent rows. A call thus has as many CTAs a part as `schedule.dense_parts` counts on.
    """
    return DenseSm100Config(tile_rows=128 if -(-rows // 64) % 2 == 0 else 64)
