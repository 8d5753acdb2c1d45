// Matrix products for the CPU: one packed kernel, every layout, and half the work where the result
// is symmetric.
//
// C = alpha A B + beta C, for A (M, K), B (K, N), C (M, N) with arbitrary strides. B is copied into
// panels of NR columns; A is read where it lies (or there, if B = A^T), one scalar at a time, and
// broadcast. `lower` skips the tiles that lie strictly above the diagonal: a symmetric result costs
// half (see `mirror` in transpose.h). Large products of float32 go to the tile unit where there is one:
// see tiles.h.
//
// The threads of a team (see team.h) share the tiles. Who computes a tile is a matter of chance, what
// is computed in it is not: results are bitwise the same for every team.
#pragma once

#include <cstdint>
#include <type_traits>

#include "team.h"
#include "tiles.h"
#include "transpose.h"

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

// Rows of a tile.
constexpr int MR = VECTOR_BYTES == 64 ? 8 : 4;
// Columns of a panel, and of a tile: two vectors.
template <class T>
constexpr int NR = 2 * VECTOR_BYTES / sizeof(T);

// One tile: MR rows of A against the first VECTORS vectors of each row of a panel of B, summed over k.
template <int VECTORS, class T, class TA>
static inline void tile(int64_t k, const TA* a, int64_t rs, int64_t cs, const T* panel, T* out) {
  typedef typename Lanes<T>::type V;
  constexpr int L = NR<T> / 2, LAST = VECTORS - 1;
  V acc[MR][VECTORS];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < VECTORS; ++v) acc[i][v] = V{};
  for (int64_t p = 0; p < k; ++p) {
    const V b0 = *(const V*)panel, b1 = *(const V*)(panel + LAST * L);
    panel += NR<T>;
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const T x = (T)a[i * rs];
      acc[i][0] += x * b0;
      if constexpr (VECTORS == 2) acc[i][1] += x * b1;
    }
    a += cs;
  }
  for (int i = 0; i < MR; ++i) {
    *(V*)(out + i * NR<T>) = acc[i][0];
    if constexpr (VECTORS == 2) *(V*)(out + i * NR<T> + L) = acc[i][1];
  }
}

// What a tile is summed in: in its own format (CHUNK = 0), or only CHUNK rows at a time, which are
// added up in double.
template <class T, int CHUNK>
struct Summed {
  typedef double type;
};
template <class T>
struct Summed<T, 0> {
  typedef T type;
};

// to += from, for a tile of so many vectors of T, whatever it is summed in.
template <int VECTORS, class T, class From, class To>
static inline void add_tile(const From* from, To* to) {
  for (int i = 0; i < MR; ++i)
    for (int x = i * NR<T>; x < i * NR<T> + VECTORS * NR<T> / 2; ++x) to[x] += from[x];
}

template <int VECTORS, class T, int CHUNK, class TA>
static inline void summed_tile(int64_t k, const TA* a, int64_t rs, int64_t cs, const T* panel,
                               typename Summed<T, CHUNK>::type* sum) {
  if constexpr (CHUNK == 0) {
    tile<VECTORS, T, TA>(k, a, rs, cs, panel, sum);
  } else {
    alignas(64) T out[MR * NR<T>];
    for (int x = 0; x < MR * NR<T>; ++x) sum[x] = 0;
    for (int64_t p = 0; p < k; p += CHUNK) {
      const int64_t depth = k - p < CHUNK ? k - p : CHUNK;
      tile<VECTORS, T, TA>(depth, a + p * cs, rs, cs, panel + p * NR<T>, out);
      add_tile<VECTORS, T>(out, sum);
    }
  }
}

// Columns [j0, j0 + NR) of B, all k rows of them, one panel; what B does not have is zero.
template <class T, class TB>
static void pack_panel(View<const TB> b, int64_t k, int64_t n, int64_t j0, T* panel) {
  const int64_t width = n - j0 < NR<T> ? n - j0 : NR<T>;
  if (b.cs == 1) {
    for (int64_t p = 0; p < k; ++p) {
      const TB* row = b.data + p * b.rs + j0;
      T* to = panel + p * NR<T>;
      if (width == NR<T>) {
        for (int j = 0; j < NR<T>; ++j) to[j] = (T)row[j];
      } else {
        for (int64_t j = 0; j < NR<T>; ++j) to[j] = j < width ? (T)row[j] : T(0);
      }
    }
    return;
  }
  int64_t done = 0;  // rows of the panel
#if defined(__AVX512F__)
  if (b.rs == 1) {
    constexpr int L = LANES<TB>;
    for (; done + L <= k; done += L)
      for (int64_t j = 0; j < NR<T>; j += L)
        transpose_block<T, TB>(b.data + (j0 + j) * b.cs + done, b.cs, width - j,
                               panel + done * NR<T> + j, NR<T>);
  }
#endif
  constexpr int64_t BLOCK = 16;  // a transposition in pieces that stay in the first-level cache
  for (int64_t p0 = done; p0 < k; p0 += BLOCK) {
    const int64_t p1 = p0 + BLOCK < k ? p0 + BLOCK : k;
    for (int64_t j = 0; j < NR<T>; ++j) {
      if (j < width) {
        const TB* column = b.data + (j0 + j) * b.cs;
        for (int64_t p = p0; p < p1; ++p) panel[p * NR<T> + j] = (T)column[p * b.rs];
      } else {
        for (int64_t p = p0; p < p1; ++p) panel[p * NR<T> + j] = T(0);
      }
    }
  }
}

