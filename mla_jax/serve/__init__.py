"""A small serving loop: how the ops, the caches and a sharding go together. `mla-jax serve-demo` runs it.

`pages` hands out pages, `model` is one decode step as a pure function, `engine` is the loop on the host.
"""

from mla_jax.serve.engine import Engine, Request
from mla_jax.serve.model import Caches, ModelConfig, init_caches, init_params
from mla_jax.serve.pages import BlockAllocator, PoolExhausted

__all__ = [
    "BlockAllocator",
    "Caches",
    "Engine",
    "ModelConfig",
    "PoolExhausted",
    "Request",
    "init_caches",
    "init_params",
]
