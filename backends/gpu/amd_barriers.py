"""Barriers of kernels for AMD with fences around them: what a block wrote to its shared memory is there behind them.

    tvm_storage_sync("shared")                  -> workgroup_barrier(): fence release, s_barrier, fence acquire

TVM's generator (0.27) makes a bare s_barrier of it. That instruction does not wait for accesses to shared memory, and
since gfx90a LLVM puts no wait in front of it either (SIInsertWaitcnts.cpp, supportsBackOffBarrier): it leaves that to
fences, of which there were none, so that a tile could be read before all of it was written. The fences order shared
memory alone (LLVM's "amdgpu-synchronize-as"): loads from the GPU's memory stay on their way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tvm_ffi
from tvm import ir, tirx

_NAME = "workgroup_barrier"
_FENCES = f"""
define linkonce_odr hidden void @{_NAME}() convergent nounwind {{
  fence syncscope("workgroup") release, !mmra !0
  call void @llvm.amdgcn.s.barrier()
  fence syncscope("workgroup") acquire, !mmra !0
  ret void
}}
declare void @llvm.amdgcn.s.barrier() convergent nounwind
!0 = !{{!"amdgpu-synchronize-as", !"local"}}
"""


def with_fences(module: Any) -> Any:
    """The kernels with fences around their barriers; they have to be linked with the file of `write_fences`."""
    barrier = ir.Op.get("tirx.tvm_storage_sync")

    def fenced(call: Any) -> Any:
        if not call.op.same_as(barrier) or str(call.args[0].value) != "shared":
            return call
        return tirx.call_extern("void", _NAME)

    functions = {
        variable: function.with_body(tvm_ffi.structural_map(function.body, (ir.Call, fenced)))
        for variable, function in module.functions_items()
    }
    return ir.IRModule(functions)


def write_fences(directory: Path) -> Path:
    """The function that `with_fences` calls, as LLVM's IR in a file of `directory`."""
    path = directory / f"{_NAME}.ll"
    path.write_text(_FENCES)
    return path
