"""Settings that hold for every test, made before torch is imported."""

from __future__ import annotations

import atexit
import dataclasses
import os
import shutil
import tempfile

import pytest

# Tests run side by side: threads that wait must not take the core from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Models come from installed packages, never from a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# The user's own cache stays as it is. The C runtime compiled there is shared by the workers of one run.
if "GRAPHWRIGHT_CACHE" not in os.environ:
    os.environ["GRAPHWRIGHT_CACHE"] = tempfile.mkdtemp(prefix="graphwright-tests-")
    atexit.register(shutil.rmtree, os.environ["GRAPHWRIGHT_CACHE"], ignore_errors=True)
# What the user measured on this machine would change what tests expect of records.
os.environ["GRAPHWRIGHT_DATA"] = os.path.join(os.environ["GRAPHWRIGHT_CACHE"], "no-data")


@pytest.fixture
def starved(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine with its smallest cache only, so that small weights count as streamed; no bfloat16 arithmetic."""
    from graphwright.compiler import api
    from graphwright.hwdb import detect

    hw = detect()
    narrow = {f for f in hw.features if "bf16" in f}
    small = dataclasses.replace(hw, caches=hw.caches[:1], dram_gbs=10.0, features=hw.features - narrow)
    monkeypatch.setattr(api, "compile_target", lambda target: small)
