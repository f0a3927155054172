"""Element types: one full name each, and how many bits an element takes."""

from __future__ import annotations

# Types CPUs and GPUs have arithmetic or storage for, by the names of torch and TVM. tf32 is float32 storage
# multiplied with 10 bits of mantissa; float8 and float4 stand for all their formats.
BITS = {
    "float64": 64,
    "float32": 32,
    "tf32": 32,
    "float16": 16,
    "bfloat16": 16,
    "float8": 8,
    "float6": 6,
    "float4": 4,
    "int64": 64,
    "int32": 32,
    "int16": 16,
    "int8": 8,
    "uint8": 8,
    "int4": 4,
    "int1": 1,
    "bool": 8,
}

# Types all of whose values float32 holds: its mantissa has 24 bits.
WITHIN_FLOAT32 = frozenset(
    {"float32", "tf32", "float16", "bfloat16", "float8", "float6", "float4"}
    | {"int16", "int8", "uint8", "int4", "int1", "bool"}
)

_SPELLINGS = {
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp8": "float8",
    "fp6": "float6",
    "fp4": "float4",
    "i8": "int8",
    "u8": "uint8",
    "i4": "int4",
}


def dtype_name(dtype: str) -> str:
    """Return the full name of `dtype`: "fp32" and "torch.float32" are "float32", "float8_e4m3fn" is "float8"."""
    name = dtype.removeprefix("torch.")
    if name.startswith(("float8_", "float4_")):
        name = name[:6]
    return _SPELLINGS.get(name, name)
