"""The command that measures this machine: figures a machine can have, kept where the next detection finds them."""

from __future__ import annotations

import dataclasses

import pytest
from typer.testing import CliRunner

from graphwright import hwdb
from graphwright.compiler.cli import app
from graphwright.compiler.commands.measure_host import level_footprints, measure
from graphwright.hwdb import host, measured


def test_footprints_lie_between_the_levels():
    hw = dataclasses.replace(hwdb.lookup("zen4"), cores=2)
    sizes = {level: 4 * floats for level, floats in level_footprints(hw).items()}
    assert set(sizes) == {0, 1, 2, 3}
    assert sizes[1] < 32 << 10 < sizes[2] < 1 << 20 < sizes[3] < 16 << 20
    assert sizes[0] * hw.cores >= 4 * (32 << 20)
    pi = level_footprints(hwdb.lookup("raspberry-pi-4"))  # 1 MB of L2 shared by four
    assert 32 << 10 < 4 * pi[2] < 256 << 10


def test_figures_are_those_of_a_machine():
    """Loose bounds: tests run beside others."""
    hw = host.detect_plain()
    found = measure(hw, seconds=0.05)
    peak = hw.peak_flops()
    assert 0.05 * peak < found.flops < 2.5 * peak
    assert found.level_gbs[1] > 0.5 * found.level_gbs[0] > 0
    assert 0 < found.launch_us < 1e4
    assert 0 < found.wake_us < 1e6
    assert found.machine == measured.identity(hw)


def test_the_command_keeps_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHWRIGHT_DATA", str(tmp_path))
    output = CliRunner().invoke(app, ["hw", "calibrate", "--seconds", "0.02", "--dry-run"]).stdout
    assert "float32 GFLOP/s" in output
    assert not list(tmp_path.iterdir())
    output = CliRunner().invoke(app, ["hw", "calibrate", "--seconds", "0.02"]).stdout
    (file,) = tmp_path.iterdir()
    assert str(file) in output.replace("\n", "")
    hw = measured.applied(host.detect_plain())
    assert hw.calibrated
    assert hw.peak_flops() == pytest.approx(measured.read(host.detect_plain()).flops)


def test_figures_that_cannot_be_kept_are_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAPHWRIGHT_DATA", str(tmp_path / "file"))
    result = CliRunner().invoke(app, ["--debug", "hw", "calibrate", "--seconds", "0.02"])
    assert "GRAPHWRIGHT_DATA" in str(result.exception)


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1"])
def test_a_time_that_is_none_is_refused_and_nothing_kept(seconds):
    result = CliRunner().invoke(app, ["hw", "calibrate", "--seconds", seconds])
    assert result.exit_code == 1
    assert "a figure takes some time to measure" in result.output
