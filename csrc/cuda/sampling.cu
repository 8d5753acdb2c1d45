// Permuted copies: space to depth and back, each byte read once and written once.
//
// A copy is a list of dimensions with a stride on either side. A block moves a tile, a box of it:
// read along x, into shared memory in the order of x, read there in the order of y, written along
// y. lipkernels/kernels/cuda/tiles.py chooses a box with long runs of neighbours on both sides, and
// the widest words, up to 16 bytes, that alignment allows on each. Where both sides have the same
// runs, words go straight across. Offsets in a tensor have 64 bits, those in a tile 32.
#include "moving.h"

namespace {

constexpr int DIMS = 6, THREADS = 256;
// Of an element: its width alone, or what it is multiplied as.
enum Scaling : int { UNSCALED, HALF, BFLOAT, FLOAT, DOUBLE };

// One dimension, in the order of one side: the innermost is the first.
struct Digit {
  int64_t size, x, y;           // elements; bytes from one to the next
  Divisor extent;               // of a tile
  Divisor tiles_before, tiles;  // of the other dimensions before it, and along it
  uint32_t shared;              // bytes from one to the next in shared memory
};

struct Copy {
  const char* x;
  char* y;
  double scale;
  Digit by_x[DIMS], by_y[DIMS];
  uint32_t dims, elements;    // in a tile
  uint32_t x_width, y_width;  // bytes of a word: 16, 4 or those of an element
  uint32_t pad_shift;
  bool direct;
  bool near;  // words of y end within the third digit
};

// Words of 16 bytes of padding, so that threads which read far apart find different banks.
__host__ __device__ __forceinline__ uint32_t padded(uint32_t bytes, uint32_t shift) {
  return bytes + (bytes >> shift << 4);
}

// Where a tile begins in one dimension, and how much of its extent is there.
__device__ __forceinline__ int64_t start_of(const Digit& d, uint32_t tile, uint32_t& left) {
  const uint32_t before = d.tiles_before.quotient(tile);
  const uint32_t index = before - d.tiles.quotient(before) * d.tiles.by;
  const int64_t start = int64_t(index) * d.extent.by;
  left = uint32_t(min(d.size - start, int64_t(d.extent.by)));
  return start;
}

// Where element `number` of a tile is, counted in the order of `digits`; whether it is there.
struct Place {
  int64_t x, y;
  uint32_t shared;
  bool inside;
};
__device__ __forceinline__ Place place(const Digit (&digits)[DIMS], uint32_t dims,
                                       const uint32_t (&left)[DIMS], uint32_t number) {
  Place found{0, 0, 0, true};
#pragma unroll
  for (int k = 0; k < DIMS; ++k) {
    if (k >= int(dims)) break;
    const Digit& d = digits[k];
    const uint32_t rest = d.extent.quotient(number), index = number - rest * d.extent.by;
    number = rest;
    found.x += index * d.x;
    found.y += index * d.y;
    found.shared += index * d.shared;
    found.inside = found.inside && index < left[k];
  }
  return found;
}

template <Scaling SCALING, class T>
__device__ __forceinline__ T scaled(T element, double scale) {
  if constexpr (SCALING == HALF) {
    half number;
    memcpy(&number, &element, sizeof(number));
    number = to_half(to_float(number) * float(scale));
    memcpy(&element, &number, sizeof(number));
  } else if constexpr (SCALING == BFLOAT) {
    bfloat16 number;
    memcpy(&number, &element, sizeof(number));
    number = to_bfloat16(to_float(number) * float(scale));
    memcpy(&element, &number, sizeof(number));
  } else if constexpr (SCALING == FLOAT) {
    float number;
    memcpy(&number, &element, sizeof(number));
    number *= float(scale);
    memcpy(&element, &number, sizeof(number));
  } else if constexpr (SCALING == DOUBLE) {
    double number;
    memcpy(&number, &element, sizeof(number));
    number *= scale;
    memcpy(&element, &number, sizeof(number));
  }
  return element;
}

// A word as its elements.
template <class T, class Word>
union Elements {
  Word word;
  T element[sizeof(Word) / sizeof(T)];
};

template <class Word>
__device__ __forceinline__ void read(const Copy& c, const char* x, const uint32_t (&left)[DIMS],
                                     uint32_t itemsize, char* memory) {
  const uint32_t per_word = sizeof(Word) / itemsize, words = c.elements / per_word;
#pragma unroll 2
  for (uint32_t w = threadIdx.x; w < words; w += THREADS) {
    const Place from = place(c.by_x, c.dims, left, w * per_word);
    if (from.inside) {
      char* to = memory + padded(w * uint32_t(sizeof(Word)), c.pad_shift);
      store_word<Word>(to, load_word<Word>(x + from.x));
    }
  }
}

// Where the neighbours of an element are in shared memory, up to the end of the third digit.
struct Neighbours {
  uint32_t index[3], rest;

