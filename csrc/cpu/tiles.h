// Matrix products on the tile registers of AMX, in float32 by way of bfloat16.
//
// A float32 number is a sum of three bfloat16 ones, a = a0 + a1 + a2, |a1| <= 2^-9 |a| and |a2| <=
// 2^-18 |a|. The tile unit multiplies bfloat16 exactly and adds up in float32, up to sixteen times as
// fast as vectors multiply float32: the six products a_i b_j with i + j <= 2 leave out less than 2^-25
// |a b|, which float32 rounds anyway; the three with i + j <= 1 leave out 3 * 2^-18 |a b|.
// (Henry, Tang, Heinecke: Leveraging the bfloat16 artificial intelligence datatype for
// higher-precision computations, arXiv:1904.06376.)
//
// The unit reads and writes subnormal numbers as zero: terms below 2^-126 are lost.
#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define LK_TILES 1
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "matrix.h"
#include "team.h"
#include "transpose.h"

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

// A tile register: 16 rows of 64 bytes. As a left factor it holds 16 rows of 32 terms each, as a right
// one 16 pairs of terms of 16 columns, as a result 16 x 16 numbers.
constexpr int64_t TILE = 16, DEPTH = 32, TILE_BYTES = 1024;
constexpr int64_t EDGE = 2 * TILE;  // a block of the result: 2 x 2 tiles
// Strips of EDGE rows of a left factor that are used again and again.
constexpr int64_t STRIPS = 8;
// Blocks of DEPTH terms in a row.
constexpr int64_t MOST = 512 / DEPTH;

// Bytes of one packed factor, rows (or columns) times terms, in so many pieces for each number.
inline int64_t packed_tiles(int64_t rows, int64_t k, int pieces) {
  return round_up(rows, EDGE) * round_up(k, DEPTH) * 2 * pieces;
}

// All tile registers at full size: palette 1, bytes of a row, rows.
struct TileSizes {
  uint8_t bytes[64];
  constexpr TileSizes() : bytes() {
    bytes[0] = 1;
    for (int t = 0; t < 8; ++t) {
      bytes[16 + 2 * t] = 64;
      bytes[48 + t] = TILE;
    }
  }
};
alignas(64) constexpr TileSizes TILE_SIZES;

// The tile unit, on for as long as this lives.
struct TileUnit {
  TileUnit() { _tile_loadconfig(TILE_SIZES.bytes); }
  ~TileUnit() { _tile_release(); }
};

inline __m512 widened(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

// 16 rows of 32 numbers, which lie side by side, as PIECES left tiles, TILE_BYTES * `apart` from one
// to the next. `height`, `width`: how many there are, the others count as zero.
template <int PIECES>
inline void split_rows(const float* from, int64_t stride, int64_t height, int64_t width, char* to,
                       int64_t apart) {
  const __mmask16 low = width >= 16 ? 0xffff : (1u << width) - 1;
  const __mmask16 high = width >= 32 ? 0xffff : width <= 16 ? 0 : (1u << (width - 16)) - 1;
  for (int64_t i = 0; i < TILE; ++i) {
    __m512 x0 = _mm512_setzero_ps(), x1 = x0;
    if (i < height) {
      x0 = _mm512_maskz_loadu_ps(low, from + i * stride);
      x1 = _mm512_maskz_loadu_ps(high, from + i * stride + 16);
    }
#pragma GCC unroll 3
    for (int p = 0; p < PIECES; ++p) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
      _mm512_store_si512(to + p * apart * TILE_BYTES + i * 64, both);
      x0 = _mm512_sub_ps(x0, widened(_mm512_castsi512_si256(both)));
      x1 = _mm512_sub_ps(x1, widened(_mm512_extracti64x4_epi64(both, 1)));
    }
  }
}

