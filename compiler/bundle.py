"""A compiled model -> a bundle: what a machine without Python needs to run it, in one directory.

    run                  a static program: inputs from .npy files, results to .npy files, and the time of a call
    model.so             a library with the C calls of graphwright.h (left out with executable=True)
    weights.safetensors  mapped by both (inside them with single_file=True)
    graphwright.h, example.c, example.py, README.txt, LICENSES.txt, manifest.json (digests of all of it)

For Android it is a Gradle module instead: libmodel.so with the weights inside, its JNI and Kotlin sources, build files.
For macOS the library is model.dylib, and `run` is dynamic, as all programs are there.

The directory is an artifact as well: where PyTorch and graphwright are installed on such a machine, `graphwright.load`
takes it.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from ..backends.aot import weights
from ..backends.aot.library import BUNDLED, LIBRARY_NAME, OBJECT_NAME, WEIGHTS_NAME
from ..backends.aot.toolchain import is_android, is_macos
from ..backends.bundle import features, link
from ..backends.bundle.notices import android_readme, readme, write_notices
from ..backends.bundle.table import Copy, Table, Tensor, c_source
from ..errors import ArtifactError, InputError
from . import artifact, loading
from .build import CONSTANTS_NAME
from .capture import Signature, TensorSpec
from .plan import OperatorCall, Plan, RegionCall

if TYPE_CHECKING:
    import torch

PROGRAM_NAME = "run"
ANDROID_NAME = "libmodel.so"  # Android's packager takes lib*.so only
MACOS_NAME = "model.dylib"
_LIBRARY_FILES = ("graphwright.h", "example.c", "example.py")
_ANDROID_FILES = (
    *("graphwright.h", "graphwright_jni.c", "Model.kt"),
    *("build.gradle.kts", "CMakeLists.txt", "AndroidManifest.xml"),
)
_FILES = Path(link.__file__).parent  # what every bundle has a copy of lies there


def bundle(directory: Path, path: Path, executable: bool = False, single_file: bool = False) -> Path:
    """Write the bundle of the artifact in `directory` to the directory `path`. Returns the path.

    executable: the program only, no library. single_file: the weights inside instead of beside them.
    Raises InputError where the model cannot be bundled, and ArtifactError where `path` is something else.
    """
    path = Path(path)
    manifest = artifact.inspect(directory)
    target = manifest["target"]
    check_bundled(target["id"], target["isa"], path)
    described = loading.from_data(manifest["description"])
    if described.twin is not None:
        raise InputError("a model of two builds (fallback=, precision='adaptive') chooses between them in Python")
    table = table_of(directory, target, described.plan, described.signature)
    with tempfile.TemporaryDirectory(prefix="graphwright-") as scratch:
        made = Path(scratch, "bundle")
        made.mkdir()
        if table.weights_bytes:
            shutil.copyfile(directory / WEIGHTS_NAME, made / WEIGHTS_NAME)
        android = is_android(target["triple"]) and not executable
        macos = is_macos(target["triple"])
        single_file = single_file or android
        text = c_source(table, WEIGHTS_NAME, _digest_of(manifest)) if single_file else c_source(table)
        code = directory / OBJECT_NAME if table.runs else None
        if not android:
            link.program(code, text, target["triple"], made / PROGRAM_NAME, made)
        if not executable:
            name = ANDROID_NAME if android else MACOS_NAME if macos else LIBRARY_NAME
            link.library(code, text, target["triple"], made / name, made)
            for name in _ANDROID_FILES if android else _LIBRARY_FILES:
                shutil.copyfile(_FILES / name, made / name)
        if single_file and table.weights_bytes:
            (made / WEIGHTS_NAME).unlink()
        about = android_readme(table) if android else readme(table, executable, single_file, macos)
        (made / "README.txt").write_text(about)
        write_notices(made / "LICENSES.txt", musl=not macos)
        artifact.seal_for(made, target, manifest["description"])
        return artifact.save(made, path)


def check_bundled(target: str, isa: str, path: Path) -> None:
    """Raise InputError where no bundle for `target` can be written to `path`."""
    if path.suffix == artifact.SUFFIX:
        raise InputError(f"a bundle is a directory: write it to a name that does not end in {artifact.SUFFIX}")
    if isa not in BUNDLED:
        raise InputError(
            f"bundles are made for {' and '.join(BUNDLED)}, and {target} is {isa}: save the model (--artifact), for "
            "graphwright.load on a machine with Python and graphwright"
        )


def _digest_of(manifest: dict[str, Any]) -> str:
    known = manifest["files"].get(WEIGHTS_NAME)
    return str(known["sha256"]) if known else ""


def table_of(directory: Path, target: Mapping[str, Any], plan: Plan, signature: Signature) -> Table:
    """What the program of a bundle has to know of the model whose files are in `directory`.

    target: `id`, `isa`, `triple` and `features`, as a manifest has them. Raises InputError where operators run in
    PyTorch.
    """
    left = sorted({call.operator for call in plan.calls if isinstance(call, OperatorCall)})
    if left:
        raise InputError(
            f"{', '.join(left)} run in PyTorch, which a bundle does without; compile for the board by its name "
            "to see where they stand in the model"
        )
    regions = [call for call in plan.calls if isinstance(call, RegionCall)]
    assert len(regions) <= 1, "what is compiled whole is one region"
    outputs = [leaf for leaf in signature.outputs if isinstance(leaf, TensorSpec)]
    header, nbytes = b"", 0
    if regions and (file := directory / WEIGHTS_NAME).exists():
        nbytes = weights.read_layout(file).nbytes
        with open(file, "rb") as content:
            header = content.read(file.stat().st_size - nbytes)
    written = regions[0].outputs if regions else ()
    return Table(
        target=target["id"],
        inputs=tuple(_tensor(spec) for spec in signature.tensors),
        outputs=tuple(_tensor(spec) for spec in outputs),
        features=features.needed(target["isa"], target["triple"], target["features"]),
        read=regions[0].inputs if regions else (),
        written=tuple(plan.outputs.index(slot) for slot in written),
        copies=tuple(_copies(plan, written, directory)),
        runs=bool(regions),
        weights_bytes=nbytes,
        header=header,
    )


def _copies(plan: Plan, written: tuple[int, ...], directory: Path) -> list[Copy]:
    """The outputs that the region does not write: inputs, constants, and what it wrote for another output."""
    copies = []
    for output, slot in enumerate(plan.outputs):
        if slot in written:
            if (first := plan.outputs.index(slot)) != output:
                copies.append(Copy("output", output, first))
        elif slot < plan.inputs:
            copies.append(Copy("input", output, slot))
        else:
            name = plan.constants.get(slot)
            if name is None:
                raise ArtifactError(f"output {output} is made by nothing; compile the model again")
            copies.append(Copy("constant", output, constant=_bytes(load_file(directory / CONSTANTS_NAME)[name])))
    return copies


def _bytes(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _tensor(spec: TensorSpec) -> Tensor:
    dtype = str(spec.dtype).removeprefix("torch.")
    return Tensor(spec.name, dtype, spec.shape, math.prod(spec.shape) * spec.dtype.itemsize)
