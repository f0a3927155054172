/* What a bundle's generated table (table.py) tells the code in bundle.c. */
#ifndef GRAPHWRIGHT_BUNDLE_H
#define GRAPHWRIGHT_BUNDLE_H

#include "graphwright.h"

typedef struct { /* an instruction set extension that the code uses, and the bit by which Linux says it is there */
    const char *name;
    int word; /* the entry of the auxiliary vector: AT_HWCAP or AT_HWCAP2 */
    int bit;
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

/* For the program: gw_trace of runtime.h; 0 where the model has no code. */
int bundle_trace(graphwright_model *model, int64_t *nanoseconds);

#endif
