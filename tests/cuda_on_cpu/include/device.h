// The part of CUDA C++ that generated kernels use, for one thread of a block run on the CPU (threads.h switches).
#pragma once
#include <math_constants.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one after the other
#define __restrict__ __restrict
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#ifndef EMULATED_WARP
#define EMULATED_WARP 32  // threads; 64 for waves of AMD's CDNA
#endif

namespace emulated {
using Lanes = unsigned long long;  // a bit each
struct Index { unsigned x, y, z; };
enum class State : unsigned char { running, at_warp_barrier, at_block_barrier, done };

struct Thread {
  void *stack_pointer;
  Index index;
  int lane, warp;
  State state;
  unsigned exchanges;  // shuffles so far: consecutive ones use different slots
  Lanes together;      // the lanes that reached the last warp barrier with this one
  std::vector<std::pair<void *, const void *>> copies;  // begun, of 16 bytes
};
struct Warp { unsigned char slots[2][EMULATED_WARP][16]; };

extern Thread *current;
extern Index grid_size, block_size, block_index;
extern Warp *warps;
extern unsigned char *dynamic_shared;
extern bool copies_at_once;
void wait(State state);  // until the warp, or the block, has come as far

// The value that `lane` of this warp brought to the same shuffle; one's own where that lane did not come.
template <class T> T exchange(T value, int lane) {
  static_assert(sizeof(T) <= 16);
  Thread *self = current;
  Warp &warp = warps[self->warp];
  unsigned turn = self->exchanges++ & 1;
  std::memcpy(warp.slots[turn][self->lane], &value, sizeof value);
  wait(State::at_warp_barrier);
  if (lane >= 0 && lane < EMULATED_WARP && (self->together >> lane & 1)) std::memcpy(&value, warp.slots[turn][lane], sizeof value);
  return value;
}

template <class... A, std::size_t... I>
void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::decay_t<A> *>(arguments[I])...);
}
template <class... A> void call(void (*kernel)(A...), void **arguments) {
  call(kernel, arguments, std::index_sequence_for<A...>{});
}
template <class... A> constexpr int count(void (*)(A...)) { return sizeof...(A); }
}  // namespace emulated

#define threadIdx (emulated::current->index)
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

inline void __syncthreads() { emulated::wait(emulated::State::at_block_barrier); }
inline void __syncwarp(unsigned = ~0u) { emulated::wait(emulated::State::at_warp_barrier); }
inline unsigned __activemask() {
  __syncwarp();
  return static_cast<unsigned>(emulated::current->together);
}
template <class T> T __shfl_sync(unsigned, T value, int source, int width = 32) {
  int lane = emulated::current->lane;
  return emulated::exchange(value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T> T __shfl_down_sync(unsigned, T value, unsigned delta, int width = 32) {
  int lane = emulated::current->lane, place = lane & (width - 1);
  return emulated::exchange(value, place + static_cast<int>(delta) < width ? lane + static_cast<int>(delta) : lane);
}
template <class T> T __shfl_up_sync(unsigned, T value, unsigned delta, int width = 32) {
  int lane = emulated::current->lane, place = lane & (width - 1);
  return emulated::exchange(value, place >= static_cast<int>(delta) ? lane - static_cast<int>(delta) : lane);
}
template <class T> T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
  return emulated::exchange(value, emulated::current->lane ^ mask);
}
// cp.async: with lanes upwards a copy arrives when it is waited for, with lanes downwards at once.
inline void copy_16_bytes(void *shared, const void *memory) {
  if (emulated::copies_at_once) std::memcpy(shared, memory, 16);
  else emulated::current->copies.emplace_back(shared, memory);
}
inline void copy_16_bytes_inside(void *shared, const void *memory, int inside) {
  static const unsigned char zeros[16] = {};
  copy_16_bytes(shared, inside ? memory : zeros);
}
inline void wait_for_copies() {
  for (auto &[shared, memory] : emulated::current->copies) std::memcpy(shared, memory, 16);
  emulated::current->copies.clear();
}
template <class T> T __ldg(const T *address) { return *address; }

using std::max;
using std::min;
using uint = unsigned int;
using uchar = unsigned char;
using ushort = unsigned short;
using longlong = long long;
using ulonglong = unsigned long long;
#define VECTORS(T)                                                                                 \
  struct alignas(2 * sizeof(T)) T##2 { T x, y; };                                                  \
  struct T##3 { T x, y, z; };                                                                      \
  struct alignas(sizeof(T) > 4 ? 16 : 4 * sizeof(T)) T##4 { T x, y, z, w; };                       \
  inline T##2 make_##T##2(T x, T y) { return {x, y}; }                                             \
  inline T##3 make_##T##3(T x, T y, T z) { return {x, y, z}; }                                     \
  inline T##4 make_##T##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(float)
VECTORS(double)
VECTORS(int)
VECTORS(uint)
VECTORS(short)
VECTORS(ushort)
VECTORS(uchar)
VECTORS(longlong)
VECTORS(ulonglong)
#undef VECTORS

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

#include "matrix.h"
#include "amd_matrix.h"
#include "fragments.h"
