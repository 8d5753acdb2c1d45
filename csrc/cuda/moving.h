// What the kernels that only move elements share: words of any width, division without dividing.
#pragma once

#include "runtime.h"

// Errors that the library itself finds: cudaErrorInvalidValue.
constexpr int INVALID_VALUE = 1;

template <class Word>
__device__ __forceinline__ Word load_word(const char* at) {
  require_aligned(at, sizeof(Word));
  return *reinterpret_cast<const Word*>(at);
}
template <class Word>
__device__ __forceinline__ void store_word(char* at, Word word) {
  require_aligned(at, sizeof(Word));
  *reinterpret_cast<Word*>(at) = word;
}

// n / d and n % d for n < 2^31 and one d for all threads, by a multiplication.
//
// With 2^(s-1) < d <= 2^s and f = floor(2^32 (2^s - d) / d) + 1, n / d = (n f / 2^32 + n) / 2^s,
// rounded down each time (Granlund and Montgomery, Division by invariant integers).
struct Divisor {
  uint32_t by, factor, shift;

  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return (uint32_t((uint64_t(n) * factor) >> 32) + n) >> shift;
  }
};

inline Divisor divisor(uint32_t by) {
  uint32_t shift = 0;
  while ((uint64_t(1) << shift) < by) ++shift;
  const uint64_t factor = (((uint64_t(1) << shift) - by) << 32) / by + 1;
  return {by, uint32_t(factor), shift};
}
