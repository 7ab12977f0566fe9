"""What the ops must know of a surrounding `jax.shard_map`: over which mesh axes their operands differ."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def varying_axes(*trees: Any) -> tuple[str, ...]:
    """Mesh axes over which any of the operands differ between shards; () outside shard_map."""
    axes: set[str] = set()
    for x in jax.tree.leaves(trees):
        axes |= getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", frozenset())
    return tuple(sorted(axes))


def vary(x: Any, axes: tuple[str, ...]) -> Any:
    """`x`, marked as differing over `axes`."""
    return lax.pcast(x, tuple(a for a in axes if a not in varying_axes(x)), to="varying")
