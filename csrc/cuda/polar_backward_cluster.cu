// lipkernels::polar_factor_backward for small sides up to 128, where a block has 227 KB of shared
// memory; the blocks of a cluster share the columns of a matrix.
#include "polar_backward.h"

namespace {
constexpr int WARPS = 8;
constexpr int LARGEST = 128;

__global__ void __launch_bounds__(32 * WARPS, 1)
    polar_backward_large(const __grid_constant__ GradientGroup group) {
#if LK_CLUSTERS
  DYN_SMEM(shared);
  const GradientProblem& problem = group.problems[blockIdx.x / cluster_size()];
  Gradient<LARGEST, WARPS>(shared, problem, group.format, group.out_format).run();
#endif
}
}  // namespace

extern "C" int lk_polar_backward_large(const GradientProblem* problems, int count, int format,
                                       int out_format, int cluster, void* stream) {
  return launch_gradient(polar_backward_large, Gradient<LARGEST, WARPS>::BYTES, 32 * WARPS,
                         problems, count, format, out_format, cluster, stream);
}
