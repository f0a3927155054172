"""Torch's own operator samples (OpInfo) as kernels for an A100 on the emulator: do the numbers agree with PyTorch's?

    python tests/cuda_on_cpu/sweep.py [--ops add,sort] [--dtypes float32,int64] [--samples 4] [--narrow 2] [--limit 60]
                                      [--json out.json]

Each operator in every dtype below that it takes and has a lowering in, in both orders of lanes, on the inputs of its
samples and on the same with NaN, infinities and extreme numbers among them. Many samples are compiled as one model: a
call of the compiler costs more than a kernel. The operators are done in worker processes, so that a crash is a result
like any other, and so is a step (tracing an operator, or compiling and running a model) that takes much longer than
others do.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "benchmarks")]
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "uint8", "bool")
OPERATORS = HERE.parents[1] / "docs" / "operators.md"  # which of them are compiled at all
# Their places are any of equal elements': PyTorch's order of those is none, and ours another.
PLACES = ("argsort", "kthvalue", "median", "mode", "msort", "nanmedian", "sort", "topk")
# Zeros around the image are multiplied here, and left out there: NaN where a weight is not finite.
FINITE_WEIGHTS = ("conv_transpose", "convolution")
# From the best to the worst. "alike": the code for CPUs gives the same, for numbers that are not finite, or overflow.
STATUSES = ("agrees", "alike", "refused", "failed", "wrong", "crash", "slow")
BATCH = 64  # samples in one model
CHUNK = 20  # operators of one process
ALLOWANCE = 3  # seconds more for each sample in a model
DATA = ("drawn", "nan", "infinite", "extreme")


@dataclass
class Sample:
    """One call of an operator, and what became of it."""

    operator: str
    dtype: str
    call: Any
    status: str = "agrees"
    detail: str = ""
    inputs: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # by the kind of data
    eager: dict[str, list[Any]] = field(default_factory=dict)

    def is_worse(self, status: str, detail: str) -> None:
        """Remember what went wrong, unless something worse did before."""
        if STATUSES.index(status) > STATUSES.index(self.status):
            self.status, self.detail = status, detail


def samples_of(info: Any, dtype: str, count: int) -> list[Sample]:
    """Samples from the whole list of an operator, the first and the last among them; those that PyTorch itself runs."""
    import op_sweep_worker as worker
    import torch

    torch.manual_seed(worker.SEED)
    drawn = list(info.sample_inputs("cpu", getattr(torch, dtype)))
    places = sorted({round(i * (len(drawn) - 1) / max(count - 1, 1)) for i in range(count)}) if drawn else []
    found = []
    for sample in (drawn[place] for place in places):
        made = Sample(info.formatted_name, dtype, worker.Call(info.op, (sample.input, *sample.args), sample.kwargs))
        for kind in DATA:
            first = any(name in made.operator for name in FINITE_WEIGHTS)
            inputs = tuple(t if first and n else changed(kind, t, n) for n, t in enumerate(made.call.tensors))
            try:
                results = made.call.eager(inputs=inputs)
            except Exception:  # a sample for another device, or an index that is none
                continue
            made.inputs[kind], made.eager[kind] = inputs, results
        if "drawn" in made.inputs:
            found.append(made)
    return found


def changed(kind: str, tensor: Any, seed: int) -> Any:
    """The tensor with some elements replaced: in floats by what `kind` says, in integers by extremes."""
    import torch

    special: tuple[float, ...] = ()
    if tensor.is_floating_point():
        limits = torch.finfo(tensor.dtype)
        extremes = (limits.max, limits.min, limits.tiny / 4, -0.0, 0.0)
        special = {"nan": (torch.nan,), "infinite": (torch.inf, -torch.inf), "extreme": extremes}.get(kind, ())
    elif kind == "extreme" and tensor.dtype not in (torch.bool, torch.complex64, torch.complex128):
        integers = torch.iinfo(tensor.dtype)
        special = (integers.max, integers.min, 0)
    if not special or not tensor.numel():
        return tensor
    result = tensor.clone().contiguous()
    draw = torch.Generator().manual_seed(seed)
    places = torch.randperm(result.numel(), generator=draw)[: min(len(special), max(1, result.numel() // 2))]
    first = int(torch.randint(len(special), (), generator=draw))
    for n, place in enumerate(places.tolist()):
        result.view(-1)[place] = special[(first + n) % len(special)]
    return result


def many(samples: Sequence[Sample]) -> tuple[Any, tuple[Any, ...]]:
    """One model of all the calls, and its inputs."""
    import torch

    class Many(torch.nn.Module):
        def forward(self, *tensors: Any) -> list[Any]:
            given, results = iter(tensors), []
            for sample in samples:
                results.append(sample.call(*(next(given) for _ in sample.call.tensors)))
            return results

    return Many(), inputs_of(samples, "drawn")


def inputs_of(samples: Sequence[Sample], kind: str) -> tuple[Any, ...]:
    """The tensors of all samples; drawn ones where PyTorch refuses the others."""
    return tuple(tensor for s in samples for tensor in s.inputs.get(kind, s.inputs["drawn"]))


def compiled(samples: Sequence[Sample]) -> Any:
    """The samples as one model for the emulated device."""
    import graphwright

    model, inputs = many(samples)
    return graphwright.compile(model, inputs, target="a100", verify=False, cache=False)


def admitted(samples: Sequence[Sample]) -> Iterator[Sample]:
    """The samples that can be compiled; the others get the reason."""
    import graphwright
    from graphwright.backends.lowering.supported import why_not
    from graphwright.compiler import build, capture, precision, rewriting
    from graphwright.compiler.partition import partition

    hw = graphwright.hwdb.lookup("a100")
    model, inputs = many(samples)
    try:
        graph = capture.capture(capture.export(model, inputs)).graph
        rewritten = rewriting.rewrite(graph, hw, build.default_passes(hw), precision.FP32).graph
        reasons = [str(reason) for reason in partition(rewritten, lambda node: why_not(node, hw)).reasons.values()]
    except Exception as error:  # of torch.export, of all kinds
        reasons = [f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"]
    if not reasons:
        yield from samples
    elif len(samples) == 1:
        samples[0].is_worse("refused", reasons[0])
    else:
        for sample in samples:
            yield from admitted([sample])


def run(samples: Sequence[Sample]) -> None:
    """Compile and compare; where that fails, by halves."""
    try:
        model = compiled(samples)
        results = {kind: called(model, samples, kind) for kind in DATA}
    except Exception as error:
        if len(samples) == 1:
            samples[0].is_worse("failed", f"{type(error).__name__}: {str(error).strip()}"[:1500])
            return
        kinds = sorted({(sample.operator, sample.dtype) for sample in samples})
        if len(kinds) > 1:  # all of one operator usually fail alike
            middle = kinds[len(kinds) // 2]
            run([sample for sample in samples if (sample.operator, sample.dtype) < middle])
            run([sample for sample in samples if (sample.operator, sample.dtype) >= middle])
            return
        for sample in samples:
            run([sample])
        return
    for kind, (upwards, downwards) in results.items():
        for number, sample in enumerate(samples):
            if kind in sample.inputs:
                compare(sample, kind, upwards[number], downwards[number])


def called(model: Any, samples: Sequence[Sample], kind: str) -> tuple[list[Any], list[Any]]:
    """The results in both orders of lanes."""
    inputs = inputs_of(samples, kind)
    first = model(*inputs)
    os.environ["EMULATED_REVERSE"] = "1"
    try:
        return first, model(*inputs)
    finally:
        del os.environ["EMULATED_REVERSE"]


def compare(sample: Sample, kind: str, upwards: Any, downwards: Any) -> None:
    """Our results against eager's, and against each other."""
    import op_sweep_worker as worker
    import torch
    from torch.utils import _pytree as pytree

    ours, again = pytree.tree_leaves(upwards), pytree.tree_leaves(downwards)
    if sample.operator in PLACES:
        kept = [n for n, x in enumerate(sample.eager[kind]) if x.dtype != torch.int64 or sample.dtype == "int64"][:1]
        ours, again, theirs = ([x[n] for n in kept] for x in (ours, again, sample.eager[kind]))
    else:
        theirs = sample.eager[kind]
    different = worker.difference(sample.call, ours, theirs, True, sample.inputs[kind])
    if different is not None:
        status = "alike" if kind != "drawn" and is_the_same_on_cpus(sample, kind, ours) else "wrong"
        sample.is_worse(status, f"{kind}: {described(sample)}: {different}")
    for one, other in zip(ours, again, strict=True):
        if isinstance(one, torch.Tensor):
            try:
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
            except AssertionError as error:
                sample.is_worse("wrong", f"{kind}: {described(sample)}: the orders of lanes differ: {error}")


