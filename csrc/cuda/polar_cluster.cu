// lipkernels::polar_factor for small sides up to 128. A matrix needs 176 KB of shared memory, which
// sm_90 and sm_100 have; the blocks of a cluster share its columns, and add up what they have of
// X X^T by way of one another's shared memory.
#include "polar.h"

namespace {
constexpr int WARPS = 8;
constexpr int LARGEST = 128;

__global__ void __launch_bounds__(32 * WARPS, 1)
    polar_large(const __grid_constant__ PolarGroup group) {
#if LK_CLUSTERS
  DYN_SMEM(shared);
  const PolarProblem& problem = group.problems[blockIdx.x / cluster_size()];
  Polar<LARGEST, WARPS>(shared, problem, group.format, group.result_format).run();
#endif
}
}  // namespace

extern "C" int lk_polar_large(const PolarProblem* problems, int count, int format,
                              int result_format, int cluster, void* stream) {
  return launch_polar(polar_large, Polar<LARGEST, WARPS>::BYTES, 32 * WARPS, problems, count,
                      format, result_format, cluster, stream);
}
