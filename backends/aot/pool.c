/* The thread pool.
 *
 * Every worker has a mailbox, one cache line: a caller writes a task and sets READY; the worker takes it by
 * READY -> TAKEN. A caller that has done its own share takes back (READY -> EMPTY) what no worker has begun, so it never
 * waits for a thread that the system has not scheduled. A worker spins for SPIN_NANOSECONDS, then sleeps on its mailbox.
 * One caller at a time has the workers; others run their loops by themselves.
 */
#include "internal.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_WORKERS 255
#define SPIN_NANOSECONDS 40000
#define LARGEST_PAGE 65536

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
    __asm__ volatile("yield");
#endif
}

int64_t now(void) {
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
    char message[MESSAGE_BYTES];
    worker all[MAX_WORKERS];
} pool;

atomic_int callers;
_Thread_local surroundings self;

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

int launch(task_function run, void *data, int tasks) {
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

void meet_family(void) {
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
