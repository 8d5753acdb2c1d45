// The words of CUDA, and those of csrc/cuda/runtime.h, for kernels that run on the host: see
// machine.h. Included by runtime.h where LK_SIMT is defined.
#pragma once

#include "machine.h"

// ------------------------------------------------------------------------------- CUDA's vocabulary
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define __align__(n) alignas(n)
#define threadIdx (simt::fiber->index)
#define blockIdx (simt::fiber->block->index)
#define blockDim (simt::block_size)
#define gridDim (simt::grid_size)

#define LK_LINE int line = __builtin_LINE()

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline void __syncthreads(LK_LINE) {
  simt::wait(simt::fiber->block->barrier, simt::Kind::BLOCK, line);
}
inline void __syncwarp(unsigned mask = ~0u, LK_LINE) {
  if (mask != ~0u) simt::fail(simt::NOT_A_FULL_WARP, "lanes are missing at a barrier");
  simt::wait(simt::warp().barrier, simt::Kind::WARP, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, LK_LINE) {
  return simt::exchange(value, source, mask, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, LK_LINE) {
  return simt::exchange(value, simt::lane() ^ bits, mask, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, LK_LINE) {
  const int source = simt::lane() + int(by);
  return simt::exchange(value, source < 32 ? source : simt::lane(), mask, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, LK_LINE) {
  const int source = simt::lane() - int(by);
  return simt::exchange(value, source >= 0 ? source : simt::lane(), mask, line);
}
inline unsigned __ballot_sync(unsigned mask, bool value, LK_LINE) {
  return simt::ballot(value, mask, line);
}
inline bool __any_sync(unsigned mask, bool value, LK_LINE) {
  return simt::ballot(value, mask, line) != 0;
}
inline bool __all_sync(unsigned mask, bool value, LK_LINE) {
  return simt::ballot(value, mask, line) == ~0u;
}

inline int __float_as_int(float x) {
  int bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  return unsigned(__float_as_int(x));
}
inline float __uint_as_float(unsigned bits) {
  return __int_as_float(int(bits));
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(unsigned x) {
  return __builtin_ffs(int(x));
}
inline int __clz(unsigned x) {
  return x ? __builtin_clz(x) : 32;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
using std::isfinite;
using std::isnan;
using std::max;
using std::min;

using half = _Float16;
inline half to_half(float x) {
  return half(x);
}
inline float to_float(half x) {
  return float(x);
}

// To nearest, ties to even; NaN stays one.
struct bfloat16 {
  uint16_t bits;
};
inline bfloat16 to_bfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7FFF};
  return {uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}
inline float to_float(bfloat16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}

// --------------------------------------------------------------- the vocabulary of cuda/runtime.h
using stream_t = void*;

#define DYN_SMEM(name) char* name = simt::fiber->block->shared
#define STATIC_SMEM(type, name, count)                                    \
  type* name = static_cast<type*>(simt::static_array(                     \
      [] {                                                                \
        static char key;                                                  \
        return &key;                                                      \
      }(),                                                                \
      sizeof(type) * (count)))

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, int cluster, void*,
           const A&... args) {
  static_assert((sizeof(P) + ... + 0) <= 4096, "parameters of a kernel: 4 KB at most");
  return simt::launch(grid, block, shared, cluster, [=] { kernel(args...); });
}

inline int thread_anew() {
  return int(threadIdx.x);
}

inline void require_aligned(const void* at, size_t bytes) {
  if ((uintptr_t)at % bytes != 0) simt::fail(simt::MISALIGNED, "a misaligned access");
}

inline void mma16816(float c[4], const uint32_t a[4], const uint32_t b[2], LK_LINE) {
  simt::full_warp(~0u);
  simt::Slot& slot = simt::next_slot();
  const int g = simt::lane() / 4, q = simt::lane() % 4;
  const auto put = [](float* to, uint32_t two) {
    half x[2];
    memcpy(x, &two, 4);
    to[0] = float(x[0]);
    to[1] = float(x[1]);
  };
  for (int r = 0; r < 4; ++r) put(&slot.a[g + 8 * (r & 1)][2 * q + 8 * (r >> 1)], a[r]);
  for (int r = 0; r < 2; ++r) put(&slot.b[g][2 * q + 8 * r], b[r]);
  simt::wait(simt::warp().barrier, simt::Kind::MMA, line);
  for (int i = 0; i < 4; ++i) {
    const float* row = slot.a[g + 8 * (i >> 1)];
    c[i] = simt::toward_zero(simt::dot16(row, slot.b[2 * q + (i & 1)], c[i]));
  }
}

// Lane 8 i + r points to row r of the i-th matrix of 8 x 8.
inline void ldmatrix_x4(uint32_t to[4], const half* row, LK_LINE) {
  simt::full_warp(~0u);
  require_aligned(row, 16);
  simt::Slot& slot = simt::next_slot();
  memcpy(slot.lanes[simt::lane()], row, 16);
  simt::wait(simt::warp().barrier, simt::Kind::EXCHANGE, line);
  const int g = simt::lane() / 4, q = simt::lane() % 4;
  for (int i = 0; i < 4; ++i) memcpy(&to[i], slot.lanes[8 * i + g] + 4 * q, 4);
}
inline void ldmatrix_x4_trans(uint32_t to[4], const half* row, LK_LINE) {
  simt::full_warp(~0u);
  require_aligned(row, 16);
  simt::Slot& slot = simt::next_slot();
  memcpy(slot.lanes[simt::lane()], row, 16);
  simt::wait(simt::warp().barrier, simt::Kind::EXCHANGE, line);
  const int g = simt::lane() / 4, q = simt::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    char two[4];
    memcpy(two, slot.lanes[8 * i + 2 * q] + 2 * g, 2);
    memcpy(two + 2, slot.lanes[8 * i + 2 * q + 1] + 2 * g, 2);
    memcpy(&to[i], two, 4);
  }
}

inline int cluster_rank() {
  return int(simt::fiber->block - simt::cluster->data());
}
inline int cluster_size() {
  return int(simt::cluster->size());
}
inline void cluster_sync(LK_LINE) {
  simt::wait(simt::cluster_barrier, simt::Kind::CLUSTER, line);
}
template <class T>
T* cluster_smem(T* mine, int rank) {
  const simt::Block& own = *simt::fiber->block;
  const ptrdiff_t offset = (const char*)mine - own.shared;
  if (rank < 0 || rank >= cluster_size() || offset < 0 || offset >= ptrdiff_t(own.shared_bytes)) {
    simt::fail(simt::BAD_CLUSTER, "no such place in the cluster's shared memory");
  }
  const simt::Block& other = (*simt::cluster)[rank];
  if (other.live == 0) simt::fail(simt::BAD_CLUSTER, "the memory of a block that has ended");
  return (T*)(other.shared + offset);
}
