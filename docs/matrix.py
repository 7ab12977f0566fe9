"""The first table of docs/support-matrix.md, from dispatch itself; `uv run python docs/matrix.py` rewrites it."""

from __future__ import annotations

from pathlib import Path

from mla_jax import dispatch, implementations
from mla_jax.calls import DenseCall, SparseCall
from pallas_kernels.formats import BF16_576, F32_576, MODEL1, V32, KVFormat

PAGE = Path(__file__).with_name("support-matrix.md")
BEGIN, END = "<!-- table: python docs/matrix.py -->\n", "<!-- end of table -->\n"
GPUS: dict[str, tuple[int, int] | None] = {
    "CPU": None,
    "A100 (8.0)": (8, 0),
    "L40S, RTX 40 (8.9)": (8, 9),
    "H100, H200 (9.0)": (9, 0),
    "B200 (10.0)": (10, 0),
    "B300 (10.3)": (10, 3),
    "RTX 50, RTX PRO 6000 (12.0)": (12, 0),
}
COLUMNS: dict[str, tuple[str, KVFormat]] = {
    "dense, bf16": ("dense", BF16_576),
    "dense, FP8": ("dense", V32),
    "sparse, bf16": ("sparse", BF16_576),
    "sparse, V32": ("sparse", V32),
    "sparse, MODEL1": ("sparse", MODEL1),
    "float32": ("dense", F32_576),
}


def runs(op: str, fmt: KVFormat, capability: tuple[int, int] | None) -> str:
    """Name of the implementation that a call runs: 128 heads, one query row, pages of 64."""
    target = dispatch.Target("cpu") if capability is None else dispatch.Target("cuda", capability)
    if op == "dense":
        call, table = DenseCall(4, 1, 128, fmt, 64, False, False), implementations.DENSE
    else:
        call, table = SparseCall(4, 1, 128, fmt, 64, 512, None, 0, 0, False), implementations.SPARSE
    chosen = dispatch.choose(table, call, target, None).implementation
    return chosen.name if chosen else "-"


def table() -> str:
    """The table in Markdown."""
    lines = [f"| GPU | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, capability in GPUS.items():
        cells = [runs(op, fmt, capability) for op, fmt in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """The page with the table between its markers."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
