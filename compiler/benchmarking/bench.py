"""Callables that run a model in eager, Inductor, ONNX Runtime or OpenVINO, and rounds in which callables take turns."""

from __future__ import annotations

import copy
import fcntl
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import ToolMissing

Runner = Callable[[], Any]


def interleave(runners: Mapping[str, Runner], rounds: int = 15, warm: int = 3) -> dict[str, float]:
    """Median milliseconds of each runner; a round runs every one of them once, so that drift meets all alike.

    Before its turn the threads of the others, which spin for a while after their last task, are given time to sleep.
    """
    for run in runners.values():
        for _ in range(warm):
            run()
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            settle()
            # One call untimed: the other runners have put their own data in the caches.
            run()
            started = time.perf_counter()
            run()
            samples[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def settle(most_seconds: float = 1.0) -> None:
    """Return when this process uses next to no processor, or after `most_seconds`."""
    end = time.perf_counter() + most_seconds
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.001:
            return


def eager(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> Runner:
    """PyTorch as it is."""

    def run() -> Any:
        with torch.inference_mode():
            return model(*inputs)

    return run


def inductor(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> Runner:
    """torch.compile with frozen weights."""
    import torch._inductor.config as config

    config.freezing = True
    torch._dynamo.reset()
    compiled = torch.compile(model)

    def run() -> Any:
        with torch.no_grad():
            return compiled(*inputs)

    run()
    return run


def narrowed(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """A copy of the model in bfloat16, and inputs to match."""
    wide = (torch.float32, torch.float64)
    return copy.deepcopy(model).bfloat16(), [x.bfloat16() if x.dtype in wide else x for x in inputs]


def onnxruntime(model: torch.nn.Module, inputs: Sequence[torch.Tensor], threads: int, path: Path) -> Runner:
    """ONNX Runtime on the CPU with all its graph optimisations; `path` keeps the exported model."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ToolMissing("pip install 'graphwright[peers]'") from error

    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(_onnx(model, inputs, path)), options, providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, feed)


def openvino(
    model: torch.nn.Module, inputs: Sequence[torch.Tensor], threads: int, path: Path, precision: str = "fp32"
) -> Runner:
    """OpenVINO tuned for latency; `path` keeps the exported model."""
    try:
        import openvino as ov
    except ImportError as error:
        raise ToolMissing("pip install 'graphwright[peers]'") from error
    core = ov.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = core.compile_model(core.read_model(_onnx(model, inputs, path)), "CPU", settings)
    request = compiled.create_infer_request()
    feed = {i: x.numpy() for i, x in enumerate(inputs)}
    return lambda: list(request.infer(feed).values())


def _onnx(model: torch.nn.Module, inputs: Sequence[torch.Tensor], path: Path) -> Path:
    """The model in ONNX at `path`; who comes second waits for who came first."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            program = torch.onnx.export(model, tuple(inputs), dynamo=True, verbose=False)
            assert program is not None
            unfinished = path.with_suffix(".part")
            unfinished.write_bytes(program.model_proto.SerializeToString())
            os.replace(unfinished, path)
    return path
