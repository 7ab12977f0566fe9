"""Block tables: the traced side, and a host-side allocator with errors that come before anything changes.

Inside jit a length is data and cannot raise. A token that has no place (its position lies past the table, or its page
is not there) is therefore not written, and the module's output for it is NaN rather than a plausible wrong one. To get
an error instead, plan the step on the host: `PagePool.grow` raises while caches and tables are still untouched.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def layer_table(block_table: jax.Array, layer: int | jax.Array, pages_per_layer: int) -> jax.Array:
    """A block table int32 `[b, columns]` moved to one layer's pages of a pool that all layers share; -1 for no page."""
    exists = (block_table >= 0) & (block_table < pages_per_layer)
    offset = jnp.asarray(layer, jnp.int32) * pages_per_layer
    return jnp.where(exists, jnp.where(exists, block_table, 0) + offset, -1)


def is_concrete(*arrays: object) -> bool:
    """Whether values can be looked at: no argument is traced."""
    return not any(isinstance(x, jax.core.Tracer) for x in arrays)


class PagePool:
    """Hands a pool's pages to requests and keeps their block table. Lives on the host; numpy only.

    Attributes:
      table: int32 `[batch, columns]`, -1 where a request has no page. Copy it to the device for every step.
      tokens: int32 `[batch]`, tokens that each request holds.
    """

    def __init__(self, num_pages: int, page_size: int, *, batch: int, columns: int, ring: bool = False):
        """An empty pool.

        Args:
          num_pages: pages in the pool (of one layer).
          page_size: tokens a page.
          batch: requests at a time.
          columns: width of the table: a request holds at most `columns * page_size` tokens.
          ring: the table is a sliding window: a request holds any number of tokens, its columns are used in turn.
        """
        for name, value in dict(num_pages=num_pages, page_size=page_size, batch=batch, columns=columns).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"PagePool: {name}={value!r}; accepted: an int of at least 1")
        self.page_size, self.ring = page_size, ring
        self.table = np.full((batch, columns), -1, np.int32)
        self.tokens = np.zeros(batch, np.int32)
        self._free = list(range(num_pages - 1, -1, -1))  # the last one goes next

    @property
    def num_free(self) -> int:
        """Pages that no request holds."""
        return len(self._free)

    def grow(self, new_tokens: np.ndarray) -> np.ndarray:
        """Makes room for `new_tokens` int `[batch]` more tokens of each request; returns `tokens` after that.

        Raises:
          ValueError: a request would outgrow the table, or the pool has too few pages; then nothing has changed.
        """
        new_tokens = np.asarray(new_tokens)
        if new_tokens.shape != self.tokens.shape or (new_tokens < 0).any():
            raise ValueError(f"new_tokens={new_tokens!r}; accepted: {self.tokens.shape} integers of at least 0")
        after = self.tokens + new_tokens  # [batch]
        columns = self.table.shape[1]
        most = columns * self.page_size
        if not self.ring and (after > most).any():
            row = int(np.argmax(after > most))
            raise ValueError(
                f"request {row} would hold {after[row]} tokens; accepted: {most}, its table has {columns} columns of "
                f"{self.page_size} tokens"
            )
        held = (self.table >= 0).sum(1)  # [batch]
        wanted = np.minimum(-(-after // self.page_size), columns)  # [batch]
        short = int(np.maximum(wanted - held, 0).sum()) - len(self._free)
        if short > 0:
            raise ValueError(f"the pool is full: {short} more free pages are needed, {len(self._free)} are left")
        for row in np.flatnonzero(wanted > held).tolist():
            for column in range(held[row], wanted[row]):
                self.table[row, column] = self._free.pop()
        self.tokens = after.astype(np.int32)
        return self.tokens

    def shrink(self, row: int, tokens: int) -> None:
        """Takes tokens of a request back (rejected drafts); its pages stay with it."""
        if not 0 <= tokens <= self.tokens[row]:
            raise ValueError(f"tokens={tokens}; accepted: 0 to {self.tokens[row]}, what request {row} holds")
        self.tokens[row] -= tokens

    def leave(self, row: int) -> None:
        """Ends a request: its pages are free again, its row of the table is empty."""
        self._free += [int(page) for page in self.table[row] if page >= 0]
        self.table[row] = -1
        self.tokens[row] = 0
