"""Fragments on NVIDIA's tensor cores whose lanes are documented: mma.sync m16n8k16, and ldmatrix that fills them.

    lane l holds, of 16 x 16 sums    rows l / 4 and l / 4 + 8; of each, columns l % 4 * 2, + 1, and those 8 further on

as wmma (wmma.py) does not say. Powers of scores are the left operand of the next product where they lie. On sm_75 a
multiplication of float16 is two of m16n8k8; bfloat16 is of sm_80 and later.

PTX ISA, "Matrix multiply-accumulate operation using mma instruction", and "ldmatrix". TVM's generator calls functions,
which `with_functions` defines in front of the kernels.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .matrix_tile import SIDE

_LOAD, _LOAD_TURNED, _MULTIPLY = "load_matrices", "load_matrices_turned", "multiply_"
_SPARSE = "multiply_sparse_"
_READ, _WRITE = 1, 2  # of an access pointer
_LINE = 8  # elements that a lane points ldmatrix at
_KINDS = {"float16": "f16", "bfloat16": "bf16"}


def _load(name: str, form: str) -> str:
    return f"""
static __device__ __forceinline__ void {name}(void* to, const void* shared) {{
  unsigned* held = static_cast<unsigned*>(to);
  unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4{form}.shared.b16 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(held[0]), "=r"(held[1]), "=r"(held[2]), "=r"(held[3]) : "r"(place) : "memory");
}}
"""


def _instruction(shape: str, kind: str, sums: int, left: tuple[int, ...], right: tuple[int, ...]) -> str:
    """Four sums from `sums`, with words of the operands by their numbers."""
    a = ", ".join(f"%{4 + i}" for i in range(len(left)))
    b = ", ".join(f"%{4 + len(left) + i}" for i in range(len(right)))
    outputs = ", ".join(f'"+f"(sums[{sums + i}])' for i in range(4))
    inputs = ", ".join([*(f'"r"(x[{i}])' for i in left), *(f'"r"(y[{i}])' for i in right)])
    return (
        f'  asm("mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{%0, %1, %2, %3}}, {{{a}}}, {{{b}}}, '
        f'{{%0, %1, %2, %3}};"\n      : {outputs} : {inputs});\n'
    )


def _multiply(dtype: str) -> str:
    kind = _KINDS[dtype]
    whole = "".join(_instruction("m16n8k16", kind, 4 * n, (0, 1, 2, 3), (2 * n, 2 * n + 1)) for n in (0, 1))
    halves = "".join(
        _instruction("m16n8k8", kind, 4 * n, (2 * k, 2 * k + 1), (2 * n + k,)) for n in (0, 1) for k in (0, 1)
    )
    body = whole if dtype == "bfloat16" else f"#if __CUDA_ARCH__ >= 800\n{whole}#else\n{halves}#endif\n"
    return f"""
static __device__ __forceinline__ void {_MULTIPLY}{dtype}(float* sums, const void* left, const void* right) {{
  const unsigned *x = static_cast<const unsigned*>(left), *y = static_cast<const unsigned*>(right);
{body}}}
"""


def _multiply_sparse(dtype: str) -> str:
    """By the pair of lanes that has the places (sparsity selector); y holds 16 of the sum for 16 columns, twice."""
    kind, text = _KINDS[dtype], ""
    for selector in (0, 1):
        instructions = ""
        for n in (0, 1):
            outputs = ", ".join(f'"+f"(sums[{4 * n + i}])' for i in range(4))
            inputs = ", ".join(f'"r"({word})' for word in ("x[0]", "x[1]", "x[2]", "x[3]"))
            columns = ", ".join(f'"r"(y[{i}])' for i in (2 * n, 2 * n + 1, 4 + 2 * n, 5 + 2 * n))
            instructions += (
                f'  asm(GRAPHWRIGHT_MMA_SP ".sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "\n'
                f'      "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9, %10, %11}}, "\n'
                f'      "{{%0, %1, %2, %3}}, %12, {selector};"\n'
                f'      : {outputs} : {inputs}, {columns}, "r"(places));\n'
            )
        text += f"""
