"""A compiled model as files: machine code, weights, and a manifest that says what they are and for which machine.

    artifact = seal(directory, hw, {...})      # write the manifest of the files that lie in `directory`
    save(directory, "model.gw")                # a copy as one file, or as a directory where the name has no .gw
    artifact = load("model.gw")                # checked: format, machine, every byte

The manifest (JSON) holds the format's version, the machine the code needs, the size and SHA-256 of every file, and
`description`, whatever the caller wants to find again. One file is a zip archive without compression; loading unpacks
it into the cache. Nothing is unpickled, and no code is loaded before its digest has been checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..backends.aot.library import LIBRARY_NAME, WEIGHTS_NAME
from ..errors import ArtifactError
from ..hwdb import Hardware, detect, missing_features
from .cache import Cache, file_digest

FORMAT = "graphwright artifact"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SUFFIX = ".gw"
_ISA_NAMES = {"amd64": "x86_64", "x86-64": "x86_64", "arm64": "aarch64"}
_SYSTEM_NAMES = {"darwin": "macosx"}  # in triples


@dataclass(frozen=True)
class Artifact:
    """A checked artifact; its files lie side by side in one directory."""

    manifest: dict[str, Any]
    library: Path  # absent where the model has no compiled region
    weights: Path  # absent with it

    @property
    def directory(self) -> Path:
        """Where the files lie."""
        return self.library.parent

    @property
    def description(self) -> dict[str, Any]:
        """What `seal` was given."""
        description: dict[str, Any] = self.manifest["description"]
        return description


def seal(directory: Path, hw: Hardware, description: dict[str, Any]) -> Artifact:
    """Write the manifest of the files in `directory`: code for `hw`, and `description` (JSON data)."""
    target = {"id": hw.id, "name": hw.name, "isa": hw.isa, "triple": hw.triple, "features": sorted(hw.features)}
    if hw.kind == "gpu":
        # What has to fit is the processor beside the GPU; whether there is one is seen when the model is loaded.
        host = detect()
        target |= {"isa": host.isa, "triple": host.triple, "features": [], "gpu": hw.llvm_cpu}
    return seal_for(directory, target, description)


def seal_for(directory: Path, target: dict[str, Any], description: dict[str, Any]) -> Artifact:
    """As `seal`, for a machine as another manifest describes it."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name != MANIFEST_NAME
    }
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "graphwright_version": __version__,
        "target": target,
        "files": files,
        "description": description,
    }
    manifest["digest"] = _digest(manifest)
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return _artifact(directory, manifest)


def save(directory: Path, path: Path) -> Path:
    """Copy a sealed artifact to `path`: one file where the name ends in .gw, else a directory. Returns the path.

    An artifact that is there is replaced in one step; other files in its directory stay. Raises ArtifactError where
    something else is there, or where `path` cannot be written.
    """
    path = Path(path)
    check_place(path)
    manifest = _read_manifest(directory / MANIFEST_NAME)
    names = [MANIFEST_NAME, *manifest["files"]]
    others = _others(path)
    path = path.resolve() if path.is_symlink() else path
    if taken := sorted(set(others).intersection(names)):
        raise ArtifactError(f"{path} has {', '.join(taken)} of another origin; move it, or choose another name")
    single = path.suffix == SUFFIX
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
            made = Path(scratch, "new")
            if single:
                _write_archive(made, directory, names)
            else:
                made.mkdir()
                for name in names:
                    shutil.copy(directory / name, made / name)  # with its permissions: a bundle has a program
                if path.is_dir():
                    os.rename(path, Path(scratch, "old"))
            os.replace(made, path)
            for name in others:
                os.rename(Path(scratch, "old", name), path / name)
    except OSError as error:
        raise ArtifactError(f"cannot save to {path}: {error}; nothing was changed there") from error
    return path


def check_place(path: Path) -> None:
    """Raise ArtifactError where `save` would have to refuse `path`, as far as can be told without touching it."""
    single = path.suffix == SUFFIX
    if path.is_dir() and (single or (any(path.iterdir()) and not _listed(path))):
        raise ArtifactError(f"{path} is a directory that is not an artifact; choose another name to save to")
    if not single and path.exists() and not path.is_dir():
        raise ArtifactError(f"{path} is a file; end the name in {SUFFIX} to save one file, or choose another name")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ArtifactError(f"cannot save to {path}: {above} is a file; choose another name")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ArtifactError(f"cannot save to {path}: {above} may not be written; choose another directory")


def _listed(path: Path) -> set[str]:
    """The names of the files of the artifact, of whatever version, in the directory `path`; empty without one."""
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_bytes())
        return {MANIFEST_NAME, *manifest["files"]} if manifest["format"] == FORMAT else set()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return set()


def _others(path: Path) -> list[str]:
    """What lies beside the files of the artifact in the directory `path`, and is its user's."""
    listed = _listed(path)
    return sorted({entry.name for entry in path.iterdir()} - listed) if listed else []


def load(path: Path) -> Artifact:
    """The artifact at `path`, checked: its format, that this machine can run it, and every byte of its files.

    Raises ArtifactError with the reason: missing, damaged, of another version, or for another machine.
    """
    path = Path(path)
    if path.is_dir():
        manifest = _read_manifest(path / MANIFEST_NAME)
        check_machine(manifest, path)
        _check_files(path, manifest, path)
        return _artifact(path, manifest)
    if not path.is_file():
        raise ArtifactError(f"there is no artifact at {path}; check the path, or save a compiled model there")
    with _archive(path) as archive:
        manifest = _parse_manifest(_member(archive, MANIFEST_NAME, path), path)
        check_machine(manifest, path)
        _check_members(archive, manifest, path)
    # The key stands for every byte: a changed file is unpacked, and so checked, again.
    key = f"gw-{file_digest(path)}"
    cache = Cache()
    directory = cache.get(key) or cache.put(key, lambda empty: _unpack(path, manifest, empty))
    return _artifact(directory, manifest)


