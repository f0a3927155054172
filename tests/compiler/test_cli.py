"""The command line: what every command prints and returns, and one clean message for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from typer.testing import CliRunner

import graphwright
from graphwright import hwdb
from graphwright.compiler.cli import app
from graphwright.compiler.commands import doctor
from graphwright.compiler.commands.model_argument import load_model, parse_input
from graphwright.errors import ArtifactError, CaptureError, GraphwrightError, InputError

FACTORIES = """
import torch


class TwoHeads(torch.nn.Module):
    def forward(self, x, *, scale):
        return {"sum": (x * scale).sum(-1), "scaled": x * scale}


def mlp():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)), (torch.randn(2, 6),)


def bare():
    return mlp()[0]


def heads():
    return TwoHeads(), {"x": torch.ones(2, 3), "scale": torch.tensor(2.0)}


def broken():
    raise ValueError("no weights here")


def number():
    return 7


instance = bare()
text = "not a function"
"""


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """A working directory with a module of factories, a cache of its own, and no trace left in sys.modules."""
    (tmp_path / "my_models.py").write_text(FACTORIES)
    (tmp_path / "my_broken.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path / "cache"))
    yield
    for name in ("my_models", "my_broken"):
        sys.modules.pop(name, None)


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def fails(*arguments: str) -> str:
    """Run a command that must fail with one message, and return that message."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    return result.stderr


# Help and start-up


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("compile", "run", "run-remote", "tune", "bench", "explain", "verify", "hw", "doctor"):
        assert command in result.output


@pytest.mark.parametrize(
    "command", ["compile", "run", "run-remote", "tune", "bench", "explain", "verify", "doctor", "hw"]
)
def test_every_command_has_help(command):
    assert run(command, "--help").exit_code == 0


def test_version():
    assert run("--version").output == f"graphwright {graphwright.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["hw", "list"], ["hw", "detect"], ["compile", "--help"]])
