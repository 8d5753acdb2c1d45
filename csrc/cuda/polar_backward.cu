// lipkernels::polar_factor_backward for small sides up to 64: one launch a group.
#include "polar_backward.h"

namespace {
constexpr int WARPS = 8;
constexpr int LARGEST = 64;

__global__ void __launch_bounds__(32 * WARPS, 2)
    polar_backward_small(const __grid_constant__ GradientGroup group) {
  DYN_SMEM(shared);
  const GradientProblem& problem = group.problems[blockIdx.x / cluster_size()];
  const int m = min(problem.rows, problem.cols);
  if (m <= 16) {
    Gradient<16, WARPS>(shared, problem, group.format, group.out_format).run();
  } else if (m <= 32) {
    Gradient<32, WARPS>(shared, problem, group.format, group.out_format).run();
  } else {
    Gradient<64, WARPS>(shared, problem, group.format, group.out_format).run();
  }
}
}  // namespace

// format: of the gradients; out_format: of the weights.
extern "C" int lk_polar_backward_small(const GradientProblem* problems, int count, int format,
                                       int out_format, int cluster, void* stream) {
  return launch_gradient(polar_backward_small, Gradient<LARGEST, WARPS>::BYTES, 32 * WARPS,
                         problems, count, format, out_format, cluster, stream);
}
