// Power iteration on a group of matrices: all rounds in one launch, each matrix read once.
//
//   v <- W^T u,    u <- W v,    n_iter times;    sigma = |W v| / |v| <= sigma_max
//
// A block keeps its matrix in shared memory, in the format that it came in; the blocks of a cluster
// keep some rows each of one that is too large for that, and add their parts of W^T u through each
// other's shared memory: rank r adds those of some columns, and all others copy what it found.
//
// Note [Arithmetic]
// Vectors and sums are float32, added in a fixed order. Between rounds vectors are divided by powers
// of two alone, which is exact and keeps squares and products in range whatever W and u are; norms
// are needed at the end only. What a round rounds is as if the one before had ended at a vector
// 2^-24 away, so the sums of the last round alone are compensated: the error of every product and
// sum is found, exactly, and added up too. float64 would do as well there, at half the rate of
// float32 at best and a 64th where a GPU is made for graphics, after a conversion of each entry.
// sigma is |W v| / |v| of the v that there is, however it was rounded: at most (1 + 2^-23) sigma_max,
// for what u and sigma are rounded to themselves.
#include <cfloat>

#include "primitives.h"

namespace {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 4;       // that a warp multiplies by v at once
constexpr int IN_FLIGHT = 8;  // loads of 16 bytes of a thread
constexpr int GROUPS = 32;    // at most: their sums are added one by one
constexpr int LARGEST_CLUSTER = 8;
constexpr int PROBLEMS = 64;
constexpr int USUAL = 20;            // magnitudes up to 2^USUAL, and as small ones, need no scaling
constexpr int NOTHING = -(1 << 20);  // the exponent of zeros

struct Problem {
  const void* w;   // (rows, cols)
  const float* u;  // (rows)
  float* sigma;
  float* left;     // (rows)
  float* right;    // (cols)
  int rows, cols;
};

struct Problems {
  Problem of[PROBLEMS];
  int n_iter;
};

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

// ------------------------------------------------------------------------------------------ sums
struct Plain {
  float sum = 0.0f;

  __device__ __forceinline__ void add(float x) { sum = __fadd_rn(sum, x); }
  __device__ __forceinline__ void add(float a, float b) { sum = __fmaf_rn(a, b, sum); }
  __device__ __forceinline__ void add(Plain other) { add(other.sum); }
  __device__ __forceinline__ Plain from(int bits) const {
    return {__shfl_xor_sync(FULL_WARP, sum, bits)};
  }
  __device__ __forceinline__ float value() const { return sum; }
};

// sum + rest: as if added in twice the precision. Knuth's sum and its error, exact in any order.
struct Compensated {
  float sum = 0.0f, rest = 0.0f;

