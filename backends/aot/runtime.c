/* Everything a compiled model needs at run time: a thread pool, scratch memory, and the calls of runtime.h.
 *
 * It is compiled once per target and linked with the objects of codegen.py, which provide gw_model_run and
 * gw_model_describe. Of a C library it uses memcpy, free, posix_memalign, pthread_create/join and syscall only: each is
 * one function in every version of glibc, musl and bionic (condition variables are not), so a model links against none.
 *
 * Pool. Every worker has a mailbox, one cache line: a caller writes a task and sets READY; the worker takes it by
 * READY -> TAKEN. A caller that has done its own share takes back (READY -> EMPTY) what no worker has begun, so it never
 * waits for a thread that the system has not scheduled. A worker spins for SPIN_NANOSECONDS, then sleeps on its mailbox.
 */
#include "runtime.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LINE 64
#define MAX_THREADS 256
#define IDLE_STATES 32
#define SPIN_NANOSECONDS 40000
#define LARGEST_PAGE 65536
#define HUGE_PAGE ((size_t)2 << 20)

/* ---- what generated code provides and expects ---- */

enum { FACT_REGIONS, FACT_ARENA_BYTES, FACT_WEIGHTS_BYTES, FACTS };
int32_t gw_model_describe(uint64_t *facts);
int32_t gw_model_run(int32_t region, void *const *inputs, void *const *outputs, void *arena, const void *weights,
                     int32_t *status);

typedef struct {
    void *sync_handle;
    int32_t num_task;
} group; /* TVMParallelGroupEnv */
typedef int (*task_function)(int task, group *env, void *data);

/* ---- small tools ---- */

static uint64_t round_up(uint64_t bytes, uint64_t to) { return (bytes + to - 1) / to * to; }

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
    __asm__ volatile("yield");
#endif
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void sleep_while(atomic_uint *word, unsigned value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake_one(atomic_uint *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0); }

/* Spin until the word differs from `value` or the time is up; return its last value. */
static unsigned spin_while(atomic_uint *word, unsigned value) {
    int64_t end = 0;
    for (unsigned turn = 1;; turn++) {
        unsigned seen = atomic_load_explicit(word, memory_order_acquire);
        if (seen != value) return seen;
        relax();
        if (turn % 64 == 0) {
            int64_t time = now();
            if (!end) end = time + SPIN_NANOSECONDS;
            if (time > end) return value;
        }
    }
}

static void *aligned(size_t bytes) {
    void *memory = NULL;
    size_t alignment = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : LINE;
    if (posix_memalign(&memory, alignment, bytes ? bytes : LINE)) return NULL;
    if (alignment == HUGE_PAGE) madvise(memory, bytes, MADV_HUGEPAGE); /* fewer TLB misses; a refusal does no harm */
    return memory;
}

/* ---- scratch: a stack of blocks per thread, kept between calls ---- */

typedef struct block {
    struct block *below, *above;
    size_t size, used;
    char padding[LINE - 2 * sizeof(void *) - 2 * sizeof(size_t)];
    char data[];
} block;

typedef struct piece { /* precedes every allocation */
    struct piece *below;
    block *home;
    int live;
    char padding[LINE - 2 * sizeof(void *) - sizeof(int)];
} piece;

typedef struct {
    block *current;
    piece *top;
} scratch;

static void *scratch_take(scratch *stack, uint64_t bytes) {
    size_t need = sizeof(piece) + round_up(bytes ? bytes : 1, LINE);
    block *home = stack->current;
    if (!home || home->size - home->used < need) {
        block *above = home ? home->above : NULL;
        if (above && above->size < need) { /* it is empty: blocks above the current one always are */
            free(above);
            home->above = above = NULL;
        }
        if (!above) {
            size_t size = home ? 2 * home->size : 64 * 1024;
            if (size < need) size = need;
            above = aligned(sizeof(block) + size);
            if (!above) return NULL;
            *above = (block){.below = home, .size = size};
            if (home) home->above = above;
        }
        stack->current = home = above;
    }
    piece *taken = (piece *)(home->data + home->used);
    taken->below = stack->top;
    taken->home = home;
    taken->live = 1;
    home->used += need;
    stack->top = taken;
    return taken + 1;
}

static void scratch_give(scratch *stack, void *memory) {
    ((piece *)memory - 1)->live = 0;
    for (piece *top = stack->top; top && !top->live; top = stack->top) {
        block *home = top->home;
        home->used = (size_t)((char *)top - home->data);
        stack->top = top->below;
        if (!home->used && home->below) stack->current = home->below;
    }
}

