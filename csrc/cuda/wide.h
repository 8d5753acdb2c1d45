// A matrix of small side m as one block works on it: wide (a tall one is transposed on the way),
// 64 columns at a time, everything else m x m in shared memory. The blocks of a cluster take the
// columns in turns and do what is m x m each for itself: the same bits in all of them.
//
// `M` is m, rounded up; the rows, columns and entries that fill up are zeros throughout.
#pragma once

#include "primitives.h"

constexpr int CHUNK = 64;             // columns
constexpr float SCALE = 128.0f;       // of planes: entries up to 500, and 2^-32 of small ones
constexpr float UNSCALE = 1.0f / (SCALE * SCALE);

// The wide one of a contiguous matrix and its transpose.
struct Source {
  const void* data;
  int format, m, n;
  bool tall, fours;  // whether four neighbours may be loaded at once

  __device__ __forceinline__ int64_t at(int row, int col) const {
    return tall ? int64_t(col) * m + row : int64_t(row) * n + col;
  }
};
__device__ __forceinline__ Source wide_source(const void* data, int rows, int cols, int format) {
  const bool tall = rows > cols;
  const int m = tall ? cols : rows, n = tall ? rows : cols;
  const uintptr_t unit = format == FLOAT32 ? 16 : 8;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % unit == 0 && (tall ? m : n) % 4 == 0;
  return {data, format, m, n, tall, aligned};
}

// x / unit, for the power of two that the largest entry is at least: max |x| in [1, 2) then.
struct Unit {
  float half, other_half;  // 2^149 is no float32
  float unit;
  float flag;  // 1; NaN where an entry is not finite, and x is to be read as zero

  __device__ __forceinline__ float operator()(float x) const {
    return flag == 1.0f ? x * half * other_half : 0.0f;
  }
};
__device__ __forceinline__ Unit unit_of(int largest_bits) {
  const bool finite = largest_bits < 0x7F800000;
  const int e = finite && largest_bits > 0 ? exponent_of(largest_bits) : 0;
  const int half = -e / 2;
  return {power_of_two(half), power_of_two(-e - half), power_of_two(e),
          finite ? 1.0f : __int_as_float(0x7FC00000)};
}

// Of every `step`-th entry, or four of them.
static __device__ __noinline__ int largest_of_thread(Source from, int start, int step) {
  int found = 0;
  const auto take = [&](float value) {
    found = max(found, __float_as_int(value) & 0x7FFFFFFF);
  };
  const int64_t count = int64_t(from.m) * from.n;
  if (from.fours) {
    for (int64_t i = start + int(threadIdx.x); i < count / 4; i += step) {
      const float4 four = load_four(from.data, 4 * i, from.format);
      take(four.x);
      take(four.y);
      take(four.z);
      take(four.w);
    }
  } else {
    for (int64_t i = start + int(threadIdx.x); i < count; i += step) {
      take(load_as_float(from.data, i, from.format));
    }
  }
  return found;
}

template <int M, int N_WARPS>
struct Wide {
  static constexpr int THREADS = 32 * N_WARPS;
  static constexpr int ROW_GROUPS = M / 16, COL_GROUPS = N_WARPS / ROW_GROUPS;
  static constexpr int N_SQUARE = M / 8 / COL_GROUPS < 2 ? 2 : M / 8 / COL_GROUPS;
  static constexpr int N_PART = CHUNK / 8 / COL_GROUPS < 2 ? 2 : CHUNK / 8 / COL_GROUPS;
  static constexpr int FOURS = M * CHUNK / 4 / THREADS;
  static_assert(M % 16 == 0 && N_WARPS % ROW_GROUPS == 0 && FOURS >= 1, "M");
  using Square = Accumulator<N_SQUARE>;  // a warp's part of an m x m product
  using Part = Accumulator<N_PART>;      // of an m x 64 one

  static constexpr int SQUARE_THREADS = 32 * ROW_GROUPS * (M / 8 / N_SQUARE);  // the first ones

