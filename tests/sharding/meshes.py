"""Meshes of the eight CPU devices that the tests run with, and what a program compiled for a mesh sends."""

from __future__ import annotations

import re

import jax
import numpy as np
from jax.sharding import AxisType

from mla_jax.sharding import DecodeSharding


def make(data=1, heads=1, context=1, kind=AxisType.Auto):
    """A sharding over a mesh of data x heads x context devices, axes "d", "h" and "c"."""
    devices = jax.devices()[: data * heads * context]
    mesh = jax.make_mesh((data, heads, context), ("d", "h", "c"), axis_types=(kind,) * 3, devices=devices)
    return DecodeSharding(mesh, data="d", heads="h", context="c")


COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|ragged-all-to-all|collective-[a-z]+)(?:-start)?\("
)


def collectives(compiled):
    """(name, bytes of its result) of every collective of a compiled program."""
    found = []
    for result, name in COLLECTIVE.findall(compiled.as_text()):
        arrays = re.findall(r"[a-z](\d+)\[([\d,]*)\]", result)
        bits = [int(width) * int(np.prod([int(n) for n in dims.split(",") if n])) for width, dims in arrays]
        found.append((name, sum(bits) // 8))
    return found