static void scratch_free(scratch *stack) {
    block *home = stack->current;
    while (home && home->above) home = home->above;
    while (home) {
        block *below = home->below;
        free(home);
        home = below;
    }
    *stack = (scratch){0};
}

/* ---- errors: text per thread, as errno is ---- */

static _Thread_local char message[256];

static void say(const char *text) {
    size_t length = strlen(text);
    if (length >= sizeof message) length = sizeof message - 1;
    memcpy(message, text, length);
    message[length] = 0;
}

static void say_more(const char *text) {
    size_t used = strlen(message);
    for (; *text && used + 1 < sizeof message; text++) message[used++] = *text;
    message[used] = 0;
}

static void say_number(int64_t value) {
    char digits[24], *end = digits + sizeof digits - 1, *first = end;
    uint64_t rest = value < 0 ? -(uint64_t)value : (uint64_t)value;
    *end = 0;
    do *--first = (char)('0' + rest % 10);
    while (rest /= 10);
    if (value < 0) *--first = '-';
    say_more(first);
}

/* ---- the pool ---- */

enum { EMPTY, READY, TAKEN, SLEEPING, LEAVE };

typedef struct {
    _Alignas(LINE) atomic_uint state;
    int task;
    task_function run;
    void *data;
    pthread_t thread;
    scratch memory;
} worker;

static struct {
    atomic_uint busy; /* held by the caller whose loop the workers run */
    int workers;
    group env;
    _Alignas(LINE) atomic_uint pending;
    atomic_uint waiting;
    atomic_int failed;
    char message[sizeof message];
    worker all[MAX_THREADS - 1];
} pool;
static atomic_int callers; /* threads inside gw_run */

/* What the kernels running on this thread use. */
static _Thread_local struct {
    scratch *memory;
    int threads;
    int nested; /* inside a parallel loop: loops in it run serially */
} self;

static void perform(int task, task_function run, void *data) {
    int result = run(task, &pool.env, data);
    if (result && !atomic_exchange(&pool.failed, result)) memcpy(pool.message, message, sizeof message);
}

static void *work(void *argument) {
    worker *me = argument;
    self.memory = &me->memory;
    self.nested = 1;
    for (;;) {
        unsigned state = spin_while(&me->state, EMPTY);
        if (state == EMPTY && atomic_compare_exchange_strong(&me->state, &state, SLEEPING)) {
            while ((state = atomic_load(&me->state)) == SLEEPING) sleep_while(&me->state, SLEEPING);
        }
        if (state == LEAVE) return NULL;
        state = READY;
        if (!atomic_compare_exchange_strong(&me->state, &state, TAKEN)) continue;
        message[0] = 0;
        perform(me->task, me->run, me->data);
        atomic_store_explicit(&me->state, EMPTY, memory_order_release);
        if (atomic_fetch_sub(&pool.pending, 1) == 1 && atomic_load(&pool.waiting)) wake_one(&pool.pending);
    }
}

static void post(worker *to, unsigned state) {
    if (atomic_exchange(&to->state, state) == SLEEPING) wake_one(&to->state);
}