  __device__ __forceinline__ Neighbours(const Digit (&digits)[DIMS], uint32_t number, uint32_t all)
      : rest(all) {
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const uint32_t carry = digits[k].extent.quotient(number);
      index[k] = number - carry * digits[k].extent.by;
      number = carry;
      rest -= index[k] * digits[k].shared;
    }
  }
  __device__ __forceinline__ uint32_t after(const Digit (&digits)[DIMS], uint32_t n) const {
    uint32_t at = rest;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      n += index[k];
      const uint32_t carry = digits[k].extent.quotient(n);
      at += (n - carry * digits[k].extent.by) * digits[k].shared;
      n = carry;
    }
    return at;
  }
};

template <class T, Scaling SCALING, class Word>
__device__ __forceinline__ void write(const Copy& c, char* y, const uint32_t (&left)[DIMS],
                                      const char* memory) {
  constexpr uint32_t PER_WORD = sizeof(Word) / sizeof(T);
  const uint32_t words = c.elements / PER_WORD;
  for (uint32_t w = threadIdx.x; w < words; w += THREADS) {
    const Place to = place(c.by_y, c.dims, left, w * PER_WORD);
    if (!to.inside) continue;
    const auto element = [&](uint32_t at) {
      return scaled<SCALING>(load_word<T>(memory + padded(at, c.pad_shift)), c.scale);
    };
    if (PER_WORD == 1 || c.near) {
      const Neighbours neighbours(c.by_y, w * PER_WORD, to.shared);
      Elements<T, Word> found;
#pragma unroll
      for (uint32_t e = 0; e < PER_WORD; ++e) {
        found.element[e] = element(e == 0 ? to.shared : neighbours.after(c.by_y, e));
      }
      store_word<Word>(y + to.y, found.word);
    } else if constexpr (PER_WORD > 1) {
      // Seldom (images of 7 x 7, say): little code, and no array that is indexed by a variable.
      uint64_t half[2] = {0, 0};
#pragma unroll 1
      for (uint32_t e = 0; e < PER_WORD; ++e) {
        const uint32_t at = place(c.by_y, c.dims, left, w * PER_WORD + e).shared;
        const uint32_t bit = 8 * uint32_t(sizeof(T)) * e;
        const uint64_t bits = uint64_t(element(at)) << (bit % 64);
        half[0] |= bit < 64 ? bits : 0;
        half[1] |= bit < 64 ? 0 : bits;
      }
      Word word;
      memcpy(&word, half, sizeof(word));
      store_word<Word>(y + to.y, word);
    }
  }
}

template <class T, Scaling SCALING, class Word>
__device__ __forceinline__ void across(const Copy& c, const char* x, char* y,
                                       const uint32_t (&left)[DIMS]) {
  constexpr uint32_t PER_WORD = sizeof(Word) / sizeof(T);
  const uint32_t words = c.elements / PER_WORD;
#pragma unroll 2
  for (uint32_t w = threadIdx.x; w < words; w += THREADS) {
    const Place both = place(c.by_y, c.dims, left, w * PER_WORD);
    if (!both.inside) continue;
    Elements<T, Word> found;
    found.word = load_word<Word>(x + both.x);
#pragma unroll
    for (uint32_t e = 0; e < PER_WORD; ++e) {
      found.element[e] = scaled<SCALING>(found.element[e], c.scale);
    }
    store_word<Word>(y + both.y, found.word);
  }
}

// f(a word of so many bytes): 16, 4 or those of T.
template <class T, class F>
__device__ __forceinline__ void with_words(uint32_t bytes, F f) {
  if (bytes == 16) return f(uint4{});
  if constexpr (sizeof(T) < 4) {
    if (bytes == 4) return f(uint32_t{});
  }
  if constexpr (sizeof(T) < 16) f(T{});
}