static __device__ __forceinline__ void {_SPARSE}{dtype}_{selector}(float* sums, const void* left, const void* right,
                                                                   unsigned places) {{
  const unsigned *x = static_cast<const unsigned*>(left), *y = static_cast<const unsigned*>(right);
{instructions}}}
"""
    return _SPARSE_NAME + text


# PTX ISA 8.5 (CUDA 12.5) has the form whose places ascend, which is not slow on later devices.
_SPARSE_NAME = """
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define GRAPHWRIGHT_MMA_SP "mma.sp::ordered_metadata"
#else
#define GRAPHWRIGHT_MMA_SP "mma.sp"
#endif
"""

# Each with what calls it by.
CUDA_SOURCES = {
    f"{_LOAD}(": _load(_LOAD, ""),
    f"{_LOAD_TURNED}(": _load(_LOAD_TURNED, ".trans"),
    **{f"{_MULTIPLY}{dtype}(": _multiply(dtype) for dtype in _KINDS},
    **{f"{_SPARSE}{dtype}_": _multiply_sparse(dtype) for dtype in _KINDS},
}


class MmaLanes:
    """Where a lane's values of 16 x 16 fragments belong, and what is done with fragments."""

    rows, each, neighbours = 2, 4, 2  # of a fragment: rows, values of a row, and how many of those lie side by side
    sharing = (1, 2)  # distances of the lanes that hold the same rows
    part = rows * each

    def __init__(self, dtype: str, lane: Any) -> None:
        """`lane` is this thread's number in its warp."""
        self.dtype, self.lane = dtype, lane

    def row(self, number: int) -> Any:
        """That of row `number` of this lane."""
        return tirx.floordiv(self.lane, 4) + number * 8

    def column(self, number: int) -> Any:
        """That of value `number` of a row."""
        return tirx.floormod(self.lane, 4) * 2 + (number // 2 * 8 + number % 2)

    def at(self, row: int, number: int) -> int:
        """Where among the values of a fragment value `number` of row `row` is."""
        return number // 2 * 4 + row * 2 + number % 2

    def load_rows(self, held: Any, at: int, tile: Any, stride: int, row: Any, k: int) -> None:
        """Rows from `row`, 16 of the sum from `k`; neighbours of the sum are neighbours in `tile`."""
        line, further = tirx.floormod(self.lane, SIDE), tirx.floordiv(self.lane, SIDE) * 8
        self._fill(_LOAD, held, at, tile, (row + line) * stride + k + further)

    def load_columns(self, held: Any, at: int, tile: Any, stride: int, column: Any, k: int) -> None:
        """As `load_rows`, for the right operand."""
        line = tirx.floordiv(self.lane, SIDE) * 8 + tirx.floormod(self.lane, 8)
        further = tirx.floormod(tirx.floordiv(self.lane, 8), 2) * 8
        self._fill(_LOAD, held, at, tile, (column + line) * stride + k + further)

    def load_columns_turned(self, held: Any, at: int, tile: Any, stride: int, column: int, k: int) -> None:
        """As `load_columns`, where neighbouring columns are neighbours in `tile`."""
        line, further = tirx.floormod(self.lane, SIDE), tirx.floordiv(self.lane, SIDE) * 8
        self._fill(_LOAD_TURNED, held, at, tile, (k + line) * stride + column + further)

    def multiply(self, sums: Any, at: int, rows: Any, row_at: int, columns: Any, column_at: int) -> None:
        """Add a product of 16 x 16 x 16 to `sums`; where the parts of this lane begin."""
        added = _pointer(sums, at, self.part, "float32", _READ | _WRITE)
        left = _pointer(rows, row_at, self.part, self.dtype, _READ)
        right = _pointer(columns, column_at, self.part, self.dtype, _READ)
        T.evaluate(T.call_extern("void", _MULTIPLY + self.dtype, added, left, right))

    def _fill(self, name: str, held: Any, at: int, tile: Any, place: Any) -> None:
        to = _pointer(held, at, self.part, self.dtype, _WRITE)
        T.evaluate(T.call_extern("void", name, to, _pointer(tile, place, _LINE, self.dtype, _READ)))


def multiply_sparse(
    dtype: str, sums: tuple[Any, int], left: tuple[Any, int], right: tuple[Any, int], places: Any, selector: int
) -> None:
    """Add a product of 16 x 32 x 16 to `sums`, turned: buffers, and where the parts of this lane begin.

    `left` is 2 of 4: `places` is this lane's word of those (sparse_weights.py), `selector` the half that counts.
    """
    added = _pointer(*sums, 8, "float32", _READ | _WRITE)
    operands = (_pointer(*left, 8, dtype, _READ), _pointer(*right, 16, dtype, _READ))
    T.evaluate(T.call_extern("void", f"{_SPARSE}{dtype}_{selector}", added, *operands, places))


def _pointer(buffer: Any, at: Any, count: int, dtype: str, access: int) -> Any:
    """To `count` values: an address alone would be that of one value, and the buffer cut to it."""
    return T.tvm_access_ptr(T.type_annotation(dtype), buffer.data, at, count, access)