def is_the_same_on_cpus(sample: Sample, kind: str, ours: list[Any]) -> bool:
    """Whether the same definitions, compiled for this processor, give these results."""
    import torch
    from torch.utils import _pytree as pytree

    import graphwright

    model, inputs = many([sample])
    compiled = graphwright.compile(model, inputs, verify=False, cache=False, threads=1)
    try:
        results = pytree.tree_leaves(compiled(*sample.inputs[kind]))
        torch.testing.assert_close(ours, results, equal_nan=True, check_stride=False)
    except AssertionError:
        return False
    return not compiled.report().eager


def described(sample: Sample) -> str:
    """The arguments of a sample in a few words."""
    shapes = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in sample.call.tensors]
    constants = [c for c, is_tensor in zip(sample.call.constants, sample.call.is_tensor, strict=True) if not is_tensor]
    return f"{', '.join(shapes)}; {constants}"[:300]


def allow(seconds: int) -> None:
    """Give this process so much more time of the CPU; after that it writes where it is and dies."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + seconds, most))


def work(names: Sequence[str], counts: dict[str, int], limit: int) -> None:
    """Do the operators in this process, and print a line of JSON for each operator and dtype."""
    import emulator

    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what operators print must not reach the answers
    emulator.start()
    import op_sweep_worker as worker
    import torch
    from torch.testing._internal import common_utils

    from graphwright.backends.gpu import cuda

    cuda.compile_cuda = emulator.compile_cuda
    cuda.find_compiler = lambda: cuda.Compiler("emulator", Path(emulator.__file__))
    cuda.check_architecture = lambda compiler, arch: None
    common_utils.extract_test_fn = lambda: None  # it looks through the stack for the test that asks for a sample
    faulthandler.register(signal.SIGXCPU, all_threads=False, chain=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    infos = {info.formatted_name: info for info in worker.operators()}
    waiting: list[Sample] = []
    done: list[Sample] = []
    for name in names:
        allow(limit)
        takes = {str(dtype).removeprefix("torch.") for dtype in infos[name].supported_dtypes("cpu")}
        wanted = [dtype for dtype in DTYPES if dtype in takes and dtype in counts]
        found = [s for dtype in wanted for s in samples_of(infos[name], dtype, counts[dtype])]
        ready = list(admitted(found))
        waiting += ready
        done += found
        if len(waiting) >= BATCH or name == names[-1]:
            allow(limit + ALLOWANCE * len(waiting))
            run(waiting)
            answer(done, channel)
            waiting, done = [], []


def answer(samples: Sequence[Sample], channel: Any) -> None:
    """A line for each operator and dtype: the worst of its samples."""
    groups: dict[tuple[str, str], list[Sample]] = collections.defaultdict(list)
    for sample in samples:
        groups[sample.operator, sample.dtype].append(sample)
    for (name, dtype), group in groups.items():
        worst = max(group, key=lambda s: STATUSES.index(s.status))
        ran = sum(s.status == "agrees" for s in group)
        record = {"operator": name, "dtype": dtype, "status": worst.status, "agree": ran, "detail": worst.detail}
        print(json.dumps(record), file=channel, flush=True)


def sweep(names: Sequence[str], counts: dict[str, int], limit: int) -> Iterator[dict[str, Any]]:
    """The records of the operators, by worker processes; those of a process that dies get one each."""
    chunks = collections.deque(list(names[i : i + CHUNK]) for i in range(0, len(names), CHUNK))
    while chunks:
        chunk = chunks.popleft()
        command = [sys.executable, __file__, "--work", ",".join(chunk), "--limit", str(limit)]
        done = subprocess.run([*command, "--counts", json.dumps(counts)], capture_output=True, text=True, check=False)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        print(f"to {chunk[-1]}", file=sys.stderr, flush=True)
        yield from records
        left = [name for name in chunk if name not in {record["operator"] for record in records}]
        if done.returncode and len(chunk) == 1:
            status = "slow" if done.returncode == -signal.SIGXCPU else "crash"
            yield {"operator": chunk[0], "dtype": "", "status": status, "agree": 0, "detail": done.stderr[-3000:]}
        elif done.returncode:
            chunks.extendleft([name] for name in reversed(left))


def main() -> int:
    """Run the sweep; the exit status is 1 if an operator is wrong, failed or crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", help="comma-separated names (default: all)")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma-separated (default: all)")
    parser.add_argument("--samples", type=int, default=4, help="samples in float32")
    parser.add_argument("--narrow", type=int, default=2, help="samples in each of the other dtypes")
    parser.add_argument("--limit", type=int, default=60, help="seconds of the CPU for a step, and 3 more a sample")
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--counts", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work.split(","), json.loads(options.counts), options.limit)
        return 0
    listed = re.findall(r"^\| (\S+) \| (?:compiled|partly) \|", OPERATORS.read_text(), re.MULTILINE)
    names = [name for name in listed if "empty" not in name]  # whose results are what was in memory
    if options.ops:
        wanted = options.ops.split(",")
        if unknown := set(wanted) - set(names):
            parser.error(f"no operator named {', '.join(sorted(unknown))} is compiled: {OPERATORS.name} has the list")
        names = wanted
    counts = {dtype: options.samples if dtype == "float32" else options.narrow for dtype in options.dtypes.split(",")}
    records = []
    for record in sweep(names, counts, options.limit):
        records.append(record)
        if record["status"] not in ("agrees", "refused"):
            print(
                f"{record['status']:7} {record['operator']:40} {record['dtype']:9} {record['detail'][:600]}", flush=True
            )
    found = collections.Counter(record["status"] for record in records)
    print(f"{len(names)} operators, {sum(r['agree'] for r in records)} samples agree; of operators and dtypes: "
          + ", ".join(f"{found[status]} {status}" for status in STATUSES))  # fmt: skip
    if options.json:
        rows = ",\n".join(json.dumps(record) for record in records)
        summary = json.dumps({status: found[status] for status in STATUSES})
        options.json.write_text(f'{{"counts": {json.dumps(counts)}, "summary": {summary}, "records": [\n{rows}\n]}}\n')
    return 1 if found["failed"] + found["wrong"] + found["crash"] else 0


if __name__ == "__main__":
    sys.exit(main())
