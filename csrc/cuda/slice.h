// The rows that a block has of a matrix, in its shared memory, and the products with them: W^T u and
// W v, of the whole matrix by the cluster that shares it.
#pragma once

#include "sums.h"

namespace {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 4;  // that a warp multiplies by v at once
constexpr int IN_FLIGHT = 8;  // loads of 16 bytes of a thread
constexpr int GROUPS = 32;    // at most: their sums are added one by one
constexpr int NOTHING = -(1 << 20);  // the exponent of zeros
constexpr int LARGEST_CLUSTER = 8;

// --------------------------------------------------------------------------------- shared memory
// What blocks of a cluster tell one another, and scratch.
struct Board {
  double norm;     // of u
  int of_w, of_v;  // magnitudes of the largest entries
  int of_u;        // u is 2^of_u times what is in shared memory
  int of_us[LARGEST_CLUSTER];  // those of all blocks
  float2 scratch[WARPS];
};

__host__ __device__ constexpr int round_up(int x, int to) {
  return (x + to - 1) / to * to;
}

// Offsets in bytes.
struct Layout {
  int rows;     // of a block
  int segment;  // columns that a block adds up for the cluster
  int groups;   // of threads that share rows of the same columns
  int64_t v, grouped, part, raw, u, board, end;

  __host__ __device__ Layout(int all_rows, int cols, int size, int cluster) {
    rows = cluster == 1 ? all_rows : round_up((all_rows + cluster - 1) / cluster, 8);
    segment = (cols + cluster - 1) / cluster;
    const int width = cols % (16 / size) == 0 ? 16 / size : 1;
    groups = THREADS / (cols / width);
    if (groups > GROUPS) groups = GROUPS;
    if (groups > rows) groups = rows;
    if (groups < 1) groups = 1;
    const auto floats = [](int64_t n) { return (4 * n + 15) / 16 * 16; };
    v = (int64_t(rows) * cols * size + 15) / 16 * 16;
    grouped = v + floats(cols);
    part = grouped + floats(int64_t(groups) * cols);
    raw = part + (cluster > 1 ? floats(cols) : 0);
    u = raw + (cluster > 1 ? floats(segment) : 0);
    board = u + floats(rows);
    end = board + round_up(sizeof(Board), 16);
  }
};

__device__ __forceinline__ Compensated sum_of_block(Compensated x, float2* scratch) {
  x = sum_of_warp(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = {x.sum, x.rest};
  __syncthreads();
  Compensated all;
  for (int w = 0; w < WARPS; ++w) all.add(Compensated{scratch[w].x, scratch[w].y});
  __syncthreads();
  return all;
}

// --------------------------------------------------------------------------------------- numbers
template <class T>
__device__ __forceinline__ T from_bits(uint32_t bits) {
  T x;
  memcpy(&x, &bits, sizeof(T));  // the low bytes
  return x;
}
template <class T>
__device__ __forceinline__ int magnitude(T x) {
  uint32_t bits = 0;
  memcpy(&bits, &x, sizeof(T));
  return int(bits & (sizeof(T) == 4 ? 0x7FFFFFFFu : 0x7FFFu));
}
// The larger magnitude of those in 4 bytes.
template <class T>
__device__ __forceinline__ int magnitudes(uint32_t bits) {
  if (sizeof(T) == 4) return int(bits & 0x7FFFFFFFu);
  return max(int(bits & 0x7FFFu), int(bits >> 16 & 0x7FFFu));
}
__device__ __forceinline__ void set(float& to, float x) {
  to = x;
}
__device__ __forceinline__ void set(half& to, float x) {
  to = to_half(x);
}
__device__ __forceinline__ void set(bfloat16& to, float x) {
  to = to_bfloat16(x);
}
__device__ __forceinline__ int exponent_or_nothing(int magnitude) {
  return magnitude > 0 ? exponent_of(magnitude) : NOTHING;
}

// ---------------------------------------------------------------------------------------- a block
// The rows that a block has of a matrix W. What is in shared memory as w, u and v is W, u and v
// divided by powers of two.
template <class T>
struct Slice {
  static constexpr int WIDTH = 16 / int(sizeof(T));  // entries that are read at once

  T* w;
  float *v, *grouped, *part, *raw, *u;
  Board* board;
  int rows, cols, segment, groups;
  int rank, cluster;

  __device__ __forceinline__ void everybody() const {
    if (cluster == 1) {
      __syncthreads();
    } else {
      cluster_sync();
    }
  }
  __device__ __forceinline__ const Board& board_of(int other) const {
    return *cluster_smem(board, other);
  }
  __device__ __forceinline__ int* scratch() const {
    return reinterpret_cast<int*>(board->scratch);
  }

  // The magnitude of the largest entry, as float32.
  __device__ int load(const T* from) const {
    const int64_t count = int64_t(rows) * cols;
    int64_t done = 0;
    int largest = 0;
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      const uint4* source = reinterpret_cast<const uint4*>(from);
      uint4* to = reinterpret_cast<uint4*>(w);
      const int pieces = int(count / WIDTH);
      for (int at = threadIdx.x; at < pieces; at += IN_FLIGHT * THREADS) {
        uint4 x[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
          x[i] = at + i * THREADS < pieces ? source[at + i * THREADS] : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
          if (at + i * THREADS < pieces) to[at + i * THREADS] = x[i];
          largest = max(largest, max(magnitudes<T>(x[i].x), magnitudes<T>(x[i].y)));
          largest = max(largest, max(magnitudes<T>(x[i].z), magnitudes<T>(x[i].w)));
        }
      }
      done = int64_t(pieces) * WIDTH;
    }
    for (int64_t at = done + threadIdx.x; at < count; at += THREADS) {
      w[at] = from[at];
      largest = max(largest, magnitude(from[at]));
    }
    largest = block_max(largest, scratch());
    return magnitude(to_float(from_bits<T>(uint32_t(largest))));
  }

  __device__ void scale(int exponent) const {
    for (int at = threadIdx.x; at < rows * cols; at += THREADS) {
      set(w[at], ldexpf(to_float(w[at]), exponent));
    }
    __syncthreads();
  }

  template <int N>
  __device__ __forceinline__ void entries(float (&to)[N], int at) const {
    if constexpr (N == 1) {
      to[0] = to_float(w[at]);
    } else {
      require_aligned(w + at, 16);
      const uint4 four = *reinterpret_cast<const uint4*>(w + at);
      const uint32_t bits[4] = {four.x, four.y, four.z, four.w};
      constexpr int EACH = 4 / int(sizeof(T));  // numbers in 4 bytes
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = to_float(from_bits<T>(bits[i / EACH] >> 16 * (i % EACH)));
    }
  }

  // Numbers of a vector.
  template <int N>
  static __device__ __forceinline__ void get(float (&to)[N], const float* from) {
    if constexpr (N == 1) {
      to[0] = from[0];
    } else {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const float4 four = load_four(from, i, FLOAT32);
        to[i] = four.x;
        to[i + 1] = four.y;
        to[i + 2] = four.z;
        to[i + 3] = four.w;
      }
    }
  }
  template <int N>
  static __device__ __forceinline__ void put(float* to, const float (&from)[N]) {
    if constexpr (N == 1) {
      to[0] = from[0];
    } else {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        store_four(to, i, {from[i], from[i + 1], from[i + 2], from[i + 3]});
      }
    }
  }

  // The part of W^T u that these rows have, into `to` (cols): a thread has N columns and every
  // groups-th row, then one column.
  template <class Sum, int N>
  __device__ void down_by(float* to) const {
    const int across = cols / N;
    for (int item = threadIdx.x; item < across * groups; item += THREADS) {
      const int column = item % across * N, first = item / across;
      Sum sums[N];
#pragma unroll 1
      for (int row = first; row < rows; row += groups) {
        float x[N];
        entries<N>(x, row * cols + column);
        const float factor = u[row];
#pragma unroll
        for (int i = 0; i < N; ++i) sums[i].add(x[i], factor);
      }
      float found[N];
#pragma unroll
      for (int i = 0; i < N; ++i) found[i] = sums[i].value();
      put(grouped + first * cols + column, found);
    }
    __syncthreads();
    for (int column = threadIdx.x; column < cols; column += THREADS) {
      Sum sum;
#pragma unroll 4
      for (int g = 0; g < groups; ++g) sum.add(grouped[g * cols + column]);
      to[column] = sum.value();
    }
  }
  template <class Sum>
  __device__ __forceinline__ void down(float* to) const {
    if (cols % WIDTH == 0) {
      down_by<Sum, WIDTH>(to);
    } else {
      down_by<Sum, 1>(to);
    }
  }

  // u = W v, a warp some rows at a time; returns the magnitude of this thread's largest.
  template <class Sum, int N>
  __device__ int across_by() const {
    const int lane = threadIdx.x % 32;
    int largest = 0;
    for (int row = threadIdx.x / 32 * ROWS; row < rows; row += WARPS * ROWS) {
      Sum sums[ROWS];
#pragma unroll 1
      for (int column = lane * N; column < cols; column += 32 * N) {
        float factors[N];
        get(factors, v + column);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          float x[N];
          entries<N>(x, min(row + r, rows - 1) * cols + column);
#pragma unroll
          for (int i = 0; i < N; ++i) sums[r].add(x[i], factors[i]);
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float sum = sum_of_warp(sums[r]).value();
        if (lane == 0 && row + r < rows) {
          u[row + r] = sum;
          largest = max(largest, magnitude(sum));
        }
      }
    }
    return largest;
  }
  template <class Sum>
  __device__ __forceinline__ int across() const {
    return cols % WIDTH == 0 ? across_by<Sum, WIDTH>() : across_by<Sum, 1>();
  }

  // v = W^T u of the whole matrix. Returns the exponent of what it was divided by.
  template <class Sum>
  __device__ int to_right() const {
    if (cluster == 1) {
      down<Sum>(v);
      int largest = 0;
#pragma unroll 1
      for (int c = threadIdx.x; c < cols; c += THREADS) largest = max(largest, magnitude(v[c]));
      const int exponent = exponent_or_nothing(block_max(largest, scratch()));
#pragma unroll 1
      for (int c = threadIdx.x; c < cols; c += THREADS) v[c] = ldexpf(v[c], -exponent);
      __syncthreads();
      return exponent;
    }
    down<Sum>(part);
    cluster_sync();
    if (int(threadIdx.x) < cluster) {
      board->of_us[threadIdx.x] = board_of(int(threadIdx.x)).of_u;
    }
    __syncthreads();
    int unit = NOTHING, largest = 0;
#pragma unroll 1
    for (int other = 0; other < cluster; ++other) unit = max(unit, board->of_us[other]);
    for (int i = threadIdx.x; i < segment && rank * segment + i < cols; i += THREADS) {
      Sum sum;
#pragma unroll 1
      for (int other = 0; other < cluster; ++other) {
        const float x = *cluster_smem(part + rank * segment + i, other);
        sum.add(ldexpf(x, board->of_us[other] - unit));
      }
      raw[i] = sum.value();
      largest = max(largest, magnitude(raw[i]));
    }
    largest = block_max(largest, scratch());
    if (threadIdx.x == 0) board->of_v = largest;
    cluster_sync();
#pragma unroll 1
    for (int other = 0; other < cluster; ++other) largest = max(largest, board_of(other).of_v);
    const int exponent = exponent_or_nothing(largest);
#pragma unroll 1
    for (int c = threadIdx.x; c < cols; c += THREADS) {
      v[c] = ldexpf(*cluster_smem(raw + c % segment, c / segment), -exponent);
    }
    __syncthreads();
    return exponent + unit;
  }

  // u = W v, these rows of it.
  template <class Sum>
  __device__ void to_left() const {
    const int exponent = exponent_or_nothing(block_max(across<Sum>(), scratch()));
    for (int r = threadIdx.x; r < rows; r += THREADS) u[r] = ldexpf(u[r], -exponent);
    if (threadIdx.x == 0) board->of_u = exponent;
    __syncthreads();
  }

  template <class F>
  __device__ __forceinline__ double norm_of(int n, F entry) const {
    Compensated squares;
    for (int i = threadIdx.x; i < n; i += THREADS) squares.add(entry(i), entry(i));
    squares = sum_of_block(squares, board->scratch);
    return sqrt(double(squares.sum) + double(squares.rest));
  }
};

}  // namespace