def check(directory: Path) -> dict[str, Any]:
    """The manifest of the artifact or bundle in `directory`, for any machine, with every byte of its files checked."""
    manifest = _read_manifest(directory / MANIFEST_NAME)
    _check_files(directory, manifest, directory)
    return manifest


def inspect(path: Path) -> dict[str, Any]:
    """The manifest of an artifact for any machine; its files are not checked. Raises ArtifactError."""
    path = Path(path)
    if path.is_file():
        with _archive(path) as archive:
            return _parse_manifest(_member(archive, MANIFEST_NAME, path), path)
    return _read_manifest(path / MANIFEST_NAME)


def check_machine(manifest: dict[str, Any], where: Path) -> None:
    """Raise ArtifactError where this machine cannot run the code."""
    target = manifest["target"]
    machine = platform.machine().lower()
    here = _ISA_NAMES.get(machine, machine)
    kernel = platform.system().lower()
    system = _SYSTEM_NAMES.get(kernel, kernel)
    if target["isa"] != here:
        raise ArtifactError(
            f"{where} holds {target['isa']} code (for {target['name']}) and this machine is {here}; "
            f"compile the model for target='native' here"
        )
    if system not in target["triple"]:
        raise ArtifactError(
            f"{where} holds code for {target['triple']} and this system is {system}; compile the model here"
        )
    if missing := missing_features(target["features"]):
        raise ArtifactError(
            f"{where} was compiled for {target['name']} and this processor lacks {', '.join(missing)}; "
            f"compile the model for target='native' here"
        )


def _artifact(directory: Path, manifest: dict[str, Any]) -> Artifact:
    return Artifact(manifest, directory / LIBRARY_NAME, directory / WEIGHTS_NAME)


def _digest(manifest: dict[str, Any]) -> str:
    """Of everything in the manifest but itself."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        return _parse_manifest(path.read_bytes(), path.parent)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"there is no artifact at {path.parent}: it has no {path.name}; check the path, or compile the model again"
        ) from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def _parse_manifest(content: bytes, where: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
        known = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    except ValueError as error:
        raise _damaged(where, f"its {MANIFEST_NAME} is not whole") from error
    if not known:
        raise ArtifactError(f"{where} is not an artifact of graphwright: its {MANIFEST_NAME} is something else")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{where} has format version {version}, written by graphwright {manifest.get('graphwright_version')}, and "
            f"graphwright {__version__} reads version {FORMAT_VERSION}; compile the model again with this version"
        )
    if manifest.get("digest") != _digest(manifest) or not _is_complete(manifest):
        raise _damaged(where, f"its {MANIFEST_NAME} has been changed")
    for name in manifest["files"]:
        # A file of an artifact lies beside the manifest and nowhere else.
        if name != os.path.basename(name) or "\\" in name or name in ("", ".", "..", MANIFEST_NAME):
            raise ArtifactError(f"{where} names a file outside itself, {name!r}; do not use it")
    checked: dict[str, Any] = manifest
    return checked


def _is_complete(manifest: dict[str, Any]) -> bool:
    target, files = manifest.get("target"), manifest.get("files")
    return (
        isinstance(target, dict)
        and all(isinstance(target.get(key), str) for key in ("id", "name", "isa", "triple"))
        and isinstance(target.get("features"), list)
        and isinstance(files, dict)
        and all(isinstance(known, dict) and {"bytes", "sha256"} <= set(known) for known in files.values())
        and isinstance(manifest.get("description"), dict)
    )


def _check_files(directory: Path, manifest: dict[str, Any], where: Path) -> None:
    for name, known in manifest["files"].items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != known["bytes"]:
                raise _damaged(where, f"{name} has {size} bytes instead of {known['bytes']}")
            if file_digest(path) != known["sha256"]:
                raise _damaged(where, f"the content of {name} has been changed")
        except FileNotFoundError as error:
            raise _damaged(where, f"{name} is missing") from error


def _damaged(where: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{where} is damaged: {what}; save or compile the model again")


def _write_archive(path: Path, directory: Path, names: list[str]) -> None:
    """Equal files give an equal archive: no compression, no times, no permissions."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            member = zipfile.ZipInfo(name)
            with open(directory / name, "rb") as source, archive.open(member, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 20)


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, f"it is not a whole archive ({error})") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    try:
        return archive.read(name)
    except KeyError as error:
        raise ArtifactError(f"{path} is not an artifact of graphwright: it has no {name}") from error


def _check_members(archive: zipfile.ZipFile, manifest: dict[str, Any], path: Path) -> None:
    """The archive must hold exactly what the manifest lists, as it is: no other path, size or compression."""
    expected = {MANIFEST_NAME, *manifest["files"]}
    names = archive.namelist()
    for name in names:
        if name not in expected:
            raise ArtifactError(f"{path} holds {name!r}, which is not part of an artifact; do not use it")
    if len(names) != len(expected):
        raise _damaged(path, f"it holds {sorted(names)} instead of {sorted(expected)}")
    for name, known in manifest["files"].items():
        member = archive.getinfo(name)
        if member.file_size != known["bytes"] or member.compress_size != known["bytes"]:
            raise _damaged(path, f"{name} has {member.file_size} bytes instead of {known['bytes']}")


def _unpack(path: Path, manifest: dict[str, Any], directory: Path) -> None:
    with _archive(path) as archive:
        for name in (MANIFEST_NAME, *manifest["files"]):
            with archive.open(name) as source, open(directory / name, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    _check_files(directory, manifest, path)
