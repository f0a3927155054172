"""Settings that hold for every test, made before torch is imported."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Tests run side by side: threads that wait must not take the core from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Models come from installed packages, never from a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# The user's own cache stays as it is. The C runtime compiled there is shared by the workers of one run.
if "GRAPHWRIGHT_CACHE" not in os.environ:
    os.environ["GRAPHWRIGHT_CACHE"] = tempfile.mkdtemp(prefix="graphwright-tests-")
    atexit.register(shutil.rmtree, os.environ["GRAPHWRIGHT_CACHE"], ignore_errors=True)
