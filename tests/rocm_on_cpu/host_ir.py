"""LLVM IR of a kernel for AMD's GPUs, as TVM's code generator hands it to the AMDGPU backend, as IR for this processor.

Address spaces have one kind of pointer here, so every access is preceded by a check that the address lies where its
space is (include/spaces.h): memory of the device, shared memory of the block, the stack of the thread. A cast between
spaces gives an address in neither, as on the GPU, where the hardware has a common one only for flat pointers (0). What
is AMD's (llvm.amdgcn.*) becomes functions of include/amdgcn.h, on pointers to results and operands.
"""

from __future__ import annotations

import re

_SPACE = re.compile(r",? addrspace\((\d+)\)")
_KERNEL = re.compile(r"^define [\w ]*amdgpu_kernel void @(\w+)\((.*)\)[^()]*(?:#\d+)? \{$")
_ACCESS = re.compile(r"^\s*(?:%\S+ = )?(?:tail )?(load|store|atomicrmw|cmpxchg)\b")
_POINTER = re.compile(r"\bptr(?: addrspace\((\d+)\))? ")
_ALIGN = re.compile(r", align (\d+)")
_CAST = re.compile(r"^(\s*%\S+ = )addrspacecast ptr(?: addrspace\((\d+)\))? (\S+) to ptr(?: addrspace\((\d+)\))?$")
_CONSTANT_CAST = re.compile(r"addrspacecast \(ptr(?: addrspace\((\d+)\))? (@[\w.]+) to ptr(?: addrspace\((\d+)\))?\)")
_DECLARED = re.compile(r"^declare (?:.*[ )])?(<\d+ x \w+>|\w+) @llvm\.(amdgcn\.[\w.]+)\((.*)\)")
_SHARED = re.compile(r"^(@[\w.]+) = .*addrspace\(3\) global (.*?)(?:, align (\d+))?$")
_WORDS = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "ptr": 8}
# Conversions that TVM defines weakly with 16-bit integers, which processors with half precision call otherwise.
_CONVERSIONS = ("__truncsfhf2", "__extendhfsf2")


def host_ir(text: str, number: int) -> tuple[str, list[str]]:
    """`text` for this processor, and its kernels: "kernel" becomes a function `emulated_<number>_kernel(void **)`.

    Raises ValueError for an access of a type it does not know.
    """
    lines: list[str] = []
    kernels: list[str] = []
    entries: list[str] = []
    section = f"shared_{number}"
    skipping = False
    for line in text.splitlines():
        if skipping or any(f"@{name}(" in line and line.startswith("define") for name in _CONVERSIONS):
            skipping = line != "}"
            continue
        if line.startswith(("target datalayout", "target triple")):
            continue
        if line.startswith("attributes #"):
            line = re.sub(r' "[^"]+"(?:="[^"]*")?', "", line)
        elif kernel := _KERNEL.match(line):
            name, parameters = kernel.groups()
            kernels.append(name)
            entries.append(_entry(name, _split(parameters), number))
            line = f"define internal void @{name}({parameters}) {{"
        elif shared := _SHARED.match(line):
            name, kind, align = shared.groups()
            line = f'{name} = internal global {kind}, section "{section}", align {max(int(align or 1), 16)}'
        elif declared := _DECLARED.match(line):
            line = _function(*declared.groups())
        else:
            line = _checked(line)
        lines.append(_SPACE.sub("", line).replace("@llvm.amdgcn.", "@amdgcn."))
    if not any(f'section "{section}"' in line for line in lines):
        lines.append(f'@none = internal global [16 x i8] undef, section "{section}"')
        entries.append("@llvm.used = appending global [1 x ptr] [ptr @none]")
    lines += entries
    lines.append(f"@__start_{section} = external hidden global i8\n@__stop_{section} = external hidden global i8")
    lines.append(_HELPERS)
    return "\n".join(lines), kernels


_HELPERS = """
declare void @emulated_begin(ptr, ptr)
declare void @emulated_space_0(ptr, i64, i64)
declare void @emulated_space_1(ptr, i64, i64)
declare void @emulated_space_3(ptr, i64, i64)
declare void @emulated_space_4(ptr, i64, i64)
declare void @emulated_space_5(ptr, i64, i64)
declare void @emulated_fence()
declare ptr @emulated_cast(ptr, i32, i32)
"""


