/* The calls of runtime.h, and what kernels call.
 *
 * The runtime is compiled once per target and linked with the objects of codegen.py, which provide gw_model_run and
 * gw_model_describe. Of a C library it uses what is one and the same function in every version of glibc, musl and bionic
 * (condition variables are not), so a model links against none.
 */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

#define MAX_THREADS 256 /* the caller and pool.c's MAX_WORKERS */
#define IDLE_STATES 32

/* What generated code provides: region.py. */
enum { FACT_REGIONS, FACT_ARENA_BYTES, FACT_WEIGHTS_BYTES, FACT_MARKS, FACTS };
int32_t gw_model_describe(uint64_t *facts);
int32_t gw_model_run(int32_t region, void *const *inputs, void *const *outputs, void *arena, const void *weights,
                     int32_t *status);

/* ---- what kernels call: TVM's objects go through these pointers; theirs are weak, ours win ---- */

static void *take(int kind, int device, uint64_t bytes, int code, int bits) {
    (void)kind, (void)device, (void)code, (void)bits;
    void *memory = scratch_take(self.memory, bytes);
    if (!memory) say("out of memory for a kernel's scratch");
    return memory;
}

static int give(int kind, int device, void *memory) {
    (void)kind, (void)device;
    scratch_give(self.memory, memory);
    return 0;
}

int (*__TVMBackendParallelLaunch)(task_function, void *, int) = launch;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = take;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = give;

/* A region function calls this in front of its first step and after each. */
static _Thread_local int64_t *stamps;

void gw_mark(int32_t number) {
    if (__builtin_expect(stamps != NULL, 0)) stamps[number] = now();
}

/* Generated code calls this in front of a parallel loop. */
void gw_extent(int32_t iterations) { self.extent = iterations; }

/* A failed assertion of a kernel calls these by name. */
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *text) {
    say(kind);
    say_more(": ");
    say_more(text);
}

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
    say(kind);
    say_more(": ");
    for (int32_t i = 0; i < count; i++) say_more(parts[i]);
}

/* ---- the calls of runtime.h ---- */

typedef struct { /* what one running call needs for itself */
    void *arena;
    scratch memory;
} state;

struct gw_context {
    const void *weights;
    atomic_int threads;
    int64_t *trace;
    uint64_t facts[FACTS];
    _Atomic(state *) idle[IDLE_STATES];
};

static void free_state(state *given) {
    free(given->arena);
    scratch_free(&given->memory);
    free(given);
}

static state *take_state(gw_context *context) {
    for (int i = 0; i < IDLE_STATES; i++) {
        if (!atomic_load_explicit(&context->idle[i], memory_order_relaxed)) continue;
        state *found = atomic_exchange(&context->idle[i], NULL);
        if (found) return found;
    }
    state *made = aligned(sizeof *made);
    if (!made) return NULL;
    *made = (state){0};
    if (!(made->arena = aligned(context->facts[FACT_ARENA_BYTES]))) {
        free(made);
        return NULL;
    }
    return made;
}

static void give_state(gw_context *context, state *given) {
    for (int i = 0; i < IDLE_STATES; i++) {
        state *none = NULL;
        if (atomic_compare_exchange_strong(&context->idle[i], &none, given)) return;
    }
    free_state(given);
}

int gw_init(const void *weights, uint64_t weights_bytes, int threads, gw_context **context) {
    *context = NULL;
    gw_context *made = aligned(sizeof *made);
    if (!made) {
        say("out of memory for a context");
        return GW_NO_MEMORY;
    }
    memset(made, 0, sizeof *made);
    gw_model_describe(made->facts);
    if (made->facts[FACT_WEIGHTS_BYTES] != weights_bytes || (uintptr_t)weights % LINE) {
        say("the model needs ");
        say_number((int64_t)made->facts[FACT_WEIGHTS_BYTES]);
        say_more(" bytes of weights on a 64-byte boundary, not ");
        say_number((int64_t)weights_bytes);
        say_more((uintptr_t)weights % LINE ? " bytes at an address that is not" : "");
        free(made);
        return GW_WRONG_WEIGHTS;
    }
    made->weights = weights;
    gw_set_threads(made, threads);
    *context = made;
    return GW_OK;
}

void gw_free(gw_context *context) {
    if (!context) return;
    for (int i = 0; i < IDLE_STATES; i++) {
        state *found = atomic_exchange(&context->idle[i], NULL);
        if (found) free_state(found);
    }
    free(context);
}

int gw_set_threads(gw_context *context, int threads) {
    if (threads <= 0) threads = usable_threads();
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    atomic_store(&context->threads, threads);
    return GW_OK;
}

int gw_get_threads(const gw_context *context) { return atomic_load(&context->threads); }

int gw_trace(gw_context *context, int64_t *nanoseconds) {
    context->trace = nanoseconds;
    return (int)context->facts[FACT_MARKS];
}

void gw_share_callers(int32_t *count) { callers = (atomic_int *)count; }

const char *gw_error(const gw_context *context) {
    (void)context;
    return message;
}

int gw_run(gw_context *context, int region, void *const *inputs, void *const *outputs) {
    meet_family();
    if (region < 0 || (uint64_t)region >= context->facts[FACT_REGIONS]) {
        say("there is no region ");
        say_number(region);
        return GW_NO_SUCH_REGION;
    }
    state *mine = take_state(context);
    if (!mine) {
        say("out of memory: the model needs ");
        say_number((int64_t)context->facts[FACT_ARENA_BYTES]);
        say_more(" bytes per running call");
        return GW_NO_MEMORY;
    }
    message[0] = 0;
    self.memory = &mine->memory;
    self.threads = atomic_load_explicit(&context->threads, memory_order_relaxed);
    stamps = context->trace;
    atomic_int *counted = callers; /* one and the same to the end of the call */
    atomic_fetch_add(counted, 1);
    int32_t status[2] = {0, 0};
    int result = gw_model_run(region, inputs, outputs, mine->arena, context->weights, status);
    atomic_fetch_sub(counted, 1);
    self.memory = NULL;
    give_state(context, mine);
    if (!result) return GW_OK;
    char *cause = message[0] ? memcpy((char[sizeof message]){0}, message, sizeof message) : "no reason given";
    say("step ");
    say_number(status[1]);
    say_more(" of region ");
    say_number(region);
    say_more(" returned ");
    say_number(status[0]);
    say_more(": ");
    say_more(cause);
    return status[0] ? status[0] : GW_KERNEL_FAILED;
}
