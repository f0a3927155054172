"""Recordings of machines (tests/hwdb/machines/*.txt) as the /proc and /sys that detection reads.

    machine aarch64                                 what uname -m prints
    note ...                                        where the recording is from
    == proc/cpuinfo                                 a file, up to the next "=="
    == files                                        files of one line, as grep -H prints them: path:value
    == nvidia-smi                                   what `host_gpus.NVIDIA_SMI` printed

Machines with many equal processors are written short: `processor : 0-63` is 64 blocks of /proc/cpuinfo, `cpu0-63` in a
path 64 files, and the value `@` the number of the processor itself.
"""

from __future__ import annotations

import re
from pathlib import Path

MACHINES = Path(__file__).parent / "hwdb" / "machines"


def unfold(name: str, root: Path) -> str:
    """Write the files of the recording `name` below `root` and return the machine name that uname printed."""
    machine = ""
    file: Path | None = None
    contents: dict[Path, list[str]] = {}
    for line in (MACHINES / f"{name}.txt").read_text().splitlines():
        if line.startswith("machine "):
            machine = line.split()[1]
        elif line.startswith("== "):
            file = None if line == "== files" else root / line[3:]
        elif file is not None:
            contents.setdefault(file, []).append(line)
        elif line.startswith("sys/"):
            path, _, value = line.partition(":")
            for expanded, number in _processors(path):
                contents[root / expanded] = [value.replace("@", number)]
    for path, lines in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_every_processor("\n".join(lines)) + "\n")
    return machine


def nvidia_smi(root: Path) -> str | None:
    """What nvidia-smi printed on the recorded machine, or None where it has none."""
    file = root / "nvidia-smi"
    return file.read_text() if file.exists() else None


def _processors(path: str) -> list[tuple[str, str]]:
    found = re.search(r"/cpu(\d+)-(\d+)/", path)
    if found is None:
        return [(path, "")]
    return [
        (f"{path[: found.start()]}/cpu{n}/{path[found.end() :]}", str(n))
        for n in range(int(found[1]), int(found[2]) + 1)
    ]


def _every_processor(text: str) -> str:
    """`text` with a block for each of the processors that `processor : first-last` stands for."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        found = re.search(r"^(processor\s*: )(\d+)-(\d+)$", block, re.MULTILINE)
        numbers = range(int(found[2]), int(found[3]) + 1) if found else ()
        blocks += [block.replace(found[0], f"{found[1]}{n}") for n in numbers] if found else [block]
    return "\n\n".join(blocks)
