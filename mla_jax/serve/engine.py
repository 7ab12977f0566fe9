"""Continuous batching on the host: requests join and leave between steps, pages follow, shapes never change.

A request's prompt goes through the decode step token by token, as its output does later, so one compiled step does
everything. When a pool runs dry, the request of that data group that joined last gives its pages back and waits; when
it joins again its tokens are fed again. A draw depends on request and position alone, so it ends up where it was.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from mla_jax.serve import model
from mla_jax.serve.model import ModelConfig
from mla_jax.serve.pages import BlockAllocator, PoolExhausted
from mla_jax.sharding import DecodeSharding


@dataclasses.dataclass
class Request:
    """One user's text.

    Attributes:
      id: what the engine calls it.
      tokens: the prompt, then what was sampled.
      max_tokens: length at which it ends, prompt included.
    """

    id: int
    tokens: list[int]
    max_tokens: int


class Engine:
    """A batch of rows, a queue, and the state on the devices.

    Attributes:
      rows: the request in each row of the batch, or None.
      waiting: requests without a row, next first.
      finished: those that reached their length, by id.
      pages: the allocator, with the block table.
      num_preempted: times that a request had to give its pages back.
    """

    def __init__(
        self,
        config: ModelConfig,
        ds: DecodeSharding,
        params: model.Params,
        *,
        batch: int,
        num_pages: int,
        system_prompt: Sequence[int] = (),
        temperature: float = 1.0,
        on_logits: Callable[[Request, int, np.ndarray], None] | None = None,
    ):
        """An idle engine whose system prompt is in place.

        Args:
          config, ds, params: the model, and where it runs.
          batch: rows; must divide into the data groups.
          num_pages: pages of the requests' pool, all layers together.
          system_prompt: tokens that come before every request's own, cached once.
          temperature: of sampling; 0 is greedy.
          on_logits: called with (request, position, logits float32 [vocab]) for every token that was fed.

        Raises:
          ValueError: sizes that do not divide, or a system prompt that is too long.
        """
        if len(system_prompt) > config.prompt_pages * config.page_size:
            raise ValueError(
                f"system_prompt has {len(system_prompt)} tokens; accepted: up to "
                f"{config.prompt_pages * config.page_size}, config.prompt_pages pages"
            )
        if any(kind != AxisType.Auto for kind in ds.mesh.axis_types):
            raise ValueError(
                f"the mesh has axes of types {ds.mesh.axis_types}; accepted: Auto, since the model leaves its "
                "projections to XLA: jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * n)"
            )
        self.config, self._ds, self._params = config, ds, params
        self.pages = BlockAllocator(
            ds, num_pages=num_pages, num_layers=config.num_layers, page_size=config.page_size, b=batch,
            max_pages=config.max_pages,
        )  # fmt: skip
        self.rows: list[Request | None] = [None] * batch
        self.waiting: collections.deque[Request] = collections.deque()
        self.finished: dict[int, Request] = {}
        self.num_preempted = 0
        self._joined: list[int] = []  # rows, in the order in which they were taken
        self._temperature, self._on_logits, self._next_id = jnp.float32(temperature), on_logits, 0
        self._caches = model.init_caches(config, ds, num_pages)
        self._prompt_length = jnp.int32(0)
        ds.group_of(0, batch)  # batch must divide
        for token in system_prompt:
            self._feed(np.full(batch, token, np.int32), np.zeros(batch, np.int32), into_prompt=True)
            self._prompt_length = self._prompt_length + jnp.int32(1)

    def submit(self, tokens: Sequence[int], max_tokens: int, *, id: int | None = None) -> int:
        """Queues a request and returns its id, by default the next number.

        Raises:
          ValueError: an empty prompt, or more tokens than it could hold with the pool to itself.
        """
        if not 0 < len(tokens) < max_tokens <= self.pages.capacity_tokens:
            raise ValueError(
                f"a request of {len(tokens)} tokens, max_tokens={max_tokens}; accepted: 1 or more tokens, and up to "
                f"{self.pages.capacity_tokens} with what is to come"
            )
        id = self._next_id if id is None else id
        self._next_id = max(self._next_id, id) + 1
        self.waiting.append(Request(id, list(tokens), max_tokens))
        return id

    def cancel(self, id: int) -> bool:
        """Drops a request, running or waiting; whether there was one."""
        for row, request in enumerate(self.rows):
            if request is not None and request.id == id:
                self._leave(row)
                return True
        before = len(self.waiting)
        self.waiting = collections.deque(r for r in self.waiting if r.id != id)
        return len(self.waiting) < before

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not any(self.rows)

    def step(self) -> int:
        """Feeds one token of every running request; returns how many that were."""
        self._join()
        self._grow()
        running = [(row, request) for row, request in enumerate(self.rows) if request is not None]
        tokens, lengths = np.zeros(len(self.rows), np.int32), np.full(len(self.rows), -1, np.int32)
        ids = np.zeros(len(self.rows), np.int32)
        for row, request in running:
            lengths[row] = self.pages.tokens[row] - 1  # `_grow` has counted the token that is fed now
            tokens[row], ids[row] = request.tokens[lengths[row]], request.id
        logits = self._feed(tokens, lengths)
        sampled = np.asarray(model.sample(logits, jnp.asarray(ids), jnp.asarray(lengths), self._temperature))
        host_logits = np.asarray(logits) if self._on_logits is not None else None
        for row, request in running:
            position = int(lengths[row])
            if host_logits is not None and self._on_logits is not None:
                self._on_logits(request, position, host_logits[row])
            if position + 1 == len(request.tokens):
                request.tokens.append(int(sampled[row]))
            if len(request.tokens) >= request.max_tokens:
                self.finished[request.id] = request
                self._leave(row)
        return len(running)

    def run(self, max_steps: int = 1_000_000) -> int:
        """Steps until nothing is left to do; returns how many steps."""
        for number in range(max_steps):
            if self.is_idle:
                return number
            self.step()
        return max_steps

    def _feed(self, tokens: np.ndarray, lengths: np.ndarray, *, into_prompt: bool = False):
        arrays = (jnp.asarray(x) for x in (tokens, lengths, self.pages.table))
        logits, self._caches = model.step(
            self._params, self.config, self._ds, self._caches, *arrays, self._prompt_length, into_prompt=into_prompt
        )
        return logits

    def _join(self) -> None:
        """Waiting requests take free rows of groups that have a page for each context rank to begin with."""
        for row, request in enumerate(self.rows):
            group = self._ds.group_of(row, len(self.rows))
            if request is None and self.waiting and self.pages.free_in(group) >= self._ds.num_context:
                self.rows[row] = self.waiting.popleft()
                self._joined.append(row)

    def _grow(self) -> None:
        """A place for every running request's next token, at the cost of those that joined last where there is none."""
        for row in list(self._joined):
            while row in self._joined:
                try:
                    self.pages.grow(row)
                    break
                except PoolExhausted as full:
                    last = [r for r in self._joined if self._ds.group_of(r, len(self.rows)) == full.group][-1]
                    self._preempt(last)

    def _preempt(self, row: int) -> None:
        request = self.rows[row]
        assert request is not None
        self.num_preempted += 1
        self._leave(row)
        self.waiting.appendleft(request)

    def _leave(self, row: int) -> None:
        self.pages.leave(row)
        self._joined.remove(row)
        self.rows[row] = None
