"""A stand-in for a board reached by ssh: a shell for ssh, a directory for its home, QEMU for its processor.

Hosts have their ways: `nobody@nowhere` is unknown, `refused@board` refuses, at `slow@board` programs never end.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from boards import emulator

# ssh -o OPTION... HOST SCRIPT: the script runs in a directory that is the board's home.
SSH = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
echo "$1" >> {log}
case "$1" in
nobody@*) echo "ssh: Could not resolve hostname nowhere: Name or service not known" >&2; exit 255;;
refused@*) echo "ssh: connect to host board port 22: Connection refused" >&2; exit 255;;
slow@*) case "$2" in *--profile*) exec sleep 60;; esac;;
esac
cd {home} && exec env PATH={commands}:$PATH sh -c {script}
"""


class Board:
    """The stand-in: its home directory, its commands, and the calls of ssh."""

    def __init__(self, root: Path, machine: str) -> None:
        self.home, self.log, self.commands, self.local = root / "home", root / "log", root / "commands", root / "local"
        for directory in (self.home, self.commands, self.local):
            directory.mkdir()
        self.log.touch()
        self.command("uname", f"echo {machine}")
        self._write_ssh('"$2"')
        self.path = f"{self.local}:{os.environ['PATH']}"

    @classmethod
    def reached(cls, root: Path, monkeypatch: pytest.MonkeyPatch, machine: str = "aarch64") -> Board:
        """One whose ssh is found from now on."""
        found = cls(root, machine)
        monkeypatch.setenv("PATH", found.path)
        return found

    def command(self, name: str, script: str) -> None:
        """What the board does for a command."""
        (self.commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.commands / name).chmod(0o755)

    def emulate(self, isa: str = "aarch64") -> None:
        """Let QEMU run the programs that a script calls by `&& ./NAME`: this machine's kernel may not do it."""
        self._write_ssh(f'''"$(echo "$2" | sed 's#&& ./#\\&\\& {emulator(isa)} ./#')"''')

    def _write_ssh(self, script: str) -> None:
        ssh = self.local / "ssh"
        ssh.write_text(SSH.format(log=self.log, home=self.home, commands=self.commands, script=script))
        ssh.chmod(0o755)
