"""Compiled programs compute the right numbers: from any thread, at any alignment, after a fork, and fail in words."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from aot_programs import WIDTH, add_one, buffer, build, double, failing, load, matmul, program, run, two_kernels

from graphwright.backends.aot.library import Library, merge_kernels
from graphwright.backends.aot.program import Step
from graphwright.errors import ArtifactError, GraphwrightError


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory, weight: torch.Tensor) -> Library:
    return load(two_kernels(), tmp_path_factory.mktemp("two"), {"w": weight}, threads=2)


def call(code: Library, x: torch.Tensor) -> torch.Tensor:
    y = torch.full((WIDTH, WIDTH), float("nan"))
    run(code, 0, [x], [y])
    return y


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """2 (x . w) in float64."""
    return 2 * (x.double() @ weight.double())


@pytest.mark.parametrize("threads", [1, 2, 4, 64])
def test_two_kernels(code: Library, weight: torch.Tensor, threads: int) -> None:
    before, code.threads = code.threads, threads
    assert code.threads == threads
    x = torch.randn(WIDTH, WIDTH)
    # 64 products of size about 1, each rounded to 2^-24
    torch.testing.assert_close(call(code, x).double(), exact(x, weight), rtol=0, atol=64 * 8 * 2**-24)
    code.threads = before


def test_every_number_of_threads_gives_the_same_bits(code: Library) -> None:
    x = torch.randn(WIDTH, WIDTH)
    results = []
    for threads in (1, 2, 3, 5, 8):
        code.threads = threads
        results.append(call(code, x))
    code.threads = 2
    assert all(torch.equal(results[0], other) for other in results)


def test_threads_zero_means_the_cores_of_this_process(tmp_path: Path, weight: torch.Tensor) -> None:
    loaded = load(two_kernels(), tmp_path, {"w": weight}, threads=0)
    assert loaded.threads == len(os.sched_getaffinity(0))
    loaded.close()


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_tensors_aligned_to_their_element_only(code: Library, weight: torch.Tensor, offset: int) -> None:
    room = torch.zeros(2, WIDTH * WIDTH + 16)
    for row in room:
        assert row[offset:].data_ptr() % 32 != 0 or offset % 8
    x, y = (row[offset : offset + WIDTH * WIDTH].view(WIDTH, WIDTH) for row in room)
    x.copy_(torch.randn(WIDTH, WIDTH))
    run(code, 0, [x], [y])
    assert torch.equal(y, call(code, x.clone()))
    assert not room[1, :offset].any()
    assert not room[1, offset + WIDTH * WIDTH :].any()


def test_many_threads_at_once_each_get_their_own_result(code: Library) -> None:
    inputs = [torch.randn(WIDTH, WIDTH) for _ in range(8)]
    expected = [call(code, x) for x in inputs]
    gate = threading.Barrier(8)

    def work(number: int) -> int:
        gate.wait()
        return sum(torch.equal(call(code, inputs[number]), expected[number]) for _ in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [200] * 8


def test_threads_may_be_changed_while_calls_run(code: Library) -> None:
    x = torch.randn(WIDTH, WIDTH)
    expected = call(code, x)
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for threads in (1, 3, 2, 4):
                code.threads = threads

    changer = threading.Thread(target=change)
    changer.start()
    try:
        assert all(torch.equal(call(code, x), expected) for _ in range(300))
    finally:
        stop.set()
        changer.join()
        code.threads = 2


def test_the_gil_is_released(tmp_path: Path) -> None:
    """While a call runs in one thread, Python runs in another."""
    width = 512
    buffers = [buffer("x", "input", (width, width)), buffer("w", "input", (width, width))]
    buffers.append(buffer("y", "output", (width, width)))
    slow = load(
        program({"matmul": matmul(width, width)}, buffers, [Step("matmul", ("x", "w", "y"))] * 8, ["y"]), tmp_path
    )
    tensors = [torch.zeros(width, width) for _ in range(3)]
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    before = counted[0]
    # With the GIL held the counter could not move between these two lines but for a switch at either end.
    run(slow, 0, tensors[:2], tensors[2:])
    moved = counted[0] - before
    stop.set()
    counter.join()
    slow.close()
    assert moved > 1000


def child_result(code: Library, x: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a forked child gets the same result."""
    process = os.fork()
    if process == 0:
        good = all(torch.equal(call(code, x), expected) for _ in range(20))
        os._exit(0 if good else 1)
    return os.waitpid(process, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_after_fork_both_processes_go_on(code: Library) -> None:
    code.threads = 3
    x = torch.randn(WIDTH, WIDTH)
    expected = call(code, x)  # the workers exist now
    assert child_result(code, x, expected)
    assert torch.equal(call(code, x), expected)
    code.threads = 2


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_fork_while_another_thread_is_inside_a_call(code: Library) -> None:
    x = torch.randn(WIDTH, WIDTH)
    expected = call(code, x)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            call(code, x)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert all(child_result(code, x, expected) for _ in range(10))
    finally:
        stop.set()
        worker.join()


def test_a_process_ends_with_calls_still_running(tmp_path: Path, weight: torch.Tensor) -> None:
    load(two_kernels(), tmp_path, {"w": weight}).close()
    script = f"""
import threading, time, torch
from pathlib import Path
from graphwright.backends.aot.library import Library
code = Library(Path({str(tmp_path)!r}, "model.so"), Path({str(tmp_path)!r}, "weights.safetensors"), threads=4)
x, y = torch.ones(2, {WIDTH}, {WIDTH})
def work():
    while True: code.run(0, [x.data_ptr()], [y.data_ptr()])
for _ in range(3): threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
print("leaving")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "leaving\n"), done.stderr


def test_loading_running_and_closing_again_and_again(tmp_path: Path, weight: torch.Tensor) -> None:
    load(two_kernels(), tmp_path, {"w": weight}).close()
    threads_before = len(os.listdir("/proc/self/task"))
    x, expected = torch.randn(WIDTH, WIDTH), None
    for _ in range(20):
        loaded = Library(tmp_path / "model.so", threads=4)
        result = call(loaded, x)
        assert expected is None or torch.equal(result, expected)
        expected = result
        assert len(os.listdir("/proc/self/task")) > threads_before
        loaded.close()
        assert len(os.listdir("/proc/self/task")) == threads_before
    assert "model.so" not in "".join(
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
    )


def test_an_unused_library_is_unloaded(tmp_path: Path, weight: torch.Tensor) -> None:
    loaded = load(two_kernels(), tmp_path, {"w": weight})
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del loaded
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_failing_kernel_is_named_and_the_next_call_works(tmp_path: Path) -> None:
    one = (1,)
    buffers = [buffer("x", "input", one), buffer("t", "temporary", one), buffer("y", "output", one)]
    steps = [Step(None, ("x", "t")), Step("failing", ("t", "y"))]
    code = load(program({"failing": failing()}, buffers, steps, ["y"]), tmp_path)
    y = torch.zeros(1)
    with pytest.raises(GraphwrightError, match="step 1 of region 0 returned -1: RuntimeError: x is negative"):
        run(code, 0, [torch.tensor([-1.0])], [y])
    run(code, 0, [torch.tensor([3.0])], [y])
    assert y.item() == 3
    with pytest.raises(GraphwrightError, match="there is no region 1"):
        run(code, 1, [], [])


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, weight: torch.Tensor) -> None:
    load(two_kernels(), tmp_path / "a", {"w": weight}).close()
    load(program({}, [buffer("x", "input")], [], ["x"]), tmp_path / "b").close()
    with pytest.raises(ArtifactError, match="needs 16384 bytes of weights"):
        Library(tmp_path / "a" / "model.so", tmp_path / "b" / "weights.safetensors")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        Library(tmp_path / "missing.so", tmp_path / "b" / "weights.safetensors")


def test_outputs_that_are_inputs_weights_or_listed_twice(tmp_path: Path, weight: torch.Tensor) -> None:
    buffers = [buffer("x", "input"), buffer("w", "weight"), buffer("t", "temporary")]
    buffers += [buffer("flat", "output", (WIDTH * WIDTH,), "t"), buffer("same", "output", alias="t")]
    steps = [Step("matmul", ("x", "w", "t"))]
    outputs = ["flat", "x", "w", "flat", "same"]
    code = load(program({"matmul": matmul()}, buffers, steps, outputs), tmp_path, {"w": weight})
    x = torch.randn(WIDTH, WIDTH)
    results = [torch.empty(WIDTH, WIDTH) for _ in outputs]
    run(code, 0, [x], results)
    torch.testing.assert_close(results[0].double(), x.double() @ weight.double(), rtol=0, atol=64 * 8 * 2**-24)
    assert torch.equal(results[1], x)
    assert torch.equal(results[2], weight)
    assert torch.equal(results[3], results[0])
    assert torch.equal(results[4], results[0])


def test_an_output_that_later_steps_read(tmp_path: Path) -> None:
    buffers = [buffer("x", "input"), buffer("a", "output"), buffer("b", "output")]
    steps = [Step("one", ("x", "a")), Step("one", ("a", "b"))]
    code = load(program({"one": add_one()}, buffers, steps, ["b", "a"]), tmp_path)
    x, b, a = torch.randn(WIDTH, WIDTH), torch.empty(WIDTH, WIDTH), torch.empty(WIDTH, WIDTH)
    run(code, 0, [x], [b, a])
    assert torch.equal(a, x + 1)
    assert torch.equal(b, x + 1 + 1)


def test_several_regions_share_kernels_and_weights(tmp_path: Path, weight: torch.Tensor) -> None:
    programs = [two_kernels(), program({"renamed": double()}, [buffer("x", "input"), buffer("y", "output")],
                                       [Step("renamed", ("x", "y"))], ["y"]), two_kernels()]  # fmt: skip
    functions, tables = merge_kernels(programs)
    assert len(functions) == 2
    assert tables[1]["renamed"] == tables[0]["double"]
    code = load(programs, tmp_path, {"w": weight})
    x, y = torch.randn(WIDTH, WIDTH), torch.empty(WIDTH, WIDTH)
    run(code, 1, [x], [y])
    assert torch.equal(y, 2 * x)
    first, third = torch.empty(WIDTH, WIDTH), torch.empty(WIDTH, WIDTH)
    run(code, 0, [x], [first])
    run(code, 2, [x], [third])
    assert torch.equal(first, third)


def test_nothing_to_do(tmp_path: Path) -> None:
    empty = (0, 5)
    buffers = [buffer("x", "input", empty), buffer("y", "output", empty)]
    code = load([program({}, [], [], []), program({}, buffers, [Step(None, ("x", "y"))], ["y"])], tmp_path)
    run(code, 0, [], [])
    run(code, 1, [torch.empty(empty)], [torch.empty(empty)])


def test_equal_programs_give_equal_files(tmp_path: Path) -> None:
    first, second = (build([two_kernels()], tmp_path / name) for name in "ab")
    assert first.library.read_bytes() == second.library.read_bytes()
    # Also in another process, with another hash seed.
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from aot_programs import build, two_kernels
build([two_kernels()], Path({str(tmp_path)!r}, "c"))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)
    assert (tmp_path / "c" / "model.so").read_bytes() == first.library.read_bytes()


def test_what_build_reports(tmp_path: Path) -> None:
    info = build([two_kernels(), two_kernels()], tmp_path)
    assert (info.kernels, info.kernel_calls) == (2, 4)
    assert info.peak_bytes == info.plans[0].lower_bound_bytes == WIDTH * WIDTH * 4
    assert info.code_bytes == (tmp_path / "model.so").stat().st_size
