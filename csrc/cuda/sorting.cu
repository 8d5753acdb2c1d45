// Pairs of neighbouring channels in ascending order, and the same exchanges for gradients.
//
// x is (pairs of rows, 2, inner): element i of a row is sorted with element i of the other row. One
// bit a pair says which were exchanged, eight pairs to a byte, the lowest bit first. Ties stay, NaN
// goes last, and elements are moved bit by bit. Each is read once and written once, 16 bytes at a
// time where rows are aligned; pairs side by side (inner = 1) come in words of both.
#include "moving.h"

namespace {

constexpr int THREADS = 256;

struct Pairs {
  const char* x;
  char* y;
  uint8_t* swaps;
  int64_t pairs, inner;
  Divisor by_inner;
  bool is_short;  // fewer than 2^31 pairs

  // The first element of pair p; the second is `inner` elements on.
  __device__ __forceinline__ int64_t first(int64_t p) const {
    if (inner == 1) return 2 * p;
    const int64_t row = is_short ? int64_t(by_inner.quotient(uint32_t(p))) : p / inner;
    return p + row * inner;
  }
};

// --------------------------------------------------------------------------------------- formats
// An element is a T, whose bits are moved, and compared as what it is.
struct Half {
  using T = uint16_t;
  static __device__ __forceinline__ float number(T bits) {
    half x;
    memcpy(&x, &bits, sizeof(x));
    return to_float(x);
  }
};
struct Bfloat {
  using T = uint16_t;
  static __device__ __forceinline__ float number(T bits) {
    return __uint_as_float(uint32_t(bits) << 16);
  }
};
template <class Number, class Bits>
struct Plain {
  using T = Bits;
  static __device__ __forceinline__ Number number(T bits) {
    Number x;
    memcpy(&x, &bits, sizeof(x));
    return x;
  }
};

// Numbers come before NaN. (No integer is unequal to itself.)
template <class Format>
__device__ __forceinline__ bool comes_before(typename Format::T a, typename Format::T b) {
  const auto x = Format::number(a), y = Format::number(b);
  return x < y || (y != y && x == x);
}

// ---------------------------------------------------------------------------------------- kernels
template <class T>
union Word {
  uint4 bits;
  T element[16 / sizeof(T)];
};

template <class T>
__device__ __forceinline__ void exchange(T& a, T& b, bool swap) {
  const T first = swap ? b : a;
  b = swap ? a : b;
  a = first;
}

template <class Format, bool SORT, class T>
__device__ __forceinline__ void pair(T& a, T& b, uint32_t& bits, int bit) {
  if (SORT) bits |= uint32_t(comes_before<Format>(b, a)) << bit;
  exchange(a, b, (bits >> bit & 1) != 0);
}

// Words: a thread has so many pairs that they fill bytes of `swaps`. Words do not cross rows.
template <class Format, bool SORT>
__global__ void __launch_bounds__(THREADS) on_words(const __grid_constant__ Pairs c) {
  using T = typename Format::T;
  constexpr int IN_WORD = 16 / sizeof(T), OWN = IN_WORD > 8 ? IN_WORD : 8;
  const int64_t start = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * OWN;
  if (start >= c.pairs) return;
  uint32_t bits = 0;
  if (!SORT) {
#pragma unroll
    for (int i = 0; i < OWN / 8; ++i) {
      if (start + 8 * i < c.pairs) bits |= uint32_t(c.swaps[start / 8 + i]) << (8 * i);
    }
  }
#pragma unroll
  for (int w = 0; w < OWN / IN_WORD; ++w) {
    const int64_t p = start + w * IN_WORD;
    if (p >= c.pairs) break;
    const int64_t second = c.inner == 1 ? IN_WORD : c.inner, at = c.first(p);
    const char *x = c.x + at * int64_t(sizeof(T)), *next = x + second * int64_t(sizeof(T));
    Word<T> a, b;
    a.bits = load_word<uint4>(x);
    // The last pairs of neighbours may be half of two words.
    const bool whole = c.inner != 1 || p + IN_WORD <= c.pairs;
    b.bits = whole ? load_word<uint4>(next) : a.bits;
#pragma unroll
    for (int e = 0; e < IN_WORD; ++e) {
      const int bit = w * IN_WORD + e;
      if (c.inner != 1) {
        pair<Format, SORT>(a.element[e], b.element[e], bits, bit);
      } else if (e < IN_WORD / 2) {
        pair<Format, SORT>(a.element[2 * e], a.element[2 * e + 1], bits, bit);
      } else if (whole) {
        const int i = 2 * e - IN_WORD;
        pair<Format, SORT>(b.element[i], b.element[i + 1], bits, bit);
      }
    }
    char* y = c.y + at * int64_t(sizeof(T));
    store_word(y, a.bits);
    if (whole) store_word(y + second * int64_t(sizeof(T)), b.bits);
  }
  if (SORT) {
#pragma unroll
    for (int i = 0; i < OWN / 8; ++i) {
      if (start + 8 * i < c.pairs) c.swaps[start / 8 + i] = uint8_t(bits >> (8 * i));
    }
  }
}

// Elements: a warp has 32 pairs, one for each lane.
template <class Format, bool SORT>
__global__ void __launch_bounds__(THREADS) on_elements(const __grid_constant__ Pairs c) {
  using T = typename Format::T;
  const int64_t p = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  const bool inside = p < c.pairs;
  const int64_t at = c.first(inside ? p : 0) * int64_t(sizeof(T));
  const int64_t next = at + c.inner * int64_t(sizeof(T));
  T a{}, b{};
  if (inside) {
    a = load_word<T>(c.x + at);
    b = load_word<T>(c.x + next);
  }
  bool swap;
  if (SORT) {
    swap = inside && comes_before<Format>(b, a);
    const unsigned votes = __ballot_sync(~0u, swap);
    if (threadIdx.x % 8 == 0 && inside) c.swaps[p / 8] = uint8_t(votes >> (threadIdx.x % 32));
  } else {
    swap = inside && (c.swaps[p / 8] >> (p % 8) & 1) != 0;
  }
  if (inside) {
    store_word<T>(c.y + at, swap ? b : a);
    store_word<T>(c.y + next, swap ? a : b);
  }
}

template <class Format, bool SORT>
int start(const void* x, void* y, void* swaps, int64_t pairs, int64_t inner, void* stream) {
  constexpr int64_t SIZE = sizeof(typename Format::T);
  Pairs c{static_cast<const char*>(x), static_cast<char*>(y), static_cast<uint8_t*>(swaps)};
  c.pairs = pairs;
  c.inner = inner;
  c.is_short = pairs <= INT32_MAX;
  c.by_inner = divisor(c.is_short ? uint32_t(inner) : 1);
  const bool aligned = uintptr_t(x) % 16 == 0 && uintptr_t(y) % 16 == 0;
  // Neighbours: whole words, or one that is half of two.
  const bool words = aligned && (inner == 1 ? 2 * pairs * SIZE % 16 == 0 : inner * SIZE % 16 == 0);
  const int64_t own = words ? (16 / SIZE > 8 ? 16 / SIZE : 8) : 1;
  const int64_t blocks = (pairs + own * THREADS - 1) / (own * THREADS);
  if (blocks > INT32_MAX) return INVALID_VALUE;
  const auto kernel = words ? on_words<Format, SORT> : on_elements<Format, SORT>;
  return launch(kernel, dim3(unsigned(blocks)), dim3(THREADS), 0, 1, stream, c);
}

}  // namespace

