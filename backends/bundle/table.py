"""What a bundle's C code has to know of its model, as a C file: bundle.h says what each field means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .features import Feature


@dataclass(frozen=True)
class Tensor:
    """An input or output: dense and row-major."""

    name: str
    dtype: str  # torch's name
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Copy:
    """An output that is a copy: of input or output `source`, or of `constant`."""

    kind: Literal["input", "output", "constant"]
    output: int
    source: int = 0
    constant: bytes = b""


@dataclass(frozen=True)
class Table:
    """All that is known of a model when it is bundled."""

    target: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    features: tuple[Feature, ...]  # features.needed
    read: tuple[int, ...]  # the model's input of each operand of the region; written: the output of each result
    written: tuple[int, ...]
    copies: tuple[Copy, ...] = ()
    runs: bool = True  # False: there is no region
    weights_bytes: int = 0  # of the data section
    header: bytes = b""  # what precedes it in the weights file


# Behind weights that are inside. Of a file that was cut its page is missing, or zeros.
_LAST = "end of the weights"


def digest(content: bytes) -> int:
    """FNV-1a, 64 bits (http://www.isthe.com/chongo/tech/comp/fnv): bundle.c compares it, and need not be safe."""
    value = 0xCBF29CE484222325
    for byte in content:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def c_source(table: Table, embedded: str | None = None, embedded_digest: str = "") -> str:
    """The C file that defines `bundle`; the weights file called `embedded` becomes part of the object.

    Compilers that keep results look at the text, not at what the assembler reads: the file's digest is in it.
    """
    blocks = [f"/* {table.target} {embedded_digest} */", '#include "bundle.h"\n']
    weights = "0"
    inside = embedded is not None and table.weights_bytes
    if inside:
        # The assembler reads the file: no compiler would take it as an array of numbers.
        lines = (f'.incbin \\"{embedded}\\", {len(table.header)}', f'.ascii \\"{_LAST}\\"')
        text = " ".join(f'"{line}\\n"' for line in lines)
        blocks.append(f"__asm__(BUNDLE_WEIGHTS_BEGIN {text} BUNDLE_WEIGHTS_END);")
        blocks.append('extern __attribute__((visibility("hidden"))) const unsigned char bundle_weights[];\n')
        weights = "bundle_weights"
    blocks += [_tensors("inputs", table.inputs), _tensors("outputs", table.outputs)]
    constants = [copy.constant for copy in table.copies if copy.kind == "constant"]
    blocks += [
        f"static const _Alignas(64) unsigned char constant_{i}[] = {{{', '.join(map(str, c)) or '0'}}};"
        for i, c in enumerate(constants)
    ]
    blocks.append(
        _array(
            "bundle_feature", "features", [f'{{"{f.name}", {f.word}, {f.bit}, "{f.question}"}}' for f in table.features]
        )
    )
    numbers = iter(range(len(constants)))
    blocks.append(
        _array(
            "bundle_copy",
            "copies",
            [
                f"{{COPY_{copy.kind.upper()}, {copy.source}, "
                f"{f'constant_{next(numbers)}' if copy.kind == 'constant' else '0'}, {copy.output}}}"
                for copy in table.copies
            ],
        )
    )
    blocks.append(_array("int", "read", [str(i) for i in table.read]))
    blocks.append(_array("int", "written", [str(i) for i in table.written]))
    fields = {
        "target": _quoted(table.target),
        "input_count": len(table.inputs),
        "output_count": len(table.outputs),
        "feature_count": len(table.features),
        "copy_count": len(table.copies),
        "inputs": "inputs",
        "outputs": "outputs",
        "features": "features",
        "copies": "copies",
        "runs": int(table.runs),
        "read_count": len(table.read),
        "written_count": len(table.written),
        "read": "read",
        "written": "written",
        "weights_bytes": table.weights_bytes,
        "header_bytes": len(table.header),
        "header_digest": f"{digest(table.header):#x}u",
        "embedded": weights,
        "last": _quoted(_LAST if inside else ""),
    }
    body = "\n".join(f"    .{name} = {value}," for name, value in fields.items())
    return "\n".join([*blocks, f"\nconst bundle_table bundle = {{\n{body}\n}};\n"])


def _tensors(name: str, tensors: Sequence[Tensor]) -> str:
    rows = []
    for tensor in tensors:
        extents = ", ".join(map(str, tensor.shape)) or "0"
        shape = f"(const int64_t[]){{{extents}}}"
        rows.append(f'{{{_quoted(tensor.name)}, "{tensor.dtype}", {shape}, {len(tensor.shape)}, {tensor.nbytes}}}')
    return _array("graphwright_tensor", name, rows)


def _array(kind: str, name: str, rows: Sequence[str]) -> str:
    """C has no arrays without elements: one of zeros stands for none."""
    body = "".join(f"\n    {row}," for row in rows) or "0"
    return f"static const {kind} {name}[] = {{{body}}};"


def _quoted(text: str) -> str:
    """A C string: whatever is not plain ASCII goes by octal codes of its UTF-8."""
    plain = (chr(b) if 32 <= b < 127 and chr(b) not in '"\\?' else f"\\{b:03o}" for b in text.encode())
    return f'"{"".join(plain)}"'
