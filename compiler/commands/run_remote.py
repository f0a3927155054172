"""`graphwright run-remote user@pi bundle/`: copy a bundle to a board by ssh, run it there, and bring the results back.

The board needs an ssh server, a shell and tar. A bundle stays there under .cache/graphwright/DIGEST, so
that only inputs travel the next time; `rm -r ~/.cache/graphwright` on the board removes what was left.
"""

from __future__ import annotations

import io
import shlex
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...backends.aot.toolchain import is_macos
from ...errors import GraphwrightError, InputError, size
from .. import artifact
from ..bundle import PROGRAM_NAME
from ..capture import TensorSpec
from ..loading import tensors_from_data
from .run_artifact import array_of, arrays, tensor_of

_MACHINES = {"aarch64": {"aarch64", "arm64"}, "armv7": {"armv7l", "armv8l", "aarch64"}}
# No question that nobody answers; a board that is not there, or is gone, is noticed within a minute.
_SSH_OPTIONS = ("BatchMode=yes", "ConnectTimeout=20", "ServerAliveInterval=15", "ServerAliveCountMax=4")
ANSWER_S = 60.0  # for a question that takes no time
_SSH_FAILED = 255  # ssh's own failure; any other status is the script's
# Results come as one archive on standard output, what the program prints as files in it.
_SCRIPT = """
set -e
cd {directory}
work=$(mktemp -d "$PWD/call-XXXXXX")
trap 'rm -rf "$work"' EXIT
tar xf - -C "$work"
cd "$work"
status=0
{command} > printed 2> complaint || status=$?
echo $status > status
tar cf - *
"""


@dataclass(frozen=True)
class RemoteRun:
    """What a call on a board gave."""

    printed: str  # of the program: how long loading and the calls took
    results: dict[str, Any]  # numpy arrays by the names of the model's outputs
    copied_bytes: int  # of the bundle; 0 where it was there already


def run_remote(
    host: str, bundle: Path, inputs: Path | None = None, repeat: int | None = None, threads: int | None = None
) -> RemoteRun:
    """Run the bundle in the directory `bundle` on `host`, as ssh names it. `inputs` is a .npz file; None is noise.

    Raises ArtifactError for a damaged bundle, InputError for wrong inputs or a board of another kind, and
    GraphwrightError where ssh or the program fails, with what they said.
    """
    bundle = Path(bundle)
    manifest = artifact.check(bundle)
    if PROGRAM_NAME not in manifest["files"]:
        raise InputError(f"{bundle} is no bundle: it has no program {PROGRAM_NAME}; compile the model for a board")
    taken, made = tensors_from_data(manifest["description"])
    given = {} if inputs is None else _checked(inputs, [spec.name for spec in taken])
    target = manifest["target"]
    check_machine(host, target["id"], target["isa"], target["triple"])
    directory = f".cache/graphwright/{manifest['digest'][:24]}"
    copied = _copy(host, bundle, manifest, directory)
    command = [f"../{PROGRAM_NAME}"]
    for i, name in enumerate(given):
        command += ["--input", f"{name}=input{i}.npy"]
    for i in range(len(made)):
        command += ["--output", f"output{i}.npy"]
    for option, value in (("--repeat", repeat), ("--threads", threads)):
        command += [option, str(value)] if value is not None else []
    specs = {spec.name: spec for spec in taken}
    files = {f"input{i}.npy": _npy(tensor_of(given[name], specs[name])) for i, name in enumerate(given)}
    answer = ssh(host, _SCRIPT.format(directory=directory, command=shlex.join(command)), archive(files))
    found = _unpacked(answer)
    if found["status"].strip() != b"0":
        complaint = found["complaint"].decode(errors="replace").strip()
        raise GraphwrightError(f"on {host}: {complaint or 'the program ended with status ' + found['status'].decode()}")
    results = {spec.name: _result(found[f"output{i}.npy"], spec) for i, spec in enumerate(made)}
    return RemoteRun(found["printed"].decode(errors="replace"), results, copied)