// 32 rows of 16 numbers as PIECES right tiles.
template <int PIECES>
inline void split_pairs(const float* from, int64_t stride, int64_t height, int64_t width, char* to,
                        int64_t apart) {
  const __mmask16 mask = width >= 16 ? 0xffff : (1u << width) - 1;
  for (int64_t i = 0; i < TILE; ++i) {
    __m512 x0 = _mm512_setzero_ps(), x1 = x0;
    if (2 * i < height) x0 = _mm512_maskz_loadu_ps(mask, from + 2 * i * stride);
    if (2 * i + 1 < height) x1 = _mm512_maskz_loadu_ps(mask, from + (2 * i + 1) * stride);
#pragma GCC unroll 3
    for (int p = 0; p < PIECES; ++p) {
      const __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x0));
      const __m512i second =
          _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x1)), 16);
      _mm512_store_si512(to + p * apart * TILE_BYTES + i * 64, _mm512_or_si512(first, second));
      x0 = _mm512_sub_ps(x0, _mm512_castsi512_ps(_mm512_slli_epi32(first, 16)));
      x1 = _mm512_sub_ps(x1, _mm512_castsi512_ps(second));
    }
  }
}

// Rows [i0, i0 + EDGE) of a factor, all k terms of them: for every DEPTH terms, PIECES x 2 tiles. A
// right factor is given by its transpose: its columns are the rows here.
template <int PIECES, bool RIGHT>
inline void pack_tiles(View<const float> x, int64_t rows, int64_t k, int64_t i0, char* to) {
  alignas(64) char turned[PIECES * TILE_BYTES];
  for (int64_t k0 = 0; k0 < k; k0 += DEPTH) {
    for (int half = 0; half < 2; ++half) {
      const int64_t first = i0 + half * TILE, there = rows - first, depth = k - k0;
      char* tile = to + half * TILE_BYTES;
      const float* from = x.data + first * x.rs + k0 * x.cs;
      const bool turns = (x.cs == 1) == RIGHT;
      char* target = turns ? turned : tile;
      const int64_t apart = turns ? 1 : 2;
      if (there <= 0) {
        for (int p = 0; p < PIECES; ++p) std::memset(tile + 2 * p * TILE_BYTES, 0, TILE_BYTES);
        continue;
      }
      if (x.cs == 1)
        split_rows<PIECES>(from, x.rs, there, depth, target, apart);
      else
        split_pairs<PIECES>(from, x.cs, depth, there, target, apart);
      if (turns) {
        for (int p = 0; p < PIECES; ++p)
          transpose_block<float, float>((const float*)(turned + p * TILE_BYTES), TILE, TILE,
                                        (float*)(tile + 2 * p * TILE_BYTES), TILE);
      }
    }
    to += 2 * PIECES * TILE_BYTES;
  }
}

// A block of EDGE x EDGE results: `blocks` times DEPTH terms, of PIECES pieces each. `a_step`,
// `b_step`: bytes from one DEPTH to the next, where the factors may have more pieces.
template <int PIECES>
inline void sum_tiles(int64_t blocks, const char* a, int64_t a_step, const char* b, int64_t b_step,
                      float* out) {
  __asm__ volatile("" ::: "memory");  // the loads below do not say that they read it
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t x = 0; x < blocks; ++x, a += a_step, b += b_step) {
    // Tile registers go by constants only, which a function's arguments are not.
#define LK_LEFT(piece)                            \
  _tile_loadd(4, a + 2 * piece * TILE_BYTES, 64); \
  _tile_loadd(5, a + (2 * piece + 1) * TILE_BYTES, 64);
#define LK_RIGHT(piece)                           \
  _tile_loadd(6, b + 2 * piece * TILE_BYTES, 64); \
  _tile_loadd(7, b + (2 * piece + 1) * TILE_BYTES, 64);
#define LK_MULTIPLY        \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7);
    // In an order in which each product has a factor of the one before.
    if constexpr (PIECES == 3) {
      LK_LEFT(0) LK_RIGHT(2) LK_MULTIPLY
      LK_RIGHT(1) LK_MULTIPLY
      LK_LEFT(1) LK_MULTIPLY
      LK_RIGHT(0) LK_MULTIPLY
      LK_LEFT(2) LK_MULTIPLY
      LK_LEFT(0) LK_MULTIPLY
    } else if constexpr (PIECES == 2) {
      LK_LEFT(0) LK_RIGHT(1) LK_MULTIPLY
      LK_RIGHT(0) LK_MULTIPLY
      LK_LEFT(1) LK_MULTIPLY
    } else {
      LK_LEFT(0) LK_RIGHT(0) LK_MULTIPLY
    }
#undef LK_LEFT
#undef LK_RIGHT
#undef LK_MULTIPLY
  }
  _tile_stored(0, out, EDGE * sizeof(float));
  _tile_stored(1, out + TILE, EDGE * sizeof(float));
  _tile_stored(2, out + TILE * EDGE, EDGE * sizeof(float));
  _tile_stored(3, out + TILE * EDGE + TILE, EDGE * sizeof(float));
}

