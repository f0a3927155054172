// V_MFMA_F32_16X16X16 of AMD's matrix cores (waves of 64) and V_WMMA_F32_16X16X16 of RDNA 3 and 4 (waves of 32), by the
// lanes of AMD's documentation: the instruction set architectures of the MI200, of RDNA 3 and of RDNA 4, AMD's matrix
// instruction calculator, and GPUOpen on WMMA.
//           a[i][k], b[k][j]: lane (j for b), element                  d[i][j]
//   MFMA    i + 16 * (k / 4), k % 4                                    lane j + 16 * (i / 4), element i % 4
//   RDNA 4  i + 16 * (k / 8), k % 8                                    lane j + 16 * (i / 8), element i % 8
//   RDNA 3  i, k; and i + 16, k, which has to be the same              lane j + 16 * (i % 2), element i / 2
// bfloat16 comes as its bits, in unsigned integers.
#pragma once

namespace emulated {
struct Bits {
  unsigned short bits;
  operator float() const {
    Brain value;
    value.bits = bits;
    return value;
  }
};

// What each lane of the warp brought, in pieces of 16 bytes: all[lane].
template <class T> void bring(const T &mine, T *all) {
  constexpr int piece = sizeof(T) < 16 ? sizeof(T) : 16;
  for (int at = 0; at < static_cast<int>(sizeof(T)); at += piece) {
    Warp &wave = warps[current->warp];
    unsigned turn = current->exchanges++ & 1;
    std::memcpy(wave.slots[turn][current->lane], reinterpret_cast<const char *>(&mine) + at, piece);
    wait(State::at_warp_barrier);
    for (int lane = 0; lane < EMULATED_WARP; lane++)
      std::memcpy(reinterpret_cast<char *>(all + lane) + at, wave.slots[turn][lane], piece);
  }
}

// d += a b, by the `each` elements of this lane; `copies` lanes have the same of a and b.
template <class E, int each, int copies> void matrix_product(const void *a, const void *b, float *d) {
  struct Part { E at[each]; } mine, left[EMULATED_WARP], right[EMULATED_WARP];
  constexpr int sums = 256 / EMULATED_WARP;
  std::memcpy(&mine, a, sizeof mine);
  bring(mine, left);
  std::memcpy(&mine, b, sizeof mine);
  bring(mine, right);
  if (copies == 2)
    for (int lane = 0; lane < 16; lane++)
      if (std::memcmp(left + lane, left + lane + 16, sizeof mine) || std::memcmp(right + lane, right + lane + 16, sizeof mine))
        d[0] = NAN;  // the halves of the wave differ
  int half = current->lane / 16, j = current->lane % 16;
  for (int n = 0; n < sums; n++) {
    int i = copies == 2 ? n * 2 + half : half * sums + n;
    for (int k = 0; k < 16; k++)
      d[n] += static_cast<float>(left[i + 16 * (k / each)].at[k % each]) * static_cast<float>(right[j + 16 * (k / each)].at[k % each]);
  }
}
}  // namespace emulated

#if EMULATED_WARP == 64
inline void amd_float16_1(const void *a, const void *b, float *d) { emulated::matrix_product<half, 4, 1>(a, b, d); }
inline void amd_bfloat16_1(const void *a, const void *b, float *d) { emulated::matrix_product<emulated::Bits, 4, 1>(a, b, d); }
#else
inline void amd_float16_1(const void *a, const void *b, float *d) { emulated::matrix_product<half, 8, 1>(a, b, d); }
inline void amd_bfloat16_1(const void *a, const void *b, float *d) { emulated::matrix_product<emulated::Bits, 8, 1>(a, b, d); }
inline void amd_float16_2(const void *a, const void *b, float *d) { emulated::matrix_product<half, 16, 2>(a, b, d); }
inline void amd_bfloat16_2(const void *a, const void *b, float *d) { emulated::matrix_product<emulated::Bits, 16, 2>(a, b, d); }
#endif
