"""Where the rows live: one device, a mesh, pinned host memory, mapped files; and the checkpoint they come from."""

import json

import engram_golden as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engram_golden import CONFIG, G
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mla_jax.nn import Engram, WeightError
from mla_jax.nn.engram import (
    EngramConfig,
    EngramTable,
    Partition,
    advance,
    check_table,
    forward,
    hash_tokens,
    init_history,
    load_layer,
    load_table,
    lookup,
    place,
)
from pallas_kernels import architectures
from pallas_kernels.formats import BF16, E4M3, E8M0

ROWS = jnp.asarray(G["hash_ids"][:, 1], jnp.int32)  # [29, 12]
fetch = jax.jit(lambda table, rows: lookup(table, rows, dtype=jnp.float32))
DATA_MODEL = jax.make_mesh((2, 4), ("data", "model"))
FLAT = jax.make_mesh((8,), ("model",))


def wide_table(rows=1001):
    """256 values a row like the published tables, so that 8 devices get a scale each; and an odd number of rows."""
    values = np.random.default_rng(0).standard_normal((rows, 256)).astype(np.float32)
    return EngramTable.quantize(values), values


PARTITIONS = {
    "8 by rows": Partition(FLAT, "model"),
    "8 by columns": Partition(FLAT, "model", "columns"),
    "4 of 2 x 4 by rows": Partition(DATA_MODEL, "model"),
    "4 of 2 x 4 by columns": Partition(DATA_MODEL, "model", "columns"),
}


def test_golden_embeddings():
    table = golden.table()
    check_table(table, CONFIG.num_rows[1], CONFIG.head_dim)
    np.testing.assert_array_equal(lookup(table, ROWS, dtype=jnp.float32), G["emb"])
    for where in ("device", "pinned_host"):
        placed = place(table, where)
        assert placed.values.sharding.memory_kind == where and placed.bytes_per_row == 66
        got = fetch(placed, ROWS)
        np.testing.assert_array_equal(got, G["emb"])
        assert got.sharding.memory_kind == "device"
    np.testing.assert_array_equal(lookup(placed, ROWS).astype(np.float32), G["emb"])  # bfloat16 holds them exactly


