"""Object code: plain C functions, no alignment assumed, no symbol that nobody provides, also for a foreign machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from aot_programs import add_one, buffer, double, load, matmul, program, run, two_kernels
from tvm import te, tirx

from graphwright.backends.aot import codegen, elf, library
from graphwright.backends.aot.program import Buffer, Program, Step
from graphwright.hwdb import detect, lookup


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3", "x86-64-v4", "raspberry-pi-4b"])
def test_a_model_for_another_machine_links_here(tmp_path: Path, target: str) -> None:
    hw = lookup(target)
    info = library.build([two_kernels()], hw, tmp_path)
    facts = elf.read(info.library)
    assert facts.machine == hw.isa
    assert facts.undefined <= {
        "__tls_get_addr",  # of the dynamic linker; 64-bit ARM needs none
        *("clock_gettime", "getpid", "madvise", "nanosleep", "syscall", "getauxval"),
        *("free", "posix_memalign", "memcpy", "memset", "strlen"),
        *("pthread_create", "pthread_join", "pthread_sigmask", "sched_getcpu", "sigfillset"),
    }


def test_functions_with_and_without_blocks_share_a_module() -> None:
    mixed = codegen.compile_object({"a": matmul(), "b": double(), "c": add_one()}, detect().tvm_target())
    assert codegen.compile_object({"a": matmul(), "b": double(), "c": add_one()}, detect().tvm_target()) == mixed
    assert mixed != codegen.compile_object({"a": matmul(), "b": add_one(), "c": double()}, detect().tvm_target())


@pytest.mark.parametrize("kernel", [matmul, double, add_one])
def test_no_alignment_is_claimed_for_parameters(kernel) -> None:
    """An aligned vector move (vmovaps, or a folded SSE operand) on a tensor of the user's would be a crash."""
    import tvm

    target = lookup("x86-64-v2").tvm_target()
    module = codegen.lower({"kernel": kernel()}, target)
    text = tvm.get_global_func("target.build.llvm")(module, tvm.target.Target(target)).inspect_source("ll")
    moves = [line for line in text.splitlines() if "x float>" in line and (" load <" in line or "store <" in line)]
    assert moves
    assert all("align 4" in line for line in moves)


def test_a_call_that_nothing_provides_is_refused(tmp_path: Path) -> None:
    x = te.placeholder((4,), name="x")
    y = te.compute((4,), lambda i: tirx.call_pure_extern("float32", "no_such_function", x[i]), name="y")
    strange = program(
        {"k": te.create_prim_func([x, y])},
        [buffer("x", "input", (4,)), buffer("y", "output", (4,))],
        [Step("k", ("x", "y"))],
        ["y"],
    )
    with pytest.raises(AssertionError, match="no_such_function"):
        load(strange, tmp_path)


@pytest.mark.parametrize("function", ["exp", "tanh", "erf", "pow"])
def test_functions_of_libm_are_found(tmp_path: Path, function: str) -> None:
    x = te.placeholder((33,), name="x")
    formula = {"pow": lambda v: tirx.pow(v, tirx.const(1.7, "float32"))}.get(function, getattr(tirx, function, None))
    y = te.compute((33,), lambda i: formula(x[i]), name="y")
    code = load(
        program(
            {"k": te.create_prim_func([x, y])},
            [buffer("x", "input", (33,)), buffer("y", "output", (33,))],
            [Step("k", ("x", "y"))],
            ["y"],
        ),
        tmp_path,
    )
    values, result = torch.linspace(0.1, 4, 33), torch.empty(33)
    run(code, 0, [values], [result])
    expected = values**1.7 if function == "pow" else getattr(torch, function)(values)
    torch.testing.assert_close(result, expected, rtol=4e-7, atol=0)  # two libraries, each within 2 ulp


def casting(source: str, target: str, count: int) -> Program:
    x = te.placeholder((count,), name="x", dtype=source)
    y = te.compute((count,), lambda i: x[i].astype(target), name="y")
    return Program(
        "cast",
        {"k": te.create_prim_func([x, y])},
        {"x": Buffer("x", (count,), source, "input"), "y": Buffer("y", (count,), target, "output")},
        (Step("k", ("x", "y")),),
        ("x",),
        ("y",),
        {},
    )


def interesting_halves() -> np.ndarray:
    """Every half, the points midway between neighbours, and the doubles just beside those points."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = (halves[:-1] + halves[1:]) / 2
    largest = np.array([65519.99999, 65520.0, 65520.00001, 1e300, np.inf, 5e-324, 2.0**-25, 2.0**-26])
    values = np.concatenate([halves, middles, np.nextafter(middles, 0), np.nextafter(middles, np.inf), largest])
    return np.concatenate([values, -values, [np.nan]])


def test_double_to_half_rounds_once(tmp_path: Path) -> None:
    values = torch.from_numpy(interesting_halves())
    code = load(casting("float64", "float16", len(values)), tmp_path)
    result = torch.empty(len(values), dtype=torch.float16)
    run(code, 0, [values], [result])
    with np.errstate(over="ignore"):
        expected = values.numpy().astype(np.float16)
    assert np.isnan(result[-1].item())
    np.testing.assert_array_equal(result.numpy().view(np.uint16)[:-1], expected.view(np.uint16)[:-1])


@pytest.mark.parametrize("target", ["float16", "bfloat16", "int8", "bool", "float64", "int64"])
@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
def test_casts(tmp_path: Path, source: str, target: str) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.75, 100.0, 0.1, -7.9]).to(getattr(torch, source))
    code = load(casting(source, target, len(values)), tmp_path)
    result = torch.empty(len(values), dtype=getattr(torch, target))
    run(code, 0, [values], [result])
    assert torch.equal(result, values.to(result.dtype))