// y = the sorted pairs of x, swaps = which were exchanged. `format`: see _FORMATS in
// lipkernels/kernels/cuda/sorting.py.
extern "C" int lk_sort_pairs(const void* x, void* y, void* swaps, int64_t pairs, int64_t inner,
                             int format, void* stream) {
  switch (format) {
    case 0: return start<Plain<float, uint32_t>, true>(x, y, swaps, pairs, inner, stream);
    case 1: return start<Half, true>(x, y, swaps, pairs, inner, stream);
    case 2: return start<Bfloat, true>(x, y, swaps, pairs, inner, stream);
    case 3: return start<Plain<double, uint64_t>, true>(x, y, swaps, pairs, inner, stream);
    case 4: return start<Plain<uint8_t, uint8_t>, true>(x, y, swaps, pairs, inner, stream);
    case 5: return start<Plain<int8_t, uint8_t>, true>(x, y, swaps, pairs, inner, stream);
    case 6: return start<Plain<int16_t, uint16_t>, true>(x, y, swaps, pairs, inner, stream);
    case 7: return start<Plain<int32_t, uint32_t>, true>(x, y, swaps, pairs, inner, stream);
    case 8: return start<Plain<int64_t, uint64_t>, true>(x, y, swaps, pairs, inner, stream);
    default: return INVALID_VALUE;
  }
}

// y = x with the pairs exchanged that `swaps` names; `itemsize`: of an element of any format.
extern "C" int lk_swap_pairs(const void* x, void* y, const void* swaps, int64_t pairs,
                             int64_t inner, int itemsize, void* stream) {
  void* bits = const_cast<void*>(swaps);
  switch (itemsize) {
    case 1: return start<Plain<uint8_t, uint8_t>, false>(x, y, bits, pairs, inner, stream);
    case 2: return start<Plain<uint16_t, uint16_t>, false>(x, y, bits, pairs, inner, stream);
    case 4: return start<Plain<uint32_t, uint32_t>, false>(x, y, bits, pairs, inner, stream);
    case 8: return start<Plain<uint64_t, uint64_t>, false>(x, y, bits, pairs, inner, stream);
    default: return INVALID_VALUE;
  }
}
