// What kernels share: reductions in a fixed order, 16-byte accesses, formats, and matrices as two
// half-precision planes in shared memory with the products of their tiles.
//
//   x = (hi + lo) / scale,    hi = fp16(scale x),    lo = fp16(scale x - hi)
//
// as in lipkernels/kernels/triton/planes.py. A product of planes is hi hi + hi lo + lo hi: all but
// 2^-22 of the whole. Rows of planes begin at multiples of 16 bytes that are odd multiples of 16
// bytes apart, so that eight rows of a fragment lie in different banks.
#pragma once

#include "runtime.h"

constexpr unsigned FULL_WARP = ~0u;

// ------------------------------------------------------------------------------------- reductions
// Every lane, or thread, gets the same bits.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(FULL_WARP, x, bits);
  return x;
}
__device__ __forceinline__ int warp_max(int x) {
  for (int bits = 16; bits > 0; bits /= 2) x = max(x, __shfl_xor_sync(FULL_WARP, x, bits));
  return x;
}

// `scratch`: shared, a T for every warp. All threads of the block call; whole warps.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  const int warps = int(blockDim.x) / 32;
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = scratch[0];
  for (int w = 1; w < warps; ++w) sum += scratch[w];
  __syncthreads();  // before the next one writes there
  return sum;
}
__device__ __forceinline__ int block_max(int x, int* scratch) {
  const int warps = int(blockDim.x) / 32;
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  int largest = scratch[0];
  for (int w = 1; w < warps; ++w) largest = max(largest, scratch[w]);
  __syncthreads();
  return largest;
}

// The sum over a cluster, of numbers that each block has one of: `mine` is shared memory. The last
// reader is done before the memory may change: cluster_sync() before and after.
template <class T>
__device__ __forceinline__ T cluster_sum(T* mine) {
  cluster_sync();
  T sum = *cluster_smem(mine, 0);
  for (int rank = 1; rank < cluster_size(); ++rank) sum += *cluster_smem(mine, rank);
  cluster_sync();
  return sum;
}

// ---------------------------------------------------------------------------------------- formats
// As lipkernels.kernels.cuda numbers them.
enum Format : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

__device__ __forceinline__ float to_float(float x) {
  return x;
}

// Element `at` of an array in a format.
__device__ __forceinline__ float load_as_float(const void* array, int64_t at, int format) {
  if (format == FLOAT16) return to_float(static_cast<const half*>(array)[at]);
  if (format == BFLOAT16) return to_float(static_cast<const bfloat16*>(array)[at]);
  return static_cast<const float*>(array)[at];
}
__device__ __forceinline__ void store_from_float(void* array, int64_t at, int format, float x) {
  if (format == FLOAT16) {
    static_cast<half*>(array)[at] = to_half(x);
  } else if (format == BFLOAT16) {
    static_cast<bfloat16*>(array)[at] = to_bfloat16(x);
  } else {
    static_cast<float*>(array)[at] = x;
  }
}
// What a number becomes in a format.
__device__ __forceinline__ float rounded_to(float x, int format) {
  if (format == FLOAT16) return to_float(to_half(x));
  if (format == BFLOAT16) return to_float(to_bfloat16(x));
  return x;
}

// Four neighbours at once: 16 bytes of float32, 8 of half precision; aligned to that.
__device__ __forceinline__ float4 load_four(const void* array, int64_t at, int format) {
  if (format == FLOAT32) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(array) + at);
    require_aligned(from, 16);
    return *from;
  }
  const uint2* from = reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(array) + at);
  require_aligned(from, 8);
  const uint2 four = *from;
  const uint32_t bits[4] = {four.x & 0xFFFF, four.x >> 16, four.y & 0xFFFF, four.y >> 16};
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint16_t one = uint16_t(bits[i]);
    half number;
    memcpy(&number, &one, 2);
    x[i] = format == FLOAT16 ? to_float(number) : __uint_as_float(bits[i] << 16);
  }
  return {x[0], x[1], x[2], x[3]};
}
__device__ __forceinline__ void store_four(float* array, int64_t at, float4 x) {
  float4* to = reinterpret_cast<float4*>(array + at);
  require_aligned(to, 16);
  *to = x;
}

// 2^e, e in [-149, 127], and floor(log2 x) of a positive number from its bits: subnormal ones too.
__device__ __forceinline__ float power_of_two(int e) {
  return __int_as_float(e >= -126 ? (e + 127) << 23 : 1 << (e + 149));
}
__device__ __forceinline__ int exponent_of(int bits) {
  return bits >= 0x00800000 ? (bits >> 23) - 127 : 31 - __clz(unsigned(bits)) - 149;
}

// ----------------------------------------------------------------------------------------- planes
__device__ __forceinline__ uint32_t bits_of(half x) {
  uint16_t bits;
  memcpy(&bits, &x, 2);
  return bits;
}

struct Planes {
  half* hi;
  half* lo;
  int ld;  // of both

