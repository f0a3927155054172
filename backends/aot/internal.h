/* What the files of the runtime share. */
#ifndef GRAPHWRIGHT_INTERNAL_H
#define GRAPHWRIGHT_INTERNAL_H

#include "runtime.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

#define LINE 64 /* bytes of a cache line, and the alignment of all memory handed out */

static inline uint64_t round_up(uint64_t bytes, uint64_t to) { return (bytes + to - 1) / to * to; }

/* ---- linux.c or macos.c: what the system is asked ---- */

#define MOST_CORES 1024
#define WORD_BITS (8 * (int)sizeof(unsigned long))
typedef unsigned long core_set[MOST_CORES / WORD_BITS];

int64_t now(void);                                          /* monotonic nanoseconds */
int start_thread(pthread_t *thread, void *(*run)(void *), void *argument); /* as urgent as the calling one */
void sleep_while(atomic_uint *word, unsigned value);        /* until wake_one finds another value there, or earlier */
void wake_one(atomic_uint *word);
void forget_sleepers(void);                                 /* in a forked child, which has none */
atomic_uint *wiped_in_children(void);                       /* 0, and again in a forked child; NULL: not to be had */
void ask_for_huge_pages(void *memory, size_t bytes);        /* fewer TLB misses; a refusal does no harm */
int usable_threads(void);                                   /* that this process may run at once */
int thread_number(void);                                    /* the system's, of the calling thread; never 0 */
int this_core(void);                                        /* negative where threads cannot be kept to cores */
long read_cores(core_set cores);                            /* of the calling thread; returns bytes, or -1 */
void keep_to_cores(int thread, const core_set cores, long bytes);

/* ---- scratch.c: memory ---- */

typedef struct {
    struct block *current;
    struct piece *top;
} scratch;

void *aligned(size_t bytes); /* LINE-aligned, given back by free(); NULL where there is none */
void *scratch_take(scratch *stack, uint64_t bytes);
void scratch_give(scratch *stack, void *memory);
void scratch_free(scratch *stack);

/* ---- message.c: the text of the calling thread's last error ---- */

enum { MESSAGE_BYTES = 256 };
extern _Thread_local char message[MESSAGE_BYTES];
void say(const char *text);
void say_more(const char *text);
void say_number(int64_t value);

/* ---- pool.c ---- */

typedef struct { /* TVMParallelGroupEnv */
    void *sync_handle;
    int32_t num_task;
} group;
typedef int (*task_function)(int task, group *env, void *data);

typedef struct { /* what the kernels running on a thread use */
    scratch *memory;
    int threads;
    int nested; /* inside a parallel loop: loops in it run serially */
    int extent; /* iterations of the loop about to be launched; 0: unknown */
} surroundings;

extern _Thread_local surroundings self;
extern atomic_int *callers; /* threads inside gw_run, of this model or of all that share the count */

int launch(task_function run, void *data, int tasks);
void meet_family(void); /* at the start of every call: notice that this process is a forked child */

#endif
