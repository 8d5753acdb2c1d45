// What the jobs have in common: scratch memory, the weight as a wide matrix, what became of it.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

// What became of a matrix; other than DONE, it is for an eigendecomposition.
enum Status : int32_t {
  DONE = 0,
  ILL_CONDITIONED = 1,       // in float32
  VERY_ILL_CONDITIONED = 2,  // most likely beyond what a float32 Gram matrix can tell
  EXTREME = 3,               // zero, not finite, or its squares are
  FEW_SMALL = 4,             // ILL_ or VERY_ILL_CONDITIONED, and best served by refine.h
};

struct Workspace {
  char* next;
  template <class T>
  T* take(int64_t n) {
    T* result = (T*)next;
    next += round_up(n * sizeof(T), 64);
    return result;
  }
};

// Doubles that `gemm` packs factors in, of products of matrices no larger than (m, n) and (n, m).
inline int64_t packed_for(int64_t m, int64_t n) {
  const int64_t tall = packed_size<double>(n, m), wide = packed_size<double>(m, n);
  return tall > wide ? tall : wide;
}

inline int64_t padded(int64_t n) { return round_up(n, 16); }

// An upper bound for what `Workspace` must hold, in bytes, for a matrix of m * n.
inline int64_t workspace_size(int64_t m, int64_t n) {
  const int64_t square = padded(m) * padded(m), whole = padded(m) * (n + 64);
  const int64_t packed = 2 * 8 * packed_size<double>(n, m);
  return 4 * 10 * square + 8 * 3 * square + 8 * 3 * whole + packed + 8 * 16 * (m + 64) + 8 * n + 65536;
}

inline View<float> wide_view(float* data, int64_t rows, int64_t cols) {
  return rows <= cols ? View<float>{data, cols, 1} : View<float>{data, 1, cols};
}
inline View<const float> wide_view(const float* data, int64_t rows, int64_t cols) {
  return rows <= cols ? View<const float>{data, cols, 1} : View<const float>{data, 1, cols};
}

}  // namespace
}  // namespace lipkernels
