"""Tables of kernel configurations, measured on one kind of GPU: `mla-jax tune` writes them, ops take them when asked.

    from mla_jax import tuning

    table = tuning.load("h200.json")
    config = table.dense(q, cache, block_table)
    out = mla_jax.mla_decode(q, cache, block_table, lengths, sm_scale=scale, config=config)

Nothing is loaded by itself and nothing is global: a lookup is a function of shapes, so it is legal inside jit, and its
result is the op's static `config`. A table is JSON; it says what device kind and version of mla-jax it is for, and
`load` refuses one that is for others. Where a table has no entry the lookup gives None, the op's own choice.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from pathlib import Path
from typing import Any

import jax

from mla_jax.cache import PagedKVCache

LAYOUT = 1  # of the JSON; goes up when older files cannot be read


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Calls that share a configuration. Sizes are powers of two, rounded up.

    Attributes:
      op: "dense" or "sparse".
      fmt, extra_fmt: names of formats; extra_fmt is "" without an extra cache.
      page_size: of the (main) cache, as it is: it decides how rows are fetched.
      batch: requests.
      rows: query rows of a request, s_q * heads.
      keys: that a row may read: the block table's tokens, or both scopes' top-k.
    """

    op: str
    fmt: str
    extra_fmt: str
    page_size: int
    batch: int
    rows: int
    keys: int

    @classmethod
    def of(
        cls, op: str, fmt: str, page_size: int, *, batch: int, rows: int, keys: int, extra_fmt: str = ""
    ) -> Bucket:
        """The bucket of a call with these sizes."""
        return cls(op, fmt, extra_fmt, page_size, *(1 << max(0, n - 1).bit_length() for n in (batch, rows, keys)))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A bucket's configuration, and the times that chose it: us of the config and of the default, by workload."""

    bucket: Bucket
    config: Any
    us: dict[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Table:
    """Configurations for one kind of device.

    Attributes:
      device: jax's device_kind.
      version: of mla-jax.
      jax: version that it was measured with, for the record.
      entries: by bucket.
    """

    device: str
    version: str
    jax: str
    entries: dict[Bucket, Entry]

    def lookup(self, bucket: Bucket) -> Any:
        """The bucket's config, or None."""
        entry = self.entries.get(bucket)
        return None if entry is None else entry.config

    def dense(self, q: Any, cache: PagedKVCache, block_table: Any = None) -> Any:
        """The config for `mla_decode` with these arguments (arrays, tracers or ShapeDtypeStructs), or None."""
        b, s_q, h, _ = q.shape
        keys = cache.page_size * (1 if block_table is None else block_table.shape[1])
        return self.lookup(Bucket.of("dense", cache.format.name, cache.page_size, batch=b, rows=s_q * h, keys=keys))

    def sparse(
        self, q: Any, cache: PagedKVCache, indices: Any, extra_cache: PagedKVCache | None = None,
        extra_indices: Any = None,
    ) -> Any:  # fmt: skip
        """The config for `sparse_mla_decode` with these arguments, or None."""
        b, s_q, h, _ = q.shape
        keys = indices.shape[-1] + (0 if extra_indices is None else extra_indices.shape[-1])
        extra_fmt = "" if extra_cache is None else extra_cache.format.name
        return self.lookup(
            Bucket.of(
                "sparse", cache.format.name, cache.page_size, batch=b, rows=s_q * h, keys=keys, extra_fmt=extra_fmt
            )
        )

    def dumps(self) -> str:
        """The table as JSON."""
        entries = [
            dataclasses.asdict(e.bucket)
            | {"config": {"type": type(e.config).__name__} | dataclasses.asdict(e.config)}
            | {"us": {name: list(us) for name, us in e.us.items()}}
            for e in self.entries.values()
        ]
        head = {"layout": LAYOUT, "device": self.device, "mla_jax": self.version, "jax": self.jax}
        return json.dumps(head | {"entries": entries}, indent=1) + "\n"

    def save(self, path: str | os.PathLike) -> None:
        """Writes it to a file."""
        Path(path).write_text(self.dumps())


def package_version() -> str:
    """The version that a table must be for."""
    import mla_jax

    return mla_jax.__version__


def load(path: str | os.PathLike, *, device: str | None = None) -> Table:
    """Reads a table for this device and this version.

    Args:
      path: of the JSON file.
      device: device kind that it must be for; None takes that of jax's first device.

    Raises:
      ValueError: the table is for another device or version, or no such table at all.
      OSError: the file cannot be read.
    """
    return loads(Path(path).read_text(), str(path), device=device)


def loads(text: str, name: str = "the table", *, device: str | None = None) -> Table:
    """`load` from a string; `name` stands in errors."""
    device = jax.devices()[0].device_kind if device is None else device
    try:
        data = json.loads(text)
        layout, made_for, version = data["layout"], data["device"], data["mla_jax"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{name} is no tuning table: {error!r}; accepted: JSON that `mla-jax tune` wrote") from error
    for what, got, accepted in (
        ("layout", layout, LAYOUT), ("device", made_for, device), ("mla-jax version", version, package_version())
    ):  # fmt: skip
        if got != accepted:
            raise ValueError(f"{name} is for {what} {got!r}; accepted here: {accepted!r}. Measure anew: mla-jax tune")
    try:
        entries = [_entry(e) for e in data["entries"]]
        return Table(made_for, version, data["jax"], {e.bucket: e for e in entries})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{name} holds an entry that this version cannot read: {error!r}") from error


def _entry(data: dict[str, Any]) -> Entry:
    bucket = Bucket(**{f.name: data[f.name] for f in dataclasses.fields(Bucket)})
    if bucket.op not in ("dense", "sparse"):
        raise ValueError(f"op is {bucket.op!r}")
    values = dict(data["config"])
    config = config_types(bucket.op)[values.pop("type")](**values)
    return Entry(bucket, config, {name: (float(us), float(default)) for name, (us, default) in data["us"].items()})


def config_types(op: str) -> dict[str, Any]:
    """The config classes of an op's kernels by name."""
    package = importlib.import_module(f"pallas_kernels.{op}_decode")
    return {config.__name__: config for config in package.CONFIGS.values()}