  __device__ __forceinline__ void add(float x) {
    const float next = __fadd_rn(sum, x);
    const float of_x = __fadd_rn(next, -sum);
    const float error = __fadd_rn(__fadd_rn(sum, -__fadd_rn(next, -of_x)), __fadd_rn(x, -of_x));
    rest = __fadd_rn(rest, error);
    sum = next;
  }
  __device__ __forceinline__ void add(float a, float b) {
    const float product = __fmul_rn(a, b);
    rest = __fadd_rn(rest, __fmaf_rn(a, b, -product));
    add(product);
  }
  __device__ __forceinline__ void add(Compensated other) {
    const float rests = __fadd_rn(rest, other.rest);  // as the other one of two lanes has it
    rest = 0.0f;
    add(other.sum);
    rest = __fadd_rn(rests, rest);
  }
  __device__ __forceinline__ Compensated from(int bits) const {
    return {__shfl_xor_sync(FULL_WARP, sum, bits), __shfl_xor_sync(FULL_WARP, rest, bits)};
  }
  __device__ __forceinline__ float value() const { return __fadd_rn(sum, rest); }
};

template <class Sum>
__device__ __forceinline__ Sum sum_of_warp(Sum x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x.add(x.from(bits));
  return x;
}

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
  to = __float2half_rn(x);
}
__device__ __forceinline__ void set(__nv_bfloat16& to, float x) {
  to = __float2bfloat16_rn(x);
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

__device__ __forceinline__ double inverse_or_zero(double x) {
  return x == 0.0 ? 0.0 : 1.0 / x;
}
__device__ __forceinline__ float saturated(double x) {
  return float(x > double(FLT_MAX) ? double(FLT_MAX) : x);
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1) iterate(const __grid_constant__ Problems problems) {
  DYN_SMEM(shared);
  const int cluster = cluster_size(), rank = cluster_rank();
  const Problem& problem = problems.of[int(blockIdx.x) / cluster];
  const int cols = problem.cols;
  const Layout layout(problem.rows, cols, sizeof(T), cluster);
  const int first = min(problem.rows, rank * layout.rows);
  const auto floats = [&](int64_t at) { return reinterpret_cast<float*>(shared + at); };
  const Slice<T> slice{reinterpret_cast<T*>(shared),
                       floats(layout.v),
                       floats(layout.grouped),
                       floats(layout.part),
                       floats(layout.raw),
                       floats(layout.u),
                       reinterpret_cast<Board*>(shared + layout.board),
                       min(problem.rows - first, layout.rows),
                       cols,
                       layout.segment,
                       layout.groups,
                       rank,
                       cluster};
  Board* board = slice.board;

  // W and u, each by its largest entry, which may be NaN or infinite.
  int of_w = slice.load(static_cast<const T*>(problem.w) + int64_t(first) * cols);
  if (threadIdx.x == 0) board->of_w = of_w;
  int of_u = 0;
  for (int r = threadIdx.x; r < problem.rows; r += THREADS) {
    of_u = max(of_u, magnitude(problem.u[r]));
  }
  of_u = block_max(of_u, slice.scratch());
  slice.everybody();
#pragma unroll 1
  for (int other = 0; other < cluster; ++other) of_w = max(of_w, slice.board_of(other).of_w);
  const auto give = [&](int exponent, double left, double right, double sigma) {
    for (int r = threadIdx.x; r < slice.rows; r += THREADS) {
      problem.left[first + r] = float(ldexp(double(slice.u[r]), exponent) * left);
    }
    const int start = rank * layout.segment;
    for (int c = start + threadIdx.x; c < min(cols, start + layout.segment); c += THREADS) {
      problem.right[c] = float(slice.v[c] * right);
    }
    if (rank == 0 && threadIdx.x == 0) *problem.sigma = saturated(sigma);
    slice.everybody();  // nobody reads the memory of a block that has ended
  };
  if (max(of_w, of_u) >= 0x7F800000) {
    const double nan = NAN;
    give(0, nan, nan, nan);  // times u and v, whatever is there
    return;
  }

  const bool unusual = of_w > 0 && abs(exponent_of(of_w)) > USUAL;
  const int unit = unusual ? exponent_of(of_w) : 0;
  if (unusual) slice.scale(-unit);
  const int of_start = exponent_or_nothing(of_u);
  for (int r = threadIdx.x; r < slice.rows; r += THREADS) {
    slice.u[r] = ldexpf(problem.u[first + r], -of_start);
  }
  if (threadIdx.x == 0) board->of_u = 0;
  __syncthreads();

  for (int round = 1; round < problems.n_iter; ++round) {
    slice.template to_right<Plain>();
    slice.template to_left<Plain>();
  }
  const int of_right = slice.template to_right<Compensated>();
  const double right = slice.norm_of(cols, [&](int c) { return slice.v[c]; });
  if (problems.n_iter == 0) {
    const double left = slice.norm_of(
        problem.rows, [&](int r) { return ldexpf(problem.u[r], -of_start); });
    const double sigma = ldexp(right, of_right + unit) * inverse_or_zero(left);
    give(0, inverse_or_zero(left), inverse_or_zero(right), sigma);
    return;
  }

  slice.template to_left<Compensated>();
  const double own = slice.norm_of(slice.rows, [&](int r) { return slice.u[r]; });
  if (threadIdx.x == 0) board->norm = own;
  slice.everybody();
  int of_left = NOTHING;
#pragma unroll 1
  for (int other = 0; other < cluster; ++other) of_left = max(of_left, slice.board_of(other).of_u);
  double squares = 0.0;
#pragma unroll 1
  for (int other = 0; other < cluster; ++other) {
    const Board& its = slice.board_of(other);
    const double norm = ldexp(its.norm, its.of_u - of_left);
    squares += norm * norm;
  }
  const double left = sqrt(squares);
  const double sigma = ldexp(left, of_left + unit) * inverse_or_zero(right);
  give(board->of_u - of_left, inverse_or_zero(left), inverse_or_zero(right), sigma);
}

template <class T>
int launch_all(const Problem* problems, int count, int n_iter, int cluster, void* stream) {
  int error = 0;
  for (int done = 0; done < count && error == 0; done += PROBLEMS) {
    Problems some{};
    const int n = min(PROBLEMS, count - done);
    int64_t bytes = 0;
    for (int i = 0; i < n; ++i) {
      some.of[i] = problems[done + i];
      bytes = max(bytes, Layout(some.of[i].rows, some.of[i].cols, sizeof(T), cluster).end);
    }
    some.n_iter = n_iter;
    error = launch(iterate<T>, dim3(n * cluster), dim3(THREADS), size_t(bytes), cluster, stream,
                   some);
  }
  return error;
}

}  // namespace

// What a device has: bytes of shared memory for a block, and blocks for a cluster.
extern "C" int lk_power_iteration_room(int device, int* bytes, int* cluster) {
#ifdef LK_SIMT
  (void)device;
  *bytes = 227 << 10;  // of sm_90
  *cluster = 8;
  return 0;
#else
  int major = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  *cluster = major >= 9 ? 8 : 1;
  return error;
#endif
}

// Shared memory of each block of a cluster that has a matrix with entries of `size` bytes.
extern "C" int64_t lk_power_iteration_bytes(int rows, int cols, int size, int cluster) {
  return Layout(rows, cols, size, cluster).end;
}

// problems: `count` of them, of one format (primitives.h), each for `cluster` blocks.
extern "C" int lk_power_iteration(const void* problems, int count, int format, int n_iter,
                                  int cluster, void* stream) {
  const Problem* all = static_cast<const Problem*>(problems);
  if (format == FLOAT16) return launch_all<half>(all, count, n_iter, cluster, stream);
  if (format == BFLOAT16) return launch_all<__nv_bfloat16>(all, count, n_iter, cluster, stream);
  return launch_all<float>(all, count, n_iter, cluster, stream);
}
