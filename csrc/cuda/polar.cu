// lipkernels::polar_factor for small sides up to 64: one block a matrix, one launch a group.
#include "polar.h"

namespace {
constexpr int WARPS = 8;
constexpr int LARGEST = 64;

__global__ void __launch_bounds__(32 * WARPS, 1)
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

extern "C" int lk_polar_small(const PolarProblem* problems, int count, int format,
                              int result_format, int cluster, void* stream) {
  return launch_polar(polar_small, Polar<LARGEST, WARPS>::BYTES, 32 * WARPS, problems, count,
                      format, result_format, cluster, stream);
}