@pytest.mark.parametrize("where", ["device", "pinned_host"])
@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS)
def test_partitioned_equals_whole(partition, where):
    table, _ = wide_table()
    placed = place(table, where, partition=partition)
    sizes = {shard.data.nbytes for shard in placed.values.addressable_shards}
    assert sizes == {-(-placed.values.nbytes // partition.shards)}
    rows = jnp.asarray(np.random.default_rng(1).integers(-3, 1009, (6, 5)), jnp.int32)  # some outside the table
    want = lookup(table, rows)
    assert np.any(np.asarray(want) != 0)
    np.testing.assert_array_equal(jax.jit(lookup)(placed, rows), want)
    np.testing.assert_array_equal(lookup(placed, rows), want)


@pytest.mark.parametrize("where", ["device", "pinned_host"])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_a_whole_step_over_a_mesh(kind, where):
    """Requests over one axis, the table over the other, from tokens to residual streams: as the golden file has it."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    by_request, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    x = np.zeros((4, 11, CONFIG.hc_mult, CONFIG.hidden_size), np.float32)
    for i, length in enumerate(golden.LENGTHS):
        x[i, :length] = G["x"][golden.STARTS[i] :][:length]
    inputs = (x, golden.batch(), golden.LENGTHS, init_history(CONFIG, 4))
    x, tokens, lengths, history = jax.device_put(inputs, by_request)
    params, token_map = jax.device_put((golden.params(), golden.MAP), everywhere)
    table = place(golden.table(), where, partition=Partition(mesh, "model"))

    @jax.jit
    def step(params, table, token_map, x, tokens, history, lengths):
        rows, keep = hash_tokens(CONFIG, token_map, tokens, history, jnp.zeros_like(lengths), lengths)
        out = forward(params, CONFIG, x, lookup(table, rows[:, :, 1], dtype=jnp.float32), keep)
        return rows, out, advance(history, tokens, lengths)

    rows, out, history = step(params, table, token_map, x, tokens, history, lengths)
    np.testing.assert_array_equal(golden.flat(rows), G["hash_ids"])
    np.testing.assert_array_equal(history, G["hist_after_full"][G["req_slots"]])
    assert np.abs(golden.flat(out) - G["out_f64"]).max() < 1e-6
    assert {y.sharding.spec[0] for y in (rows, out, history)} == {"data"}


def for_cuda(table):
    """The program that looks rows up on a GPU, and of it what the host's processors gather."""
    text = jax.jit(lookup).trace(table, jnp.zeros((6, 5), jnp.int32)).lower(lowering_platforms=("cuda",)).as_text()
    gathers = [line for line in text.splitlines() if "stablehlo.gather" in line]
    return text, [line for line in gathers if '_xla_compute_type = "host"' in line]


@pytest.mark.parametrize("partition", [None, *PARTITIONS.values()], ids=["whole", *PARTITIONS])
def test_a_gpu_reads_rows_in_pinned_memory_itself(partition):
    """On CPUs all memory is one: so by the program for a GPU."""
    text, by_host = for_cuda(place(wide_table()[0], "pinned_host", partition=partition))
    assert text.count("@mosaic_gpu_v2(") == 1 and "stablehlo.gather" not in text and not by_host


def test_where_no_kernel_exists_the_host_gathers(monkeypatch):
    monkeypatch.setattr(architectures, "lowered_for", lambda: (8, 0))
    text, by_host = for_cuda(place(wide_table(1003)[0], "pinned_host"))  # of a size that JAX has not lowered yet
    assert "mosaic_gpu" not in text and len(by_host) == 2
    text, by_host = for_cuda(place(wide_table()[0]))  # in the GPU's memory XLA gathers
    assert "_xla_compute_type" not in text and not by_host


@pytest.mark.parametrize("where", ["device", "pinned_host"])
def test_vmap_of_a_lookup(where):
    table = place(wide_table()[0], where)
    rows = jnp.asarray(np.random.default_rng(2).integers(-3, 1009, (4, 3, 5)), jnp.int32)
    got = jax.jit(jax.vmap(lookup, in_axes=(None, 1), out_axes=1))(table, rows)
    np.testing.assert_array_equal(got, lookup(table, rows))


def test_rows_outside_give_zeros():
    table, _ = wide_table(10)
    rows = jnp.array([[-1, 0, 10, 2**31 - 1, -(2**31)]], jnp.int32)
    for t in (table, place(table), place(table, "pinned_host")):
        found = np.asarray(lookup(t, rows)).reshape(5, 256)
        assert [bool(np.any(row != 0)) for row in found] == [False, True, False, False, False]


@pytest.mark.slow
def test_beyond_two_gib():
    """Rows whose first byte lies past 2^31: gathered where they are."""
    config = EngramConfig.small(slots=760_000, head_dim=256, layer_ids=(1,))
    rows = config.num_rows[0]
    values = np.zeros((rows, 256), E4M3)
    index = np.array([[0, 2**23 - 1, 2**23, 2**23 + 1, rows - 1]], np.int32)
    assert values.nbytes > 2**31 and int(index[0, 3]) * 256 > 2**31
    values[index[0]] = np.arange(1, 6, dtype=np.float32).astype(E4M3)[:, None]
    table = EngramTable(values, np.full((rows, 8), 127, np.uint8), rows)
    check_table(table, rows, 256)
    placed = place(table)
    found = np.asarray(lookup(placed, jnp.asarray(index)), np.float32).reshape(5, 256)
    np.testing.assert_array_equal(found, np.repeat(np.arange(1.0, 6)[:, None], 256, axis=1))


def test_quantize():
    table, rows = wide_table(64)
    back = np.asarray(lookup(table, np.arange(64, dtype=np.int32)[:, None], dtype=jnp.float32))
    tiles = np.abs(rows).reshape(64, 8, 32).max(axis=-1, keepdims=True)
    error = np.abs(back - rows).reshape(64, 8, 32)
    assert (error <= tiles * 2**-4).all() and error.max() > 0  # e4m3: half a unit of 3 mantissa bits
    assert (np.abs(table.values.astype(np.float32)).reshape(64, 8, 32).max(axis=-1) >= 224).all()  # scales fit tightly
    exact = EngramTable.quantize(np.ldexp(np.full((1, 32), 448.0), -9))
    assert exact.scales[0, 0] == 127 - 9 and exact.values[0, 0] == 448
    zero = EngramTable.quantize(np.zeros((1, 32)))
    np.testing.assert_array_equal(lookup(zero, np.zeros((1, 1), np.int32), dtype=jnp.float32), np.zeros((1, 32)))


def test_unquantised_tables():
    rows = G["p_table"].astype(np.float32)
    table = place(EngramTable(rows, None, len(rows)), partition=PARTITIONS["8 by columns"])
    index = jnp.asarray(G["p_hash"][:, :, 0], jnp.int32)  # [2, 13, 8]
    np.testing.assert_array_equal(fetch(table, index), rows[np.asarray(index)].reshape(2, 13, -1))


def test_bad_tables():
    table = golden.table()
    for bad, message in (
        ("rows", "table is str 'rows'; accepted: an EngramTable"),
        (EngramTable(table.values[:-1], table.scales[:-1], 2303), "table has 2303 rows; accepted: 2304"),
        (EngramTable(table.values[:-1], table.scales, 2304), r"values is .*\[2303, 64\]; accepted: .*\[2304, 64\]"),
        (EngramTable(table.values, table.scales[:, :1], 2304), r"scales is .*\[2304, 1\]; accepted: .*\[2304, 2\]"),
        (EngramTable(table.values.view(np.uint8), table.scales, 2304), "table.values is uint8"),
        (EngramTable(table.values, None, 2304), "accepted without scales: bfloat16, float32"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_table(bad, 2304, 64)
    with pytest.raises(ValueError, match=r"rows is float32\[1\]"):
        lookup(table, jnp.zeros(1))
    with pytest.raises(ValueError, match="rows is traced; accepted: a lookup outside jit"):
        jax.jit(lambda rows: lookup(table, rows))(ROWS)
    with pytest.raises(ValueError, match="where='disk'; accepted: 'device', 'pinned_host'"):
        place(table, "disk")
    with pytest.raises(ValueError, match="accepted: a number of devices that divides 2"):
        place(table, partition=PARTITIONS["8 by columns"])
    with pytest.raises(ValueError, match="axis='expert'; accepted: an axis of the mesh"):
        Partition(FLAT, "expert")
    with pytest.raises(ValueError, match="by='hash'; accepted: 'rows' or 'columns'"):
        Partition(FLAT, "model", "hash")
    with pytest.raises(ValueError, match=r"rows is float32\[3, 40\]; accepted: .*multiple of 32"):
        EngramTable.quantize(np.zeros((3, 40), np.float32))


def save(path, tensors):
    """A safetensors file: header length, header, data (https://huggingface.co/docs/safetensors)."""
    names = {np.dtype(np.float32): "F32", BF16: "BF16", E4M3: "F8_E4M3", E8M0: "F8_E8M0"}
    header, at = {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": names[x.dtype], "shape": x.shape, "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(x.tobytes() for x in tensors.values()))


def checkpoint(layer_id=14):
    rng = np.random.default_rng(3)
    wkv = rng.standard_normal((240, 768)).astype(E4M3)
    exponents = rng.integers(110, 125, (8, 24)).astype(np.uint8)
    tensors = {
        "embed.weight": golden.table().values,
        "embed.scale": golden.table().scales.view(E8M0),
        "wkv.weight": wkv,
        "wkv.scale": exponents.view(E8M0),
        "q_weight": G["q_weight"].astype(BF16),
        "k_weight": G["k_weight"].astype(BF16),
    }
    blocks = np.repeat(np.repeat(2.0 ** (exponents.astype(np.float64) - 127), 32, axis=0), 32, axis=1)[:240, :768]
    return {f"layers.{layer_id}.engram.{name}": x for name, x in tensors.items()}, wkv.astype(np.float64) * blocks


def test_checkpoint(tmp_path):
    tensors, wkv = checkpoint()
    others = {"layers.14.attn.wkv.weight": np.zeros((2, 2), np.float32)}
    save(tmp_path / "model-00047-of-00048.safetensors", others | tensors)
    params = load_layer(CONFIG, 1, tmp_path)
    np.testing.assert_array_equal(params["wkv"], wkv)
    np.testing.assert_array_equal(params["q_weight"], tensors["layers.14.engram.q_weight"].astype(np.float32))
    Engram(CONFIG, 1, params=params)  # which checks shapes and dtypes
    mapped = load_table(CONFIG, 1, tmp_path, None)
    assert isinstance(mapped.values, np.memmap)
    np.testing.assert_array_equal(lookup(mapped, ROWS, dtype=jnp.float32), G["emb"])
    partition = PARTITIONS["4 of 2 x 4 by rows"]
    module = Engram.from_checkpoint(CONFIG, 1, tmp_path, where="pinned_host", partition=partition)
    np.testing.assert_array_equal(module.lookup(ROWS), G["emb"])
    assert module.table.values.sharding == NamedSharding(partition.mesh, partition.spec, memory_kind="pinned_host")


def test_bad_checkpoints(tmp_path):
    tensors, _ = checkpoint()
    name = "layers.14.engram."
    file = tmp_path / "model.safetensors"
    wrong = {k: v for k, v in tensors.items() if "q_weight" not in k}
    wrong |= {name + "conv.weight": np.zeros(3, np.float32), name + "wkv.scale": tensors[name + "wkv.scale"][1:]}
    save(file, wrong)
    with pytest.raises(WeightError) as error:
        load_layer(CONFIG, 1, file)
    for part in ("missing (1):\n    q_weight", "unexpected (1):\n    conv.", "wkv.scale (7, 24), expected (8, 24"):
        assert part in str(error.value)
    save(file, tensors | {name + "embed.weight": golden.table().values[1:]})
    with pytest.raises(WeightError, match=r"embed.weight float8_e4m3fn \(2303, 64\), expected .* \(2304, 64\)"):
        load_table(CONFIG, 1, file)
    with pytest.raises(WeightError, match="missing"):
        load_table(CONFIG, 0, file)
    with pytest.raises(FileNotFoundError):
        load_table(CONFIG, 0, tmp_path / "none")
    with pytest.raises(NotImplementedError, match="no checkpoint of the paper form"):
        load_layer(golden.PAPER, 0, file)
