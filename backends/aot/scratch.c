/* Scratch memory of kernels: a stack of blocks per thread, kept between calls, so that a warm call allocates nothing. */
#include "internal.h"

#include <stdlib.h>

#define HUGE_PAGE ((size_t)2 << 20)

void *aligned(size_t bytes) {
    void *memory = NULL;
    size_t alignment = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : LINE;
    if (posix_memalign(&memory, alignment, bytes ? bytes : LINE)) return NULL;
    if (alignment == HUGE_PAGE) ask_for_huge_pages(memory, bytes);
    return memory;
}

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

void *scratch_take(scratch *stack, uint64_t bytes) {
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

void scratch_give(scratch *stack, void *memory) {
    ((piece *)memory - 1)->live = 0;
    for (piece *top = stack->top; top && !top->live; top = stack->top) {
        block *home = top->home;
        home->used = (size_t)((char *)top - home->data);
        stack->top = top->below;
        if (!home->used && home->below) stack->current = home->below;
    }
}

void scratch_free(scratch *stack) {
    block *home = stack->current;
    while (home && home->above) home = home->above;
    while (home) {
        block *below = home->below;
        free(home);
        home = below;
    }
    *stack = (scratch){0};
}
