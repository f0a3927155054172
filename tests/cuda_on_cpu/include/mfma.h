// V_MFMA_F32_16X16X16 of AMD's matrix cores, by the lanes of its documentation ("AMD Instinct MI200" instruction set
// architecture, and AMD's matrix instruction calculator), for waves of 64:
//   a[i][k]   lane i + 16 * (k / 4), element k % 4
//   b[k][j]   lane j + 16 * (k / 4), element k % 4
//   d[i][j]   lane j + 16 * (i / 4), element i % 4
#pragma once
#if EMULATED_WARP == 64

namespace emulated {
template <class T> struct Parts { T a[4], b[4]; };
}

// d += a b, by the four elements of this lane.
template <class T> void mfma(const T *a, const T *b, float *d) {
  using namespace emulated;
  Thread *self = current;
  Warp &wave = warps[self->warp];
  unsigned turn = self->exchanges++ & 1;
  static_assert(sizeof(Parts<T>) == sizeof wave.slots[0][0]);
  auto *lanes = reinterpret_cast<Parts<T> *>(wave.slots[turn]);
  std::copy(a, a + 4, lanes[self->lane].a);
  std::copy(b, b + 4, lanes[self->lane].b);
  wait(State::at_warp_barrier);
  int j = self->lane % 16;
  for (int n = 0; n < 4; n++)
    for (int k = 0, i = self->lane / 16 * 4 + n; k < 16; k++)
      d[n] += static_cast<float>(lanes[i + 16 * (k / 4)].a[k % 4]) * static_cast<float>(lanes[j + 16 * (k / 4)].b[k % 4]);
}
#endif
