// Sorting pairs of neighbouring channels, and exchanging them as a sort did.
//
// A tensor is (outer, pairs, 2, inner), contiguous. `index` has the shape of the tensor: 0 or 1, the
// place in its pair that an entry came from.
#pragma once

#include <cstdint>

#include "team.h"

namespace lipkernels {
namespace {

template <class T>
inline void sort_pairs(const Team& team, const T* x, T* y, uint8_t* index, int64_t rows,
                       int64_t inner) {
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