  static constexpr int SQUARE_BYTES = plane_bytes(M, M);
  static constexpr int CHUNK_BYTES = plane_bytes(M, CHUNK);
  static constexpr int SECOND_BYTES = SQUARE_BYTES > CHUNK_BYTES ? SQUARE_BYTES : CHUNK_BYTES;
  static constexpr int SCRATCH_BYTES = 256;
  static constexpr int FREE_OF_SCRATCH = 40;  // from there on nothing here uses it
  static constexpr int BYTES = SCRATCH_BYTES + SQUARE_BYTES + SECOND_BYTES + CHUNK_BYTES;

  float* scratch;
  Planes first, second;  // m x m
  Planes x, y;           // m x 64; y is where `second` is
  float* exchanged;      // there too, M x M numbers
  int m, n, chunks, rank, ranks;

  __device__ __forceinline__ Wide(char* shared, int rows, int cols) {
    scratch = reinterpret_cast<float*>(shared);
    char* at = shared + SCRATCH_BYTES;
    first = planes_at(at, M, M);
    at += SQUARE_BYTES;
    second = planes_at(at, M, M);
    y = planes_at(at, M, CHUNK);
    exchanged = reinterpret_cast<float*>(at);
    x = planes_at(at + SECOND_BYTES, M, CHUNK);
    m = rows < cols ? rows : cols;
    n = rows < cols ? cols : rows;
    chunks = (n + CHUNK - 1) / CHUNK;
    rank = cluster_rank();
    ranks = cluster_size();
  }

  static __device__ __forceinline__ int warp() {
    return thread_anew() / 32;
  }
  static __device__ __forceinline__ int row0() {
    return warp() % ROW_GROUPS * 16;
  }
  static __device__ __forceinline__ int square_col0() {
    return warp() / ROW_GROUPS * (8 * N_SQUARE);
  }
  static __device__ __forceinline__ int part_col0() {
    return warp() / ROW_GROUPS * (8 * N_PART);
  }
  __device__ __forceinline__ float identity(int row, int col) const {
    return row == col && row < m ? 1.0f : 0.0f;
  }

  // ------------------------------------------------------------------------------------- chunks
  // A chunk of what `from` is, in units, as M x 64 float32 numbers and in planes. A call, and not
  // inlined: nothing is gained by another copy of so much code.
  static __device__ __noinline__ void gather(Source from, Unit unit, int chunk, float* to,
                                             Planes planes) {
    const int m = from.m, n = from.n;
    const auto take = [&](int row, int col, float value) {
      value = unit(value);
      to[row * CHUNK + col] = value;
      planes.put(row, col, value * SCALE);
    };
    if (from.fours && !from.tall) {
#pragma unroll
      for (int i = 0; i < FOURS; ++i) {
        const int k = int(threadIdx.x) + i * THREADS;
        const int row = k / (CHUNK / 4), col = k % (CHUNK / 4) * 4;
        float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
        if (row < m && chunk * CHUNK + col < n) {
          four = load_four(from.data, from.at(row, chunk * CHUNK + col), from.format);
        }
        four = {unit(four.x), unit(four.y), unit(four.z), unit(four.w)};
        store_four(to, 4 * k, four);
        planes.put_four(row, col, times(four, SCALE));
      }
    } else if (from.fours) {
#pragma unroll 2
      for (int i = 0; i < FOURS; ++i) {
        const int k = int(threadIdx.x) + i * THREADS;
        const int row = k % (M / 4) * 4, col = k / (M / 4);
        float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
        if (row < m && chunk * CHUNK + col < n) {
          four = load_four(from.data, from.at(row, chunk * CHUNK + col), from.format);
        }
        take(row, col, four.x);
        take(row + 1, col, four.y);
        take(row + 2, col, four.z);
        take(row + 3, col, four.w);
      }
    } else {
#pragma unroll 2
      for (int k = int(threadIdx.x); k < M * CHUNK; k += THREADS) {
        const int row = from.tall ? k % M : k / CHUNK, col = from.tall ? k / M : k % CHUNK;
        const bool inside = row < m && chunk * CHUNK + col < n;
        const int64_t at = from.at(row, chunk * CHUNK + col);
        take(row, col, inside ? load_as_float(from.data, at, from.format) : 0.0f);
      }
    }
  }

