// Matrices somewhere in memory, and the vectors of an instruction set.
#pragma once

#include <cstdint>

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

constexpr int64_t KC = 256;  // terms that a product sums up before it adds the next ones to a result

template <class T>
struct Lanes {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
  // The same for loads from addresses that are aligned to the element only.
  typedef T loose __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A matrix somewhere in memory: element (i, j) at data[i * rs + j * cs].
template <class T>
struct View {
  T* data;
  int64_t rs, cs;
  T& operator()(int64_t i, int64_t j) const { return data[i * rs + j * cs]; }
  View<T> t() const { return {data, cs, rs}; }
  // Row i of a matrix whose rows are contiguous (the scratch matrices): loops over it vectorize.
  T* row(int64_t i) const { return data + i * rs; }
};

template <class T>
inline View<T> rows_of(T* data, int64_t ld) { return {data, ld, 1}; }

template <class T>
inline View<const T> read_only(View<T> x) { return {x.data, x.rs, x.cs}; }

// C = alpha out + keep C, for a block of height x width whose rows are WIDTH apart in `out`.
template <int WIDTH, class TC, class Sum>
inline void put_block(View<TC> c, int64_t height, int64_t width, const Sum* out, Sum alpha, Sum keep) {
  if (c.cs == 1) {
    for (int64_t i = 0; i < height; ++i) {
      TC* to = c.row(i);
      const Sum* from = out + i * WIDTH;
      if (keep == Sum(0)) {
        for (int64_t x = 0; x < width; ++x) to[x] = (TC)(alpha * from[x]);
      } else {
        for (int64_t x = 0; x < width; ++x) to[x] = (TC)(alpha * from[x] + keep * (Sum)to[x]);
      }
    }
  } else {
    for (int64_t x = 0; x < width; ++x)
      for (int64_t i = 0; i < height; ++i) {
        const Sum before = keep == Sum(0) ? Sum(0) : keep * (Sum)c(i, x);
        c(i, x) = (TC)(alpha * out[i * WIDTH + x] + before);
      }
  }
}

// A dot product of two rows in double, in lanes that the compiler can vectorize.
template <class TA, class TB>
inline double dot(const TA* a, const TB* b, int64_t n) {
  constexpr int LANES_OF_SUM = 16;
  double lanes[LANES_OF_SUM] = {}, sum = 0;
  int64_t i = 0;
  for (; i + LANES_OF_SUM <= n; i += LANES_OF_SUM)
    for (int x = 0; x < LANES_OF_SUM; ++x) lanes[x] += double(a[i + x]) * double(b[i + x]);
  for (; i < n; ++i) sum += double(a[i]) * double(b[i]);
#pragma GCC unroll 4
  for (int half = LANES_OF_SUM / 2; half > 0; half /= 2)
    for (int x = 0; x < half; ++x) lanes[x] += lanes[x + half];
  return sum + lanes[0];
}

}  // namespace
}  // namespace lipkernels
