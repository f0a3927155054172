/* The C interface of a model compiled by graphwright. C99 or C++; needs no other header of the bundle.
 *
 *     graphwright_model *model;
 *     if (graphwright_init("weights.safetensors", 4, &model)) puts(graphwright_error());
 *     const void *inputs[] = {image};
 *     void *outputs[] = {scores};
 *     if (graphwright_run(model, inputs, outputs)) puts(graphwright_error());
 *     graphwright_free(model);
 *
 * A model may run on any number of threads at once, and a program may initialise it any number of times. A library holds
 * one model: a program with several opens each with dlopen(RTLD_LOCAL).
 */
#ifndef GRAPHWRIGHT_H
#define GRAPHWRIGHT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct graphwright_model graphwright_model;

typedef struct {
    const char *name;
    const char *dtype;    /* "float32", "float16", "bfloat16", "int64", "bool" (one byte), ... */
    const int64_t *shape; /* `rank` extents; the data is dense and row-major */
    int32_t rank;
    uint64_t bytes;
} graphwright_tensor;

enum {
    GRAPHWRIGHT_OK = 0,
    GRAPHWRIGHT_WRONG_MACHINE = -1, /* the processor lacks instructions that the model was compiled to use */
    GRAPHWRIGHT_WRONG_WEIGHTS = -2, /* the weights file is missing, truncated, or another model's */
    GRAPHWRIGHT_NO_MEMORY = -3,
    GRAPHWRIGHT_FAILED = -4 /* a kernel failed, or an argument is NULL; graphwright_error says which */
};

/* What goes in and what comes out, in the order of graphwright_run; returns how many. May be called at any time. */
int graphwright_inputs(const graphwright_tensor **tensors);
int graphwright_outputs(const graphwright_tensor **tensors);

/* Check the processor, map the weights, and prepare to run.
 *
 * weights: the path of the weights file; NULL where the weights are inside the library (a single-file bundle).
 * threads: of one call, the caller's included; 0 or less is as many as the process may run on, more than 256 are 256.
 */
int graphwright_init(const char *weights, int threads, graphwright_model **model);

/* Run once. inputs and outputs: addresses of as many tensors as the model has, of the sizes above; each needs no more than
 * the alignment of its element, and an output must not overlap an input. */
int graphwright_run(graphwright_model *model, const void *const *inputs, void *const *outputs);

/* No call may be running. NULL is allowed. */
void graphwright_free(graphwright_model *model);

/* What the calling thread's last failing call met; never NULL. */
const char *graphwright_error(void);

/* The machine the model was compiled for: "raspberry-pi-4b". */
const char *graphwright_target(void);

/* Threads of one call of this model; 0 for NULL. */
int graphwright_threads(const graphwright_model *model);

#ifdef __cplusplus
}
#endif
#endif
