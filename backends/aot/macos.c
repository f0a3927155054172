/* What macOS is asked, by its public calls: those by which threads sleep on a word (__ulock_wait) are not, and programs
 * with them are kept out of its store; os_sync_wait_on_address came with macOS 14.4.
 *
 * Threads cannot be kept to cores on Apple's processors. The system chooses between fast and slow ones by how urgent a
 * thread's work is (its quality of service), so the pool's threads get that of the thread they work for.
 */
#include "internal.h"

#include <pthread/qos.h>
#include <time.h>
#include <unistd.h>

int64_t now(void) { return (int64_t)clock_gettime_nsec_np(CLOCK_UPTIME_RAW); }

int start_thread(pthread_t *thread, void *(*run)(void *), void *argument) {
    pthread_attr_t like_this;
    if (pthread_attr_init(&like_this)) return -1;
    qos_class_t urgency = qos_class_self();
    if (urgency != QOS_CLASS_UNSPECIFIED) pthread_attr_set_qos_class_np(&like_this, urgency, 0);
    int failed = pthread_create(thread, &like_this, run, argument);
    pthread_attr_destroy(&like_this);
    return failed;
}

/* ---- sleeping on a word: the words share places to sleep, so a thread that wakes looks whether it is meant ---- */

enum { PLACES = 64 };

typedef struct {
    _Alignas(LINE) pthread_mutex_t lock;
    pthread_cond_t woken;
} place;

#define EMPTY_PLACE {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER}

static place places[PLACES] = {[0 ... PLACES - 1] = EMPTY_PLACE};

static place *place_of(const atomic_uint *word) {
    uint64_t mixed = ((uint64_t)(uintptr_t)word / sizeof *word) * 0x9E3779B97F4A7C15u; /* Knuth's multiplicative hash */
    return &places[mixed >> 58];
}

void sleep_while(atomic_uint *word, unsigned value) {
    place *here = place_of(word);
    pthread_mutex_lock(&here->lock);
    while (atomic_load(word) == value) pthread_cond_wait(&here->woken, &here->lock);
    pthread_mutex_unlock(&here->lock);
}

void wake_one(atomic_uint *word) {
    place *here = place_of(word);
    pthread_mutex_lock(&here->lock);
    pthread_cond_broadcast(&here->woken);
    pthread_mutex_unlock(&here->lock);
}

void forget_sleepers(void) {
    for (int i = 0; i < PLACES; i++) places[i] = (place)EMPTY_PLACE;
}

/* ---- the rest ---- */

atomic_uint *wiped_in_children(void) { return NULL; }

void ask_for_huge_pages(void *memory, size_t bytes) { (void)memory, (void)bytes; }

int usable_threads(void) {
    long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count > 0 ? (int)count : 1;
}

int thread_number(void) { return 1; }

int this_core(void) { return -1; }

long read_cores(core_set cores) {
    (void)cores;
    return -1;
}

void keep_to_cores(int thread, const core_set cores, long bytes) { (void)thread, (void)cores, (void)bytes; }
