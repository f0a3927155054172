/* Thread-local variables for Android before version 10, whose loader knows none: the code was compiled with
 * -femulated-tls, and asks here for the calling thread's copy of a variable. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_VARIABLES = 16 };

typedef struct { /* LLVM's layout: one for each variable */
    size_t size, alignment;
    atomic_uintptr_t number; /* from 1; 0: not used yet */
    const void *initial;     /* NULL: zeros */
} variable;

typedef struct {
    void *values[MOST_VARIABLES];
} copies;

static pthread_key_t key;
static atomic_uintptr_t variables;

static void release(void *argument) {
    copies *all = argument;
    for (int i = 0; i < MOST_VARIABLES; i++) free(all->values[i]);
    free(all);
}

/* In front of every other constructor: those use the variables. */
__attribute__((constructor(101))) static void start(void) {
    if (pthread_key_create(&key, release)) abort();
}

/* Last of all, at dlclose: a thread that ends later must not come to code that is gone. Its copies are lost. */
__attribute__((destructor(101))) static void stop(void) { pthread_key_delete(key); }

static uintptr_t number_of(variable *which) {
    uintptr_t number = atomic_load(&which->number);
    if (number) return number;
    uintptr_t mine = atomic_fetch_add(&variables, 1) + 1; /* lost where another thread is first: there are enough */
    return atomic_compare_exchange_strong(&which->number, &number, mine) ? mine : number;
}

void *__emutls_get_address(void *control) {
    variable *which = control;
    uintptr_t number = number_of(which);
    copies *all = pthread_getspecific(key);
    if (!all) {
        all = calloc(1, sizeof *all);
        if (!all || pthread_setspecific(key, all)) abort();
    }
    if (number > MOST_VARIABLES) abort();
    void **value = &all->values[number - 1];
    if (!*value) {
        size_t alignment = which->alignment < sizeof(void *) ? sizeof(void *) : which->alignment;
        if (posix_memalign(value, alignment, which->size)) abort();
        if (which->initial) memcpy(*value, which->initial, which->size);
        else memset(*value, 0, which->size);
    }
    return *value;
}
