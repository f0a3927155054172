"""Candidates timed on a board, for which QEMU stands: its times mean nothing, so tests ask what becomes of them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from remote_board import Board
from torch import fx, nn
from torch.utils import _pytree as pytree
from typer.testing import CliRunner

import graphwright
from graphwright.backends.lowering.registry import KernelInfo
from graphwright.compiler import tune
from graphwright.compiler.build import Built
from graphwright.compiler.capture import Signature
from graphwright.compiler.cli import app
from graphwright.compiler.commands import tune_board
from graphwright.compiler.plan import Plan
from graphwright.errors import GraphwrightError, InputError
from graphwright.hwdb import lookup

TARGET = "raspberry-pi-4b"
GRAPH = fx.symbolic_trace(nn.Identity())
LEAF = pytree.tree_structure(0)


class Net(nn.Module):
    """A convolution, whose blocking is a decision, and an input that is not floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, stride=2)

    def forward(self, x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu()[:, which]


INPUTS = (torch.randn(1, 8, 12, 12), torch.tensor([3, 15, 0]))


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setattr(tune_board, "TURNS", 2)
    monkeypatch.setattr(tune, "cache_directory", lambda: tmp_path)  # what QEMU's times prefer is for no other test
    return Board.reached(tmp_path, monkeypatch)


def test_compile_uses_what_a_board_said(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    board.emulate()
    model = Net().eval()
    found = graphwright.tune(model, INPUTS, target=TARGET, remote="pi@board", time="300s", threads=2)
    assert found.builds == 3
    assert found.after_us <= found.before_us
    assert tune.stored(lookup(TARGET)) == found.preferred
    (row,) = [row for row in found.rows if len(row.candidates) > 1]
    assert all(us > 0 for _, us in row.candidates)
    compiled = graphwright.compile(model, INPUTS, target=TARGET)
    (decision,) = [d for k in compiled.report().kernels for d in k.decisions if d.problem == row.problem]
    assert (decision.reason, decision.measured) == (row.kept, True)
    assert not list((board.home / ".cache" / "graphwright").iterdir())


def test_the_command(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board.emulate()
    (tmp_path / "small.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(64, 48).eval(), (torch.zeros(32, 64),)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["tune", "small:make", "--target", TARGET, "--remote", "pi@board", "--time", "0.001s"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "time for 1 of 3 candidates" in done.output
    assert "us before" in done.output
    assert "kept in" in done.output


def test_times_go_to_their_builds_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The board says 1 us for ./a and 2 us for ./b, and 5 ms for a call: as many of those as fill a turn."""
    asked: list[list[str]] = []

    def answer(host: str, script: str, content: bytes = b"", limit: float | None = None) -> bytes:
        commands = [line.split("./")[1] for line in script.splitlines() if "./" in line]
        asked.append(commands)
        told = [f"next\nstep 0: {'ab'.index(c[0]) + 1}.0 us\nlatency: first call 5.000 ms\n" for c in commands]
        return "".join(told).encode()

    monkeypatch.setattr(tune_board, "ssh", answer)
    board = tune_board._Board("pi@board", "there", lookup(TARGET), Signature((), (), LEAF, LEAF, ()), (), 1, 1.0)
    kernels = (KernelInfo("k", "conv", "a", "r", None, step=0),)
    builds = [(Path(name), Built(Plan((), 0, (), 0, {}), GRAPH, (), kernels=kernels)) for name in "ab"]
    board.commands = {Path(name): f"./{name}" for name in "ab"}
    assert board.measure(builds, time.perf_counter() + 60) == [[1.0], [2.0]]
    assert asked[:2] == [["b --repeat 3", "a --repeat 3"], ["a --repeat 60", "b --repeat 60"]]


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("nobody@nowhere", "nobody@nowhere is not reached: ssh: Could not resolve hostname"),
        ("refused@board", "refused@board is not reached: ssh: connect to host board port 22: Connection refused; `ssh"),
        ("slow@board", "slow@board did not finish within"),
    ],
)
def test_boards_that_do_not_answer(board: Board, host: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_board, "_STALLED_S", 1.0)
    with pytest.raises(GraphwrightError, match=message):
        graphwright.tune(nn.Softmax(-1), (torch.zeros(2, 5),), target=TARGET, remote=host, time=1)
    assert not list(board.home.glob(".cache/graphwright/*"))


def test_a_board_without_space(board: Board) -> None:
    board.command("tar", "echo 'tar: run: Cannot write: No space left on device' >&2; exit 2")
    with pytest.raises(GraphwrightError, match=r"^pi@board has no space left for .*KB: `rm -r ~/.cache/graphwright`"):
        graphwright.tune(nn.Softmax(-1), (torch.zeros(2, 5),), target=TARGET, remote="pi@board", time=1)


def test_a_board_that_says_something_else(board: Board) -> None:
    """The program is for ARM, which this machine does not run."""
    board.command("chmod", "exit 0")  # so that it is not even a program
    with pytest.raises(GraphwrightError, match=r"^on pi@board: .*ermission denied"):
        graphwright.tune(nn.Softmax(-1), (torch.zeros(2, 5),), target=TARGET, remote="pi@board", time=1)


def test_boards_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Board.reached(tmp_path, monkeypatch, "riscv64")
    with pytest.raises(InputError, match="pi@board is riscv64, and raspberry-pi-4b is aarch64"):
        graphwright.tune(nn.Softmax(-1), (torch.zeros(2, 5),), target=TARGET, remote="pi@board")


def test_what_cannot_be_tuned(board: Board) -> None:
    model, x = nn.Softmax(-1), torch.zeros(2, 5)
    with pytest.raises(InputError, match="boards are aarch64 and armv7, and zen4 is x86_64: say what"):
        graphwright.tune(model, x, target="zen4", remote="pi@board")
    with pytest.raises(InputError, match="graphwright tune --target raspberry-pi-4b --remote user@board"):
        graphwright.tune(model, x, target=TARGET)
    with pytest.raises(InputError, match="give some"):
        graphwright.tune(model, target=TARGET, remote="pi@board")
    with pytest.raises(InputError, match="kernels of int8 have one each"):
        graphwright.tune(model, x, target=TARGET, remote="pi@board", precision="int8")
