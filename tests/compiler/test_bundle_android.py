"""A bundle for Android: its library as far as it can be checked here, and its JNI sources against a small JVM."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from boards import ROOTS, Doubled, emulator

import graphwright
from graphwright.backends.aot import elf, toolchain

GLIBC = ROOTS["aarch64"] / "lib"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiled = graphwright.compile(Doubled().eval(), (torch.ones(48, 64),), target="android-arm64")
    return compiled.bundle(tmp_path_factory.mktemp("android") / "out")


def test_the_directory_is_a_gradle_module(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {
        *("libmodel.so", "graphwright.h", "graphwright_jni.c", "Model.kt", "README.txt", "LICENSES.txt"),
        *("build.gradle.kts", "CMakeLists.txt", "AndroidManifest.xml", "manifest.json"),
    }


def test_the_library_is_what_androids_loader_takes(made: Path) -> None:
    facts = elf.read(made / "libmodel.so")
    assert (facts.machine, facts.kind) == ("aarch64", "shared")
    assert set(facts.needed) <= {"libc.so", "libm.so"}
    assert "libc.so" in facts.needed
    assert not facts.versions  # bionic's symbols have none that a library must ask for
    assert all(alignment % 16384 == 0 for alignment in facts.alignments)
    assert not facts.text_relocations
    # Thread-local variables are functions' work: the loaders of API 24 to 28 refuse a segment of them.
    assert not facts.thread_local
    assert "__tls_get_addr" not in facts.undefined
    assert "pthread_getspecific" in facts.undefined
    assert "sysconf" not in facts.undefined  # its numbers are others in bionic


def test_every_kotlin_function_is_in_the_jni_source(made: Path) -> None:
    kotlin = set(re.findall(r"external fun (\w+)\(", (made / "Model.kt").read_text()))
    native = set(re.findall(r"Java_org_graphwright_Model_(\w+)\(", (made / "graphwright_jni.c").read_text()))
    assert kotlin == native
    assert kotlin


# The part of jni.h (Java Native Interface Specification, chapter 4) that the source uses.
JNI_H = """
#include <stdint.h>
typedef unsigned char jboolean; typedef int32_t jint; typedef int64_t jlong; typedef jint jsize;
typedef void *jobject, *jclass, *jstring, *jlongArray, *jobjectArray;
#define JNI_FALSE 0
#define JNI_TRUE 1
#define JNIEXPORT __attribute__((visibility("default")))
#define JNICALL
struct JNINativeInterface; typedef const struct JNINativeInterface *JNIEnv;
struct JNINativeInterface {
    jclass (*FindClass)(JNIEnv *, const char *);
    jint (*ThrowNew)(JNIEnv *, jclass, const char *);
    jstring (*NewStringUTF)(JNIEnv *, const char *);
    jlongArray (*NewLongArray)(JNIEnv *, jsize);
    void (*SetLongArrayRegion)(JNIEnv *, jlongArray, jsize, jsize, const jlong *);
    jsize (*GetArrayLength)(JNIEnv *, jobject);
    jobject (*GetObjectArrayElement)(JNIEnv *, jobjectArray, jsize);
    void *(*GetDirectBufferAddress)(JNIEnv *, jobject);
    jlong (*GetDirectBufferCapacity)(JNIEnv *, jobject);
    void (*DeleteLocalRef)(JNIEnv *, jobject);
};
"""

# A virtual machine of one array of one buffer, which calls the functions as Model.kt does.
CALLER = """
#include "graphwright_jni.c"
#include <stdio.h>
#include <string.h>
typedef struct { float *data; jlong bytes; } buffer;
typedef struct { jsize length; buffer *items[2]; } array;
static char thrown[256];
static jclass find(JNIEnv *e, const char *name) { (void)e; return (void *)name; }
static jint throw(JNIEnv *e, jclass c, const char *t) { (void)e; return snprintf(thrown, 256, "%s: %s", (char *)c, t); }
static jstring text(JNIEnv *e, const char *t) { (void)e; return (void *)t; }
static jlongArray longs(JNIEnv *e, jsize n) { (void)e; return calloc(n, sizeof(jlong)); }
static void set(JNIEnv *e, jlongArray a, jsize f, jsize n, const jlong *v) { (void)e, (void)f; memcpy(a, v, n * 8); }
static jsize length(JNIEnv *e, jobject a) { (void)e; return ((array *)a)->length; }
static jobject item(JNIEnv *e, jobjectArray a, jsize i) { (void)e; return ((array *)a)->items[i]; }
static void *address(JNIEnv *e, jobject b) { (void)e; return ((buffer *)b)->data; }
static jlong capacity(JNIEnv *e, jobject b) { (void)e; return ((buffer *)b)->bytes; }
static void drop(JNIEnv *e, jobject o) { (void)e, (void)o; }
static const struct JNINativeInterface machine = {find, throw, text, longs, set, length, item, address, capacity, drop};
int main(void) {
    JNIEnv env = &machine;
    jlong model = Java_org_graphwright_Model_create(&env, NULL, 2);
    if (!model) return puts(thrown), 1;
    jlong *shape = Java_org_graphwright_Model_shape(&env, NULL, JNI_FALSE, 0);
    printf("%s %s %lld %lld\\n", (char *)Java_org_graphwright_Model_name(&env, NULL, JNI_FALSE, 0),
           (char *)Java_org_graphwright_Model_dtype(&env, NULL, JNI_TRUE, 0), (long long)shape[0], (long long)shape[1]);
    jlong bytes = Java_org_graphwright_Model_bytes(&env, NULL, JNI_TRUE, 0);
    buffer x = {malloc(bytes), bytes}, y = {malloc(bytes), bytes};
    for (int i = 0; i < bytes / 4; i++) x.data[i] = 1;
    array in = {1, {&x}}, out = {1, {&y}}, none = {0, {NULL}};
    Java_org_graphwright_Model_call(&env, NULL, model, &in, &out);
    printf("%s%g %g\\n", thrown, y.data[0], y.data[bytes / 4 - 1]);
    y.bytes--;
    Java_org_graphwright_Model_call(&env, NULL, model, &in, &out);
    puts(thrown);
    Java_org_graphwright_Model_call(&env, NULL, model, &none, &out);
    puts(thrown);
    Java_org_graphwright_Model_destroy(&env, NULL, model);
    return 0;
}
"""


def test_the_jni_functions_with_glibc_in_bionics_place(made: Path, tmp_path: Path) -> None:
    if not GLIBC.is_dir():
        pytest.skip("glibc for aarch64 is not installed (Debian: apt-get install libc6-arm64-cross)")
    (tmp_path / "jni.h").write_text(JNI_H)
    (tmp_path / "caller.c").write_text(CALLER)
    for bionic, glibc in (("libc.so", "libc.so.6"), ("libm.so", "libm.so.6")):
        (tmp_path / bionic).symlink_to(GLIBC / glibc)
    toolchain.zig(
        "cc", "-target", "aarch64-linux-gnu.2.28", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{tmp_path}", f"-I{made}",
        str(tmp_path / "caller.c"), str(made / "libmodel.so"), "-lpthread", f"-Wl,-rpath,{made}:{tmp_path}",
        "-Wl,--allow-shlib-undefined", "-o", str(tmp_path / "caller"),
    )  # fmt: skip
    emulated = [emulator("aarch64"), "-cpu", "cortex-a53", "-L", str(ROOTS["aarch64"])]
    command = [*emulated, "-E", f"LD_LIBRARY_PATH={tmp_path}", str(tmp_path / "caller")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "x float32 48 64",
        "128 128",
        "java/lang/IllegalArgumentException: a buffer is not direct, or not of its tensor's size",
        "java/lang/IllegalArgumentException: one buffer for each input, and one for each output",
    ]
