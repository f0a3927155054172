"""Evidence about ARM code without an ARM machine: `make bench-arm` writes docs/measurements/arm.json.

- executed instructions of one inference, and how many for each vector multiply-add, counted by QEMU (qemu_count.c). One
  inference is a run of two calls less a run of one.
- the hot loop of every kernel in llvm-mca, LLVM's model of a core: multiply-adds a cycle, as a share of the model's own
  peak. It takes every load for a hit in L1 and every branch for predicted: it ranks instruction mixes. The same for
  kernels of their own: products and 3x3 convolutions in float32, float16 and int8.
- bytes of the program and the library beyond the weights, and the milliseconds that loading takes in QEMU.
- predicted latency, from the cost model, in float32 and in reduced precision.

None of it is a measurement of a board. Needs Debian's qemu-user and llvm-19.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import graphwright
from graphwright.backends.aot import codegen, toolchain
from graphwright.backends.kernels.bf16_matmul import FloatFinish, bf16_matmul
from graphwright.backends.kernels.conv2d import conv2d
from graphwright.backends.kernels.conv_plan import Conv, choose_plan
from graphwright.backends.kernels.dot_conv import choose_dot_conv, dot_conv
from graphwright.backends.kernels.dot_product import f16_dot, int8_dot
from graphwright.backends.kernels.int8_product import Requantize, int8_conv, int8_matmul
from graphwright.backends.kernels.matmul import matmul
from graphwright.backends.kernels.mmla import choose_mmla, mmla_conv, mmla_dot
from graphwright.compiler.benchmarking import zoo
from graphwright.hwdb import Hardware, lookup
from graphwright.passes import dialect_half

HERE = Path(__file__).resolve().parent
RESULT = HERE.parent / "docs" / "measurements" / "arm.json"
# LLVM's model of a core, and the vector multiply-adds of float32 it starts in a cycle. LLVM 19 has none of the
# Cortex-A76: the Neoverse N1 is the same design.
MODELS = {"cortex-a72": 1.0, "neoverse-n1": 2.0, "neoverse-n2": 2.0}
BOARDS = {"raspberry-pi-4b": ("cortex-a72", "cortex-a72"), "raspberry-pi-5": ("cortex-a76", "neoverse-n1")}
REDUCED = {"raspberry-pi-4b": ("int8",), "raspberry-pi-5": ("fp16", "int8")}  # what a board gains by
FMLA = re.compile(r"^\s+fmla\s+v\d+\.4s", re.M)
# Kernels judged alone: instruction, LLVM's model of a core, and the machine they are made for.
ALONE = (
    ("fmla of floats", r"fmla\s+v\d+\.4s", "cortex-a72", "raspberry-pi-4b"),
    ("fmla of floats", r"fmla\s+v\d+\.4s", "neoverse-n1", "raspberry-pi-5"),
    ("fmla of halves", r"fmla\s+v\d+\.8h", "neoverse-n1", "raspberry-pi-5"),
    ("smull and sadalp", r"smull2?\s", "cortex-a72", "raspberry-pi-4b"),
    ("sdot", r"sdot\s", "neoverse-n1", "raspberry-pi-5"),
    ("usmmla", r"usmmla\s", "neoverse-n2", "neoverse-n2"),
)
# Counted by the same plugin: the aarch64 wheel of ONNX Runtime 1.31.1, one thread, -cpu cortex-a76.
ONNX_RUNTIME = {"model": "resnet18", "instructions": 666_100_000, "fmla": 473_150_000}


def main() -> None:
    """Count, model and predict; print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet18", help="names of the zoo, separated by commas")
    parser.add_argument("--boards", default=",".join(BOARDS))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    for program in ("qemu-aarch64", "llvm-mca-19"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is missing: apt-get install qemu-user llvm-19")
    rows = [measured(name, board) for name in options.models.split(",") for board in options.boards.split(",")]
    for row in rows:
        print(f"{row['model']} on {row['board']}: {row['instructions'] / 1e6:.1f} M instructions, "
              f"{row['fmla'] / 1e6:.1f} M fmla, {row['instructions_per_fmla']:.3f} for each, "
              f"predicted {row['predicted_ms']:.1f} ms")  # fmt: skip
        for loop in row["loops"]:
            print(f"  {loop['share_of_peak']:6.1%} of {row['mca_core']}'s peak, {loop['instructions_per_fmla']:.2f} "
                  f"instructions per fmla, {loop['fmla']:3d} fmla: {loop['kernel']}")  # fmt: skip
    alone = [row for case in ALONE for row in judged_alone(*case)]
    for row in alone:
        each = f"{row['instructions_per_fmla']:.2f} instructions per {row['instruction']}"
        print(f"{row['share_of_peak']:6.1%} of {row['mca_core']}'s peak, {each}: {row['kernel']}")
    content = {"rows": rows, "kernels": alone, "onnxruntime": ONNX_RUNTIME}
    options.output.write_text(json.dumps(content, indent=1) + "\n")


def measured(name: str, board: str) -> dict[str, Any]:
    """The figures of one model of the zoo on one board."""
    emulated, core = BOARDS[board]
    model, inputs = zoo.build(name)
    with tempfile.TemporaryDirectory() as directory:
        texts, compiled = assembly(model, inputs, board)
        bundle = compiled.bundle(Path(directory, "out"))
        sizes = {f"{file}_bytes": (bundle / file).stat().st_size for file in ("run", "model.so")}
        loading = load_ms(bundle / "run", emulated)
        once, twice = (counts(bundle / "run", emulated, repeat) for repeat in (0, 1))
    one = {kind: twice[kind] - once[kind] for kind in once}
    return {
        "model": name,
        "board": board,
        "qemu_cpu": emulated,
        "mca_core": core,
        **one,
        **sizes,
        "load_ms_in_qemu": loading,
        "instructions_per_fmla": one["instructions"] / one["fmla"],
        "predicted_ms": sum(k.predicted_us or 0.0 for k in compiled.report().kernels) / 1e3,
        "predicted_reduced_ms": {name: reduced_ms(model, inputs, board, name) for name in REDUCED[board]},
        "loops": [found for kernel, text in texts.items() if (found := hot_loop(kernel, text, core))],
    }


def assembly(model: Any, inputs: Any, board: str) -> tuple[dict[str, str], Any]:
    """The assembly text of every kernel by its C name, and the compiled model."""
    import tvm

    texts: dict[str, str] = {}
    emit = codegen._emit

    def noting(module: Any, target: Any) -> bytes:
        text = tvm.get_global_func("target.build.llvm")(module, target).inspect_source("asm")
        texts[str(next(iter(module.functions)).name_hint)] = text
        return emit(module, target)

    codegen._emit = noting
    try:
        compiled = graphwright.compile(model, inputs, target=board, cache=False, verify=False)
    finally:
        codegen._emit = emit
    return texts, compiled


def hot_loop(kernel: str, text: str, core: str, instruction: str | None = None) -> dict[str, Any] | None:
    """The loop of one block that is densest in multiply-adds, through llvm-mca; None where no loop has eight.

    `instruction`: a pattern of the one to count; None: fmla of four floats.
    """
    blocks = re.split(r"^(\.L\w+):.*$", text, flags=re.M)
    of = FMLA if instruction is None else re.compile(rf"^\s+{instruction}", re.M)
    loops = [
        body[: match.end()]
        for label, body in zip(blocks[1::2], blocks[2::2], strict=True)
        if (match := re.search(rf"^\s+(?:b\.\w+|cbn?z\s+\w+,|b)\s+{re.escape(label)}$", body, re.M))
        and len(of.findall(body)) >= 8
    ]
    if not loops:
        return None
    code = max(loops, key=lambda body: len(of.findall(body)) / body.count("\n"))
    lines = [line for line in code.splitlines() if re.match(r"^\s+[a-z]", line)]
    fmla = len(of.findall(code))
    command = ["llvm-mca-19", "-mtriple=aarch64", f"-mcpu={core}", "-iterations=200", "-instruction-info=0"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=True)
    cycles = float(re.search(r"Total Cycles:\s+(\d+)", done.stdout)[1]) / 200  # type: ignore[index]
    return {
        "kernel": kernel,
        "fmla": fmla,
        "instructions_per_fmla": len(lines) / fmla,
        "cycles_per_fmla": cycles / fmla,
        "share_of_peak": fmla / MODELS[core] / cycles,
    }


def judged_alone(what: str, instruction: str, core: str, machine: str) -> list[dict[str, Any]]:
    """A product and a 3x3 convolution of one instruction in LLVM's model of a core."""
    hw = lookup(machine)
    problems = {
        "product 196x256x256": Conv(1, 1, 196, 256, 256, (1, 1)),
        "3x3 convolution 14x14x128": Conv(1, 14, 14, 128, 128, (3, 3), padding=(1, 1, 1, 1)),
    }
    rows = []
    for name, conv in problems.items():
        text = _assembly_of(_kernel(what, conv, hw), hw)
        found = hot_loop(name, text, core, instruction)
        assert found is not None, (what, name)
        rows.append({"instruction": what, "mca_core": core, **found})
    return rows


def _kernel(what: str, conv: Conv, hw: Hardware) -> Any:
    M, K, N = prod(conv.output_shape[:3]), conv.channels, conv.filters
    if what == "fmla of floats":
        return matmul(M, K, N, hw) if conv.pointwise else conv2d(conv, choose_plan(conv, hw))
    if what == "fmla of halves":
        dot, finish = f16_dot(hw, dialect_half.BLOCK), FloatFinish(M, N, True)
        assert dot is not None
        if conv.pointwise:
            return bf16_matmul(M, K, N, hw, finish, dot=dot)
        return dot_conv("f16_conv", conv, "float32", dot, choose_dot_conv(conv, dot, hw), finish)
    finish = Requantize(M, N, "uint8", output_shape=conv.output_shape)
    if what in ("sdot", "smull and sadalp"):
        dot = int8_dot(hw)
        return (
            int8_matmul(M, K, N, hw, "int8", finish, dot=dot)
            if conv.pointwise
            else int8_conv(conv, hw, "int8", finish, dot=dot)
        )
    dot = mmla_dot(hw, "uint8")
    assert dot is not None
    return mmla_conv(conv, "uint8", dot, choose_mmla(conv, hw), finish)


def _assembly_of(func: Any, hw: Hardware) -> str:
    import tvm

    target = tvm.target.Target(hw.tvm_target())
    return str(
        tvm.get_global_func("target.build.llvm")(
            codegen.lower({"kernel": func}, hw.tvm_target()), target
        ).inspect_source("asm")
    )


def reduced_ms(model: Any, inputs: Any, board: str, precision: str) -> float:
    """Predicted milliseconds in a reduced precision; as many as in float32 where the machine gains nothing."""
    given = {"calibration": [inputs]} if precision == "int8" else {}
    compiled = graphwright.compile(
        model, inputs, target=board, precision=precision, tolerance=0.5, cache=False, verify=False, **given
    )
    return sum(k.predicted_us or 0.0 for k in compiled.report().kernels) / 1e3


def load_ms(program: Path, cpu: str) -> float:
    """What the program says that mapping its weights took, the best of five runs in QEMU."""
    command = ["qemu-aarch64", "-cpu", cpu, str(program), "--threads", "1"]
    printed = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(5)]
    return min(float(re.search(r"loaded in ([\d.]+) ms", text)[1]) for text in printed)  # type: ignore[index]


def counts(program: Path, cpu: str, repeat: int) -> dict[str, int]:
    """What the program executes on one thread, by kind, with `repeat` calls after the first."""
    with tempfile.TemporaryDirectory() as directory:
        plugin = Path(directory, "qemu_count.so")
        toolchain.zig("cc", "-shared", "-fPIC", "-O2", str(HERE / "qemu_count.c"), "-Wl,--allow-shlib-undefined",
                      "-o", str(plugin), scratch=Path(directory))  # fmt: skip
        command = ["qemu-aarch64", "-cpu", cpu, "-plugin", str(plugin), "-d", "plugin", str(program), "--threads", "1"]
        command += ["--repeat", str(repeat)] if repeat else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    words = next(line for line in done.stderr.splitlines() if line.startswith("instructions ")).split()
    return {kind: int(number) for kind, number in zip(words[::2], words[1::2], strict=True)}


if __name__ == "__main__":
    main()
