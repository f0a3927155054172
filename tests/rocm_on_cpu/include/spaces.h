// Address spaces of AMD's GPUs, as host_ir.py has accesses checked: a thread that reads or writes elsewhere ends there,
// and the launch fails with what it did.
#pragma once
#include <cstdio>

#include "device.h"

namespace emulated {
struct Range {
  const unsigned char *start, *stop;
  bool holds(const void *address, std::size_t bytes) const {
    auto at = static_cast<const unsigned char *>(address);
    return start <= at && at < stop && bytes <= static_cast<std::size_t>(stop - at);
  }
};
Range shared;                 // memory of the block that runs
std::vector<Range> memory;    // of the device: the arguments of the launch
std::vector<bool> under_way;  // by waves: whether accesses to shared memory were not waited for
char fault[300];
constexpr std::size_t stack_room = 128 << 10;

inline std::size_t shared_bytes() { return static_cast<std::size_t>(shared.stop - shared.start); }

template <class... T> void fail(const char *format, T... values) {
  if (!*fault) std::snprintf(fault, sizeof fault, format, values...);
  wait(State::done);
}
inline bool in_memory(const void *address, std::size_t bytes) {
  for (auto &range : memory)
    if (range.holds(address, bytes)) return true;
  return false;
}
inline bool in_stack(const void *address, std::size_t bytes) {
  auto here = static_cast<const unsigned char *>(__builtin_frame_address(0));
  return Range{here, here + stack_room}.holds(address, bytes);
}
inline void check(bool inside, const char *space, const void *address, std::size_t bytes, std::size_t align) {
  if (!inside) fail("thread %u of block %u accesses %zu bytes at %p, which is not in %s", current->index.x, block_index.x, bytes, address, space);
  if (reinterpret_cast<std::uintptr_t>(address) % align)
    fail("thread %u of block %u accesses %zu bytes of %s at %p, which is no multiple of %zu", current->index.x, block_index.x, bytes, space, address, align);
}
inline void check_barrier() {
  if (under_way[current->warp])
    fail("thread %u of block %u is at a barrier while accesses of its wave to shared memory are under way", current->index.x, block_index.x);
}
}  // namespace emulated

extern "C" {
void emulated_begin(const unsigned char *start, const unsigned char *stop) { emulated::shared = {start, stop}; }
void emulated_space_0(const void *p, std::size_t n, std::size_t align) {
  bool inside = emulated::in_memory(p, n) || emulated::shared.holds(p, n) || emulated::in_stack(p, n);
  emulated::check(inside, "any space", p, n, align);
  emulated::under_way[emulated::current->warp] = true;
}
void emulated_space_1(const void *p, std::size_t n, std::size_t align) {
  emulated::check(emulated::in_memory(p, n), "memory of the device", p, n, align);
}
void emulated_space_3(const void *p, std::size_t n, std::size_t align) {
  emulated::check(emulated::shared.holds(p, n), "shared memory", p, n, align);
  emulated::under_way[emulated::current->warp] = true;
}
void emulated_space_4(const void *, std::size_t, std::size_t) {}  // constants of the program
void emulated_space_5(const void *p, std::size_t n, std::size_t align) {
  emulated::check(emulated::in_stack(p, n), "the stack", p, n, align);
}
void emulated_fence() { emulated::under_way[emulated::current->warp] = false; }
// Flat pointers hold those of all spaces; from one space to another there is no address.
void *emulated_cast(void *p, int from, int to) { return from == 0 || to == 0 ? p : reinterpret_cast<void *>(16); }

// A launch with what memory there is; what went wrong, or null.
const char *emulated_launch(void (*)(void **), void **, const unsigned *, const unsigned *, std::size_t, int);
const char *emulated_launch_in(void (*kernel)(void **), void **arguments, const unsigned *grid, const unsigned *block,
                               int reversed, const emulated::Range *ranges, int count) {
  emulated::memory.assign(ranges, ranges + count);
  emulated::under_way.assign(block[0] * block[1] * block[2] / EMULATED_WARP + 1, false);
  *emulated::fault = 0;
  const char *error = emulated_launch(kernel, arguments, grid, block, 0, reversed);
  return *emulated::fault ? emulated::fault : error;
}
}