def test_light_commands_import_neither_torch_nor_tvm(arguments):
    code = (
        "import sys; from graphwright.compiler.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'tvm', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# hw


def test_hw_list_is_one_line_a_record():
    lines = run("hw", "list").output.splitlines()
    assert [line.split("\t")[0] for line in lines] == hwdb.names()
    devices = run("hw", "list", "--kind", "device").output.splitlines()
    assert devices
    assert all(line.split("\t")[2] == "device" for line in devices)
    assert "raspberry-pi-4b" in {
        line.split("\t")[0] for line in run("hw", "list", "--isa", "aarch64").output.splitlines()
    }


def test_hw_list_is_long_and_sourced():
    rows = [line.split("\t") for line in run("hw", "list", "--kind", "device").output.splitlines()]
    assert len(rows) > 240
    for fields in rows:
        assert len(fields) == 11
        assert fields[8] in ("high", "medium", "low")
        assert fields[9], f"{fields[0]} has no source"


def test_hw_list_by_vendor_and_class():
    rows = [line.split("\t") for line in run("hw", "list", "--vendor", "nvidia", "--kind", "gpu").output.splitlines()]
    assert "rtx-4090" in {fields[0] for fields in rows}
    assert {(fields[1], fields[3]) for fields in rows} == {("gpu", "nvidia")}
    boards = run("hw", "list", "--vendor", "raspberry-pi").output
    assert "raspberry-pi-5\tboard" in boards
    assert run("hw", "list", "--vendor", "Raspberry Pi").output == boards
    assert run("hw", "list", "--vendor", "NVIDIA", "--kind", "GPU").output.count("\n") == len(rows)


def test_hw_list_refuses_unknown_filters():
    assert "did you mean 'device'" in fails("hw", "list", "--kind", "devices")
    assert "did you mean 'nvidia'" in fails("hw", "list", "--vendor", "nvidai")
    assert "no vendor 'Acme': one of amazon, amd, " in fails("hw", "list", "--vendor", "Acme")
    assert "no kind 'toaster': one of architecture, board, cpu, device" in fails("hw", "list", "--kind", "toaster")
    assert "no vendor 'nvidia' among these machines" in fails("hw", "list", "--kind", "npu", "--vendor", "nvidia")


def test_hw_compare_divides_figures():
    rows = dict(line.split("\t", 1) for line in run("hw", "compare", "pi4", "pi5").output.splitlines())
    assert rows["id"].split("\t") == ["raspberry-pi-4b", "raspberry-pi-5", ""]
    assert rows["peak float32, GFLOP/s"].split("\t") == ["57.6", "153.6", "2.67x"]
    across = run("hw", "compare", "native", "h100-sxm").output
    assert "132" in across
    assert "peak bfloat16, GFLOP/s" in across


@pytest.mark.parametrize("name", ["h100-sxm", "mi300x", "hailo-8", "raspberry-pi-5", "zen4", "native"])
def test_hw_show_names_the_source_of_every_fact(name):
    output = run("hw", "show", name, "--why").output
    told, _, sources = output.partition("\nsources:\n")
    known = {line.split(":")[0].strip() for line in sources.splitlines()}
    facts = re.findall(r"^  .*  \[[\w.-]+: (.*)\]$", told, re.M)
    assert len(facts) >= 5
    for named in facts:
        assert set(named.split(", ")) <= known


def test_hw_show_tells_what_counts():
    """Of a rate by vector width the nearest record's table counts as a whole; of rates by dtype each entry."""
    told = run("hw", "show", "zen4", "--why").output
    assert re.findall(r"^  fma_per_cycle +(.*?)  \[(\w+):", told, re.M) == [("256 2 512 1", "zen4")]
    told = run("hw", "show", "h100-sxm", "--why").output
    assert len(re.findall(r"^  vector_flops\.float32 ", told, re.M)) == 1
    assert not re.search(r"^  parts ", run("hw", "show", "raspberry-pi-5", "--why").output, re.M)  # the core's own
    told = run("hw", "show", "native", "--why").output
    assert re.search(r"counts in place of the above: host\b", told)


def test_hw_show_prints_facts_and_sources():
    output = run("hw", "show", "pi4", "--why").output
    for text in ("raspberry-pi-4b", "57.6 GFLOP/s", "1024 KiB, 16 ways", "cortex-a72: ", "raspberrypi.com"):
        assert text in output
    assert "raspberrypi.com" not in run("hw", "show", "pi4").output


def test_hw_show_json():
    data = json.loads(run("hw", "show", "haswell", "--json").output)
    assert (data["id"], data["vector_bits"], data["caches"][0]["ways"]) == ("haswell", 256, 8)
    assert "avx2" in data["features"]


def test_hw_detect_is_this_machine():
    hw = hwdb.detect()
    output = run("hw", "detect").output
    assert hw.name in output
    assert f"{hw.vector_registers} vector registers of {hw.vector_bits} bits" in output
    assert json.loads(run("hw", "detect", "--json").output)["native"] is True


def test_unknown_record_offers_near_names():
    message = fails("hw", "show", "raspbery-pi-4")
    assert "did you mean" in message
    assert "raspberry-pi-4" in message


def test_debug_raises_the_error_itself():
    for arguments in (["--debug", "hw", "show", "nonsense"], ["hw", "show", "nonsense", "--debug"]):
        assert isinstance(run(*arguments).exception, GraphwrightError)


def test_hw_predict_ranks_devices():
    output = run("hw", "predict", "my_models:mlp", "--devices", "pi4,pi5,native", "--json").stdout
    rows = {row["id"]: row for row in json.loads(output)}
    assert set(rows) == {"native", "raspberry-pi-4b", "raspberry-pi-5"}
    assert rows["raspberry-pi-5"]["milliseconds"] <= rows["raspberry-pi-4b"]["milliseconds"]
    assert rows["native"]["memory_bytes"] >= 4 * (6 * 8 + 8 + 8 * 3 + 3)  # weights, and some activations
    times = [row["milliseconds"] for row in json.loads(output)]
    assert times == sorted(times)


# MODEL and --input


def test_inputs_are_read():
    assert parse_input("1x3x8").shape == (1, 3, 8)
    assert parse_input("1x3x8").dtype == torch.float32
    assert parse_input("4:int64").dtype == torch.int64
    assert parse_input("2x0:bf16").dtype == torch.bfloat16
    assert parse_input("scalar:bool").shape == ()


@pytest.mark.parametrize("text", ["", "1x", "x1", "1x-3", "1,3", "1x3:", "axb", "1x3 "])
def test_malformed_shapes_are_refused(text):
    if text == "1x3:":
        assert parse_input(text).shape == (1, 3)  # an empty dtype is float32
        return
    with pytest.raises(InputError, match="--input"):
        parse_input(text)


def test_malformed_dtype_offers_near_names():
    with pytest.raises(InputError, match="did you mean 'float32'"):
        parse_input("1x3:flot32")


def test_factories():
    model, inputs = load_model("my_models:mlp")
    assert not model.training
    assert inputs[0].shape == (2, 6)
    model, inputs = load_model("my_models:mlp", ["5x6"])
    assert inputs[0].shape == (5, 6)  # what is typed wins over what the factory brings
    assert load_model("my_models:instance", ["1x6"])[0] is sys.modules["my_models"].instance
    assert set(load_model("my_models:heads")[1]) == {"x", "scale"}


@pytest.mark.parametrize(
    ("model", "message", "kind"),
    [
        ("my_models:bare", "brings no example inputs: add --input", InputError),
        ("my_models:mpl", "has no 'mpl'; did you mean 'mlp'", GraphwrightError),
        ("no_such_module:f", "no module 'no_such_module'", GraphwrightError),
        ("my_broken:f", "RuntimeError: at import", CaptureError),
        ("my_models:broken", "ValueError: no weights here", CaptureError),
        ("my_models:number", "returned a int", GraphwrightError),
        ("my_models:text", "is a str", GraphwrightError),
        ("no_such_file.pt2", "no_such_file.pt2", GraphwrightError),
        ("resnet81", "did you mean 'resnet18'", GraphwrightError),
    ],
)
def test_models_that_are_none(model, message, kind):
    with pytest.raises(kind, match=message):
        load_model(model)


def test_a_file_that_is_no_program_is_refused(tmp_path):
    (tmp_path / "bad.pt2").write_bytes(b"not an archive")
    with pytest.raises(GraphwrightError, match=r"bad\.pt2"):
        load_model(str(tmp_path / "bad.pt2"))


def test_an_exported_program_brings_its_inputs(tmp_path):
    program = torch.export.export(torch.nn.Linear(4, 2).eval(), (torch.ones(3, 4),))
    torch.export.save(program, str(tmp_path / "linear.pt2"))
    _, inputs = load_model("linear.pt2")
    assert inputs[0].shape == (3, 4)


# compile, run, explain, verify


def test_compile_and_run(tmp_path):
    result = run("compile", "my_models:mlp", "-o", "out.gw", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert "against float64" in result.output
    x = numpy.random.default_rng(0).standard_normal((2, 6)).astype("float32")
    numpy.savez("in.npz", x)
    result = run("run", "out.gw", "--input", "in.npz", "-o", "results.npz", "--repeat", "2")
    assert result.exit_code == 0, result.output
    assert "float32[2, 3]" in result.output
    assert "ms a call" in result.output
    model, _ = load_model("my_models:mlp")
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    found = numpy.load("results.npz")["output"]
    numpy.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # sums of eight products near 1 in float32


def test_run_with_keyword_inputs_and_named_results(tmp_path):
    assert run("compile", "my_models:heads", "-o", "heads", "--no-verify").exit_code == 0
    numpy.savez("in.npz", x=numpy.full((2, 3), 3, "float32"), scale=numpy.float32(2))
    result = run("run", "heads", "--input", "in.npz", "-o", "results.npz")
    assert result.exit_code == 0, result.output
    results = numpy.load("results.npz")
    assert results["sum"].tolist() == [18, 18]
    assert results["scaled"].tolist() == [[6, 6, 6]] * 2


def test_run_refuses_wrong_inputs(tmp_path):
    assert run("compile", "my_models:heads", "-o", "heads", "--no-verify").exit_code == 0
    numpy.savez("other.npz", x=numpy.zeros((2, 3), "float32"), scal=numpy.float32(1))
    assert "not 'scal'; did you mean 'scale'" in fails("run", "heads", "--input", "other.npz")
    numpy.savez("few.npz", x=numpy.zeros((2, 3), "float32"))
    assert "scale missing" in fails("run", "heads", "--input", "few.npz")
    numpy.savez("shape.npz", x=numpy.zeros((2, 4), "float32"), scale=numpy.float32(1))
    assert "expected float32[2, 3]" in fails("run", "heads", "--input", "shape.npz")
    Path("text.npz").write_text("hello")
    assert "not a .npz file" in fails("run", "heads", "--input", "text.npz")
    assert "numpy.savez" in fails("run", "heads", "--input", "text.npz")
    assert "nothing.npz: cannot be read: No such file" in fails("run", "heads", "--input", "nothing.npz")
    numpy.savez("objects.npz", x=numpy.array([{}]), scale=numpy.float32(1), allow_pickle=True)
    assert "not a .npz file" in fails("run", "heads", "--input", "objects.npz")  # nothing is unpickled


def test_run_looks_at_the_output_before_the_work():
    assert run("compile", "my_models:heads", "-o", "heads", "--no-verify").exit_code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphwright.compiler.compiled.Compiled.__call__", None)  # whoever calls it fails
        assert "there is no directory" in fails("run", "heads", "-o", "nodir/r.npz")
        assert "heads is a directory" in fails("run", "heads", "-o", "heads")


def test_compile_looks_at_the_output_before_the_work():
    Path("letter").write_text("mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphwright.compiler.commands.model_argument.load_model", None)
        assert "letter is a file" in fails("compile", "my_models:mlp", "-o", "letter")
        assert "letter is a file" in fails("compile", "my_models:mlp", "-o", "letter/out")
    assert Path("letter").read_text() == "mine"


@pytest.mark.parametrize("more", [(), ("--executable",)])
def test_boards_without_bundles_are_not_given_something_else(more):
    arguments = ("compile", "my_models:mlp", "-o", "out", "--target", "visionfive-2")
    assert "bundles are made for aarch64 and armv7, and visionfive-2 is riscv64" in fails(*arguments, *more)
    assert not Path("out").exists()
    assert run(*arguments, "--artifact").exit_code == 0
    assert "does not end in .gw" in fails("compile", "my_models:mlp", "-o", "out.gw", "--target", "armv7", "--bundle")


def test_compile_report_as_json():
    result = run("compile", "my_models:mlp", "-o", "out", "--json", "--no-verify", "--no-cache")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["precision"] == "fp32"


def test_compile_in_8_bits_by_a_file_of_inputs():
    numpy.savez("inputs.npz", arr_0=numpy.random.default_rng(0).standard_normal((4, 2, 6), dtype=numpy.float32))
    given = ("--precision", "int8", "--calibration", "inputs.npz", "--tolerance", "0.1")
    result = run("compile", "my_models:mlp", "-o", "out", *given)
    assert result.exit_code == 0, result.output
    # Products as small as these gain nothing anywhere, and the report says why.
    assert "everything stays float32" in result.output
    for command in (("compile", "my_models:mlp", "-o", "out"), ("explain", "my_models:mlp")):
        message = fails(*command, "--precision", "int8")
        assert "give --calibration FILE.npz" in message
        assert "calibration=" not in message
        result = run(*command, "--precision", "int8", "--int8", "activation=dynamic")
        assert result.exit_code == 0, result.output
        assert "float32" in result.output
    start = ("compile", "my_models:mlp", "-o", "out", *given, "--int8")
    assert "NAME=VALUE" in fails(*start, "kl")
    assert "did you mean 'kl'" in fails(*start, "activation=kll")
    assert "there are 32, 64, 128" in fails(*start, "group=48")
    assert "no product is called" in fails(*start, "keep=nothing", "--int8", "keep=*0_weight")
    assert "attention='yes': it has to be True or False" in fails(*start, "attention=yes")


def test_compile_mistakes():
    assert "did you mean" in fails("compile", "my_models:mlp", "-o", "out", "--target", "natve")
    assert "precision" in fails("compile", "my_models:mlp", "-o", "out", "--precision", "fp33")
    assert "--calibration" in fails("compile", "my_models:mlp", "-o", "out", "--calibration", "c.npz")
    assert "same reduction dim" in fails("compile", "my_models:bare", "-o", "out", "--input", "2x7")
    assert not Path("out").exists()
    assert run("compile", "my_models:mlp").exit_code == 2  # -o is missing: a usage error


def test_run_without_artifact():
    assert "nowhere" in fails("run", "nowhere")


def test_explain_prints_the_graph():
    result = run("explain", "my_models:mlp")
    assert result.exit_code == 0, result.output
    assert "linear" in result.output


def test_verify_prints_errors():
    result = run("verify", "my_models:mlp")
    assert result.exit_code == 0, result.output
    assert "machine code" in result.output


def test_code_for_another_machine_is_built_but_not_run():
    """Never a crash: what cannot run here says so when it is called, loaded or verified."""
    other = "aarch64" if hwdb.detect().isa == "x86_64" else "x86-64"
    assert run("compile", "my_models:mlp", "-o", "out", "--artifact", "--target", other).exit_code == 0
    assert "compile the model for target='native'" in fails("run", "out")
    result = run("verify", "my_models:mlp", "--target", other)
    assert result.exit_code == 0, result.output
    assert "machine code not run: it is" in result.output
    model, inputs = load_model("my_models:mlp")
    compiled = graphwright.compile(model, inputs, target=other)
    with pytest.raises(ArtifactError, match="target='native'"):
        compiled(*inputs)


def test_bench_refuses_unknown_peers():
    assert "did you mean 'eager'" in fails("bench", "my_models:mlp", "--against", "eagre")


def test_bench_writes_figures():
    result = run("bench", "my_models:mlp", "--rounds", "2", "--threads", "1", "--json", "figures.json")
    assert result.exit_code == 0, result.output
    rows = json.loads(Path("figures.json").read_text())["rows"]
    assert rows[0]["model"] == "my_models:mlp"
    assert {"graphwright", "eager"} <= set(rows[0]["milliseconds"])


# doctor


def test_doctor_on_a_working_installation():
    result = run("doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(result.stdout)}
    assert result.exit_code == 0, result.output
    for what in ("torch", "apache-tvm", "ziglang", "linker", "compile and run", "threads", "target x86-64-v3"):
        assert findings[what]["status"] == "ok", findings[what]
    assert str(torch.__version__) in findings["torch"]["detail"]


def test_doctor_finds_what_is_broken(monkeypatch):
    def absent(name: str) -> str:
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", absent)
    assert doctor._distribution("torch", "captures models", "broken").status == "broken"
    assert doctor._distribution("openvino", "a peer", "missing").status == "missing"


def test_doctor_finds_a_wrong_version(monkeypatch):
    monkeypatch.setattr(doctor, "_pins", lambda: {"apache-tvm-ffi": "0.0.1"})
    finding = doctor._distribution("apache-tvm-ffi", "belongs to apache-tvm", "broken")
    assert finding.status == "broken"
    assert "0.0.1 is needed" in finding.detail


def test_doctor_reports_an_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path / "file" / "cache"))
    finding = doctor._guard("cache directory", doctor._cache)
    assert finding.status == "missing"
    assert "GRAPHWRIGHT_CACHE" in finding.detail


def test_doctor_survives_a_failing_check(monkeypatch):
    def crash() -> doctor.Finding:
        raise OSError("disk on fire")

    finding = doctor._guard("linker", crash)
    assert (finding.what, finding.status) == ("linker", "broken")
    assert "disk on fire" in finding.detail


def test_the_package_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graphwright", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith(graphwright.__version__)
