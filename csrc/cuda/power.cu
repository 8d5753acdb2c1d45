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

#include "slice.h"

namespace {

constexpr int PROBLEMS = 64;
constexpr int USUAL = 20;  // magnitudes up to 2^USUAL, and as small ones, need no scaling

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
  if (format == BFLOAT16) return launch_all<bfloat16>(all, count, n_iter, cluster, stream);
  return launch_all<float>(all, count, n_iter, cluster, stream);
}
