/* The C interface of a compiled model. Plain C11 and no header of a C library, so it can be read by any compiler.
 *
 * A model is one shared (or static) library and one weights file. Typical use:
 *
 *     gw_context *context;
 *     if (gw_init(weights, weights_bytes, 4, &context)) puts(gw_error(NULL));
 *     gw_run(context, 0, inputs, outputs);      // from any number of threads at once
 *     gw_free(context);
 *
 * `weights` is the data section of the weights file (what follows its 8-byte length and JSON header), mapped read-only
 * on a 64-byte boundary and kept until gw_free. Inputs and outputs are dense row-major tensors owned by the caller; each
 * needs no more than the alignment of its element, and an output must not overlap an input.
 */
#ifndef GRAPHWRIGHT_RUNTIME_H
#define GRAPHWRIGHT_RUNTIME_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct gw_context gw_context;

enum {
    GW_OK = 0,
    GW_KERNEL_FAILED = -1, /* usually: no memory left for a kernel's scratch; gw_error names the step */
    GW_NO_MEMORY = -100,
    GW_NO_SUCH_REGION = -101,
    GW_WRONG_WEIGHTS = -102, /* their size or alignment is not what the model was compiled for */
};

/* threads <= 0: as many as this process may run on. */
int gw_init(const void *weights, uint64_t weights_bytes, int threads, gw_context **context);
int gw_run(gw_context *context, int region, void *const *inputs, void *const *outputs);
void gw_free(gw_context *context);

int gw_set_threads(gw_context *context, int threads);
int gw_get_threads(const gw_context *context);
/* Until it is given NULL: the calls write, region after region, the nanosecond at which they begin and the one at which
 * each of their steps ends. One call at a time may run. Returns how many values there are. */
int gw_trace(gw_context *context, int64_t *nanoseconds);
/* For a process that runs several models: count running calls in `*count`, a zero that all of them are given before any
 * is called. When there are as many callers as threads, each runs on its own thread alone. A forked child zeroes it. */
void gw_share_callers(int32_t *count);
/* What the calling thread's last failing call met; never NULL. */
const char *gw_error(const gw_context *context);

#ifdef __cplusplus
}
#endif
#endif
