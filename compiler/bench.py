"""Time a compiled model beside eager, Inductor, ONNX Runtime and OpenVINO: interleaved rounds, equal threads."""

from __future__ import annotations

import json
import logging
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import GraphwrightError, ToolMissing, suggest
from .reference import relative_l2

log = logging.getLogger(__name__)

Runner = Callable[[], Any]
PEERS = ("eager", "inductor", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Row:
    """One model: milliseconds and errors by runner; a peer that cannot run the model says why."""

    model: str
    milliseconds: dict[str, float]
    relative_l2: dict[str, float]
    compile_seconds: dict[str, float]
    unavailable: dict[str, str] = field(default_factory=dict)
    arena_bytes: int = 0
    arena_lower_bound_bytes: int = 0
    peak_rss_bytes: int = 0  # of the process that ran everybody, peers included

    @property
    def best_peer(self) -> str:
        """The fastest of the others."""
        peers = {k: v for k, v in self.milliseconds.items() if k != "graphwright"}
        return min(peers, key=lambda k: peers[k])

    def ratio(self, peer: str) -> float:
        """Our time over the peer's."""
        return self.milliseconds["graphwright"] / self.milliseconds[peer]


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


def onnxruntime(model: torch.nn.Module, inputs: Sequence[torch.Tensor], threads: int) -> Runner:
    """ONNX Runtime on the CPU with all its graph optimisations."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ToolMissing("pip install 'graphwright[peers]'") from error

    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(_onnx(model, inputs), options, providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, feed)


def openvino(model: torch.nn.Module, inputs: Sequence[torch.Tensor], threads: int) -> Runner:
    """OpenVINO in float32, tuned for latency."""
    try:
        import openvino as ov
    except ImportError as error:
        raise ToolMissing("pip install 'graphwright[peers]'") from error
    core = ov.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = core.compile_model(core.read_model(_onnx(model, inputs)), "CPU", settings)
    request = compiled.create_infer_request()
    feed = {i: x.numpy() for i, x in enumerate(inputs)}
    return lambda: list(request.infer(feed).values())


def measure(
    name: str,
    model: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    against: Sequence[str],
    rounds: int,
    threads: int,
    target: str = "native",
) -> Row:
    """Compile with everybody, check everybody's numbers, time all of them in one run."""
    from .api import compile

    torch.set_num_threads(threads)
    runners: dict[str, Runner] = {}
    seconds: dict[str, float] = {}
    missing: dict[str, str] = {}
    makers: dict[str, Callable[[], Runner]] = {
        "eager": lambda: eager(model, inputs),
        "inductor": lambda: inductor(model, inputs),
        "onnxruntime": lambda: onnxruntime(model, inputs, threads),
        "openvino": lambda: openvino(model, inputs, threads),
    }
    started = time.perf_counter()
    compiled = compile(model, tuple(inputs), target=target, threads=threads, cache=False)
    seconds["graphwright"] = time.perf_counter() - started
    runners["graphwright"] = lambda: compiled(*inputs)
    for peer in against:
        started = time.perf_counter()
        try:
            runners[peer] = makers[peer]()
            runners[peer]()
        except Exception as error:
            # A peer that refuses a model is a row of the table, not the end of the run.
            runners.pop(peer, None)
            missing[peer] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            log.warning("%s cannot run %s: %s", peer, name, missing[peer])
        seconds[peer] = time.perf_counter() - started
    errors = _errors(model, inputs, runners)
    report = compiled.report()
    return Row(
        name,
        interleave(runners, rounds),
        errors,
        seconds,
        missing,
        report.arena_bytes,
        report.arena_lower_bound_bytes,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def bench_models(
    models: Sequence[str],
    against: Sequence[str] = PEERS,
    rounds: int = 15,
    threads: int | None = None,
    json_path: str | Path | None = None,
    inputs: Mapping[str, tuple[torch.nn.Module, Sequence[torch.Tensor]]] | None = None,
) -> int:
    """Measure models (names of the zoo, or entries of `inputs`), print the table, write JSON; returns how many ran.

    Raises GraphwrightError for a peer that is not one of eager, inductor, onnxruntime, openvino.
    """
    for peer in against:
        if peer not in PEERS:
            raise GraphwrightError(f"no peer {peer!r}{suggest(peer, PEERS)}; there are {', '.join(PEERS)}")
    from . import zoo

    threads = threads or torch.get_num_threads()
    rows: list[Row] = []
    for name in models:
        model, example = (inputs or {})[name] if name in (inputs or {}) else zoo.build(name)
        rows.append(measure(name, model, example, against, rounds, threads))
        _print(rows[-1:], against, header=len(rows) == 1)
    if json_path is not None:
        text = json.dumps({"machine": machine(threads), "rounds": rounds, "rows": [asdict(r) for r in rows]}, indent=1)
        Path(json_path).write_text(text + "\n")
    return len(rows)


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    from ..hwdb import detect

    hw = detect()
    return {
        "cpu": hw.name,
        "isa": hw.isa,
        "vector_bits": hw.vector_bits,
        "cores": os.cpu_count(),
        "threads": threads,
        "caches": [[c.level, c.size_bytes] for c in hw.caches],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg(),
    }


def _errors(model: torch.nn.Module, inputs: Sequence[torch.Tensor], runners: Mapping[str, Runner]) -> dict[str, float]:
    """Relative L2 of each runner's first output against the model in float64."""
    import copy

    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        exact = _first(wide(*[x.double() if x.is_floating_point() else x for x in inputs]))
    return {name: relative_l2(_first(run()), exact) for name, run in runners.items()}


def _first(result: Any) -> torch.Tensor:
    leaf = pytree.tree_leaves(result)[0]
    return leaf if isinstance(leaf, torch.Tensor) else torch.from_numpy(leaf)


def _onnx(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> bytes:
    program = torch.onnx.export(model, tuple(inputs), dynamo=True, verbose=False)
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def _print(rows: Sequence[Row], against: Sequence[str], header: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=header)
    table.add_column("model", min_width=12)
    for peer in ("graphwright", *against):
        table.add_column(f"{peer} ms", min_width=12, justify="right")
    for column in ("best peer", "ratio", "error", "eager's", "compile s", "activations MB"):
        table.add_column(column, min_width=9, justify="right")
    for row in rows:
        table.add_row(
            row.model,
            *[f"{row.milliseconds[p]:.2f}" if p in row.milliseconds else "-" for p in ("graphwright", *against)],
            row.best_peer if len(row.milliseconds) > 1 else "-",
            f"{row.ratio(row.best_peer):.2f}" if len(row.milliseconds) > 1 else "-",
            f"{row.relative_l2['graphwright']:.1e}",
            f"{row.relative_l2['eager']:.1e}" if "eager" in row.relative_l2 else "-",
            f"{row.compile_seconds['graphwright']:.1f}",
            f"{row.arena_bytes / 1e6:.1f}",
        )
    Console(width=170).print(table)
