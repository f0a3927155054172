"""The library of a bundle in programs of one's own, with a real glibc under QEMU: its example, and threads."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from boards import PACKAGES, ROOTS, Doubled, emulator

import graphwright
from graphwright.backends.aot import toolchain

CPUS = {"aarch64": "cortex-a72", "armv7": "cortex-a7"}
TARGETS = {"aarch64": "raspberry-pi-4b", "armv7": "raspberry-pi-2b"}


@pytest.fixture(scope="module", params=list(ROOTS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOTS[request.param] / "lib").is_dir():
        pytest.skip(f"glibc for {request.param} is not installed (Debian: apt-get install {PACKAGES[request.param]})")
    model, x = Doubled().eval(), torch.ones(48, 64)
    return graphwright.compile(model, (x,), target=TARGETS[request.param]).bundle(tmp_path_factory.mktemp("c") / "out")


def program(made: Path, source: Path, work: Path) -> subprocess.CompletedProcess[str]:
    """Compile a C file against the bundle's library, with glibc 2.28, and run it beside its weights."""
    target = json.loads((made / "manifest.json").read_text())["target"]
    output = work / "program"
    toolchain.zig(
        "cc", "-target", f"{toolchain.zig_target(target['triple'])}.2.28", *toolchain.start_flags(target["triple"]),
        "-O1", "-Wall", "-Werror", f"-I{made}", str(source), str(made / "model.so"), "-lpthread", f"-Wl,-rpath,{made}",
        "-o", str(output),
    )  # fmt: skip
    isa = target["isa"]
    command = [emulator(isa), "-cpu", CPUS[isa], "-L", str(ROOTS[isa]), str(output), str(made / "weights.safetensors")]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_example(made: Path, tmp_path: Path) -> None:
    done = program(made, made / "example.c", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "mul: float32, 12288 bytes 0 0 0 0\n"


CALLERS = """
#include "graphwright.h"
#include <pthread.h>
#include <stdio.h>
#include <string.h>

enum { THREADS = 4, ROUNDS = 50, VALUES = 48 * 64 };
static graphwright_model *models[2];

static void *work(void *argument) {
    long mine = (long)argument, wrong = 0;
    static float x[THREADS][VALUES], y[THREADS][VALUES];
    for (int i = 0; i < VALUES; i++) x[mine][i] = mine + 1;
    for (int round = 0; round < ROUNDS; round++) {
        const void *in[] = {x[mine]};
        void *out[] = {y[mine]};
        memset(y[mine], 0, sizeof y[mine]);
        if (graphwright_run(models[round % 2], in, out)) return (void *)-1;
        for (int i = 0; i < VALUES; i++) wrong += y[mine][i] != 128 * (mine + 1);
    }
    return (void *)wrong;
}

int main(int argc, char **argv) {
    if (graphwright_init("nowhere", 1, &models[0]) != GRAPHWRIGHT_WRONG_WEIGHTS || models[0]) return 1;
    puts(graphwright_error());
    if (graphwright_run(NULL, NULL, NULL) != GRAPHWRIGHT_FAILED) return 2;
    puts(graphwright_error());
    for (int i = 0; i < 2; i++)
        if (graphwright_init(argv[1], 1 + 2 * i, &models[i])) return 3;
    const void *in[] = {NULL};
    void *out[] = {NULL};
    if (graphwright_run(models[0], in, out) != GRAPHWRIGHT_FAILED) return 4;
    puts(graphwright_error());
    if (graphwright_run(models[0], NULL, out) != GRAPHWRIGHT_FAILED) return 5;
    puts(graphwright_error());
    if (graphwright_run(models[0], in, NULL) != GRAPHWRIGHT_FAILED || graphwright_threads(NULL)) return 6;
    puts(graphwright_error());
    printf("%d %d threads\\n", graphwright_threads(models[0]), graphwright_threads(models[1]));
    pthread_t threads[THREADS];
    long wrong = 0;
    for (long i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, work, (void *)i);
    for (int i = 0; i < THREADS; i++) {
        void *found;
        pthread_join(threads[i], &found);
        wrong += (long)found;
    }
    printf("%ld wrong\\n", wrong);
    graphwright_free(models[0]), graphwright_free(models[1]), graphwright_free(NULL);
    return 0;
}
"""


def test_two_models_called_by_four_threads(made: Path, tmp_path: Path) -> None:
    (tmp_path / "callers.c").write_text(CALLERS)
    done = program(made, tmp_path / "callers.c", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "the weights nowhere cannot be opened",
        "graphwright_run: there is no model: graphwright_init failed, or was not called",
        "graphwright_run: the address of x is NULL",
        "graphwright_run: inputs is NULL",
        "graphwright_run: outputs is NULL",
        "1 3 threads",
        "0 wrong",
    ]
