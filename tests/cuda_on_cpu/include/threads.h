// Runs a block: its threads take turns on stacks of their own and give way at barriers and shuffles.
// Lanes run upwards, or downwards with `reversed`: code that depends on the order gives other numbers.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "device.h"

namespace emulated {
Thread *current;
Index grid_size, block_size, block_index;
Warp *warps;
unsigned char *dynamic_shared;
bool copies_at_once;

extern "C" void emulated_switch(void **save, void *restore);
#if defined(__x86_64__)
// Saves the registers a callee has to keep on the running stack, and goes on with those of another.
asm(R"(
.text
.type emulated_switch,@function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr int saved_registers = 6;
#else
#error "the emulator switches stacks on x86-64 only"
#endif

static void *scheduler;
static void (*entry)(void **);
static void **entry_arguments;
constexpr std::size_t stack_bytes = 128 << 10;

void wait(State state) {
  Thread *self = current;
  self->state = state;
  emulated_switch(&self->stack_pointer, scheduler);
}

static void body() {
  entry(entry_arguments);
  wait(State::done);
  std::abort();
}

static void prepare(Thread &thread, unsigned char *stack) {
  void **top = reinterpret_cast<void **>(stack + stack_bytes);
  *--top = nullptr;  // the stack of a function called by nobody is aligned so
  *--top = reinterpret_cast<void *>(body);
  for (int i = 0; i < saved_registers; i++) *--top = nullptr;
  thread.stack_pointer = top;
  thread.state = State::running;
  thread.exchanges = 0;
  thread.copies.clear();
}

// Lets one warp run until all its threads are done or at the barrier of the block.
static bool run_warp(Thread *lanes, int count, bool reversed) {
  bool moved = false;
  for (;;) {
    for (int i = 0; i < count; i++) {
      Thread &thread = lanes[reversed ? count - 1 - i : i];
      if (thread.state != State::running) continue;
      current = &thread;
      emulated_switch(&scheduler, thread.stack_pointer);
      moved = true;
    }
    Lanes together = 0;
    for (int i = 0; i < count; i++) together |= Lanes{lanes[i].state == State::at_warp_barrier} << i;
    if (!together) return moved;
    for (int i = 0; i < count; i++) {
      if (lanes[i].state != State::at_warp_barrier) continue;
      lanes[i].state = State::running;
      lanes[i].together = together;
    }
  }
}

static const char *run_block(std::vector<Thread> &threads, bool reversed) {
  int total = static_cast<int>(threads.size()), count = (total + EMULATED_WARP - 1) / EMULATED_WARP;
  for (;;) {
    bool moved = false;
    for (int i = 0; i < count; i++) {
      int first = EMULATED_WARP * (reversed ? count - 1 - i : i);
      moved |= run_warp(&threads[first], std::min(EMULATED_WARP, total - first), reversed);
    }
    int done = 0;
    for (Thread &thread : threads) done += thread.state == State::done;
    if (done == total) return nullptr;
    if (done) return "some threads of a block wait at __syncthreads and others have returned";
    if (!moved) return "no thread of a block can go on";
    for (Thread &thread : threads) thread.state = State::running;
  }
}

// Runs a kernel over a grid; returns what went wrong, or null.
extern "C" const char *emulated_launch(void (*kernel)(void **), void **arguments, const unsigned *grid,
                                       const unsigned *block, std::size_t shared_bytes, int reversed) {
  grid_size = {grid[0], grid[1], grid[2]};
  block_size = {block[0], block[1], block[2]};
  copies_at_once = reversed;
  entry = kernel;
  entry_arguments = arguments;
  std::vector<Thread> threads(block[0] * block[1] * block[2]);
  std::vector<Warp> storage((threads.size() + EMULATED_WARP - 1) / EMULATED_WARP);
  warps = storage.data();
  std::vector<double> shared(shared_bytes / sizeof(double) + 8);
  dynamic_shared = reinterpret_cast<unsigned char *>((reinterpret_cast<std::uintptr_t>(shared.data()) + 15) & ~15ul);
  static std::vector<unsigned char *> stacks;
  while (stacks.size() < threads.size()) stacks.push_back(static_cast<unsigned char *>(std::aligned_alloc(64, stack_bytes)));
  for (unsigned i = 0; i < threads.size(); i++) {
    threads[i].index = {i % block[0], i / block[0] % block[1], i / (block[0] * block[1])};
    threads[i].lane = i % EMULATED_WARP;
    threads[i].warp = i / EMULATED_WARP;
  }
  for (unsigned z = 0; z < grid[2]; z++)
    for (unsigned y = 0; y < grid[1]; y++)
      for (unsigned x = 0; x < grid[0]; x++) {
        block_index = {x, y, z};
        for (unsigned i = 0; i < threads.size(); i++) prepare(threads[i], stacks[i]);
        if (const char *error = run_block(threads, reversed)) return error;
      }
  return nullptr;
}
}  // namespace emulated
