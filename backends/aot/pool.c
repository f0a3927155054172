/* The thread pool.
 *
 * A loop is cut into tasks, and the tasks into one row of neighbours for each thread: the same rows every time, so a
 * thread finds in its caches what it left there. A thread takes tasks from the front of its own row, then from those of
 * the others, so whoever comes late, or loses its core to another process, leaves the rest to them.
 *
 * Every worker has a mailbox, one cache line: a caller sets READY; the worker enters the loop by READY -> TAKEN. A caller
 * that finds no task left calls back (READY -> EMPTY) the workers that have not entered, so it never waits for a thread
 * that the system has not scheduled, but for one that lost its core within a task. A worker spins for SPIN_NANOSECONDS,
 * then sleeps on its mailbox. One caller at a time has the workers; others run their loops by themselves.
 *
 * Workers keep off the caller's core: the system likes to wake a thread where its waker runs, and on a small machine leaves
 * it there for tens of milliseconds, while the caller does all the work and another core is idle.
 */
#include "internal.h"

#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAX_WORKERS 255
#define SPIN_NANOSECONDS 40000
#define TASKS_PER_THREAD 16 /* enough that one of a slow thread's is little to wait for; a task costs 10 to 30 ns */

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
    __asm__ volatile("yield");
#endif
}

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
    int row;
    int avoids;       /* the core it keeps off, and one more: 0 is none */
    unsigned follows; /* the caller whose cores it may run on */
    atomic_int system; /* the system's number of the thread, once it runs */
    pthread_t thread;
    scratch memory;
} worker;

typedef struct { /* the tasks of one thread that nobody has begun */
    _Alignas(LINE) atomic_int next;
    int end;
} row;

static struct {
    atomic_uint busy; /* held by the caller whose loop the workers run */
    int workers;
    group env;
    task_function run;
    void *data;
    int rows;
    _Alignas(LINE) atomic_uint pending;
    atomic_uint waiting;
    atomic_int failed;
    char message[MESSAGE_BYTES];
    row all_rows[MAX_WORKERS + 1];
    worker all[MAX_WORKERS];
} pool;

static atomic_int own_callers;
atomic_int *callers = &own_callers;
_Thread_local surroundings self;

/* Run tasks until none is left, those of row `first` before the others'. */
static void take_part(int first) {
    for (int i = 0; i < pool.rows; i++) {
        row *from = &pool.all_rows[(first + i) % pool.rows];
        if (atomic_load_explicit(&from->next, memory_order_relaxed) >= from->end) continue;
        for (int task; (task = atomic_fetch_add_explicit(&from->next, 1, memory_order_relaxed)) < from->end;) {
            int result = pool.run(task, &pool.env, pool.data);
            if (result && !atomic_exchange(&pool.failed, result)) memcpy(pool.message, message, sizeof message);
        }
    }
}

static void *work(void *argument) {
    worker *me = argument;
    self.memory = &me->memory;
    self.nested = self.threads = 1;
    atomic_store(&me->system, thread_number());
    for (;;) {
        unsigned state = spin_while(&me->state, EMPTY);
        if (state == EMPTY && atomic_compare_exchange_strong(&me->state, &state, SLEEPING)) {
            while ((state = atomic_load(&me->state)) == SLEEPING) sleep_while(&me->state, SLEEPING);
        }
        if (state == LEAVE) return NULL;
        state = READY;
        if (!atomic_compare_exchange_strong(&me->state, &state, TAKEN)) continue;
        message[0] = 0;
        take_part(me->row);
        atomic_store_explicit(&me->state, EMPTY, memory_order_release);
        if (atomic_fetch_sub(&pool.pending, 1) == 1 && atomic_load(&pool.waiting)) wake_one(&pool.pending);
    }
}

static void post(worker *to, unsigned state) {
    if (atomic_exchange(&to->state, state) == SLEEPING) wake_one(&to->state);
}

