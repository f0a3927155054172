"""Calls with tensors on the GPU, over the emulated driver; prints a line of JSON.

The PyTorch here has no CUDA: tensors on the device are TVM's, with the few members of a torch.Tensor that a call reads,
and streams are numbers. What PyTorch itself does with DLPack and streams is not run.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import emulator

emulator.start()

import torch  # noqa: E402  (torch and tvm come behind the driver)
import tvm  # noqa: E402
from torch import nn  # noqa: E402

import graphwright  # noqa: E402
from graphwright.backends.gpu.device_library import DeviceLibrary  # noqa: E402
from graphwright.errors import InputError  # noqa: E402

emulator.take_over()
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu  # noqa: E402


class There:
    """A tensor on the device, as a call sees it."""

    is_cpu = False

    def __init__(self, content: Any, device: str = "cuda:0") -> None:
        self.content, self.device = content, torch.device(device)

    def detach(self) -> There:
        """No gradients here."""
        return self

    contiguous = detach

    def data_ptr(self) -> int:
        """Where TVM has it."""
        return 1 << 20

    def __dlpack__(self, **options: Any) -> Any:
        return self.content.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self.content.__dlpack_device__()

    def back(self) -> torch.Tensor:
        """On the CPU."""
        return torch.from_numpy(self.content.numpy().copy())


class Shifted(There):
    """The same four bytes behind a place that wide loads take: a view x[1:] of odd rows."""

    copies = 0

    def data_ptr(self) -> int:
        """No multiple of 16."""
        return super().data_ptr() + 4

    def clone(self) -> There:
        """A copy lies where wide loads take it."""
        Shifted.copies += 1
        return There(self.content)


class Stream:
    """A stream of PyTorch's by its number, which keeps what is asked of it."""

    def __init__(self, number: int) -> None:
        self.cuda_stream, self.asked = number, []

    def wait_stream(self, other: Stream) -> None:
        """Note it."""
        self.asked.append(f"wait for {other.cuda_stream}")

    def synchronize(self) -> None:
        """Note it."""
        self.asked.append("synchronize")


def there(tensor: torch.Tensor) -> There:
    """A CPU tensor on the device."""
    return There(tvm.runtime.tensor(tensor.numpy(), tvm.cuda(0)))


def main() -> None:
    """Call on two streams, on the CPU, and wrongly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 48), nn.Softmax(-1), nn.Linear(48, 8)).eval()
    inputs = [torch.randn(20, 40) for _ in range(5)]
    streams = [Stream(11), Stream(12)]
    current = [streams[0]]
    torch.cuda.current_stream = lambda index: current[0]
    torch.utils.dlpack.from_dlpack = lambda tensor: There(tensor)
    compiled = graphwright.compile(model, (inputs[0],), target="a100", cache=False, verify=False)
    with tempfile.TemporaryDirectory() as scratch:
        library = DeviceLibrary(compiled.save(Path(scratch, "out")))
    seen: list[int] = []
    errors: list[float] = []
    for number, x in zip((0, 0, 1), inputs, strict=False):
        current[0] = streams[number]
        (made,) = library.call([there(x)])
        seen.append(emulator.counts().stream)
        errors.append(difference(made.back(), model(x)))
    (made,) = library.call([Shifted(there(inputs[4]).content)])
    errors.append(difference(made.back(), model(inputs[4])))
    (made,) = library.call([inputs[3]])
    errors.append(difference(made, model(inputs[3])))
    refused = []
    for wrong in ([there(inputs[4]), inputs[4]], [There(there(inputs[4]).content, "cuda:1")]):
        try:
            library.call(wrong)
        except InputError as error:
            refused.append(str(error))
    print(
        json.dumps(
            {
                "streams": seen,
                "on_cpu": emulator.counts().stream,
                "asked": [s.asked for s in streams],
                "errors": errors,
                "copies": Shifted.copies,
                "refused": refused,
                "ended": after_its_first_thread(),
                "benchmark": benchmark(model, inputs[0]),
            }
        )
    )


class Sorted(nn.Module):
    """A sort among what is recorded: between its kernels are values that the plan of memory does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 80), nn.Linear(80, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, 8]."""
        return self.last(torch.sort(self.first(x * 2)).values + 1)


def after_its_first_thread() -> float:
    """The error of a model whose first call was made by a thread that has ended."""
    model, x = Sorted().eval(), torch.randn(3, 8)
    compiled = graphwright.compile(model, (x,), target="a100", cache=False, verify=False)
    first = threading.Thread(target=compiled, args=(x,))
    first.start()
    first.join()
    return difference(compiled(x), model(x))


def benchmark(model: nn.Module, x: torch.Tensor) -> list[Any]:
    """What benchmarks/gpu.py measures of the model."""
    gpu.zoo.build = lambda name, batch: (model, (x,))
    gpu.WARM_UP, gpu.CALLS = 1, 2
    return [(row.subject, row.device_ms, row.error) for row in gpu.measured("small", "a100", 1, "fp32")]


def difference(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((result - exact).norm() / exact.norm())


if __name__ == "__main__":
    with torch.no_grad():
        main()
