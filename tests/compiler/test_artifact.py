"""Artifacts: what is saved is what is loaded, and nothing else is loaded."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphwright.compiler import artifact
from graphwright.errors import ArtifactError
from graphwright.hwdb import detect, lookup

DESCRIPTION = {"inputs": [{"name": "x", "shape": [1, 3]}], "report": {"seconds": 1.5}}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    directory = tmp_path / "sealed"
    directory.mkdir()
    (directory / "model.so").write_bytes(b"\x7fELF" + bytes(5000))
    (directory / "weights.safetensors").write_bytes(b"w" * 100_000)
    artifact.seal(directory, detect(), DESCRIPTION)
    return directory


def saved(sealed: Path, tmp_path: Path, kind: str) -> Path:
    return artifact.save(sealed, tmp_path / ("model.gw" if kind == "file" else "model"))


def rewritten(path: Path, change: Callable[[dict[str, Any]], None], honest: bool = True) -> None:
    """Change the manifest of a directory; `honest` makes its own digest right again."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    if honest:
        rest = {key: value for key, value in manifest.items() if key != "digest"}
        manifest["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_was_saved_is_loaded(sealed: Path, tmp_path: Path, kind: str) -> None:
    path = saved(sealed, tmp_path, kind)
    assert path.is_file() == (kind == "file")
    loaded = artifact.load(path)
    assert loaded.description == DESCRIPTION
    assert loaded.library.read_bytes() == (sealed / "model.so").read_bytes()
    assert loaded.weights.read_bytes() == (sealed / "weights.safetensors").read_bytes()
    assert loaded.manifest["target"]["isa"] == detect().isa
    assert artifact.inspect(path) == loaded.manifest


def test_equal_artifacts_are_equal_files(sealed: Path, tmp_path: Path) -> None:
    first, second = artifact.save(sealed, tmp_path / "a.gw"), artifact.save(sealed, tmp_path / "b.gw")
    assert first.read_bytes() == second.read_bytes()


def test_a_file_is_unpacked_once(sealed: Path, tmp_path: Path) -> None:
    path = saved(sealed, tmp_path, "file")
    assert artifact.load(path).directory == artifact.load(path).directory


def test_a_loaded_file_outlives_its_archive(sealed: Path, tmp_path: Path) -> None:
    path = saved(sealed, tmp_path, "file")
    loaded = artifact.load(path)
    path.unlink()
    assert loaded.library.exists()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_an_artifact_is_replaced(sealed: Path, tmp_path: Path, kind: str) -> None:
    path = saved(sealed, tmp_path, kind)
    (sealed / "model.so").write_bytes(b"new")
    (sealed / "extra.safetensors").write_bytes(b"more")
    artifact.seal(sealed, detect(), {})
    loaded = artifact.load(artifact.save(sealed, path))
    assert loaded.library.read_bytes() == b"new"
    assert (loaded.directory / "extra.safetensors").read_bytes() == b"more"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_what_else_lies_in_the_directory_stays(sealed: Path, tmp_path: Path) -> None:
    path = saved(sealed, tmp_path, "directory")
    (path / "scores.npy").write_bytes(b"mine")
    (path / "notes").mkdir()
    artifact.save(sealed, path)
    assert (path / "scores.npy").read_bytes() == b"mine"
    assert (path / "notes").is_dir()
    (path / "extra.safetensors").write_bytes(b"mine")
    (sealed / "extra.safetensors").write_bytes(b"more")
    artifact.seal(sealed, detect(), {})
    with pytest.raises(ArtifactError, match=r"has extra\.safetensors of another origin"):
        artifact.save(sealed, path)
    assert (path / "extra.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("content", ["{}", '{"name": "an app"}', "[1]", "{", '{"format": "graphwright artifact"}'])
def test_manifests_of_others(sealed: Path, tmp_path: Path, content: str) -> None:
    """manifest.json is what web apps and browser extensions call theirs, too."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match="not an artifact"):
        artifact.save(sealed, tmp_path / "app")
    assert (tmp_path / "app" / "manifest.json").read_text() == content


def test_saving_does_not_replace_what_is_not_an_artifact(sealed: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(ArtifactError, match="not an artifact"):
        artifact.save(sealed, precious)
    with pytest.raises(ArtifactError, match=r"end the name in \.gw"):
        artifact.save(sealed, precious / "thesis.txt")
    (tmp_path / "dir.gw").mkdir()
    with pytest.raises(ArtifactError, match="not an artifact"):
        artifact.save(sealed, tmp_path / "dir.gw")
    assert (precious / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("name", ["model.gw", "model"])
def test_saving_where_nothing_can_be_written(sealed: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="cannot save"):
        artifact.save(sealed, Path("/proc/nowhere", name))


@pytest.mark.parametrize("name", ["none", "none.gw"])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="there is no artifact at"):
        artifact.load(tmp_path / name)


def test_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        artifact.load(tmp_path)


@pytest.mark.parametrize("name", ["model.so", "weights.safetensors"])
@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda p: p.unlink(), "is missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "bytes instead of"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "bytes instead of"),
        (lambda p: p.write_bytes(b"X" + p.read_bytes()[1:]), "has been changed"),
    ],
    ids=["missing", "truncated", "longer", "changed"],
)
def test_a_damaged_directory(
    sealed: Path, tmp_path: Path, name: str, harm: Callable[[Path], object], reason: str
) -> None:
    path = saved(sealed, tmp_path, "directory")
    harm(path / name)
    with pytest.raises(ArtifactError, match=f"damaged.*{name}|{name}.*{reason}") as error:
        artifact.load(path)
    assert reason in str(error.value)


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, 50_000, 100_000, -1])
def test_a_truncated_file(sealed: Path, tmp_path: Path, keep: int) -> None:
    path = saved(sealed, tmp_path, "file")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="damaged"):
        artifact.load(path)


def test_any_changed_byte_of_a_file_is_noticed_or_harmless(sealed: Path, tmp_path: Path) -> None:
    path = saved(sealed, tmp_path, "file")
    content = path.read_bytes()
    artifact.load(path)  # the cache holds the good one: it must not stand in for a changed one
    noticed = 0
    for position in range(0, len(content), 997):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            loaded = artifact.load(path)
        except ArtifactError:
            noticed += 1
            continue
        # Only fields of the archive that say nothing of its content (dates, versions) may differ.
        assert loaded.library.read_bytes() == (sealed / "model.so").read_bytes()
        assert loaded.weights.read_bytes() == (sealed / "weights.safetensors").read_bytes()
    assert noticed >= len(content) // 997 - 3


def test_a_changed_manifest(sealed: Path, tmp_path: Path) -> None:
    path = saved(sealed, tmp_path, "directory")
    rewritten(path, lambda m: m["description"].update(report={}), honest=False)
    with pytest.raises(ArtifactError, match=r"manifest\.json has been changed"):
        artifact.load(path)
    (path / "manifest.json").write_text('{"format": ')
    with pytest.raises(ArtifactError, match=r"manifest\.json is not whole"):
        artifact.load(path)
    (path / "manifest.json").write_text('{"name": "web app"}')
    with pytest.raises(ArtifactError, match="something else"):
        artifact.load(path)
    (path / "manifest.json").write_text("[]")
    with pytest.raises(ArtifactError, match="something else"):
        artifact.load(path)


@pytest.mark.parametrize("part", ["files", "target", "description"])
def test_a_manifest_without_a_part(sealed: Path, tmp_path: Path, part: str) -> None:
    path = saved(sealed, tmp_path, "directory")
    rewritten(path, lambda m: m.pop(part))
    with pytest.raises(ArtifactError, match="changed"):
        artifact.load(path)


def test_another_version_of_the_format(sealed: Path, tmp_path: Path) -> None:
    path = saved(sealed, tmp_path, "directory")
    rewritten(path, lambda m: m.update(format_version=99, graphwright_version="7.0"))
    with pytest.raises(ArtifactError, match=r"format version 99, written by graphwright 7\.0.*compile the model again"):
        artifact.load(path)


def test_code_for_another_isa_is_refused_before_its_files_are_read(sealed: Path, tmp_path: Path) -> None:
    other = "x86-64-v2" if platform.machine() == "aarch64" else "aarch64"
    artifact.seal(sealed, lookup(other), DESCRIPTION)
    path = saved(sealed, tmp_path, "directory")
    (path / "model.so").unlink()
    with pytest.raises(ArtifactError, match=r"holds \w+ code .* and this machine is \w+; compile the model"):
        artifact.load(path)
    assert artifact.inspect(path)["target"]["isa"] == lookup(other).isa


def test_code_for_another_system(sealed: Path, tmp_path: Path) -> None:
    path = saved(sealed, tmp_path, "directory")
    rewritten(path, lambda m: m["target"].update(triple="x86_64-unknown-haiku"))
    with pytest.raises(ArtifactError, match="haiku"):
        artifact.load(path)


def test_code_that_needs_instructions_this_processor_lacks(sealed: Path, tmp_path: Path) -> None:
    path = saved(sealed, tmp_path, "directory")
    rewritten(path, lambda m: m["target"]["features"].append("flux-capacitor"))
    with pytest.raises(ArtifactError, match="this processor lacks flux-capacitor; compile the model"):
        artifact.load(path)


@pytest.mark.parametrize("name", ["../outside", "/etc/cron.d/x", "sub/file", "..", "", "a\\b", "manifest.json"])
def test_a_manifest_that_names_files_elsewhere(sealed: Path, tmp_path: Path, name: str) -> None:
    path = saved(sealed, tmp_path, "directory")
    rewritten(path, lambda m: m["files"].update({name: {"bytes": 0, "sha256": ""}}))
    with pytest.raises(ArtifactError, match="outside itself"):
        artifact.load(path)


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside-of-the-archive", "sub/../../outside"])
def test_an_archive_with_a_path_elsewhere(sealed: Path, tmp_path: Path, name: str) -> None:
    path = saved(sealed, tmp_path, "file")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(ArtifactError, match="not part of an artifact"):
        artifact.load(path)
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_holds_a_file_twice(sealed: Path, tmp_path: Path) -> None:
    path = saved(sealed, tmp_path, "file")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model.so", b"x")
    with pytest.raises(ArtifactError, match="damaged"):
        artifact.load(path)


def test_a_compressed_archive_is_refused(sealed: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gw"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sealed.iterdir():
            archive.write(file, file.name)
    with pytest.raises(ArtifactError, match="damaged"):
        artifact.load(path)


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "model.gw"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"\x80\x04")
    with pytest.raises(ArtifactError, match=r"it has no manifest\.json"):
        artifact.load(path)
    path.write_bytes(b"not a zip archive at all")
    with pytest.raises(ArtifactError, match="not a whole archive"):
        artifact.load(path)


def test_a_damaged_copy_in_the_cache_is_made_again(sealed: Path, tmp_path: Path) -> None:
    path = saved(sealed, tmp_path, "file")
    library = artifact.load(path).library
    library.write_bytes(b"evil")
    assert artifact.load(path).library.read_bytes() == (sealed / "model.so").read_bytes()


def test_a_model_without_code(tmp_path: Path) -> None:
    directory = tmp_path / "sealed"
    directory.mkdir()
    artifact.seal(directory, detect(), DESCRIPTION)
    loaded = artifact.load(artifact.save(directory, tmp_path / "model.gw"))
    assert not loaded.library.exists()
    shutil.rmtree(directory)
    assert loaded.description == DESCRIPTION