def _checked(file: Path, names: list[str]) -> dict[str, Any]:
    given = arrays(file, "--input")
    if set(given) == {f"arr_{i}" for i in range(len(names))}:
        return {name: given[f"arr_{i}"] for i, name in enumerate(names)}
    if set(given) != set(names):
        raise InputError(f"--input {file}: the model takes {', '.join(names)}, and the file has {', '.join(given)}")
    return given


def check_machine(host: str, target: str, isa: str, triple: str) -> None:
    """Raise InputError where the board at `host` does not run code for `target`, which is `isa` and for `triple`."""
    answer = ssh(host, "uname -sm", limit=ANSWER_S).decode(errors="replace").strip()
    said, _, named = answer.rpartition("\n")
    if said:  # it would be taken for results
        raise GraphwrightError(
            f"the shell of {host} prints {said[:80]!r} before it does what it is asked: let its ~/.bashrc, or whatever "
            "does that, print to terminals only"
        )
    system, _, machine = named.rpartition(" ")
    if machine not in _MACHINES[isa]:
        raise InputError(f"{host} is {machine}, and {target} is {isa}: compile for the board that it is")
    if (system == "Darwin") != is_macos(triple):
        wanted = "macOS" if is_macos(triple) else "Linux"
        raise InputError(f"{host} runs {system}, and the code for {target} is for {wanted}: compile for what it runs")


def _copy(host: str, bundle: Path, manifest: dict[str, Any], directory: str) -> int:
    """Copy what runs, unless it is there; returns the bytes."""
    asked = f"mkdir -p {directory} && if test -f {directory}/whole; then echo whole; fi"
    if ssh(host, asked).strip() == b"whole":
        return 0
    names = [name for name in manifest["files"] if name == PROGRAM_NAME or name.endswith(".safetensors")]
    content = archive({name: (bundle / name).read_bytes() for name in names})
    unpack = f"tar xf - && chmod +x {PROGRAM_NAME} && touch whole"
    ssh(host, f"cd {directory} && {{ {unpack} || {{ rm -f ./*; exit 1; }}; }}", content)
    return len(content)


def _npy(tensor: torch.Tensor) -> bytes:
    """As the program reads it: bfloat16 is pairs of bytes to numpy."""
    array = tensor.view(torch.int16).numpy().view("V2") if tensor.dtype == torch.bfloat16 else tensor.numpy()
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _result(content: bytes, spec: TensorSpec) -> Any:
    array = np.load(io.BytesIO(content))
    if spec.dtype == torch.bfloat16:
        array = array_of(torch.from_numpy(array.view(np.int16)).view(torch.bfloat16))
    return array


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _unpacked(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = {member.name.removeprefix("./"): archive.extractfile(member) for member in archive if member.isfile()}
        return {name: file.read() for name, file in files.items() if file is not None}


def ssh(host: str, script: str, content: bytes = b"", limit: float | None = None) -> bytes:
    """What `script` writes on `host` to standard output, given `content` on standard input.

    limit: the most seconds it may take; a board that no longer answers is noticed in any case. Raises GraphwrightError.
    """
    if not host or host.startswith("-"):  # an option to ssh
        raise InputError(f"{host!r} is no host: give it as ssh knows it, such as pi@raspberrypi")
    command = ["ssh", *(part for option in _SSH_OPTIONS for part in ("-o", option)), host, script]
    try:
        done = subprocess.run(command, input=content, capture_output=True, check=False, timeout=limit)
    except FileNotFoundError as error:
        raise GraphwrightError("boards are reached by the ssh program: install OpenSSH's client") from error
    except subprocess.TimeoutExpired as error:
        raise GraphwrightError(f"{host} did not finish within {limit:.0f} s: see what else runs there") from error
    if not done.returncode:
        return done.stdout
    said = " ".join(done.stderr.decode(errors="replace").split())
    if "No space left on device" in said:
        needed = f" for {size(len(content))}" if content else ""
        raise GraphwrightError(f"{host} has no space left{needed}: `rm -r ~/.cache/graphwright` there removes bundles")
    if done.returncode == _SSH_FAILED:
        raise GraphwrightError(f"{host} is not reached: {said}; `ssh {shlex.quote(host)} true` has to work by itself")
    raise GraphwrightError(f"on {host}: {said or f'a command ended with status {done.returncode}'}")
