// Matrix products for the CPU: one packed kernel, every layout, and half the work where the result
// is symmetric.
//
// C = alpha A B + beta C, for A (M, K), B (K, N), C (M, N) with arbitrary strides. B is copied into
// panels of NR columns; A is read where it lies (or there, if B = A^T), one scalar at a time, and
// broadcast. `lower` skips the tiles that lie strictly above the diagonal: a symmetric result costs
// half (see `mirror`).
//
// The threads of a team (see team.h) share the tiles. Who computes a tile is a matter of chance, what
// is computed in it is not: results are bitwise the same for every team.
#pragma once

#include <cstdint>
#include <type_traits>

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
constexpr double MIN_WORK_SHARED = 4e6;

template <class T>
inline int64_t packed_size(int64_t k, int64_t n) { return k * round_up(n, NR<T>); }

// C = alpha A B + beta C. `packed` has packed_size<T>(K, N) elements, aligned to VECTOR_BYTES.
// C may be B (which is packed whole before anything is written), but not A. CHUNK: see `Summed`.
template <class T, int CHUNK = 0, class TA, class TB, class TC>
void gemm(const Team& everyone, int64_t m, int64_t n, int64_t k, View<const TA> a, View<const TB> b,
          View<TC> c, typename Summed<T, CHUNK>::type alpha, typename Summed<T, CHUNK>::type beta,
          bool lower, T* packed) {
  typedef typename Summed<T, CHUNK>::type Sum;
  static_assert(NR<T> % MR == 0, "a strip of rows lies in one panel");
  // Where this is little work, the others would wait longer for the factors than it takes.
  const Team alone, &team = double(m) * n * k < MIN_WORK_SHARED ? alone : everyone;
  const int64_t panels = round_up(n, NR<T>) / NR<T>, strips = round_up(m, MR) / MR;
  // B = A^T: what is packed is A too, in T already and side by side.
  const bool is_gram =
      (const void*)a.data == (const void*)b.data && a.rs == b.cs && a.cs == b.rs && m == n;
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
          if (is_gram) {
            const T* rows = packed + (i0 / NR<T> * k + k0) * NR<T> + i0 % NR<T>;
            summed_tile<T, CHUNK, T>(depth, rows, 1, NR<T>, panel, out);
          } else if (height == MR) {
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

// A dot product of two rows in double, in lanes that the compiler can vectorize.
template <class TA, class TB>
inline double dot(const TA* a, const TB* b, int64_t n) {
  constexpr int LANES_OF_SUM = 16;
  double lanes[LANES_OF_SUM] = {}, sum = 0;
  int64_t i = 0;
  for (; i + LANES_OF_SUM <= n; i += LANES_OF_SUM)
    for (int x = 0; x < LANES_OF_SUM; ++x) lanes[x] += double(a[i + x]) * double(b[i + x]);
  for (; i < n; ++i) sum += double(a[i]) * double(b[i]);
#pragma GCC unroll 4
  for (int half = LANES_OF_SUM / 2; half > 0; half /= 2)
    for (int x = 0; x < half; ++x) lanes[x] += lanes[x + half];
  return sum + lanes[0];
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
