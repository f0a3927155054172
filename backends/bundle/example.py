"""The model of this bundle from Python with numpy alone: python3 example.py

model = Model()
results = model(image)        # arrays in the model's order; a list of arrays
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
# numpy has no bfloat16: its bits are given and taken as unsigned numbers.
DTYPES = {"bfloat16": "uint16"}


class Tensor(ctypes.Structure):
    """graphwright_tensor of graphwright.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_char_p),
        ("extents", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int32),
        ("bytes", ctypes.c_uint64),
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """The extents."""
        return tuple(self.extents[: self.rank])

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """What numpy calls the dtype."""
        name: str = self.dtype.decode()
        return np.dtype(DTYPES.get(name, name))


class Model:
    """A bundle's model.so, or model.dylib; calls may come from several threads."""

    def __init__(self, directory: str | Path = HERE, threads: int = 0) -> None:
        """threads=0 is all cores. Raises RuntimeError where the processor or the weights are not the model's."""
        name = "model.dylib" if sys.platform == "darwin" else "model.so"
        library = ctypes.CDLL(str(Path(directory).resolve() / name))
        library.graphwright_error.restype = ctypes.c_char_p
        library.graphwright_free.argtypes = (ctypes.c_void_p,)
        library.graphwright_run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        self.library, self.model = library, ctypes.c_void_p()
        self.inputs = self._tensors(library.graphwright_inputs)
        self.outputs = self._tensors(library.graphwright_outputs)
        weights = Path(directory) / "weights.safetensors"
        path = str(weights).encode() if weights.exists() else None
        self._check(library.graphwright_init(path, threads, ctypes.byref(self.model)))

    @staticmethod
    def _tensors(function: Any) -> list[Tensor]:
        table = ctypes.POINTER(Tensor)()
        count = function(ctypes.byref(table))
        return [table[i] for i in range(count)]

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(self.library.graphwright_error().decode())

    def __call__(self, *arrays: Any) -> list[Any]:
        """The results for one array per input. Raises ValueError for another shape or dtype."""
        if len(arrays) != len(self.inputs):
            raise ValueError(f"the model has {len(self.inputs)} inputs, not {len(arrays)}")
        given = [np.ascontiguousarray(a).reshape(np.shape(a)) for a in arrays]
        for i, tensor in enumerate(self.inputs):
            dtype, shape = tensor.numpy_dtype, tensor.shape
            if given[i].shape != shape or given[i].dtype != dtype:
                found = f"{given[i].dtype}{given[i].shape}"
                raise ValueError(f"{tensor.name.decode()}: {dtype}{shape} expected, {found} given")
        results = [np.empty(tensor.shape, tensor.numpy_dtype) for tensor in self.outputs]
        tables = [(ctypes.c_void_p * (len(a) + 1))(*(x.ctypes.data for x in a)) for a in (given, results)]
        self._check(self.library.graphwright_run(self.model, *tables))
        return results

    def __del__(self) -> None:
        if getattr(self, "model", None):
            self.library.graphwright_free(self.model)


if __name__ == "__main__":
    model = Model()
    found = model(*(np.zeros(t.shape, t.numpy_dtype) for t in model.inputs))
    for i, tensor in enumerate(model.outputs):
        print(f"{tensor.name.decode()}: {tensor.dtype.decode()}{list(tensor.shape)} {found[i].reshape(-1)[:4]}")