static void grow(int workers) {
    if (pool.workers >= workers) return;
    sigset_t all, before; /* signals stay with the program's own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    while (pool.workers < workers) {
        worker *next = &pool.all[pool.workers];
        atomic_store(&next->state, EMPTY);
        if (pthread_create(&next->thread, NULL, work, next)) break; /* callers then do more themselves */
        pool.workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static int launch(task_function run, void *data, int tasks) {
    if (tasks <= 0 || tasks > self.threads) tasks = self.threads;
    int others = atomic_load_explicit(&callers, memory_order_relaxed);
    /* Enough callers to fill the machine run fastest each alone. */
    if (self.nested || tasks <= 1 || (others > 1 && others >= tasks) || atomic_exchange(&pool.busy, 1)) {
        group alone = {NULL, 1};
        return run(0, &alone, data);
    }
    grow(tasks - 1);
    int posted = pool.workers < tasks - 1 ? pool.workers : tasks - 1;
    pool.env = (group){NULL, tasks};
    atomic_store_explicit(&pool.failed, 0, memory_order_relaxed);
    atomic_store_explicit(&pool.pending, (unsigned)posted, memory_order_relaxed);
    for (int i = 0; i < posted; i++) {
        worker *to = &pool.all[i];
        to->task = i + 1;
        to->run = run;
        to->data = data;
        post(to, READY);
    }
    self.nested = 1;
    perform(0, run, data);
    for (int task = posted + 1; task < tasks; task++) perform(task, run, data);
    for (int i = 0; i < posted; i++) {
        unsigned state = READY;
        if (atomic_compare_exchange_strong(&pool.all[i].state, &state, EMPTY)) {
            perform(i + 1, run, data);
            atomic_fetch_sub(&pool.pending, 1);
        }
    }
    self.nested = 0;
    for (unsigned left; (left = atomic_load(&pool.pending));) {
        if (spin_while(&pool.pending, left) != left) continue;
        atomic_store(&pool.waiting, 1);
        if ((left = atomic_load(&pool.pending))) sleep_while(&pool.pending, left);
        atomic_store(&pool.waiting, 0);
    }
    int failed = atomic_load(&pool.failed);
    if (failed) memcpy(message, pool.message, sizeof message);
    atomic_store_explicit(&pool.busy, 0, memory_order_release);
    return failed;
}

/* ---- fork: a page that the child finds zeroed tells it that the workers are gone ---- */

static atomic_uint *family; /* 1: this process made the pool */
static atomic_uint family_word;
static int family_pid; /* compared where the system cannot wipe pages */

static void meet_family(void) {
    if (!family_pid && atomic_load_explicit(family, memory_order_acquire) == 1) return;
    if (family_pid && family_pid == (int)getpid()) return;
    unsigned expected = family_pid ? 1 : 0;
    if (atomic_compare_exchange_strong(family, &expected, 2)) {
        memset(&pool, 0, sizeof pool);
        atomic_store(&callers, 0);
        if (family_pid) family_pid = (int)getpid();
        atomic_store(family, 1);
    } else {
        while (atomic_load(family) != 1) relax();
    }
}

__attribute__((constructor)) static void start(void) {
    static char room[2 * LARGEST_PAGE]; /* holds one whole page, whatever its size */
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *wiped = (void *)round_up((uintptr_t)room, page);
    if (page <= LARGEST_PAGE && madvise(wiped, page, 18 /* MADV_WIPEONFORK */) == 0) {
        family = wiped;
    } else {
        family = &family_word;
        family_pid = (int)getpid();
    }
    atomic_store(family, 1);
}

/* At dlclose and at exit: no thread of ours may outlive the code it runs. */
__attribute__((destructor)) static void stop(void) {
    meet_family();
    for (int64_t end = now() + 2000000000; atomic_exchange(&pool.busy, 1);) {
        if (now() > end) return; /* a call is still running while the process ends: leave it be */
        struct timespec pause = {0, 100000};
        nanosleep(&pause, NULL);
    }
    for (int i = 0; i < pool.workers; i++) post(&pool.all[i], LEAVE);
    for (int i = 0; i < pool.workers; i++) {
        pthread_join(pool.all[i].thread, NULL);
        scratch_free(&pool.all[i].memory);
    }
    pool.workers = 0;
}

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

static void raise_text(const char *kind, const char *text) {
    say(kind);
    say_more(": ");
    say_more(text);
}

static void raise_parts(const char *kind, const char **parts, int32_t count) {
    say(kind);
    say_more(": ");
    for (int32_t i = 0; i < count; i++) say_more(parts[i]);
}

int (*__TVMBackendParallelLaunch)(task_function, void *, int) = launch;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = take;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = give;
void (*__TVMFFIErrorSetRaisedFromCStr)(const char *, const char *) = raise_text;
void (*__TVMFFIErrorSetRaisedFromCStrParts)(const char *, const char **, int32_t) = raise_parts;

/* ---- the calls of runtime.h ---- */

typedef struct { /* what one running call needs for itself */
    void *arena;
    scratch memory;
} state;

struct gw_context {
    const void *weights;
    atomic_int threads;
    uint64_t facts[FACTS];
    _Atomic(state *) idle[IDLE_STATES];
};

static int usable_threads(void) {
    unsigned long mask[1024 / (8 * sizeof(unsigned long))] = {0};
    long bytes = syscall(SYS_sched_getaffinity, 0, sizeof mask, mask);
    int count = 0;
    for (long i = 0; i < bytes / (long)sizeof *mask; i++) count += __builtin_popcountl(mask[i]);
    return count ? count : 1;
}

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
    atomic_fetch_add(&callers, 1);
    int32_t status[2] = {0, 0};
    int result = gw_model_run(region, inputs, outputs, mine->arena, context->weights, status);
    atomic_fetch_sub(&callers, 1);
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
