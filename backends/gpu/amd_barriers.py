"""Barriers of kernels for AMD with fences around them: what threads wrote to shared memory is there behind them.

    tvm_storage_sync("shared")                  -> workgroup_barrier(): fence release, s_barrier, fence acquire
    tvm_storage_sync("warp")                    -> wave_barrier(): the same of a wave, which is no instruction

TVM's generator (0.27) makes a bare s_barrier of it. That instruction does not wait for accesses to shared memory, and
since gfx90a LLVM puts no wait in front of it either (SIInsertWaitcnts.cpp, supportsBackOffBarrier): it leaves that to
fences, of which there were none, so that a tile could be read before all of it was written. The fences order shared
memory alone (LLVM's "amdgpu-synchronize-as"): loads from the GPU's memory stay on their way.

Of a barrier of a wave TVM makes nothing: its lanes go in step, and volatile accesses keep LLVM from another order. What
is here costs no instruction either, asks nothing of lanes, and orders accesses that are not volatile too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tvm_ffi
from tvm import ir, tirx

_BARRIERS = {"shared": "workgroup_barrier", "warp": "wave_barrier"}


def _function(name: str, scope: str, barrier: str) -> str:
    return f"""
define linkonce_odr hidden void @{name}() convergent nounwind {{
  fence syncscope("{scope}") release, !mmra !0
  call void @llvm.amdgcn.{barrier}()
  fence syncscope("{scope}") acquire, !mmra !0
  ret void
}}
declare void @llvm.amdgcn.{barrier}() convergent nounwind
"""


_FENCES = "".join(
    (
        _function(_BARRIERS["shared"], "workgroup", "s.barrier"),
        _function(_BARRIERS["warp"], "wavefront", "wave.barrier"),
        '!0 = !{!"amdgpu-synchronize-as", !"local"}\n',
    )
)


def with_fences(module: Any) -> Any:
    """The kernels with fences around their barriers; they have to be linked with the file of `write_fences`."""
    barrier = ir.Op.get("tirx.tvm_storage_sync")

    def fenced(call: Any) -> Any:
        if not call.op.same_as(barrier):
            return call
        return tirx.call_extern("void", _BARRIERS[str(call.args[0].value)])

    functions = {
        variable: function.with_body(tvm_ffi.structural_map(function.body, (ir.Call, fenced)))
        for variable, function in module.functions_items()
    }
    return ir.IRModule(functions)


def write_fences(directory: Path) -> Path:
    """The functions that `with_fences` calls, as LLVM's IR in a file of `directory`."""
    path = directory / "barriers.ll"
    path.write_text(_FENCES)
    return path