// Multiplications of a product that pay for a second thread.
constexpr double MIN_WORK_SHARED = 1e6;

// Elements of B as `gemm` packs it.
template <class T>
inline int64_t panels_size(int64_t k, int64_t n) { return k * round_up(n, NR<T>); }

// Elements that `gemm` needs at `packed` for products of matrices no larger than (k, n).
template <class T>
inline int64_t packed_size(int64_t k, int64_t n) {
  const int64_t size = panels_size<T>(k, n);
#ifdef LK_TILES
  const int64_t tiles = 2 * packed_tiles(k, n, 3) / int64_t(sizeof(T));
  return tiles > size ? tiles : size;
#else
  return size;
#endif
}

// How much of a product in float32 counts, of the sizes |A| |B|. What is asked for is the least that
// is given: only the tile unit is faster with fewer digits.
enum class Digits {
  EVERY,  // and subnormal numbers, which the tile unit takes for zero
  ALL,    // 2^-24
  HALF,   // 2^-16
  FEW,    // 2^-8
};

// What a row of products with the same left factor and the same `packed` keeps of it.
struct Kept {
  int pieces = 0;
};

// Whether there is a tile unit, and splitting both factors for it pays.
inline bool uses_tiles(int64_t m, int64_t n, int64_t k, Digits digits) {
#ifdef LK_TILES
  if (digits == Digits::EVERY) return false;
  const int64_t least = digits == Digits::ALL ? 200 : 64;
  return m >= least && n >= least && k >= least;
#else
  (void)m, (void)n, (void)k, (void)digits;
  return false;
#endif
}