template <class T, Scaling SCALING>
__global__ void __launch_bounds__(THREADS) permuted_copy(const __grid_constant__ Copy c) {
  DYN_SMEM(memory);
  const uint32_t tile = blockIdx.x;
  const char* x = c.x;
  char* y = c.y;
  uint32_t left_x[DIMS] = {}, left_y[DIMS] = {};
#pragma unroll
  for (int k = 0; k < DIMS; ++k) {
    if (k >= int(c.dims)) break;
    x += start_of(c.by_x[k], tile, left_x[k]) * c.by_x[k].x;
    y += start_of(c.by_y[k], tile, left_y[k]) * c.by_y[k].y;
  }
  if (c.direct) {
    with_words<T>(c.y_width, [&](auto word) {
      across<T, SCALING, decltype(word)>(c, x, y, left_y);
    });
    return;
  }
  with_words<T>(c.x_width, [&](auto word) {
    read<decltype(word)>(c, x, left_x, sizeof(T), memory);
  });
  __syncthreads();
  with_words<T>(c.y_width, [&](auto word) {
    write<T, SCALING, decltype(word)>(c, y, left_y, memory);
  });
}

}  // namespace

// A copy as Python describes it. Dimensions in the order of y, the innermost first; those of one
// element are left out. `by_x`: their numbers in the order of x.
struct CopyDescription {
  int64_t size[DIMS], x[DIMS], y[DIMS];  // strides in bytes
  int32_t extent[DIMS], by_x[DIMS];
  int32_t dims, itemsize, scaling, x_width, y_width, pad_shift, direct;
};

namespace {

bool describe(const CopyDescription& d, Copy& c, uint32_t& tiles) {
  int64_t before = 1;
  if (d.dims < 1 || d.dims > DIMS || d.itemsize < 1 || d.y_width < d.itemsize) return false;
  for (int k = d.dims; k < DIMS; ++k) c.by_y[k].extent = divisor(1);
  for (int k = 0; k < d.dims; ++k) {
    const int64_t count = (d.size[k] + d.extent[k] - 1) / d.extent[k];
    c.by_y[k].size = d.size[k];
    c.by_y[k].x = d.x[k];
    c.by_y[k].y = d.y[k];
    c.by_y[k].extent = divisor(uint32_t(d.extent[k]));
    if (count > INT32_MAX || before > INT32_MAX) return false;
    c.by_y[k].tiles_before = divisor(uint32_t(before));
    c.by_y[k].tiles = divisor(uint32_t(count));
    before *= count;
  }
  if (before > INT32_MAX) return false;
  tiles = uint32_t(before);
  uint32_t bytes = uint32_t(d.itemsize);
  for (int k = 0; k < d.dims; ++k) {
    Digit& digit = c.by_y[d.by_x[k]];
    digit.shared = bytes;
    bytes *= digit.extent.by;
    c.by_x[k] = digit;
  }
  c.elements = bytes / uint32_t(d.itemsize);
  c.dims = uint32_t(d.dims);
  c.x_width = uint32_t(d.x_width);
  c.y_width = uint32_t(d.y_width);
  c.pad_shift = uint32_t(d.pad_shift);
  c.direct = d.direct != 0;
  const uint32_t three = c.by_y[0].extent.by * c.by_y[1].extent.by * c.by_y[2].extent.by;
  c.near = three % (c.y_width / uint32_t(d.itemsize)) == 0;
  return true;
}

template <class T, Scaling SCALING>
int start(const Copy& c, uint32_t tiles, void* stream) {
  const uint32_t bytes = c.direct ? 0 : padded(c.elements * uint32_t(sizeof(T)), c.pad_shift) + 16;
  return launch(permuted_copy<T, SCALING>, dim3(tiles), dim3(THREADS), bytes, 1, stream, c);
}

}  // namespace

// y = x, or scale x rounded to the format that `scaling` names.
extern "C" int lk_permuted_copy(const void* x, void* y, const CopyDescription* description,
                                double scale, void* stream) {
  Copy c{};
  uint32_t tiles = 0;
  if (!describe(*description, c, tiles)) return INVALID_VALUE;
  c.x = static_cast<const char*>(x);
  c.y = static_cast<char*>(y);
  c.scale = scale;
  switch (description->scaling) {
    case HALF: return start<uint16_t, HALF>(c, tiles, stream);
    case BFLOAT: return start<uint16_t, BFLOAT>(c, tiles, stream);
    case FLOAT: return start<uint32_t, FLOAT>(c, tiles, stream);
    case DOUBLE: return start<uint64_t, DOUBLE>(c, tiles, stream);
    default: break;
  }
  switch (description->itemsize) {
    case 1: return start<uint8_t, UNSCALED>(c, tiles, stream);
    case 2: return start<uint16_t, UNSCALED>(c, tiles, stream);
    case 4: return start<uint32_t, UNSCALED>(c, tiles, stream);
    case 8: return start<uint64_t, UNSCALED>(c, tiles, stream);
    case 16: return start<uint4, UNSCALED>(c, tiles, stream);
    default: return INVALID_VALUE;
  }
}