  // What a thread has of a chunk of M x 64 float32 numbers.
  struct Fours {
    float4 each[FOURS];
  };
  __device__ __forceinline__ void load(Fours& to, const float* chunk) const {
#pragma unroll
    for (int i = 0; i < FOURS; ++i) {
      to.each[i] = load_four(chunk, 4 * (int(threadIdx.x) + i * THREADS), FLOAT32);
    }
  }
  __device__ __forceinline__ void put(const Planes& to, const Fours& from, float scale) const {
#pragma unroll
    for (int i = 0; i < FOURS; ++i) {
      const int k = int(threadIdx.x) + i * THREADS;
      to.put_four(k / (CHUNK / 4), k % (CHUNK / 4) * 4, times(from.each[i], scale));
    }
  }
  static __device__ __forceinline__ float4 times(float4 four, float by) {
    return {four.x * by, four.y * by, four.z * by, four.w * by};
  }

  // -------------------------------------------------------------------------------- over the whole
  __device__ __forceinline__ float sum(float value) const {
    return block_sum(value, scratch);
  }
  // Over the blocks of the cluster as well.
  __device__ __forceinline__ float sum_of_all(float value) const {
    value = sum(value);
    if (ranks > 1) {
      if (threadIdx.x == 0) scratch[WARPS_OF_SCRATCH] = value;
      value = cluster_sum(scratch + WARPS_OF_SCRATCH);
    }
    return value;
  }
  // The largest magnitude of the matrix, as bits: those of NaN and infinity are the largest.
  __device__ __forceinline__ int largest(const Source& from) const {
    int* place = reinterpret_cast<int*>(scratch);
    int found = block_max(largest_of_thread(from, rank * THREADS, ranks * THREADS), place);
    if (ranks > 1) {
      place += WARPS_OF_SCRATCH;
      if (threadIdx.x == 0) *place = found;
      cluster_sync();
      for (int r = 0; r < ranks; ++r) found = max(found, *cluster_smem(place, r));
      cluster_sync();
    }
    return found;
  }
  // The sum of what the blocks of the cluster have; whoever reads `second` or `y` is done after it.
  __device__ __forceinline__ void reduce(Square& acc) const {
    __syncthreads();
    if (ranks == 1) return;
    const int thread = int(threadIdx.x);
#pragma unroll
    for (int j = 0; j < N_SQUARE; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (thread < SQUARE_THREADS) {
          exchanged[(4 * j + e) * SQUARE_THREADS + thread] = acc.value[j][e];
        }
      }
    }
    cluster_sync();
    acc.clear();
    for (int r = 0; r < ranks; ++r) {
      const float* other = cluster_smem(exchanged, r);
#pragma unroll
      for (int j = 0; j < N_SQUARE; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (thread < SQUARE_THREADS) {
            acc.value[j][e] += other[(4 * j + e) * SQUARE_THREADS + thread];
          }
        }
      }
    }
    cluster_sync();
  }

  // -------------------------------------------------------------------------------------- products
  // acc += A B, and the lower triangle alone where that is symmetric.
  __device__ __forceinline__ void add_symmetric(Square& acc, const Planes& a, const Planes& b,
                                                int depth) const {
    multiply<BY_COLUMNS>(acc, a, b, row0(), square_col0(), depth, row0() + 16);
  }
  // acc += A X, for a chunk X
  __device__ __forceinline__ void add_part(Part& acc, const Planes& a, const Planes& of) const {
    multiply<BY_ROWS>(acc, a, of, row0(), part_col0(), M, CHUNK);
  }
  // f(row, column, value) on and below the diagonal.
  template <class F>
  __device__ __forceinline__ void lower(Square& acc, F f) const {
    acc.each(row0(), square_col0(), [&](int row, int col, float& value) {
      if (col <= row) f(row, col, value);
    });
  }
  template <class F>
  __device__ __forceinline__ void all(Square& acc, F f) const {
    acc.each(row0(), square_col0(), [&](int row, int col, float& value) {
      if (col < M) f(row, col, value);
    });
  }
  template <class F>
  __device__ __forceinline__ void part(Part& acc, F f) const {
    acc.each(row0(), part_col0(), [&](int row, int col, float& value) {
      if (col < CHUNK) f(row, col, value);
    });
  }
  // f(row, column) on and below the diagonal: for what is in planes, in whatever layout.
  template <class F>
  __device__ __forceinline__ void lower(F f) const {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < M * M; i += THREADS) {
      const int row = i / M, col = i % M;
      if (col <= row) f(row, col);
    }
  }
  // What an entry on or below the diagonal of a symmetric matrix counts in |.|_F^2.
  static __device__ __forceinline__ float weight_of(int row, int col) {
    return row == col ? 1.0f : 2.0f;
  }

  // ------------------------------------------------------------------------------ half precision
  // The chunks, a matrix of norm 1 / `own`, times the largest multiplier that rounding is certain
  // not to carry over `scale`: as lipkernels/kernels/triton/half.py, which says why.
  __device__ __forceinline__ void store_within(const float* matrix, const Source& like,
                                               void* result, int format, double scale,
                                               double worst_case, double own,
                                               float flag) const {
    const double eps = format == FLOAT16 ? 0x1p-10 : 0x1p-7;
    const float to_units = float(1.0 / (eps * scale));
    const float room = float(1.0 / eps) * (2.0f + sqrtf(float(m))) * (1.0f / 4194304.0f);
    float multiplier = float(worst_case);
    bool within = false;
#pragma unroll 1
    for (int attempt = 0; attempt < 4 && !within; ++attempt) {
      const float shrink = attempt == 0 ? 0.3f : attempt == 1 ? 0.6f : attempt == 2 ? 1.2f : 2.5f;
      const float tried = float(scale * own * max(0.0, 1.0 - double(shrink) * eps));
      const float norm = rounded_off(matrix, format, tried, to_units);
      within = norm * (1.0f + 1e-4f) + room <= shrink;
      if (within) multiplier = tried;
    }
    multiplier *= flag;
    for (int c = rank; c < chunks; c += ranks) {
      const float* from = matrix + int64_t(c) * M * CHUNK;
#pragma unroll 1
      for (int i = int(threadIdx.x); i < M * CHUNK; i += THREADS) {
        const int row = like.tall ? i % M : i / CHUNK;
        const int col = like.tall ? i / M : i % CHUNK;
        if (row < m && c * CHUNK + col < n) {
          store_from_float(result, like.at(row, c * CHUNK + col), format,
                           from[row * CHUNK + col] * multiplier);
        }
      }
    }
  }

 private:
  // At least the norm of what rounding changes, in units.
  __device__ __forceinline__ float rounded_off(const float* matrix, int format, float multiplier,
                                               float to_units) const {
    Square rr;
    rr.clear();
    float squares = 0.0f;
    for (int c = rank; c < chunks; c += ranks) {
      const float* from = matrix + int64_t(c) * M * CHUNK;
#pragma unroll 1
      for (int i = int(threadIdx.x); i < M * CHUNK; i += THREADS) {
        const float value = from[i] * multiplier;
        const float r = (rounded_to(value, format) - value) * to_units;
        squares += r * r;
        x.put(i / CHUNK, i % CHUNK, r * SCALE);
      }
      __syncthreads();
      add_symmetric(rr, x, x, CHUNK);
      __syncthreads();
    }
    reduce(rr);
    float own = 0.0f;
    lower(rr, [&](int row, int col, float& value) {
      value *= UNSCALE;
      own += weight_of(row, col) * value * value;
    });
    return min(sqrtf(sum_of_all(squares)), sqrtf(sqrtf(sum(own))));
  }

  static constexpr int WARPS_OF_SCRATCH = 32;  // what `block_sum` may use
};