// The same, never more than MOST blocks in a row: their sums are added up.
template <int PIECES>
inline void multiply_tiles(int64_t blocks, const char* a, int64_t a_step, const char* b,
                           int64_t b_step, float* out) {
  sum_tiles<PIECES>(blocks < MOST ? blocks : MOST, a, a_step, b, b_step, out);
  alignas(64) float more[EDGE * EDGE];
  for (int64_t x = MOST; x < blocks; x += MOST) {
    const int64_t some = blocks - x < MOST ? blocks - x : MOST;
    sum_tiles<PIECES>(some, a + x * a_step, a_step, b + x * b_step, b_step, more);
    for (int64_t i = 0; i < EDGE * EDGE; ++i) out[i] += more[i];
  }
}

// C = alpha A B + beta C, all with rows or columns side by side. `packed` has 2 packed_tiles(...) bytes
// or more, A first; `a_pieces`: in how many A is there already, or 0.
template <int PIECES>
void tile_product(const Team& team, int64_t m, int64_t n, int64_t k, View<const float> a,
                  View<const float> b, View<float> c, float alpha, float beta, bool lower,
                  char* packed, int a_pieces) {
  const int64_t strips = round_up(m, EDGE) / EDGE, panels = round_up(n, EDGE) / EDGE;
  const bool has_a = a_pieces >= PIECES;
  if (!has_a) a_pieces = PIECES;
  const int64_t a_strip = packed_tiles(EDGE, k, a_pieces), b_panel = packed_tiles(EDGE, k, PIECES);
  char* const right = packed + strips * a_strip;
  team.each(has_a ? panels : panels + strips, EDGE * k, [&](int64_t i) {
    if (i < panels)
      pack_tiles<PIECES, true>(b.t(), n, k, i * EDGE, right + i * b_panel);
    else
      pack_tiles<PIECES, false>(a, m, k, (i - panels) * EDGE, packed + (i - panels) * a_strip);
  });
  // A piece of work: strips whose terms stay in the second-level cache, times a few panels.
  const int64_t down = (strips + STRIPS - 1) / STRIPS, eighth = down * panels / 8;
  const int64_t width = eighth < 1 ? 1 : eighth < 8 ? eighth : 8;
  const int64_t across = (panels + width - 1) / width;
  team.run(across * down, [&](int64_t piece, int) {
    const TileUnit on;
    alignas(64) float out[EDGE * EDGE];
    // From below: with `lower` the last rows are the most work.
    const int64_t s0 = (down - 1 - piece / across) * STRIPS, p0 = piece % across * width;
    const int64_t s1 = s0 + STRIPS < strips ? s0 + STRIPS : strips;
    const int64_t p1 = p0 + width < panels ? p0 + width : panels;
    const int64_t a_step = packed_tiles(EDGE, DEPTH, a_pieces);
    const int64_t b_step = packed_tiles(EDGE, DEPTH, PIECES), blocks = round_up(k, DEPTH) / DEPTH;
    for (int64_t p = p0; p < p1; ++p)
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t i0 = s * EDGE, j0 = p * EDGE;
        if (lower && j0 > i0) continue;
        const char *left = packed + s * a_strip, *top = right + p * b_panel;
        multiply_tiles<PIECES>(blocks, left, a_step, top, b_step, out);
        put_block<EDGE>(View<float>{&c(i0, j0), c.rs, c.cs}, m - i0 < EDGE ? m - i0 : EDGE,
                        n - j0 < EDGE ? n - j0 : EDGE, out, alpha, beta);
      }
  });
}

}  // namespace
}  // namespace lipkernels
#endif
