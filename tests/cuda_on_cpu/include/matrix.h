// Half precision and matrix multiplications of a warp (nvcuda::wmma) as generated kernels use them.
// Every lane holds whole fragments: it loads all of one and stores its own part, each 32nd element, so that what other
// lanes have not written yet, or have overwritten, is seen.
#pragma once

namespace emulated {
// A float rounded to nearest, ties to even, kept in 16 bits.
struct Half {
  unsigned short bits;
  Half() = default;
  Half(float value) {
    _Float16 rounded = static_cast<_Float16>(value);
    std::memcpy(&bits, &rounded, sizeof bits);
  }
  operator float() const {
    _Float16 value;
    std::memcpy(&value, &bits, sizeof bits);
    return value;
  }
};
struct Brain {
  unsigned short bits;
  Brain() = default;
  Brain(float value) {
    unsigned whole;
    std::memcpy(&whole, &value, sizeof whole);
    if (value != value) whole |= 0x400000;  // NaN stays one
    else whole += 0x7fff + (whole >> 16 & 1);
    bits = static_cast<unsigned short>(whole >> 16);
  }
  operator float() const {
    unsigned whole = static_cast<unsigned>(bits) << 16;
    float value;
    std::memcpy(&value, &whole, sizeof value);
    return value;
  }
};
template <class T> struct Pair { T x, y; };
}  // namespace emulated

using half = emulated::Half;
using __half = half;
using __half2 = emulated::Pair<half>;
using half2 = __half2;
inline half2 make_half2(half first, half second) { return {first, second}; }
using nv_bfloat16 = emulated::Brain;
struct nv_bfloat162 : emulated::Pair<nv_bfloat16> {
  nv_bfloat162() = default;
  nv_bfloat162(nv_bfloat16 first, nv_bfloat16 second) : Pair{first, second} {}
};
inline bool __hgt(float a, float b) { return a > b; }
inline bool __hlt(float a, float b) { return a < b; }
inline float __half2float(half x) { return x; }
inline half __float2half(float x) { return x; }
inline half __float2half_rn(float x) { return x; }
inline float __bfloat162float(nv_bfloat16 x) { return x; }
inline nv_bfloat16 __float2bfloat16(float x) { return x; }
inline nv_bfloat16 __float2bfloat16_rn(float x) { return x; }

namespace nvcuda::wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
  static constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M;
  static constexpr int columns = std::is_same_v<Use, matrix_a> ? K : N;
  T at[rows][columns];
};

template <class F> void fill_fragment(F &to, float value) {
  for (auto &row : to.at)
    for (auto &element : row) element = value;
}
template <class Use, int M, int N, int K, class T, class Layout>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout> &to, const T *from, unsigned stride) {
  constexpr bool by_column = std::is_same_v<Layout, col_major>;
  for (int i = 0; i < to.rows; i++)
    for (int j = 0; j < to.columns; j++) to.at[i][j] = by_column ? from[j * stride + i] : from[i * stride + j];
}
template <int M, int N, int K, class T, class LA, class LB>
void mma_sync(fragment<accumulator, M, N, K, float> &to, const fragment<matrix_a, M, N, K, T, LA> &a,
              const fragment<matrix_b, M, N, K, T, LB> &b, const fragment<accumulator, M, N, K, float> &add) {
  float x[M][K], y[K][N];
  for (int i = 0; i < M; i++)
    for (int k = 0; k < K; k++) x[i][k] = a.at[i][k];
  for (int k = 0; k < K; k++)
    for (int j = 0; j < N; j++) y[k][j] = b.at[k][j];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) {
      float sum = add.at[i][j];
      for (int k = 0; k < K; k++) sum += x[i][k] * y[k][j];
      to.at[i][j] = sum;
    }
}
template <int M, int N, int K>
void store_matrix_sync(float *to, const fragment<accumulator, M, N, K, float> &from, unsigned stride, layout_t) {
  for (int i = emulated::current->lane; i < M * N; i += 32) to[i / N * stride + i % N] = from.at[i / N][i % N];
}
}  // namespace nvcuda::wmma