// C = alpha A B + beta C. `packed` has packed_size<T>(K, N) elements, aligned to VECTOR_BYTES; with a
// tile unit A is packed there too: packed_size of anything that both A and B fit into.
// C may be B (whose columns are packed before any of them is written), but not A. CHUNK: see `Summed`.
template <class T, int CHUNK = 0, class TA, class TB, class TC>
void gemm(const Team& everyone, int64_t m, int64_t n, int64_t k, View<const TA> a, View<const TB> b,
          View<TC> c, typename Summed<T, CHUNK>::type alpha, typename Summed<T, CHUNK>::type beta,
          bool lower, T* packed, Digits digits = Digits::ALL, Kept* kept = nullptr) {
  typedef typename Summed<T, CHUNK>::type Sum;
  static_assert(NR<T> % MR == 0, "a strip of rows lies in one panel");
  // Where this is little work, the others would wait longer for the factors than it takes.
  const Team alone, &team = double(m) * n * k < MIN_WORK_SHARED ? alone : everyone;
#ifdef LK_TILES
  if constexpr (CHUNK == 0 && std::is_same<TA, float>::value && std::is_same<TB, float>::value &&
                std::is_same<TC, float>::value) {
    if (uses_tiles(m, n, k, digits) && (a.rs == 1 || a.cs == 1) && (b.rs == 1 || b.cs == 1)) {
      const int pieces = digits == Digits::ALL ? 3 : digits == Digits::HALF ? 2 : 1;
      const auto product = pieces == 3   ? tile_product<3>
                           : pieces == 2 ? tile_product<2>
                                         : tile_product<1>;
      product(team, m, n, k, a, b, c, alpha, beta, lower, (char*)packed, kept ? kept->pieces : 0);
      if (kept && kept->pieces < pieces) kept->pieces = pieces;
      return;
    }
  }
#endif
  const int64_t panels = round_up(n, NR<T>) / NR<T>, strips = round_up(m, MR) / MR;
  // B = A^T: what is packed is A too, in T already and side by side.
  const bool is_gram =
      (const void*)a.data == (const void*)b.data && a.rs == b.cs && a.cs == b.rs && m == n;
  // The tile at strip s and panel j, summed over terms [k0, k0 + depth) into `out`.
  const auto sum = [&](auto vectors, int64_t s, int64_t j, int64_t k0, int64_t depth, Sum* out) {
    constexpr int VECTORS = decltype(vectors)::value;
    const int64_t i0 = s * MR, height = m - i0 < MR ? m - i0 : MR;
    const T* panel = packed + (j * k + k0) * NR<T>;
    if (is_gram) {
      const T* rows = packed + (i0 / NR<T> * k + k0) * NR<T> + i0 % NR<T>;
      summed_tile<VECTORS, T, CHUNK, T>(depth, rows, 1, NR<T>, panel, out);
    } else if (height == MR) {
      const TA* rows = a.data + i0 * a.rs + k0 * a.cs;
      summed_tile<VECTORS, T, CHUNK, TA>(depth, rows, a.rs, a.cs, panel, out);
    } else {  // the last rows: a tile of which some rows repeat the last one
      TA edge[MR * KC];
      for (int64_t p = 0; p < depth; ++p)
        for (int i = 0; i < MR; ++i) edge[p * MR + i] = a(i0 + (i < height ? i : height - 1), k0 + p);
      summed_tile<VECTORS, T, CHUNK, TA>(depth, edge, 1, MR, panel, out);
    }
  };
  // The same for terms [k0, end), no more than KC of them at a time.
  const auto summed = [&](auto vectors, int64_t s, int64_t j, int64_t k0, int64_t end, Sum* out,
                          Sum* more) {
    sum(vectors, s, j, k0, end - k0 < KC ? end - k0 : KC, out);
    for (int64_t p = k0 + KC; p < end; p += KC) {
      sum(vectors, s, j, p, end - p < KC ? end - p : KC, more);
      add_tile<decltype(vectors)::value, T>(more, out);
    }
  };
  // KC terms at a time, which C adds up; a C that is there already, or has fewer digits than the sum,
  // is rounded only once.
  const bool adds_up = beta == Sum(0) && std::is_same<TC, Sum>::value;
  const int64_t at_once = adds_up || k < KC ? KC : k;
  // All strips [s0, s1) of the panels [first, last).
  const auto tiles = [&](int64_t s0, int64_t s1, int64_t first, int64_t last) {
    alignas(64) Sum out[MR * NR<T>], more[MR * NR<T>];
    for (int64_t k0 = 0; k0 < k || k0 == 0; k0 += at_once) {
      const int64_t end = k - k0 < at_once ? k : k0 + at_once;
      for (int64_t j = first; j < last; ++j) {
        const int64_t j0 = j * NR<T>, there = n - j0 < NR<T> ? n - j0 : NR<T>;
        for (int64_t s = s0; s < s1; ++s) {
          const int64_t i0 = s * MR, height = m - i0 < MR ? m - i0 : MR;
          // As many columns as there are, with `lower` those up to the last row's diagonal.
          const int64_t reach = lower ? i0 + height - j0 : there, width = reach < there ? reach : there;
          if (width <= 0) continue;
          if (width <= NR<T> / 2)
            summed(std::integral_constant<int, 1>(), s, j, k0, end, out, more);
          else
            summed(std::integral_constant<int, 2>(), s, j, k0, end, out, more);
          put_block<NR<T>, TC, Sum>({&c(i0, j0), c.rs, c.cs}, height, width, out, alpha,
                                    k0 == 0 ? beta : Sum(1));
        }
      }
    }
  };
  // Strips of rows, in groups that share a panel while it is in the cache.
  const int64_t work = MR * n * k / 8, group = work < 1 << 13 ? 8 : 4;
  const int64_t pieces = (strips + group - 1) / group;
  // All of B first, where everybody needs it or the cache holds it.
  constexpr int64_t CACHED = 1 << 20;
  const bool is_cached = panels_size<T>(k, n) * int64_t(sizeof(T)) <= CACHED;
  if (is_gram || panels < 4 || (team.is_one() && is_cached)) {
    team.each(panels, k * NR<T>, [&](int64_t j) {
      pack_panel<T, TB>(b, k, n, j * NR<T>, packed + j * k * NR<T>);
    });
    team.run(pieces, [&](int64_t i, int) {
      // From below: with `lower` the last rows are the most work, and the threads end together if
      // the small pieces are left for the end.
      const int64_t s0 = (pieces - 1 - i) * group;
      tiles(s0, s0 + group < strips ? s0 + group : strips, 0, panels);
    });
    return;
  }
  // Each thread its own columns: what it packs, nobody else reads.
  const int64_t width = panels < 16 ? 1 : panels < 64 ? 2 : 4;
  team.run((panels + width - 1) / width, [&](int64_t i, int) {
    const int64_t j0 = i * width, j1 = j0 + width < panels ? j0 + width : panels;
    for (int64_t j = j0; j < j1; ++j) pack_panel<T, TB>(b, k, n, j * NR<T>, packed + j * k * NR<T>);
    for (int64_t s = 0; s < strips; s += 16) tiles(s, s + 16 < strips ? s + 16 : strips, j0, j1);
  });
}

}  // namespace
}  // namespace lipkernels
