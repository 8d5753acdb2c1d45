// Which sizes of numbers the kernels compute with: float32 has no room for the squares of the largest
// and the smallest, the tile unit none for subnormal numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "gemm.h"

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

// Entries outside this range are for the reference: their squares leave the range of float32.
constexpr float LARGEST = 1e12f, SMALLEST = 1e-12f;

// The largest |x|, infinite where there is a NaN; `partial` holds a double for each row.
inline double largest_entry(const Team& team, int64_t rows, int64_t cols, const float* data,
                            double* partial) {
  // Compared as integers: a NaN or an infinity is larger than all others.
  team.each(rows, cols / 8, [&](int64_t i) {
    const float* row = data + i * cols;
    int32_t largest = 0;
    for (int64_t j = 0; j < cols; ++j) {
      int32_t bits;
      std::memcpy(&bits, row + j, sizeof bits);
      bits &= 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    float size;
    std::memcpy(&size, &largest, sizeof size);
    partial[i] = std::isnan(size) ? INFINITY : size;
  });
  double largest = 0;
  for (int64_t i = 0; i < rows; ++i) largest = partial[i] > largest ? partial[i] : largest;
  return largest;
}

// Whether products of numbers of this size, and what becomes of them, can do without subnormal ones.
inline Digits digits_by_size(double size) {
  return size >= 1e-15 && size <= 1e30 ? Digits::ALL : Digits::EVERY;
}

// The same for a gradient of this shape and a matrix of this norm.
inline Digits digits_by_size(const Team& team, int64_t rows, int64_t cols, const float* grad,
                             double norm, double* partial) {
  const int64_t m = rows < cols ? rows : cols;
  if (!uses_tiles(m, m, m, Digits::FEW)) return Digits::ALL;
  if (digits_by_size(norm) == Digits::EVERY) return Digits::EVERY;
  return digits_by_size(largest_entry(team, rows, cols, grad, partial));
}

}  // namespace
}  // namespace lipkernels
