/* What Linux, and Android, is asked. By calls of the system where C libraries differ: sysconf's numbers are other ones in
 * each of them, and musl has none of sched.h's sets. */
#include "internal.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LARGEST_PAGE 65536

int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int start_thread(pthread_t *thread, void *(*run)(void *), void *argument) {
    return pthread_create(thread, NULL, run, argument);
}

void sleep_while(atomic_uint *word, unsigned value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

void wake_one(atomic_uint *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0); }

void forget_sleepers(void) {} /* the system keeps none of another process */

atomic_uint *wiped_in_children(void) {
    static char room[2 * LARGEST_PAGE]; /* holds one whole page, whatever its size */
    size_t page = (size_t)getauxval(AT_PAGESZ);
    void *wiped = (void *)round_up((uintptr_t)room, page);
    return page <= LARGEST_PAGE && madvise(wiped, page, 18 /* MADV_WIPEONFORK */) == 0 ? wiped : NULL;
}

void ask_for_huge_pages(void *memory, size_t bytes) { madvise(memory, bytes, MADV_HUGEPAGE); }

int usable_threads(void) {
    core_set cores = {0};
    long bytes = read_cores(cores);
    int count = 0;
    for (long i = 0; i < bytes / (long)sizeof *cores; i++) count += __builtin_popcountl(cores[i]);
    return count ? count : 1;
}

int thread_number(void) { return (int)syscall(SYS_gettid); }

int this_core(void) { return sched_getcpu(); }

long read_cores(core_set cores) { return syscall(SYS_sched_getaffinity, 0, sizeof(core_set), cores); }

void keep_to_cores(int thread, const core_set cores, long bytes) {
    syscall(SYS_sched_setaffinity, thread, bytes, cores);
}