  __device__ __forceinline__ void put(int row, int col, float scaled) const {
    const half high = to_half(scaled);
    hi[row * ld + col] = high;
    lo[row * ld + col] = to_half(scaled - to_float(high));
  }
  // Four neighbours in a row, the first in a column that is a multiple of four.
  __device__ __forceinline__ void put_four(int row, int col, float4 scaled) const {
    const float x[4] = {scaled.x, scaled.y, scaled.z, scaled.w};
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const half first = to_half(x[i]);
      high[i] = bits_of(first);
      low[i] = bits_of(to_half(x[i] - to_float(first)));
    }
    *reinterpret_cast<uint2*>(hi + row * ld + col) = {high[0] | high[1] << 16,
                                                      high[2] | high[3] << 16};
    *reinterpret_cast<uint2*>(lo + row * ld + col) = {low[0] | low[1] << 16, low[2] | low[3] << 16};
  }
  // The number times its scale.
  __device__ __forceinline__ float get(int row, int col) const {
    return to_float(hi[row * ld + col]) + to_float(lo[row * ld + col]);
  }
  // A symmetric matrix from its lower triangle: equal bits on both sides.
  __device__ __forceinline__ void put_symmetric(int row, int col, float scaled) const {
    if (col <= row) put(row, col, scaled);
    if (col < row) put(col, row, scaled);
  }
};

__host__ __device__ constexpr int plane_stride(int cols) {
  return cols + 8;  // cols is a multiple of 16
}
__host__ __device__ constexpr int plane_bytes(int rows, int cols) {
  return 2 * 2 * rows * plane_stride(cols);
}
__device__ __forceinline__ Planes planes_at(char* at, int rows, int cols) {
  half* hi = reinterpret_cast<half*>(at);
  return {hi, hi + rows * plane_stride(cols), plane_stride(cols)};
}

// A warp's part of a product: 16 rows, 8 N columns; as mma.m16n8k16 has it in registers.
template <int N>
struct Accumulator {
  float value[N][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) value[j][e] = 0.0f;
    }
  }
  // f(row, column, value) for every entry that this lane has, counted from (row0, col0).
  template <class F>
  __device__ __forceinline__ void each(int row0, int col0, F f) {
    const int lane = thread_anew() % 32;
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        f(row0 + lane / 4 + 8 * (e / 2), col0 + 8 * j + 2 * (lane % 4) + e % 2, value[j][e]);
      }
    }
  }
};

// Fragments of a 16 x 16 tile whose rows are those of the left factor, or of 16 columns of the
// right one; the right factor's are stored by columns (`B^T`) or by rows (`B`).
__device__ __forceinline__ void load_left(uint32_t to[4], const half* tile, int ld) {
  const int lane = int(threadIdx.x) % 32;
  ldmatrix_x4(to, tile + (lane % 16) * ld + lane / 16 * 8);
}
// to[0..1]: columns 0..7; to[2..3]: columns 8..15
__device__ __forceinline__ void load_right_by_columns(uint32_t to[4], const half* tile, int ld) {
  const int lane = int(threadIdx.x) % 32;
  ldmatrix_x4(to, tile + (lane / 16 * 8 + lane % 8) * ld + lane / 8 % 2 * 8);
}
__device__ __forceinline__ void load_right_by_rows(uint32_t to[4], const half* tile, int ld) {
  const int lane = int(threadIdx.x) % 32;
  ldmatrix_x4_trans(to, tile + (lane / 8 % 2 * 8 + lane % 8) * ld + lane / 16 * 8);
}

enum Right { BY_ROWS, BY_COLUMNS };

// acc += A B, the right factor stored by rows, or by columns (row j of `b` is column j of it), over
// `depth`, a multiple of 16. A warp has rows row0 .. row0 + 15 and columns col0 .. col0 + 8 N - 1;
// tiles that begin at column `col_end` or later are left out.
//
// Note [Cut off sums]
// Tensor cores do not round what they add to an accumulator, they cut it off: a long sum comes out
// too small. Here every 16 terms are summed by themselves, the small ones first, and added to `acc`
// by an ordinary float32 addition.
template <Right STORED, int N>
__device__ __forceinline__ void multiply(Accumulator<N>& acc, const Planes& a, const Planes& b,
                                         int row0, int col0, int depth, int col_end) {
  static_assert(N % 2 == 0, "tiles of 16 columns");
#pragma unroll 1
  for (int k = 0; k < depth && col0 < col_end; k += 16) {
    uint32_t a_hi[4], a_lo[4];
    load_left(a_hi, a.hi + row0 * a.ld + k, a.ld);
    load_left(a_lo, a.lo + row0 * a.ld + k, a.ld);
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      const int col = col0 + 8 * j;
      if (col >= col_end) break;  // the same for all lanes
      uint32_t b_hi[4], b_lo[4];
      if (STORED == BY_COLUMNS) {
        load_right_by_columns(b_hi, b.hi + col * b.ld + k, b.ld);
        load_right_by_columns(b_lo, b.lo + col * b.ld + k, b.ld);
      } else {
        load_right_by_rows(b_hi, b.hi + k * b.ld + col, b.ld);
        load_right_by_rows(b_lo, b.lo + k * b.ld + col, b.ld);
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        mma16816(part, a_lo, b_hi + 2 * side);
        mma16816(part, a_hi, b_lo + 2 * side);
        mma16816(part, a_hi, b_hi + 2 * side);
#pragma unroll
        for (int e = 0; e < 4; ++e) acc.value[j + side][e] += part[e];
      }
    }
  }
}
