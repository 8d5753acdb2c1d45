// Matrix products for the CPU: one packed kernel, every layout, and half the work where the result
// is symmetric.
//
// C = alpha A B + beta C, for A (M, K), B (K, N), C (M, N) with arbitrary strides. B is copied into
// panels of NR columns; A is read where it lies, one scalar at a time, and broadcast. `lower` skips
// the tiles that lie strictly above the diagonal: a symmetric result costs half (see `mirror`).
//
// The threads of a team (see team.h) share the tiles. Who computes a tile is a matter of chance, what
// is computed in it is not: results are bitwise the same for every team.
#pragma once

#include <cstdint>

#include "team.h"

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, MR = 8;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, MR = 4;
#else
constexpr int VECTOR_BYTES = 16, MR = 4;
#endif

template <class T>
struct Lanes {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
  // The same for loads from addresses that are aligned to the element only.
  typedef T loose __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

// Columns of a panel: two vectors.
template <class T>
constexpr int NR = 2 * VECTOR_BYTES / sizeof(T);

constexpr int64_t KC = 256;  // rows of B that a tile is summed over before the next ones

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A matrix somewhere in memory: element (i, j) at data[i * rs + j * cs].
template <class T>
struct View {
  T* data;
  int64_t rs, cs;
  T& operator()(int64_t i, int64_t j) const { return data[i * rs + j * cs]; }
  View<T> t() const { return {data, cs, rs}; }
  // Row i of a matrix whose rows are contiguous (the scratch matrices): loops over it vectorize.
  T* row(int64_t i) const { return data + i * rs; }
};

template <class T>
inline View<T> rows_of(T* data, int64_t ld) { return {data, ld, 1}; }

template <class T>
inline View<const T> read_only(View<T> x) { return {x.data, x.rs, x.cs}; }

// One tile: MR rows of A against one panel of B, summed over k.
template <class T, class TA>
static inline void tile(int64_t k, const TA* a, int64_t rs, int64_t cs, const T* panel, T* out) {
  typedef typename Lanes<T>::type V;
  V acc[MR][2];
  for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = V{};
  for (int64_t p = 0; p < k; ++p) {
    const V b0 = *(const V*)(panel), b1 = *(const V*)(panel + NR<T> / 2);
    panel += NR<T>;
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const T x = (T)a[i * rs];
      acc[i][0] += x * b0;
      acc[i][1] += x * b1;
    }
    a += cs;
  }
  for (int i = 0; i < MR; ++i) {
    *(V*)(out + i * NR<T>) = acc[i][0];
    *(V*)(out + i * NR<T> + NR<T> / 2) = acc[i][1];
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

template <class T, int CHUNK, class TA>
static inline void summed_tile(int64_t k, const TA* a, int64_t rs, int64_t cs, const T* panel,
                               typename Summed<T, CHUNK>::type* sum) {
  if constexpr (CHUNK == 0) {
    tile<T, TA>(k, a, rs, cs, panel, sum);
  } else {
    alignas(64) T out[MR * NR<T>];
    for (int x = 0; x < MR * NR<T>; ++x) sum[x] = 0;
    for (int64_t p = 0; p < k; p += CHUNK) {
      const int64_t depth = k - p < CHUNK ? k - p : CHUNK;
      tile<T, TA>(depth, a + p * cs, rs, cs, panel + p * NR<T>, out);
      for (int x = 0; x < MR * NR<T>; ++x) sum[x] += out[x];
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
  constexpr int64_t BLOCK = 16;  // a transposition in pieces that stay in the first-level cache
  for (int64_t p0 = 0; p0 < k; p0 += BLOCK) {
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

template <class T>
inline int64_t packed_size(int64_t k, int64_t n) { return k * round_up(n, NR<T>); }

// C = alpha A B + beta C. `packed` has packed_size<T>(K, N) elements, aligned to VECTOR_BYTES.
// C may be B (which is packed whole before anything is written), but not A. CHUNK: see `Summed`.
template <class T, int CHUNK = 0, class TA, class TB, class TC>
void gemm(const Team& team, int64_t m, int64_t n, int64_t k, View<const TA> a, View<const TB> b,
          View<TC> c, typename Summed<T, CHUNK>::type alpha, typename Summed<T, CHUNK>::type beta,
          bool lower, T* packed) {
  typedef typename Summed<T, CHUNK>::type Sum;
  const int64_t panels = round_up(n, NR<T>) / NR<T>, strips = round_up(m, MR) / MR;
  team.each(panels, k * NR<T>, [&](int64_t j) {
    pack_panel<T, TB>(b, k, n, j * NR<T>, packed + j * k * NR<T>);
  });

  // Strips of rows, in groups that share a panel while it is in the cache.
  const int64_t work = MR * n * k / 8, group = work < 1 << 13 ? 8 : 4;
  const int64_t pieces = (strips + group - 1) / group;
  team.run(pieces, [&](int64_t i, int) {
    alignas(64) Sum out[MR * NR<T>];
    // From below: with `lower` the last rows are the most work, and the threads end together if the
    // small pieces are left for the end.
    const int64_t s0 = (pieces - 1 - i) * group;
    const int64_t s1 = s0 + group < strips ? s0 + group : strips;
    for (int64_t k0 = 0; k0 < k || k0 == 0; k0 += KC) {
      const int64_t depth = k - k0 < KC ? k - k0 : KC;
      const Sum keep = k0 == 0 ? beta : Sum(1);
      for (int64_t j = 0; j < panels; ++j) {
        const int64_t j0 = j * NR<T>, width = n - j0 < NR<T> ? n - j0 : NR<T>;
        for (int64_t s = s0; s < s1; ++s) {
          const int64_t i0 = s * MR, height = m - i0 < MR ? m - i0 : MR;
          if (lower && j0 > i0 + height - 1) continue;
          const T* panel = packed + (j * k + k0) * NR<T>;
          if (height == MR) {
            summed_tile<T, CHUNK, TA>(depth, a.data + i0 * a.rs + k0 * a.cs, a.rs, a.cs, panel, out);
          } else {  // the last rows: a tile of which some rows repeat the last one
            TA edge[MR * KC];
            for (int64_t p = 0; p < depth; ++p)
              for (int i = 0; i < MR; ++i)
                edge[p * MR + i] = a(i0 + (i < height ? i : height - 1), k0 + p);
            summed_tile<T, CHUNK, TA>(depth, edge, 1, MR, panel, out);
          }
          if (c.cs == 1) {
            for (int64_t i = 0; i < height; ++i) {
              TC* to = c.data + (i0 + i) * c.rs + j0;
              const Sum* from = out + i * NR<T>;
              if (keep == Sum(0)) {
                for (int64_t x = 0; x < width; ++x) to[x] = (TC)(alpha * from[x]);
              } else {
                for (int64_t x = 0; x < width; ++x) to[x] = (TC)(alpha * from[x] + keep * (Sum)to[x]);
              }
            }
          } else {
            for (int64_t x = 0; x < width; ++x)
              for (int64_t i = 0; i < height; ++i) {
                TC& to = c(i0 + i, j0 + x);
                to = (TC)(alpha * out[i * NR<T> + x] + (keep == Sum(0) ? Sum(0) : keep * (Sum)to));
              }
          }
        }
      }
    }
  });
}

// Copies the lower triangle of C (n, n), whose rows are contiguous, over its upper one; `sign` -1 makes it skew.
template <class T>
void mirror(const Team& team, int64_t n, View<T> c, T sign = T(1)) {
  constexpr int64_t BLOCK = 32;
  const int64_t blocks = round_up(n, BLOCK) / BLOCK;
  team.each(blocks, BLOCK * n, [&](int64_t bi) {
    for (int64_t bj = 0; bj <= bi; ++bj)
      for (int64_t i = bi * BLOCK; i < n && i < (bi + 1) * BLOCK; ++i) {
        const T* from = c.row(i);
        T* to = c.data + i;
        const int64_t ld = c.rs;
        for (int64_t j = bj * BLOCK; j < i && j < (bj + 1) * BLOCK; ++j) to[j * ld] = sign * from[j];
      }
  });
}

}  // namespace
}  // namespace lipkernels
