"""Which kernel runs on which GPU: the one rule by which an op package picks its module.

An op package (`dense_decode`, `sparse_decode`) has one module an architecture, `sm90.py` and `sm100.py`, each with a
function of the op's name and the same arguments, and a table `MODULES` of the major compute capabilities that they
are for. Its `check...` function calls `module_name` (which refuses the others, with the reason), and its op imports
the module when it is first called: loading Mosaic GPU takes longer than all the rest of `import mla_jax`.

`aot_cases.configurations(arch)` of the package says what ships for an architecture.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

LACKS = {
    7: "wgmma and TMA, which came with 9.0",
    8: "wgmma and TMA, which came with 9.0",
    10: "wgmma, which 9.0 alone has",
    11: "the instructions of 9.0, and was not compiled for",
    12: "wgmma, which 9.0 alone has, and tcgen05 with its tensor memory, which 10.x alone has",
}
"""What kernels need and GPUs of a major compute capability do not have."""


def module_name(modules: Mapping[int, str], capability: tuple[int, int], op: str) -> str:
    """The module of `op` for a GPU.

    Args:
      modules: major compute capability -> module name.
      capability: of the GPU that is compiled for.
      op: "dense" or "sparse", for the message.

    Raises:
      NotImplementedError: there is none; says which there are and what this GPU lacks.
    """
    major, minor = capability
    if major in modules:
        return modules[major]
    accepted = " and ".join(f"{m}.0" if m == 9 else f"{m}.x" for m in modules)
    lacks = f": {major}.x lacks {LACKS[major]}" if major in LACKS else ""
    raise NotImplementedError(
        f"the {op} Mosaic kernel exists for compute capability {accepted}, this is {major}.{minor}{lacks}"
    )


def module(package: str, modules: Mapping[int, str], capability: tuple[int, int], op: str) -> ModuleType:
    """The same, imported from `package`."""
    return importlib.import_module(f"{package}.{module_name(modules, capability, op)}")


def on_one_device(ctx: Any) -> bool:
    """Whether what is lowered runs on one device, or on several as one program each (shard_map over all axes).

    Elsewhere XLA splits the program, and it cannot split a kernel. `ctx` is JAX's LoweringRuleContext.
    """
    axis_context = ctx.module_context.axis_context
    if hasattr(axis_context, "manual_axes"):
        return frozenset(axis_context.manual_axes) == frozenset(axis_context.mesh.axis_names)
    return getattr(axis_context, "num_devices", None) == 1


def lowered_for() -> tuple[int, int]:
    """The compute capability that Mosaic GPU lowers for."""
    from jax.experimental.mosaic.gpu import utils as mosaic_utils

    return mosaic_utils._infer_arch()
