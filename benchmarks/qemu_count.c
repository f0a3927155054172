/* A plugin of QEMU (API version 1, include/qemu/qemu-plugin.h) that counts what a program executes:
 *
 *     qemu-aarch64 -plugin qemu_count.so -d plugin program      prints "instructions N fmla N loads N stores N"
 *
 * Counted are all instructions of AArch64, its vector multiply-adds of float32 (FMLA .4S, whole or by element), and loads
 * and stores of 128-bit registers. The declarations are those of the header, which Debian does not package.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *insn);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*call)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *tb, int add, void *counter, uint64_t amount);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*call)(qemu_plugin_id_t, void *), void *data);
void qemu_plugin_outs(const char *text);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

enum { INSTRUCTIONS, FMLA, LOADS, STORES, KINDS };
static uint64_t counts[KINDS];

static int is(uint32_t code, uint32_t mask, uint32_t value) { return (code & mask) == value; }

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
    (void)id;
    uint64_t found[KINDS] = {qemu_plugin_tb_n_insns(tb)};
    for (size_t i = 0; i < found[INSTRUCTIONS]; i++) {
        uint32_t code = *(const uint32_t *)qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i));
        /* Arm Architecture Reference Manual: FMLA (vector), FMLA (by element), LDR/STR (SIMD&FP), LDP/STP (SIMD&FP). */
        found[FMLA] += is(code, 0xFFE0FC00, 0x4E20CC00) || is(code, 0xFFC0F400, 0x4F801000);
        found[LOADS] += is(code, 0xFFC00000, 0x3DC00000) || is(code, 0xFFE00000, 0x3CC00000) ||
                        is(code, 0xFE400000, 0xAC400000);
        found[STORES] += is(code, 0xFFC00000, 0x3D800000) || is(code, 0xFFE00000, 0x3C800000) ||
                         is(code, 0xFE400000, 0xAC000000);
    }
    for (int kind = 0; kind < KINDS; kind++)
        if (found[kind]) qemu_plugin_register_vcpu_tb_exec_inline(tb, 0, &counts[kind], found[kind]);
}

static void finished(qemu_plugin_id_t id, void *data) {
    (void)id, (void)data;
    char text[256];
    snprintf(text, sizeof text, "instructions %llu fmla %llu loads %llu stores %llu\n",
             (unsigned long long)counts[INSTRUCTIONS], (unsigned long long)counts[FMLA],
             (unsigned long long)counts[LOADS], (unsigned long long)counts[STORES]);
    qemu_plugin_outs(text);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int count,
                                                               char **arguments) {
    (void)info, (void)count, (void)arguments;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, finished, NULL);
    return 0;
}
