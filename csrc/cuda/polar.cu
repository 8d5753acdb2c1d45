// lipkernels::polar_factor for small sides up to 64: one block a matrix, one launch a group.
#include "polar.h"

namespace {
constexpr int WARPS = 8;
constexpr int LARGEST = 64;

__global__ void __launch_bounds__(32 * WARPS)
    polar_small(const __grid_constant__ PolarGroup group) {
  DYN_SMEM(shared);
  const PolarProblem& problem = group.problems[blockIdx.x / cluster_size()];
  const int m = min(problem.rows, problem.cols);
  if (m <= 16) {
    Polar<16, WARPS>(shared, problem, group.format, group.result_format).run();
  } else if (m <= 32) {
    Polar<32, WARPS>(shared, problem, group.format, group.result_format).run();
  } else {
    Polar<64, WARPS>(shared, problem, group.format, group.result_format).run();
  }
}
}  // namespace

// float32 numbers of a problem's workspace.
extern "C" int64_t lk_polar_workspace(int rows, int cols) {
  const int m = rows < cols ? rows : cols;
  const int64_t n = rows < cols ? cols : rows;
  const int padded = m <= 16 ? 16 : m <= 32 ? 32 : m <= 64 ? 64 : 128;
  return ((n + CHUNK - 1) / CHUNK + (padded > CHUNK ? 2 : 1)) * padded * CHUNK;
}

extern "C" int lk_polar_small(const PolarProblem* problems, int count, int format,
                              int result_format, int cluster, void* stream) {
  for (int start = 0; start < count; start += POLAR_PROBLEMS) {
    PolarGroup group{};
    group.format = format;
    group.result_format = result_format;
    const int n = count - start < POLAR_PROBLEMS ? count - start : POLAR_PROBLEMS;
    for (int i = 0; i < n; ++i) group.problems[i] = problems[start + i];
    const int error = launch(polar_small, dim3(n * cluster), dim3(32 * WARPS),
                             Polar<LARGEST, WARPS>::BYTES, cluster, stream, group);
    if (error) return error;
  }
  return 0;
}
