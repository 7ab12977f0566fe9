"""FlashMLA, run beside us in the same process on the same arrays. The only module that imports torch.

The peer is DeepSeek's FlashMLA as packaged for SGLang, whose legacy half holds the SM90 kernels. It is never a
dependency: where it is absent, `load` says what to install. Arrays are shared through DLPack: both sides read the same
memory.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax
import numpy as np

from mla_jax.bench import timer
from mla_jax.bench.inputs import Inputs, sm_scale
from mla_jax.bench.workloads import Dense, Plan, Sparse, Workload
from pallas_kernels.formats import KVFormat

INSTALL = "the peer needs Linux, an NVIDIA GPU, torch and sgl-flash-mla: pip install torch sgl-flash-mla"
PEERS = ("flash_mla",)


class PeerUnavailable(RuntimeError):
    """The peer is not installed, or cannot run this workload."""


def load(name: str) -> Any:
    """Imports a peer's module. Raises PeerUnavailable, saying what to install, where it cannot be imported."""
    if name not in PEERS:
        raise ValueError(f"peer {name!r} does not exist; there is {', '.join(PEERS)}")
    try:
        torch = importlib.import_module("torch")
        module = importlib.import_module("flash_mla")
    except (ImportError, OSError) as error:
        raise PeerUnavailable(f"{INSTALL}; importing it failed with: {error}") from error
    if not torch.cuda.is_available():
        raise PeerUnavailable("torch sees no GPU; the peer runs on an NVIDIA GPU only")
    return module


class FlashMLA:
    """One workload on the peer: a CUDA graph per input set, captured after a warm-up that fills its split metadata."""

    def __init__(self, inputs: Inputs, *, calls: int):
        import torch

        self._torch = torch
        self._flash_mla = load("flash_mla")
        self._calls = calls
        self._outs: list[Any] = []
        self._graphs: list[Any] = []
        # The tensors stand in the graphs by address: they live as long as this object.
        self._functions = [self._function(inputs.workload, inputs.caches, args) for args in inputs.sets]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            for function in self._functions:
                function()
            stream.synchronize()
            for function in self._functions:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    self._outs.append(function())
                self._graphs.append(graph)
        torch.cuda.synchronize()
        self.measure()

    def measure(self) -> float:
        """The `graph` regime: microseconds of one call, CUDA events around `calls` back-to-back replays."""
        torch = self._torch
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for i in range(self._calls):
            self._graphs[i % len(self._graphs)].replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e3 / self._calls

    def isolated(self, repeats: int = 10) -> timer.Sample:
        """The `isolated` regime, timed like ours."""

        def one(i: int) -> None:
            with self._torch.no_grad():
                self._functions[i % len(self._functions)]()
            self._torch.cuda.synchronize()

        one(0)
        return timer.isolated(one, repeats)

    def out(self, input_set: int) -> np.ndarray:
        """Attention output of an input set: float32 [b, s_q, h, d_v]."""
        self._graphs[input_set].replay()
        self._torch.cuda.synchronize()
        return self._outs[input_set][0].float().cpu().numpy()

    def _function(self, w: Workload, caches: dict, args: dict):
        match w:
            case Dense():
                return self._dense(w, caches, args)
            case Sparse():
                return self._sparse(w, caches, args)
            case Plan(of=Dense()):
                return self._plan(w, args)
            case _:
                raise PeerUnavailable(f"the peer has nothing like {w.name}")

    def _dense(self, w: Dense, caches: dict, args: dict):
        meta, _ = self._flash_mla.get_mla_metadata()
        q, table, lengths = map(self._tensor, (args["q"], args["block_table"], args["cache_seqlens"]))
        cache = self._tensor(caches["cache"].data).unsqueeze(2)  # [pages, page_size, 1, d_qk]
        return lambda: self._flash_mla.flash_mla_with_kvcache(
            q, cache, table, lengths, w.fmt.d_v, meta, softmax_scale=sm_scale(w.fmt), causal=w.is_causal,
            use_legacy=True,
        )  # fmt: skip

    def _sparse(self, w: Sparse, caches: dict, args: dict):
        if w.h > 128:
            raise PeerUnavailable(f"the peer takes at most 128 heads; {w.name} has {w.h}")
        torch = self._torch
        meta, _ = self._flash_mla.get_mla_metadata()
        q = self._tensor(args["q"])
        # Its kernels exist for 64 and 128 heads: engines pad, outside of what is timed.
        padded = 64 if w.h <= 64 else 128
        q = torch.nn.functional.pad(q, (0, 0, 0, padded - w.h)).contiguous()  # [b, s_q, 64 or 128, d_qk]
        more = {}
        if w.extra is not None:
            more["extra_k_cache"] = self._paged(caches["extra_cache"], w.extra.fmt)
            more["extra_indices_in_kvcache"] = self._tensor(args["extra_indices"])
            if "extra_topk_length" in args:
                more["extra_topk_length"] = self._tensor(args["extra_topk_length"])
        cache, indices = self._paged(caches["cache"], w.fmt), self._tensor(args["indices"])

        def function():
            out, lse = self._flash_mla.flash_mla_with_kvcache(
                q, cache, None, None, w.fmt.d_v, meta, softmax_scale=sm_scale(w.fmt), is_fp8_kvcache=True,
                indices=indices, use_legacy=True, **more,
            )  # fmt: skip
            return out[:, :, : w.h], lse

        return function

    def _plan(self, w: Plan, args: dict):
        lengths = self._tensor(args["lengths"])
        return lambda: self._flash_mla.get_mla_decoding_metadata(
            lengths, w.of.s_q * w.of.h, 1, w.of.h, use_legacy=True
        )

    def _paged(self, cache: Any, fmt: KVFormat):
        """A quantised cache as the peer sees it: uint8 [pages, page_size, 1, bytes_per_token], strided by pages."""
        data = self._tensor(cache.data)
        stride = fmt.page_bytes(cache.page_size)
        shape = (data.shape[0], cache.page_size, 1, fmt.bytes_per_token)
        strides = (stride, fmt.bytes_per_token, fmt.bytes_per_token, 1)
        return data.as_strided(shape, strides)

    def _tensor(self, x: jax.Array):
        return self._torch.from_dlpack(jax.block_until_ready(x))

