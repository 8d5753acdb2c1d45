// Sorting pairs of neighbouring channels, and exchanging them as a sort did.
//
// A tensor is (outer, pairs, 2, inner), contiguous. `index` has the shape of the tensor: 0 or 1, the
// place in its pair that an entry came from.
#pragma once

#include <cstdint>

#include "team.h"

namespace lipkernels {
namespace {

// Where inner is 1 the pairs are neighbours in memory: loops over many of them, for the compiler to
// vectorize. The two bytes of a pair's index are one number, in the processor's order of bytes.
constexpr int64_t RUN = 2048;  // pairs
constexpr uint16_t SWAPPED = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 0x0001 : 0x0100;
constexpr uint16_t KEPT = 0x0101 - SWAPPED;
typedef uint16_t Both __attribute__((aligned(1), may_alias));

template <class F>
inline void in_runs(const Team& team, int64_t pairs, F f) {
  team.each((pairs + RUN - 1) / RUN, 2 * RUN, [&](int64_t run) {
    f(run * RUN, pairs < (run + 1) * RUN ? pairs : (run + 1) * RUN);
  });
}

template <class T>
inline void sort_neighbours(const Team& team, const T* __restrict x, T* __restrict y,
                            uint8_t* index, int64_t pairs) {
  Both* __restrict both = reinterpret_cast<Both*>(index);
  in_runs(team, pairs, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T a = x[2 * i], b = x[2 * i + 1];
      const bool swap = (a > b) | ((a != a) & (b == b));  // a NaN goes last
      y[2 * i] = swap ? b : a;
      y[2 * i + 1] = swap ? a : b;
      both[i] = swap ? SWAPPED : KEPT;
    }
  });
}

template <class T>
inline void swap_neighbours(const Team& team, const T* __restrict x, T* __restrict y,
                            const uint8_t* index, int64_t pairs) {
  const Both* __restrict both = reinterpret_cast<const Both*>(index);
  in_runs(team, pairs, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T a = x[2 * i], b = x[2 * i + 1];
      const bool swap = both[i] == SWAPPED;
      y[2 * i] = swap ? b : a;
      y[2 * i + 1] = swap ? a : b;
    }
  });
}

template <class T>
inline void sort_pairs(const Team& team, const T* x, T* y, uint8_t* index, int64_t rows,
                       int64_t inner) {
  if (inner == 1) return sort_neighbours(team, x, y, index, rows);
  team.each(rows, inner * 2, [&](int64_t row) {
    const T *a = x + row * 2 * inner, *b = a + inner;
    T *low = y + row * 2 * inner, *high = low + inner;
    uint8_t *first = index + row * 2 * inner, *second = first + inner;
    for (int64_t i = 0; i < inner; ++i) {
      const bool swap = a[i] > b[i] || (a[i] != a[i] && b[i] == b[i]);  // a NaN goes last
      low[i] = swap ? b[i] : a[i];
      high[i] = swap ? a[i] : b[i];
      first[i] = swap;
      second[i] = !swap;
    }
  });
}

template <class T>
inline void swap_pairs(const Team& team, const T* x, T* y, const uint8_t* index, int64_t rows,
                       int64_t inner) {
  if (inner == 1) return swap_neighbours(team, x, y, index, rows);
  team.each(rows, inner * 2, [&](int64_t row) {
    const T *a = x + row * 2 * inner, *b = a + inner;
    T *first = y + row * 2 * inner, *second = first + inner;
    const uint8_t* swap = index + row * 2 * inner;
    for (int64_t i = 0; i < inner; ++i) {
      first[i] = swap[i] ? b[i] : a[i];
      second[i] = swap[i] ? a[i] : b[i];
    }
  });
}

}  // namespace
}  // namespace lipkernels
