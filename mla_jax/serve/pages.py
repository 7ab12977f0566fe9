"""Who has which page: the block tables of a batch, on the host. The pool may be spread over a mesh."""

from __future__ import annotations

import numpy as np

from mla_jax.sharding import DecodeSharding


class PoolExhausted(Exception):
    """The part of the pool that a row needs a page of has none left. Nothing has changed."""

    def __init__(self, group: int, rank: int):
        super().__init__(f"data group {group}, context rank {rank} has no free page")
        self.group = group


class BlockAllocator:
    """Pages of one layer's share of a pool, and the block table of every row of the batch.

    All layers live in one pool: layer l's page is the table's page plus l * `layer_stride`. Each part of the pool
    (`mla_jax.sharding.layout`) holds `layer_stride` pages of every layer, those of layer 0 first, so that the sum stays
    in the part that it started in.

    Attributes:
      table: int32 [b, max_pages], global page ids of layer 0; -1 where a row has no page.
      tokens: int32 [b], tokens that each row has room for in use.
    """

    def __init__(self, ds: DecodeSharding, *, num_pages: int, num_layers: int, page_size: int, b: int, max_pages: int):
        each = num_pages // ds.num_parts
        if num_pages % ds.num_parts or each % num_layers:
            raise ValueError(
                f"num_pages={num_pages}; accepted: a multiple of {ds.num_parts * num_layers}, the pool's parts times "
                "the layers"
            )
        self._ds, self.page_size, self.layer_stride = ds, page_size, each // num_layers
        self.table = np.full((b, max_pages), -1, np.int32)
        self.tokens = np.zeros(b, np.int32)
        self._free = {
            (group, rank): list(ds.pages_of(group, rank, num_pages)[: self.layer_stride])[::-1]
            for group in range(ds.num_data)
            for rank in range(ds.num_context)
        }
        self._all = {page: part for part, pages in self._free.items() for page in pages}

    @property
    def capacity_tokens(self) -> int:
        """Tokens that a row alone can hold: its table's, or fewer where a group's pages are."""
        return min(self.table.shape[1], self.layer_stride * self._ds.num_context) * self.page_size

    @property
    def num_free(self) -> int:
        """Free pages of one layer."""
        return sum(map(len, self._free.values()))

    def free_in(self, group: int) -> int:
        """Free pages of one layer of one data group."""
        return sum(len(pages) for (g, _), pages in self._free.items() if g == group)

    def grow(self, row: int) -> None:
        """Room for one more token of `row`.

        Raises:
          PoolExhausted: it needs a page and there is none; nothing has changed.
          ValueError: its table is full.
        """
        column, offset = divmod(int(self.tokens[row]), self.page_size)
        if column >= self.table.shape[1]:
            raise ValueError(f"row {row} holds {self.tokens[row]} tokens, all that its table has room for")
        if offset == 0:
            part = self._ds.group_of(row, len(self.tokens)), column % self._ds.num_context
            if not self._free[part]:
                raise PoolExhausted(*part)
            self.table[row, column] = self._free[part].pop()
        self.tokens[row] += 1

    def leave(self, row: int) -> None:
        """Frees the row's pages."""
        for page in self.table[row][self.table[row] >= 0].tolist():
            self._free[self._all[page]].append(page)
        self.table[row], self.tokens[row] = -1, 0

    def check(self) -> None:
        """Raises AssertionError if a page is lost, is held twice, or lies in a part that its row must not use."""
        held = self.table[self.table >= 0].tolist()
        free = [page for pages in self._free.values() for page in pages]
        assert sorted(held + free) == sorted(self._all), "a page is lost or held twice"
        for row, column in zip(*np.nonzero(self.table >= 0), strict=True):
            part = self._ds.group_of(row, len(self.tokens)), column % self._ds.num_context
            assert self._all[int(self.table[row, column])] == part, f"row {row}, column {column}: page of another part"
        need = -(-self.tokens // self.page_size)
        assert ((self.table >= 0).sum(1) == need).all(), "a row has more or fewer pages than its tokens need"
