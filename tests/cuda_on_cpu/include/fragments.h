// mma.sync m16n8k16 and ldmatrix by the lanes of the PTX ISA, for warps of 32:
//   a[i][k]   lane i % 8 * 4 + k % 8 / 2, element k % 2 + 2 * (i / 8) + 4 * (k / 8)
//   b[k][j]   lane j * 4 + k % 8 / 2, element k % 2 + 2 * (k / 8)
//   d[i][j]   lane i % 8 * 4 + j / 2, element j % 2 + 2 * (i / 8)
// A call of ours multiplies with two b side by side.
// mma.sp m16n8k32: of a[i][0..31] two of every four are kept, as a[i][0..15] above; which, says bit i / 8 * 16 on of the
// word of lane i % 8 * 4 + selector * 2 + k / 16, 4 bits for every four: two places, the lower one first.
#pragma once
#if EMULATED_WARP == 32

namespace emulated {
// What each lane of the warp brought: `of(lane)` until the next exchange but one.
template <class T> const T *gather(const T &mine) {
  static_assert(sizeof(T) == 16);
  Warp &warp = warps[current->warp];
  unsigned turn = current->exchanges++ & 1;
  std::memcpy(warp.slots[turn][current->lane], &mine, sizeof mine);
  wait(State::at_warp_barrier);
  return reinterpret_cast<const T *>(warp.slots[turn]);
}
template <class T> struct Eight { T at[8]; };

template <class T> void multiply(float *sums, const void *left, const void *right) {
  Eight<T> part, lefts[32], rights[32];
  std::memcpy(&part, left, sizeof part);
  std::memcpy(lefts, gather(part), sizeof lefts);
  std::memcpy(&part, right, sizeof part);
  std::memcpy(rights, gather(part), sizeof rights);
  for (int n = 0; n < 8; n++) {
    int i = current->lane / 4 + n / 2 % 2 * 8, j = current->lane % 4 * 2 + n % 2, half = n / 4;
    for (int k = 0; k < 16; k++) {
      float a = lefts[i % 8 * 4 + k % 8 / 2].at[k % 2 + 2 * (i / 8) + 4 * (k / 8)];
      float b = rights[j * 4 + k % 8 / 2].at[half * 4 + k % 2 + 2 * (k / 8)];
      sums[n] += a * b;
    }
  }
}
template <class T> void multiply_sparse(float *sums, const void *left, const void *right, unsigned places, int selector) {
  Eight<T> part, lefts[32], rights[2][32];
  struct Word { unsigned bits, none[3]; } mine = {places, {}}, words[32];
  std::memcpy(&part, left, sizeof part);
  std::memcpy(lefts, gather(part), sizeof lefts);
  for (int n = 0; n < 2; n++) {
    std::memcpy(&part, static_cast<const char *>(right) + n * sizeof part, sizeof part);
    std::memcpy(rights[n], gather(part), sizeof lefts);
  }
  std::memcpy(words, gather(mine), sizeof words);
  for (int n = 0; n < 8; n++) {
    int i = current->lane / 4 + n / 2 % 2 * 8, j = current->lane % 4 * 2 + n % 2, half = n / 4;
    for (int four = 0; four < 8; four++) {
      unsigned code = words[i % 8 * 4 + selector * 2 + four / 4].bits >> (i / 8 * 16 + four % 4 * 4) & 15;
      if ((code & 3) >= code >> 2) sums[n] = std::nanf("");  // has no meaning
      for (int e = 0; e < 2; e++) {
        int held = four * 2 + e, k = four * 4 + (code >> 2 * e & 3), low = k % 16;
        float a = lefts[i % 8 * 4 + held % 8 / 2].at[held % 2 + 2 * (i / 8) + 4 * (held / 8)];
        float b = rights[k / 16][j * 4 + low % 8 / 2].at[half * 4 + low % 2 + 2 * (low / 8)];
        sums[n] += a * b;
      }
    }
  }
}
inline void load(void *to, const void *row, bool turned) {
  struct Row { const unsigned short *at; unsigned long long none; } mine = {static_cast<const unsigned short *>(row), 0};
  Row rows[32];
  if (reinterpret_cast<std::uintptr_t>(row) % 16) std::abort();  // rows of 16 bytes lie on 16 bytes
  std::memcpy(rows, gather(mine), sizeof rows);
  unsigned short *held = static_cast<unsigned short *>(to);
  for (int matrix = 0; matrix < 4; matrix++)
    for (int n = 0; n < 2; n++) {
      int line = current->lane / 4, place = current->lane % 4 * 2 + n;
      held[matrix * 2 + n] = turned ? rows[matrix * 8 + place].at[line] : rows[matrix * 8 + line].at[place];
    }
}
}  // namespace emulated

inline void load_matrices(void *to, const void *shared) { emulated::load(to, shared, false); }
inline void load_matrices_turned(void *to, const void *shared) { emulated::load(to, shared, true); }
inline void multiply_float16(float *sums, const void *left, const void *right) {
  emulated::multiply<half>(sums, left, right);
}
inline void multiply_bfloat16(float *sums, const void *left, const void *right) {
  emulated::multiply<nv_bfloat16>(sums, left, right);
}
#define EMULATED_SPARSE(name, type, selector) \
  inline void multiply_sparse_##name##_##selector(float *sums, const void *left, const void *right, unsigned places) { \
    emulated::multiply_sparse<type>(sums, left, right, places, selector); \
  }
EMULATED_SPARSE(float16, half, 0)
EMULATED_SPARSE(float16, half, 1)
EMULATED_SPARSE(bfloat16, nv_bfloat16, 0)
EMULATED_SPARSE(bfloat16, nv_bfloat16, 1)
#endif