/* Let the workers run on the cores that the caller may use, but for the one it is on. Asking for its cores is a call of
 * the system, made when another thread calls or the caller has moved. */
static void keep_apart(int workers) {
    static atomic_uint threads;
    static _Thread_local unsigned caller;
    int core = this_core();
    if (!caller) caller = atomic_fetch_add(&threads, 1) + 1;
    core_set own;
    long bytes = 0;
    for (int i = 0; i < workers; i++) {
        worker *each = &pool.all[i];
        int thread = atomic_load_explicit(&each->system, memory_order_relaxed);
        if ((each->avoids == core + 1 && each->follows == caller) || !thread || core < 0 || core >= MOST_CORES) continue;
        each->avoids = core + 1;
        each->follows = caller;
        if (!bytes) {
            bytes = read_cores(own);
            if (bytes > 0) own[core / WORD_BITS] &= ~(1ul << core % WORD_BITS);
        }
        /* Refused, and rightly, where no core is left. */
        if (bytes > 0) keep_to_cores(thread, own, bytes);
    }
}

static void grow(int workers) {
    if (pool.workers >= workers) return;
    sigset_t all, before; /* signals stay with the program's own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    while (pool.workers < workers) {
        worker *next = &pool.all[pool.workers];
        atomic_store(&next->state, EMPTY);
        atomic_store(&next->system, 0);
        next->avoids = 0;
        if (start_thread(&next->thread, work, next)) break; /* callers then do more themselves */
        pool.workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* How many tasks a loop of `extent` iterations becomes; generated code gives each ceil(extent / tasks) of them. */
static int cut(int extent, int threads) {
    if (extent <= 0) return threads; /* unknown */
    int most = TASKS_PER_THREAD * threads;
    int size = (extent + most - 1) / most;
    return (extent + size - 1) / size;
}

int launch(task_function run, void *data, int tasks) {
    int threads = self.threads;
    tasks = tasks > 0 ? tasks : cut(self.extent, threads);
    self.extent = 0;
    if (threads > tasks) threads = tasks;
    int others = atomic_load_explicit(callers, memory_order_relaxed);
    /* Enough callers to fill the machine run fastest each alone. */
    if (self.nested || threads <= 1 || (others > 1 && others >= threads) || atomic_exchange(&pool.busy, 1)) {
        group alone = {NULL, 1};
        return run(0, &alone, data);
    }
    grow(threads - 1);
    int posted = pool.workers < threads - 1 ? pool.workers : threads - 1;
    keep_apart(posted);
    pool.env = (group){NULL, tasks};
    pool.run = run;
    pool.data = data;
    pool.rows = posted + 1;
    for (int i = 0, end = 0; i <= posted; i++) {
        atomic_store_explicit(&pool.all_rows[i].next, end, memory_order_relaxed);
        /* Rounded up: the caller, who begins first, has the odd task. */
        pool.all_rows[i].end = end = (int)(((int64_t)(i + 1) * tasks + posted) / (posted + 1));
    }
    atomic_store_explicit(&pool.failed, 0, memory_order_relaxed);
    atomic_store_explicit(&pool.pending, (unsigned)posted, memory_order_relaxed);
    for (int i = 0; i < posted; i++) {
        pool.all[i].row = i + 1;
        post(&pool.all[i], READY);
    }
    self.nested = 1;
    take_part(0);
    self.nested = 0;
    for (int i = 0; i < posted; i++) {
        unsigned state = READY;
        if (atomic_compare_exchange_strong(&pool.all[i].state, &state, EMPTY)) atomic_fetch_sub(&pool.pending, 1);
    }
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
        forget_sleepers();
        if (callers == &own_callers) atomic_store(callers, 0);
        if (family_pid) family_pid = (int)getpid();
        atomic_store(family, 1);
    } else {
        while (atomic_load(family) != 1) relax();
    }
}

__attribute__((constructor)) static void start(void) {
    if (!(family = wiped_in_children())) {
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
