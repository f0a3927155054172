"""Artifacts for GPUs: machine code that is there, and what is said where something is missing. No GPU is needed."""

from __future__ import annotations

import dataclasses
import re
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

import graphwright
from graphwright.backends.gpu import cuda, device_library, evidence, instructions, lower, rocm, schedule
from graphwright.backends.gpu.device_library import runs_on
from graphwright.backends.gpu.launches import Description, Launch
from graphwright.compiler import artifact
from graphwright.compiler.commands import doctor
from graphwright.errors import ArtifactError, GraphwrightError, InputError, ToolMissing, UnknownTarget, UnsupportedOp

CUDA_MACHINE, AMD_MACHINE = 190, 224  # of ELF files; llvm/BinaryFormat/ELF.h


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.Softmax(-1)
    ).eval()


IMAGE = torch.linspace(-1.0, 1.0, 3 * 8 * 8).reshape(1, 3, 8, 8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Artifacts by target."""
    made = {}
    for target in ("a100", "mi300x"):
        folder = tmp_path_factory.mktemp(target) / "out"
        graphwright.compile(model(), (IMAGE,), target=target, cache=False).save(folder)
        made[target] = folder
    return made


def machine_of(image: bytes) -> int:
    (machine,) = struct.unpack_from("<H", image, 18)
    return machine


def test_a_cuda_artifact_holds_machine_code_of_every_kernel_it_launches(saved):
    described = Description.read(saved["a100"] / "device.json")
    content = (saved["a100"] / described.image).read_bytes()
    assert described.arch == "sm_80"
    cubin = content[content.index(b"\x7fELF") :]
    assert machine_of(cubin) == CUDA_MACHINE
    if described.image.endswith("fatbin"):
        assert content[:4] == struct.pack("<I", 0xBA55ED50)
    kernels = [launch.name for launch in described.kernels]
    assert len(kernels) >= 4
    for name in kernels:
        assert f".text.{name}\0".encode() in cubin, name


def test_a_rocm_artifact_holds_a_code_object_of_every_kernel_within_its_own_limits(saved):
    from graphwright.backends.aot import elf

    described = Description.read(saved["mi300x"] / "device.json")
    path = saved["mi300x"] / described.image
    assert described.image == "kernels.hsaco"
    assert machine_of(path.read_bytes()) == AMD_MACHINE
    found = elf.read(path)
    assert not found.undefined
    notes = {kernel[".name"]: kernel for kernel in evidence.metadata(path.read_bytes())["amdhsa.kernels"]}
    assert "gfx942" in evidence.metadata(path.read_bytes())["amdhsa.target"]
    for launch in described.kernels:
        assert {launch.name, f"{launch.name}.kd"} <= found.defined
        # TVM's code generator writes 256 into every kernel: with more threads a launch would be out of contract.
        assert launch.threads <= notes[launch.name][".max_flat_workgroup_size"]
        assert notes[launch.name][".vgpr_spill_count"] == 0


def test_whoever_may_read_one_file_of_an_artifact_may_read_all(saved):
    for folder in saved.values():
        assert len({file.stat().st_mode & 0o444 for file in folder.iterdir()}) == 1


def test_the_report_says_what_the_machine_code_says_of_each_kernel(saved):
    for target in ("a100", "mi300x"):
        for kernel in graphwright.load(saved[target]).report().kernels:
            assert re.search(r"; \d+ registers, .*none spilled, occupancy \d+% \(by ", kernel.choice), kernel.choice
    scalar = graphwright.load(saved["mi300x"]).report().kernels[0].choice
    assert re.search(r"\d+ scalar", scalar)


def test_registers_of_a_cubin_are_those_that_its_section_headers_hold(saved):
    """Two places in the file, written by ptxas: .nv.info, and the upper byte of sh_info of .text.NAME."""
    described = Description.read(saved["a100"] / "device.json")
    content = (saved["a100"] / described.image).read_bytes()
    cubin = content[content.index(b"\x7fELF") :]
    found = evidence.evidence(content, described.kernels, graphwright.hwdb.lookup("a100"))
    assert set(found) == {launch.name for launch in described.kernels}
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    rows = [struct.unpack_from("<IIQQQQII", cubin, start + i * size) for i in range(count)]
    for name, *_, info in rows:
        at = rows[names][4] + name
        text = cubin[at : cubin.index(b"\0", at)].decode()
        if text.startswith(".text."):
            assert found[text.removeprefix(".text.")].registers == info >> 24


@pytest.mark.parametrize(
    ("target", "precision"),
    [("a100", "fp16"), *((arch, p) for arch in ("mi250x", "gfx942", "gfx1100", "gfx1201") for p in ("fp16", "bf16"))],
)
def test_products_in_16_bits_hold_instructions_of_matrix_units_and_wide_loads(target, precision, tmp_path):
    hw = graphwright.hwdb.lookup(target)
    if (instructions.amd_disassembler() if hw.isa == "amdgcn" else instructions.nvidia_disassembler()) is None:
        pytest.skip("no disassembler: pip install nvidia-cuda-nvdisasm, or a package llvm")
    torch.manual_seed(0)
    linear = nn.Linear(64, 64).eval()
    compiled = graphwright.compile(linear, (torch.randn(64, 64),), target=target, precision=precision, cache=False)
    compiled.save(tmp_path / "out")
    described = Description.read(tmp_path / "out" / "device.json")
    found = evidence.evidence((tmp_path / "out" / described.image).read_bytes(), described.kernels, hw)
    narrow = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    (name,) = (kernel.name for kernel in compiled.report().kernels if kernel.algorithm == f"{narrow} tiled product")
    counts = found[f"{name}_kernel"].counts
    assert counts is not None
    assert counts.matrix > 0
    assert counts.wide_loads == counts.loads
    assert (counts.asynchronous > 0) == (target == "a100")
    assert found[f"{name}_kernel"].spilled == 0


def test_a_kernel_that_cannot_be_lowered_gives_way_to_rules(monkeypatch, caplog):
    monkeypatch.setattr(lower, "_lower_kernel", lambda v, f, call, t: _raised(lower.KernelFailed(call, "no such luck")))
    wide = nn.Linear(32, 32)
    compiled = graphwright.compile(wide, (torch.ones(32, 32),), target="a100", cache=False)
    assert [kernel.algorithm for kernel in compiled.report().kernels] != ["tiled product"]
    assert "no such luck: TVM's rules take its place" in caplog.text
    (fallback,) = compiled.report().fallbacks
    assert fallback.startswith("tiled product (")
    assert fallback.endswith("cannot be lowered: no such luck")
    assert "1 schedules failed, and others took their place:" in compiled.report().text()


def test_a_schedule_that_fails_gives_way_to_the_next_and_is_counted(monkeypatch):
    rules = lower.schedules

    def with_a_bad_one(function, target, units):
        yield "no threads", function
        yield from rules(function, target, units)

    monkeypatch.setattr(lower, "schedules", with_a_bad_one)
    compiled = graphwright.compile(nn.ReLU(), (torch.ones(8),), target="a100", cache=False)
    (kernel,) = compiled.report().kernels
    assert kernel.algorithm == "a thread an element"
    (fallback,) = compiled.report().fallbacks
    assert fallback == f"no threads for {kernel.name}: the schedule leaves everything to the host"
    assert type(compiled.report()).from_dict(compiled.report().to_dict()) == compiled.report()


def _raised(error: Exception) -> None:
    raise error


def test_attention_of_16_bits_that_cannot_be_lowered_gives_way_to_rules_in_float32(monkeypatch):
    class Attention(nn.Module):
        def forward(self, q):
            return nn.functional.scaled_dot_product_attention(q, q, q)

    heads = torch.linspace(-1.0, 1.0, 2 * 16 * 16).reshape(1, 2, 16, 16)
    rules = []
    for fails in (False, True):
        if fails:
            refuse = lambda v, f, call, t: _raised(lower.KernelFailed(call, "no such luck"))  # noqa: E731
            monkeypatch.setattr(lower, "_lower_kernel", refuse)
        compiled = graphwright.compile(Attention(), (heads,), target="a100", precision="fp16", cache=False)
        rules.append({kernel.algorithm for kernel in compiled.report().kernels})
    assert rules[0] == {"float16 online attention"}
    assert not any("attention" in rule for rule in rules[1])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_products_and_convolutions_of_16_bits_that_cannot_be_lowered_give_way_to_rules_in_float32(
    monkeypatch, precision
):
    torch.manual_seed(0)
    products = nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)  # what lies between them is 16 bits in memory
    wide = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Flatten(2), *products)
    refuse = lambda v, f, call, t: _raised(lower.KernelFailed(call, "no such luck"))  # noqa: E731
    monkeypatch.setattr(lower, "_lower_kernel", refuse)
    image = torch.randn(1, 16, 4, 4)
    report = graphwright.compile(wide.eval(), (image,), target="a100", precision=precision, cache=False).report()
    narrow = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    assert len(report.fallbacks) == 3
    assert all(text.startswith(f"{narrow} tiled") for text in report.fallbacks), report.fallbacks
    assert not any(kernel.algorithm.startswith(narrow) for kernel in report.kernels)


@pytest.mark.parametrize("name", ["orin", "jetson-orin"])
def test_the_name_of_a_jetson_is_its_gpu(name):
    hw = graphwright.hwdb.lookup(name)
    assert (hw.kind, hw.llvm_cpu) == ("gpu", "sm_87")


@pytest.mark.parametrize(("target", "arch"), [("a100", "sm_80"), ("mi300x", "gfx942")])
def test_without_a_device_a_call_says_so_and_the_rest_works(saved, target, arch):
    manifest = artifact.inspect(saved[target])
    assert manifest["target"]["gpu"] == arch
    loaded = graphwright.load(saved[target])
    assert len(loaded.report().kernels) >= 4
    with pytest.raises(ArtifactError, match=f"cannot run: there is no {arch} device here"):
        loaded(IMAGE)


def test_no_compiler(monkeypatch, tmp_path):
    for name in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cuda, "_USUAL", tmp_path / "nvcc")
    monkeypatch.setattr(cuda, "find_nvrtc", lambda: None)
    with pytest.raises(ToolMissing, match=r"needs a CUDA compiler and none is here: pip install 'graphwright\[cuda\]'"):
        graphwright.compile(model(), (IMAGE,), target="a100", cache=False)
    assert doctor._cuda().status == "missing"
    finding = doctor._target("a100")
    assert finding.status == "missing"
    assert "CUDA compiler" in finding.detail


def test_nvrtc_compiles_where_it_is_installed():
    nvrtc = cuda.find_nvrtc()
    if nvrtc is None:
        pytest.skip("NVRTC is not installed: pip install 'graphwright[cuda]'")
    source = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }'
    cubin = cuda._with_nvrtc(nvrtc, source, "sm_80")
    assert machine_of(cubin) == CUDA_MACHINE
    assert b".text.twice\0" in cubin
    with pytest.raises(GraphwrightError, match=r"NVRTC failed: (.|\n)*undefined_name"):
        cuda._with_nvrtc(nvrtc, "int x = undefined_name;", "sm_80")


def test_an_architecture_the_compiler_does_not_know():
    with pytest.raises(GraphwrightError, match=r"makes no code for sm_35, it knows sm_\d+"):
        cuda.check_architecture(cuda.find_compiler(), "sm_35")


def test_an_architecture_with_a_suffix_is_compiled_without():
    """nvcc lists sm_90 and not sm_90a, which is what the database calls an H100."""
    compiler = cuda.find_compiler()
    hw = graphwright.hwdb.lookup("h100")
    assert hw.llvm_cpu == "sm_90a"
    cuda.check_architecture(compiler, hw.llvm_cpu)
    image, _ = cuda.compile_cuda('extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }', hw.llvm_cpu)
    assert b".text.twice\0" in image


def test_errors_of_tvm_are_sentences_that_name_the_target_and_the_function(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(lower, "schedules", lambda *_: _raised(ValueError("no loop\nbelow")))
        with pytest.raises(GraphwrightError, match=r"^exp cannot be scheduled for a100-\S+: no loop; report this"):
            graphwright.compile(torch.exp, (torch.ones(32),), target="a100", cache=False)
    monkeypatch.setattr("graphwright.backends.gpu.build._machine_code", lambda *_: _raised(RuntimeError("bad bitcast")))
    with pytest.raises(GraphwrightError, match=r"^code generation for a100-\S+ failed: bad bitcast; report this"):
        graphwright.compile(torch.exp, (torch.ones(32),), target="a100", cache=False)


class _Argmax(nn.Module):
    def forward(self, x):
        return x.argmax(-1), x.argmin()


@pytest.mark.parametrize("target", ["a100", "mi300x"])
def test_positions_of_extremes_are_built_without_their_values(target):
    report = graphwright.compile(_Argmax(), (torch.ones(2, 300),), target=target, cache=False).report()
    assert {kernel.algorithm for kernel in report.kernels} == {"first extreme"}
    assert all("256 threads a row" in kernel.choice for kernel in report.kernels)


def test_bfloat16_products_of_matrix_units_that_take_less_of_a_sum_stay_float32_and_the_report_says_why():
    product, x = nn.Linear(64, 64), torch.ones(32, 64)
    report = graphwright.compile(product, (x,), target="mi100", precision="bf16", cache=False).report()
    assert [kernel.algorithm for kernel in report.kernels] == ["tiled product"]
    assert "no kernel has fragments of m16n16k8:bfloat16:float32, which mi100 multiplies" in report.text()


def test_functions_of_device_libraries_that_are_not_here(monkeypatch, tmp_path):
    monkeypatch.setattr(rocm, "_places", lambda: iter([tmp_path]))
    assert doctor._rocm().status == "missing"
    with pytest.raises(ToolMissing, match=r"kernels call __ocml_\w+ of AMD's device libraries and none are here"):
        graphwright.compile(torch.tan, (torch.ones(64),), target="mi300x", cache=False)


def test_bitcode_of_another_architecture_is_not_linked(monkeypatch, tmp_path):
    for name in ("ocml", "oclc_isa_version_90a", "oclc_wavefrontsize64_on", "oclc_wavefrontsize64_off"):
        (tmp_path / f"{name}.bc").touch()
    monkeypatch.setenv("HIP_DEVICE_LIB_PATH", str(tmp_path))
    assert [path.stem for path in rocm.bitcode("gfx942", 64)] == ["ocml", "oclc_wavefrontsize64_on"]
    assert [path.stem for path in rocm.bitcode("gfx90a", 64)][-1] == "oclc_isa_version_90a"
    assert "oclc_wavefrontsize64_off" in [path.stem for path in rocm.bitcode("gfx1100", 32)]


def test_operators_without_a_lowering_are_refused_together():
    class Two(nn.Module):
        def forward(self, x):
            return torch.nonzero(x), torch.masked_select(x, x > 0)

    with pytest.raises(UnsupportedOp, match="operators cannot be compiled for a100") as refused:
        graphwright.compile(Two(), (torch.ones(4),), target="a100", cache=False)
    assert "aten.nonzero" in str(refused.value)
    assert "aten.masked_select" in str(refused.value)
    assert f'{Path(__file__).name}", line' in str(refused.value)


def test_a_model_larger_than_the_device():
    small = dataclasses.replace(graphwright.hwdb.lookup("mi300x"), dram_bytes=1000)
    with pytest.raises(GraphwrightError, match=r"needs 0\.0 GB for weights, inputs and activations and .* has 0\.0 GB"):
        graphwright.compile(model(), (IMAGE,), target=small, cache=False)


def test_inputs_count_in_the_memory_of_the_device():
    """An input of 4000 bytes, of which a sum is left."""
    x = torch.ones(1000)
    for memory, fits in ((4500, True), (3900, False)):
        hw = dataclasses.replace(graphwright.hwdb.lookup("mi300x"), dram_bytes=memory)
        if fits:
            graphwright.compile(torch.sum, (x,), target=hw, cache=False)
            continue
        with pytest.raises(GraphwrightError, match="for weights, inputs and activations"):
            graphwright.compile(torch.sum, (x,), target=hw, cache=False)


def test_kernels_over_the_limits_of_the_device_give_way(caplog, tmp_path):
    tiny = dataclasses.replace(graphwright.hwdb.lookup("a100"), max_threads_per_block=16)
    compiled = graphwright.compile(nn.Linear(32, 32), (torch.ones(32, 32),), target=tiny, cache=False)
    assert "has 64 threads a block, the device allows 16: TVM's rules take its place" in caplog.text
    compiled.save(tmp_path / "out")
    assert all(launch.threads <= 16 for launch in Description.read(tmp_path / "out" / "device.json").kernels)


def test_where_no_rule_is_within_the_limits_the_sentence_says_which_one(monkeypatch):
    launch = Launch("kernel", (), (), 32, 60000)
    monkeypatch.setattr(lower, "_launch", lambda kernel: launch)
    why = r"the last one because kernel has 60000 bytes of shared memory, 49152 are allowed; choose a device with other"
    with pytest.raises(GraphwrightError, match=rf"no schedule makes kernels of \w+ for cuda, {why} limits"):
        graphwright.compile(torch.exp, (torch.ones(32),), target="a100", cache=False)


@pytest.mark.parametrize("target", ["gfx9999", "gfx943", "sm_35", "sm_999"])
def test_an_architecture_that_nobody_knows(target):
    with pytest.raises(UnknownTarget, match=rf"unknown target '{target}'; did you mean"):
        graphwright.compile(model(), (IMAGE,), target=target, cache=False)


@pytest.mark.parametrize("options", [{"precision": "int8"}, {"tune": "1s"}, {"memory_limit": "1MB"}])
def test_options_that_are_for_cpus(options):
    with pytest.raises(InputError, match=r"leave .* out for"):
        graphwright.compile(model(), (IMAGE,), target="a100", cache=False, **options)


def test_gpus_of_other_makers():
    with pytest.raises(UnknownTarget, match="made with CUDA and ROCm, not spirv"):
        graphwright.compile(model(), (IMAGE,), target="arc-a770", cache=False)


@pytest.mark.parametrize(
    ("arch", "here", "has_ptx", "runs"),
    [
        ("sm_80", "80", False, True),
        ("sm_80", "86", False, True),  # later, of the same major number
        ("sm_86", "80", True, False),
        ("sm_80", "90", False, False),
        ("sm_80", "90", True, True),  # the driver translates PTX
        ("sm_90a", "90", False, True),
        ("sm_90", "120", True, True),
        ("sm_100", "90", True, False),
    ],
)
def test_code_runs_on_the_devices_that_cuda_says(arch, here, has_ptx, runs):
    assert runs_on(arch, here, has_ptx) is runs


def test_a_missing_runtime_is_looked_for_once(monkeypatch):
    looked = []
    monkeypatch.setattr(device_library, "from_pip", lambda pattern: looked.append(pattern) or [])
    device_library._load_cuda.cache_clear()
    for _ in range(2):
        device_library.absence(graphwright.hwdb.lookup("a100"))
    assert len(looked) <= 1


def test_a_function_that_no_rule_takes_is_refused_with_what_each_says(monkeypatch):
    monkeypatch.setattr(schedule, "one_thread_each", lambda *_: None)
    monkeypatch.setattr(schedule, "_applied", lambda *_: _raised(ValueError("not such loops")))
    with pytest.raises(
        GraphwrightError, match=r"no rule applies \(.*not such loops.*loops of another form.*report this"
    ):
        graphwright.compile(nn.Softmax(-1), torch.randn(3, 5), target="a100", cache=False)
