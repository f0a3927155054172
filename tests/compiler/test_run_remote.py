"""A bundle runs on a board reached by ssh: here a shell in place of ssh, and QEMU in place of the board."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from boards import emulator
from remote_board import Board
from torch import nn
from typer.testing import CliRunner

import graphwright
from graphwright.compiler.cli import app
from graphwright.compiler.commands.run_remote import check_machine, run_remote
from graphwright.errors import ArtifactError, GraphwrightError, InputError
from graphwright.hwdb import lookup


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graphwright.compile(nn.Softmax(-1), (torch.zeros(2, 5),), target="raspberry-pi-4b").bundle(
        tmp_path_factory.mktemp("remote") / "out"
    )


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    return Board.reached(tmp_path, monkeypatch)


def through_emulator(board: Board, bundle: Path) -> Path:
    """A copy of the bundle whose program calls QEMU: this machine's kernel may not do it by itself."""
    import json
    import shutil

    from graphwright.compiler.artifact import seal_for

    made = Path(shutil.copytree(bundle, board.home / "made"))
    (made / "run").rename(made / "program.safetensors")  # copied along, as weights are
    (made / "run").write_text(
        f'#!/bin/sh\nchmod +x ../program.safetensors\nexec {emulator("aarch64")} ../program.safetensors "$@"\n'
    )
    manifest = json.loads((made / "manifest.json").read_text())
    seal_for(made, manifest["target"], manifest["description"])
    return made


def test_results_come_back_and_the_bundle_stays(board: Board, made: Path, tmp_path: Path) -> None:
    bundle = through_emulator(board, made)
    x = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    np.savez(tmp_path / "in.npz", input=x)
    first = run_remote("pi@board", bundle, tmp_path / "in.npz", repeat=2, threads=1)
    np.testing.assert_allclose(first.results["softmax"], torch.softmax(torch.from_numpy(x), -1).numpy(), rtol=1e-6)
    assert "1 thread\n" in first.printed
    assert "ms of 2" in first.printed
    assert first.copied_bytes > 50_000
    again = run_remote("pi@board", bundle, tmp_path / "in.npz")
    assert again.copied_bytes == 0
    left = [p.name for p in (board.home / ".cache" / "graphwright").glob("*/*")]
    assert not [name for name in left if name.startswith("call-")]
    assert set(board.log.read_text().split()) == {"pi@board"}


