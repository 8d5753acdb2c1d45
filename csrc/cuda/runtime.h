// The words that kernels are written in, for two compilers: nvcc, and g++ with LK_SIMT defined,
// which runs them on the host (csrc/simt/simt.h).
//
//   DYN_SMEM(name)                   char* name: the dynamic shared memory, aligned to 1024 bytes
//   STATIC_SMEM(type, name, count)   a static shared array; never __shared__, which g++ lacks
//   launch(kernel, grid, block, shared bytes, cluster size, stream, args...)   an error code, or 0
//   mma16816(c, a, b)                m16n8k16, float32 += fp16 * fp16, PTX's fragment layout
//   ldmatrix_x4(to, row), ldmatrix_x4_trans(to, row)   its fragments; lane 8 i + r points to row r
//                                    of matrix i
//   cluster_rank(), cluster_size(), cluster_sync(), cluster_smem(pointer, rank)
//   thread_anew()                    threadIdx.x, for what shall be computed again, not kept
//   half, bfloat16, to_float(x), to_half(x), to_bfloat16(x)   formats; to nearest, ties to even
//   require_aligned(pointer, bytes)  nothing on a GPU, a check on the host
//
// Parameters of a kernel are structs by value, `const __grid_constant__`, 4 KB in all. Warp
// functions take all 32 lanes (mask ~0u); threads that return never come to a barrier again.
#pragma once

// LK_CLUSTERS: whether blocks know of a cluster that they are in. Where they do not, kernels for
// clusters alone are empty.
#if defined(LK_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define LK_CLUSTERS 1
#else
#define LK_CLUSTERS 0
#endif

#ifdef LK_SIMT
#include "../simt/simt.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

using stream_t = cudaStream_t;

#define DYN_SMEM(name) extern __shared__ __align__(1024) char name[]
#define STATIC_SMEM(type, name, count) __shared__ __align__(16) type name[count]

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, int cluster, void* stream,
           const A&... args) {
  // In ascending order; see Note [PTX] in build.py.
  constexpr int COMPILED_FOR[] = {__CUDA_ARCH_LIST__};
  constexpr bool CLUSTERS = COMPILED_FOR[sizeof(COMPILED_FOR) / sizeof(int) - 1] >= 900;
  if (cluster > 1 && !CLUSTERS) return int(cudaErrorInvalidConfiguration);
  cudaError_t error = cudaSuccess;
  if (shared > (48 << 10)) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<stream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, args...);
  }
  if (error != cudaSuccess) cudaGetLastError();  // reported here, so nobody else's
  return int(error);
}

// Those of cuda_fp16.h and cuda_bf16.h, which take the compiler longer than all else in some files.
struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};
__device__ __forceinline__ half to_half(float x) {
  half to;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
  return to;
}
__device__ __forceinline__ bfloat16 to_bfloat16(float x) {
  bfloat16 to;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
  return to;
}
__device__ __forceinline__ float to_float(half x) {
  float to;
  asm("cvt.f32.f16 %0, %1;" : "=f"(to) : "h"(x.bits));
  return to;
}
__device__ __forceinline__ float to_float(bfloat16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}

__device__ __forceinline__ void require_aligned(const void*, size_t) {}

__device__ __forceinline__ void mma16816(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// threadIdx.x, anew: what is computed from it is not kept in registers from one use to the next.
__device__ __forceinline__ int thread_anew() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

__device__ __forceinline__ unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t to[4], const half* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t to[4], const half* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// Clusters came with sm_90; before it every block is one of its own.
__device__ __forceinline__ int cluster_rank() {
  int rank = 0;
#if LK_CLUSTERS
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ int cluster_size() {
  int size = 1;
#if LK_CLUSTERS
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}
__device__ __forceinline__ void cluster_sync() {
#if LK_CLUSTERS
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#else
  __syncthreads();
#endif
}
// The same place in the shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ T* cluster_smem(T* mine, int rank) {
#if LK_CLUSTERS
  T* other;
  asm("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(mine), "r"(rank));
  return other;
#else
  return mine;
#endif
}

#endif
