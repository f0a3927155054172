/* What a bundle's generated table (table.py) tells the code in bundle.c. */
#ifndef GRAPHWRIGHT_BUNDLE_H
#define GRAPHWRIGHT_BUNDLE_H

#include "graphwright.h"

typedef struct { /* an instruction set extension that the code uses, and how the system says that it is there */
    const char *name;
    int word; /* Linux: the entry of the auxiliary vector, AT_HWCAP or AT_HWCAP2, and the bit in it */
    int bit;
    const char *question; /* macOS: the name of a number, for sysctlbyname */
} bundle_feature;

typedef struct { /* an output that the code does not write: a copy of an input, of another output, or of a constant */
    enum { COPY_INPUT, COPY_OUTPUT, COPY_CONSTANT } kind;
    int source;
    const void *constant;
    int output;
} bundle_copy;

typedef struct {
    const char *target;
    int input_count, output_count, feature_count, copy_count;
    const graphwright_tensor *inputs, *outputs;
    const bundle_feature *features;
    const bundle_copy *copies;
    int runs; /* whether there is code to run; else copies do it all */
    int read_count, written_count;
    const int *read, *written;   /* the model's input, or output, of each of the code's operands */
    uint64_t weights_bytes;      /* of the data section; 0: the model has no weights */
    uint64_t header_bytes;       /* of what precedes it in the file */
    uint64_t header_digest;      /* FNV-1a, 64 bits, of that */
    const void *embedded;        /* the weights, where they are inside */
    const char *last;            /* what then follows them */
} bundle_table;

extern const bundle_table bundle;

/* In assembly, around weights that are inside. */
#ifdef __APPLE__
#define BUNDLE_WEIGHTS_BEGIN                                                                                          \
    ".section __DATA_CONST,__weights\n.p2align 14\n.globl _bundle_weights\n.private_extern _bundle_weights\n"         \
    "_bundle_weights:\n"
#define BUNDLE_WEIGHTS_END ".text\n"
#else
#define BUNDLE_WEIGHTS_BEGIN                                                                                          \
    ".section .weights, \"a\"\n.balign 4096\n.globl bundle_weights\n.hidden bundle_weights\nbundle_weights:\n"
#define BUNDLE_WEIGHTS_END ".previous\n"
#endif

/* For the program: gw_trace of runtime.h; 0 where the model has no code. */
int bundle_trace(graphwright_model *model, int64_t *nanoseconds);

#endif