def _checked(line: str) -> str:
    """An instruction, with the check in front of it."""
    line = _CONSTANT_CAST.sub(lambda m: _constant_cast(*m.groups()), line)
    if cast := _CAST.match(line):
        result, source, value, target = cast.groups()
        return f"{result}call ptr @emulated_cast(ptr {value}, i32 {source or 0}, i32 {target or 0})"
    if re.match(r'\s*fence syncscope\("workgroup"\) release', line):
        return f"  call void @emulated_fence()\n{line}"
    access = _ACCESS.match(line)
    if not access:
        return re.sub(r"(@llvm\.(?:memcpy|memset|memmove|lifetime\.\w+))((?:\.p\d+)+)", _flat_name, line)
    what, rest = access[1], line[access.end() :].replace(" volatile", "", 1)
    # store and cmpxchg: the value comes first; load: the type.
    parts = _split(rest)
    place = 0 if what in ("atomicrmw", "cmpxchg") else 1
    pointer = _POINTER.search(parts[place])
    assert pointer, line
    value = parts[0] if what in ("load", "store") else parts[1]
    size = _bytes(value.strip())
    align = _ALIGN.search(line)
    given = f"ptr {parts[place][pointer.end() :]}, i64 {size}, i64 {align[1] if align else 1}"
    return f"  call void @emulated_space_{pointer[1] or 0}({given})\n{line}"


def _flat_name(match: re.Match[str]) -> str:
    return match[1] + re.sub(r"p\d+", "p0", match[2])


def _constant_cast(source: str | None, name: str, target: str | None) -> str:
    """Of an address that is known: an address in no space, but for flat pointers."""
    return name if target is None else f"inttoptr (i64 {16 * int(target)} to ptr)"


def _split(text: str) -> list[str]:
    """What commas part that are in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"(": 1, "<": 1, "[": 1, "{": 1, ")": -1, ">": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def _bytes(value: str) -> int:
    """Of a type, with or without a value behind it."""
    if vector := re.match(r"<(\d+) x (\w+)>", value):
        return (int(vector[1]) * _bits(vector[2]) + 7) // 8
    return (_bits(value.split()[0]) + 7) // 8


def _bits(word: str) -> int:
    if integer := re.fullmatch(r"i(\d+)", word):
        return int(integer[1])
    if word not in _WORDS:
        raise ValueError(f"an access of type {word}, whose size is not known here")
    return 8 * _WORDS[word]


def _type(parameter: str) -> str:
    """Of a parameter, without its attributes and name."""
    found = re.match(r"\s*(<\d+ x \w+>|\w+)", parameter)
    assert found, parameter
    return found[1]


def _entry(kernel: str, parameters: list[str], number: int) -> str:
    """A function of the array of pointers to the arguments."""
    lines = [f"define void @emulated_{number}_{kernel}(ptr %arguments) {{"]
    lines.append(f"  call void @emulated_begin(ptr @__start_shared_{number}, ptr @__stop_shared_{number})")
    given = []
    for place, parameter in enumerate(parameters):
        kind = _type(parameter)
        lines.append(f"  %at{place} = getelementptr ptr, ptr %arguments, i64 {place}")
        lines.append(f"  %from{place} = load ptr, ptr %at{place}")
        lines.append(f"  %a{place} = load {kind}, ptr %from{place}")
        given.append(f"{kind} %a{place}")
    lines += [f"  call void @{kernel}({', '.join(given)})", "  ret void", "}"]
    return "\n".join(lines)


def _function(result: str, name: str, parameters: str) -> str:
    """An intrinsic as a function that hands pointers to the result and the operands to one of include/amdgcn.h."""
    symbol = "emulated_" + name.replace(".", "_")
    kinds = [_type(parameter) for parameter in _split(parameters)]
    lines = [f"define internal {result} @{name}({', '.join(f'{kind} %v{i}' for i, kind in enumerate(kinds))}) {{"]
    given = []
    if result != "void":
        lines.append(f"  %r = alloca {result}")
        given.append("ptr %r")
    for i, kind in enumerate(kinds):
        lines += [f"  %p{i} = alloca {kind}", f"  store {kind} %v{i}, ptr %p{i}"]
        given.append(f"ptr %p{i}")
    lines.append(f"  call void @{symbol}({', '.join(given)})")
    lines += ["  ret void"] if result == "void" else [f"  %x = load {result}, ptr %r", f"  ret {result} %x"]
    lines += ["}", f"declare void @{symbol}({', '.join('ptr' for _ in given)})"]
    return "\n".join(lines)
