"""PrimFuncs -> an object file of plain C functions, `int32_t name(void *...)`.

TVM's own pipelines end in the packed calling convention of its FFI. These are the same pipelines for a CPU, with
MakePackedAPI replaced by `_plain_c_abi`: a buffer parameter becomes a bare pointer, the function returns 0, or -1 where
scratch memory ran out. Passes that act on GPU threads, scopes and copies only are left out.

No alignment above the element's own is claimed for a pointer parameter, so LLVM emits unaligned vector moves (as fast
on aligned data) and a caller may pass any tensor its framework holds.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tvm
from tvm import ir, s_tir, tirx
from tvm.tirx.buffer import is_buffer_var

from .announce_loops import announce_loops
from .cut_nested import cut_nested
from .stack_locals import stack_locals

# Weak pointers that TVM's code calls through and our runtime does not fill: such a call would jump to address 0.
_FOREIGN = (b"__TVMBackendParallelBarrier", b"__TVMFFIFunctionCall", b"__TVMFFIEnvModLookupFromImports")


def compile_objects(functions: Mapping[str, Any], target: Mapping[str, Any]) -> list[bytes]:
    """Compile every PrimFunc to an object of its own, on all cores: TVM and LLVM release the GIL."""
    with ThreadPoolExecutor(max(1, min(len(functions), len(os.sched_getaffinity(0))))) as pool:
        return list(pool.map(lambda item: compile_object(dict([item]), target), functions.items()))


def compile_object(functions: Mapping[str, Any], target: Mapping[str, Any]) -> bytes:
    """Compile PrimFuncs to one relocatable object whose C symbols are the keys of `functions`.

    Functions with and without schedulable blocks may be mixed. Equal input gives equal bytes.
    """
    return _emit(lower(functions, target), tvm.target.Target(dict(target)))


def lower(functions: Mapping[str, Any], target: Mapping[str, Any]) -> ir.IRModule:
    """Lower PrimFuncs to what LLVM code generation takes, with the C calling convention."""
    host = tvm.target.Target(dict(target))
    named = {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
    module = tirx.transform.BindTarget(host.with_host(host))(ir.IRModule(named))
    return ir.transform.Sequential(_passes())(module)


def _emit(module: ir.IRModule, target: Any) -> bytes:
    built = tvm.get_global_func("target.build.llvm")(module, target)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "kernels.o")
        built.write_to_file(path, "o")
        with open(path, "rb") as file:
            content = file.read()
    for symbol in _FOREIGN:
        assert symbol not in content, f"a kernel needs {symbol.decode()}, which the runtime does not have"
    return content


def _passes() -> list[Any]:
    """What tvm.s_tir.pipeline.default_s_tir_pipeline does to a CPU function, up to MakePackedAPI."""
    return [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.AnnotateIrregularLoop(),
        s_tir.transform.InjectSoftwarePipeline(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        s_tir.transform.InjectVirtualThread(),
        s_tir.transform.InjectDoubleBuffer(),
        tirx.transform.StorageRewrite(),
        s_tir.transform.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.FP8ComputeLegalize(),
        tirx.transform.SplitHostDevice(),
        _plain_c_abi(),
        # These refuse buffer parameters, so they follow the change of convention.
        tirx.transform.FP8StorageLegalize(),
        tirx.transform.BF16StorageLegalize(),
        cut_nested(),
        stack_locals(),  # after cut_nested, whose scratch is local
        tirx.transform.LowerTVMBuiltin(),
        tirx.transform.LowerIntrin(),
    ]


@ir.transform.module_pass(opt_level=0, name="PlainCABI")
class _plain_c_abi:  # noqa: N801  (TVM's pass decorator makes an instance factory of it)
    def transform_module(self, module: Any, _context: Any) -> Any:
        for name, func in list(module.functions.items()):
            module.update_func(name, _with_c_abi(func))
        return module


def _with_c_abi(func: Any) -> Any:
    parameters, declarations = [], []
    for parameter in func.params:
        if is_buffer_var(parameter):
            buffer = parameter.ty
            pointer = tirx.Var(f"{parameter.name}_data", ir.PointerType(buffer.dtype, buffer.storage_scope or "global"))
            declarations.append(tirx.DeclBuffer(parameter, data=pointer))
            parameters.append(pointer)
        else:
            parameters.append(parameter)
    body = announce_loops(func.body)
    body = tirx.SeqStmt([*declarations, body]) if declarations else body
    # LowerTVMBuiltin asks on which device scratch memory lies: device 0 of kind 1 is the CPU.
    for key, value in (("device_type", 1), ("device_id", 0)):
        body = tirx.AttrStmt(ir.StringImm("default"), key, tirx.IntImm("int32", value), body)
    body = tirx.SeqStmt([body, tirx.stmt.Return(tirx.IntImm("int32", 0))])
    return tirx.PrimFunc(parameters, body, ir.PrimType("int32"), func.attrs).with_attr("calling_conv", 0)
