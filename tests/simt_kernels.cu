// Kernels of tests/test_simt.py, some with a mistake that a macro or an argument plants.
#include "../csrc/cuda/primitives.h"

#if defined(WITHOUT_SYNCTHREADS)
#define SYNCTHREADS
#else
#define SYNCTHREADS __syncthreads()
#endif
#if defined(WITHOUT_SYNCWARP)
#define SYNCWARP
#else
#define SYNCWARP __syncwarp()
#endif

namespace {
__global__ void reverse_block(const float* x, float* y) {
  DYN_SMEM(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int t = int(threadIdx.x), n = int(blockDim.x);
  shared[t] = x[blockIdx.x * n + t];
  SYNCTHREADS;
  y[blockIdx.x * n + t] = shared[n - 1 - t];
}
__global__ void reverse_warp(const float* x, float* y) {
  STATIC_SMEM(float, shared, 64);
  const int t = int(threadIdx.x);
  shared[t] = x[t];
  SYNCWARP;
  y[t] = shared[t ^ 31];
}
// 0: none; the other mistakes: see `test_mistakes`.
__global__ void mistakes(const float* x, float* y, int which) {
  DYN_SMEM(memory);
  float* shared = reinterpret_cast<float*>(memory);
  STATIC_SMEM(float, fixed, 64);
  const int t = int(threadIdx.x);
  shared[t] = x[t];
  fixed[t] = x[t];
  if (which == 1 && t < 32) __syncthreads();
  if (which == 2) {
    if (t < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (which == 3 && t == 63) return;
  if (which == 4) shared[t + 1] = 1.0f;
  if (which == 5) shared[t - 1] = 1.0f;
  if (which == 6) fixed[t + 1] = 1.0f;
  if (which == 7 && t % 2) __syncwarp();
  if (which == 8) __shfl_sync(FULL_WARP >> 1, 1.0f, 0);
  if (which == 9 && t == 0) store_four(shared, 1, {1.0f, 2.0f, 3.0f, 4.0f});
  if (which == 10 && t == 0) *cluster_smem(shared, 1) = 1.0f;
  if (which == 11) {
    if (t % 2) {
      __syncwarp();
    } else {
      __shfl_sync(FULL_WARP, 1.0f, 0);
    }
  }
  __syncthreads();
  y[t] = which == 12 ? shared[t + 64] : which == 13 ? fixed[t + 64] : shared[t];
}
__global__ void warp_words(const float* x, float* y) {
  const int t = int(threadIdx.x);
  y[t] = warp_sum(x[t]);
  y[64 + t] = __shfl_down_sync(FULL_WARP, x[t], 3);
  y[128 + t] = __shfl_up_sync(FULL_WARP, x[t], 3);
  y[192 + t] = __shfl_sync(FULL_WARP, x[t], 5);
  y[256 + t] = float(__ballot_sync(FULL_WARP, x[t] > 0) & 0xFFFF);
  STATIC_SMEM(float, scratch, 2);
  y[320 + t] = block_sum(x[t], scratch);
}
// (16 blocks of columns) A (32, 48) in planes times B (16, 48)^T, and the same B as (48, 16).
__global__ void product(const float* a, const float* b, float* c, float* d) {
  DYN_SMEM(memory);
  Planes left = planes_at(memory, 32, 48);
  Planes right = planes_at(memory + plane_bytes(32, 48), 16, 48);
  Planes turned = planes_at(memory + plane_bytes(48, 48), 48, 16);
  for (int i = int(threadIdx.x); i < 32 * 48; i += 64) left.put(i / 48, i % 48, a[i]);
  for (int i = int(threadIdx.x); i < 16 * 48; i += 64) {
    right.put(i / 48, i % 48, b[i]);
    turned.put(i % 48, i / 48, b[i]);
  }
  __syncthreads();
  const int row0 = int(threadIdx.x) / 32 * 16;
  Accumulator<2> acc;
  acc.clear();
  multiply<BY_COLUMNS>(acc, left, right, row0, 0, 48, 16);
  acc.each(row0, 0, [&](int row, int col, float value) { c[row * 16 + col] = value; });
  acc.clear();
  multiply<BY_ROWS>(acc, left, turned, row0, 0, 48, 16);
  acc.each(row0, 0, [&](int row, int col, float value) { d[row * 16 + col] = value; });
}
__global__ void cluster_words(const float* x, float* y) {
  STATIC_SMEM(float, scratch, 2);
  DYN_SMEM(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int t = int(threadIdx.x), rank = cluster_rank();
  const float sum = block_sum(x[blockIdx.x * 64 + t], scratch);
  if (t == 0) shared[0] = sum;
  const float all = cluster_sum(shared);
  shared[1 + t] = x[blockIdx.x * 64 + t];
#ifndef WITHOUT_CLUSTER_SYNC
  cluster_sync();
#endif
  y[blockIdx.x * 64 + t] = all + *cluster_smem(shared + 1 + t, (rank + 1) % cluster_size());
#ifndef WITHOUT_LAST_CLUSTER_SYNC
  cluster_sync();
#endif
}
// Which format a number is in, there and back.
__global__ void formats(const float* x, float* y) {
  const int t = int(threadIdx.x);
  STATIC_SMEM(bfloat16, there, 64);
  store_from_float(there, t, BFLOAT16, x[t]);
  y[t] = load_as_float(there, t, BFLOAT16);
  y[64 + t] = rounded_to(x[t], FLOAT16);
  y[128 + t] = power_of_two(exponent_of(__float_as_int(x[t]) & 0x7FFFFFFF));
}
}  // namespace

extern "C" int run_reverse_block(const float* x, float* y, int blocks) {
  return launch(reverse_block, dim3(blocks), dim3(64), 256, 1, nullptr, x, y);
}
extern "C" int run_reverse_warp(const float* x, float* y) {
  return launch(reverse_warp, dim3(1), dim3(64), 0, 1, nullptr, x, y);
}
extern "C" int run_mistakes(const float* x, float* y, int which) {
  return launch(mistakes, dim3(1), dim3(64), which == 12 ? 512 : 256, 1, nullptr, x, y, which);
}
extern "C" int run_warp_words(const float* x, float* y) {
  return launch(warp_words, dim3(1), dim3(64), 0, 1, nullptr, x, y);
}
extern "C" int run_product(const float* a, const float* b, float* c, float* d) {
  const int bytes = plane_bytes(48, 48) + plane_bytes(48, 16);
  return launch(product, dim3(1), dim3(64), bytes, 1, nullptr, a, b, c, d);
}
extern "C" int run_cluster_words(const float* x, float* y) {
  return launch(cluster_words, dim3(8), dim3(64), 65 * 4, 4, nullptr, x, y);
}
extern "C" int run_formats(const float* x, float* y) {
  return launch(formats, dim3(1), dim3(64), 0, 1, nullptr, x, y);
}
extern "C" int run_launch(int threads, int shared, int cluster, int blocks) {
  return launch(reverse_block, dim3(blocks), dim3(threads), shared, cluster, nullptr,
                (const float*)nullptr, (float*)nullptr);
}
