"""Meshes of the eight CPU devices that the tests run with."""

from __future__ import annotations

import jax
from jax.sharding import AxisType

from mla_jax.sharding import DecodeSharding


def make(data=1, heads=1, context=1, kind=AxisType.Auto):
    """A sharding over a mesh of data x heads x context devices, axes "d", "h" and "c"."""
    devices = jax.devices()[: data * heads * context]
    mesh = jax.make_mesh((data, heads, context), ("d", "h", "c"), axis_types=(kind,) * 3, devices=devices)
    return DecodeSharding(mesh, data="d", heads="h", context="c")
