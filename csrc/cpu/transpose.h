// Transpositions, whole blocks of them in registers where the instruction set has shuffles for it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "matrix.h"
#include "team.h"

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

#if defined(__AVX512F__)
// A transposition of L rows of L lanes in log2(L) stages: at each, every two rows that are `size`
// apart exchange blocks of `size` lanes. Where each lane comes from, in the first row or (L and more)
// in the second one.
template <class Index, int L>
struct Exchanges {
  static constexpr int STAGES = L == 16 ? 4 : 3;
  alignas(VECTOR_BYTES) Index first[STAGES][L], second[STAGES][L];
  constexpr Exchanges() : first(), second() {
    for (int stage = 0; stage < STAGES; ++stage)
      for (int x = 0, size = 1 << stage; x < L; ++x) {
        first[stage][x] = x & size ? L + x - size : x;
        second[stage][x] = x & size ? L + x : x + size;
      }
  }
};

// Lanes of a vector of TB, and the integers that choose among them.
template <class TB>
constexpr int LANES = VECTOR_BYTES / sizeof(TB);
template <class TB>
using LaneIndex = typename std::conditional<sizeof(TB) == 4, int32_t, int64_t>::type;

template <class TB>
constexpr Exchanges<LaneIndex<TB>, LANES<TB>> EXCHANGES{};

// Row i of `to` is column i of LANES<TB> rows at `from`, the first `rows` of which there are (others
// count as zero). `stride`, `ld`: from one row to the next.
template <class T, class TB>
static inline void transpose_block(const TB* from, int64_t stride, int64_t rows, T* to, int64_t ld) {
  typedef typename Lanes<TB>::type V;
  typedef typename Lanes<LaneIndex<TB>>::type Index;
  typedef T Row __attribute__((vector_size(LANES<TB> * sizeof(T)), may_alias));
  constexpr int L = LANES<TB>;
  V row[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    row[i] = i < rows ? *(const typename Lanes<TB>::loose*)(from + i * stride) : V{};
#pragma GCC unroll 4
  for (int stage = 0; stage < EXCHANGES<TB>.STAGES; ++stage) {
    const Index first = *(const Index*)EXCHANGES<TB>.first[stage];
    const Index second = *(const Index*)EXCHANGES<TB>.second[stage];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i >> stage & 1) continue;
      const V a = row[i], b = row[i + (1 << stage)];
      row[i] = __builtin_shuffle(a, b, first);
      row[i + (1 << stage)] = __builtin_shuffle(a, b, second);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) *(Row*)(to + i * ld) = __builtin_convertvector(row[i], Row);
}
#endif

// Square blocks in which a matrix and its transpose are read together.
constexpr int64_t SQUARE = 32;

// to[j * SQUARE + i] = from[i * ld + j], for a block of at most SQUARE rows and columns.
template <class T>
static inline void transpose_square(const T* from, int64_t ld, int64_t rows, int64_t cols, T* to) {
#if defined(__AVX512F__)
  constexpr int64_t L = LANES<T>;
#else
  constexpr int64_t L = 8;
#endif
  for (int64_t i0 = 0; i0 < rows; i0 += L)
    for (int64_t j0 = 0; j0 < cols; j0 += L) {
      const int64_t i1 = i0 + L < rows ? i0 + L : rows, j1 = j0 + L < cols ? j0 + L : cols;
#if defined(__AVX512F__)
      if (j0 + L <= cols) {
        transpose_block<T, T>(from + i0 * ld + j0, ld, i1 - i0, to + j0 * SQUARE + i0, SQUARE);
        continue;
      }
#endif
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j) to[j * SQUARE + i] = from[i * ld + j];
    }
}

// f(i, j0, j1, turned) for every row i of a matrix (n, n) with contiguous rows, in pieces [j0, j1) of
// its columns: turned[j - j0] = X(j, i). `upper`: only the pieces that reach above the diagonal.
template <class T, class F>
void with_transpose(const Team& team, int64_t n, View<const T> x, bool upper, const F& f) {
  const int64_t blocks = round_up(n, SQUARE) / SQUARE;
  team.each(blocks, SQUARE * n, [&](int64_t block) {
    alignas(64) T turned[SQUARE * SQUARE];
    const int64_t i0 = block * SQUARE, i1 = i0 + SQUARE < n ? i0 + SQUARE : n;
    for (int64_t j0 = upper ? i0 : 0; j0 < n; j0 += SQUARE) {
      const int64_t j1 = j0 + SQUARE < n ? j0 + SQUARE : n;
      transpose_square<T>(x.row(j0) + i0, x.rs, j1 - j0, i1 - i0, turned);
      for (int64_t i = i0; i < i1; ++i) f(i, j0, j1, turned + (i - i0) * SQUARE);
    }
  });
}

// Copies the lower triangle of C (n, n), whose rows are contiguous, over its upper one; `sign` -1
// makes it skew.
template <class T>
void mirror(const Team& team, int64_t n, View<T> c, T sign = T(1)) {
  const auto copy = [&](int64_t i, int64_t j0, int64_t j1, const T* turned) {
    T* row = c.row(i);
    for (int64_t j = j0 > i ? j0 : i + 1; j < j1; ++j) row[j] = sign * turned[j - j0];
  };
  with_transpose<T>(team, n, read_only(c), true, copy);
}

}  // namespace
}  // namespace lipkernels