class Halves(nn.Module):
    """One value that is a result twice, of a dtype that numpy does not have, and a key that numpy.savez has taken."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        half = x + 1
        return {"file": half, "again": half}


def test_bfloat16_travels_as_float32(board: Board, tmp_path: Path) -> None:
    x = torch.randn(2, 5).bfloat16()
    made = graphwright.compile(Halves(), (x,), target="raspberry-pi-4b").bundle(tmp_path / "halves")
    bundle = through_emulator(board, made)
    np.savez(tmp_path / "in.npz", x=x.float().numpy())
    arguments = ["run-remote", "pi@board", str(bundle), "--input", str(tmp_path / "in.npz")]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out.npz")])
    assert done.exit_code == 0, done.output
    found = np.load(tmp_path / "out.npz")
    assert set(found) == {"file", "again"}
    for name in found:
        np.testing.assert_array_equal(found[name], (x + 1).float().numpy())


def test_the_command(board: Board, made: Path, tmp_path: Path) -> None:
    bundle = through_emulator(board, made)
    done = CliRunner().invoke(app, ["run-remote", "pi@board", str(bundle), "-o", str(tmp_path / "out.npz")])
    assert done.exit_code == 0, done.output
    assert "latency: first call" in done.output
    assert np.load(tmp_path / "out.npz")["softmax"].shape == (2, 5)


def test_what_can_go_wrong(board: Board, made: Path, tmp_path: Path) -> None:
    with pytest.raises(GraphwrightError, match="Could not resolve hostname"):
        run_remote("nobody@nowhere", made)
    np.savez(tmp_path / "in.npz", image=np.zeros(3))
    with pytest.raises(InputError, match="the model takes input, and the file has image"):
        run_remote("pi@board", made, tmp_path / "in.npz")
    np.savez(tmp_path / "in.npz", input=np.zeros((2, 5)))
    with pytest.raises(GraphwrightError, match=r"on pi@board: run: .*the file has '<f8'"):
        run_remote("pi@board", through_emulator(board, made), tmp_path / "in.npz")
    (board.home / "made" / "run").write_text("#!/bin/sh\n")
    done = CliRunner().invoke(app, ["run-remote", "nobody@nowhere", str(made), "-o", str(tmp_path / "no" / "out.npz")])
    assert "there is no directory" in done.output  # before the board is asked
    with pytest.raises(ArtifactError, match="is damaged"):
        run_remote("pi@board", board.home / "made")


def test_a_board_of_another_kind(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", Board(tmp_path, "riscv64").path)
    with pytest.raises(InputError, match="is riscv64, and raspberry-pi-4b is aarch64: compile for"):
        run_remote("pi@board", made)


def test_a_shell_that_talks(board: Board, made: Path) -> None:
    board.command("uname", "echo Welcome; echo aarch64")
    with pytest.raises(GraphwrightError, match=r"the shell of pi@board prints 'Welcome' before .* ~/\.bashrc"):
        run_remote("pi@board", made)


@pytest.mark.parametrize("host", ["-oProxyCommand=touch x", ""])
def test_what_is_no_host(host: str, made: Path) -> None:
    with pytest.raises(InputError, match="is no host: give it as ssh knows it"):
        run_remote(host, made)


def test_without_ssh(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent / "nowhere"))
    with pytest.raises(GraphwrightError, match="OpenSSH"):
        run_remote("pi@board", made)


def test_calibrating_a_board(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record that comes of it is a target; QEMU's times are none of a board, and only have to be times."""
    board.emulate()
    file = tmp_path / "records" / "my-pi.toml"
    file.parent.mkdir()
    arguments = ["hw", "calibrate", "--remote", "pi@board", "--target", "raspberry-pi-4b", "--seconds", "0.01"]
    done = CliRunner().invoke(app, [*arguments, "--name", "my-pi", "-o", str(file)])
    assert done.exit_code == 0, done.output
    assert "float32 GFLOP/s" in done.output
    monkeypatch.setenv("GRAPHWRIGHT_HWDB", str(file.parent))
    found, plain = lookup("my-pi"), lookup("raspberry-pi-4b")
    assert (found.isa, found.features, found.caches) == (plain.isa, plain.features, plain.caches)
    assert found.clock_mhz != plain.clock_mhz
    assert 0 < found.dram_gbs < 1e3
    assert 0 < found.launch_us < 1e6
    assert not list((board.home / ".cache" / "graphwright").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--remote", "pi@board"], "go together"),
        (["--target", "raspberry-pi-4b"], "go together"),
        (["-o", "x.toml"], "for the record of a board"),
        (["--remote", "pi@board", "--target", "znver4"], "boards are aarch64 and armv7"),
        (["--remote", "pi@board", "--target", "raspberry-pi-2b", "--name", "a.b"], "letters, digits"),
        (["--remote", "nobody@nowhere", "--target", "raspberry-pi-4b"], "Could not resolve hostname"),
    ],
)
def test_calibrations_that_are_refused(board: Board, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["hw", "calibrate", *arguments])
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())


@pytest.mark.parametrize(("system", "target"), [("Darwin arm64", "raspberry-pi-4b"), ("Linux aarch64", "apple-m1")])
def test_a_board_with_another_system_is_refused(tmp_path, monkeypatch, system, target):
    Board.reached(tmp_path, monkeypatch, machine=system)
    hw = graphwright.hwdb.lookup(target)
    with pytest.raises(InputError, match=r"board runs (Darwin|Linux), and the code for .* is for (Linux|macOS)"):
        check_machine("board", hw.id, hw.isa, hw.triple)
