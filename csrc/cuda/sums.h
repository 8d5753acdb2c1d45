// Sums in float32, and those whose errors are added up too: as if in twice the precision.
#pragma once

#include "primitives.h"

namespace {

struct Plain {
  float sum = 0.0f;

  __device__ __forceinline__ void add(float x) { sum = __fadd_rn(sum, x); }
  __device__ __forceinline__ void add(float a, float b) { sum = __fmaf_rn(a, b, sum); }
  __device__ __forceinline__ void add(Plain other) { add(other.sum); }
  __device__ __forceinline__ Plain from(int bits) const {
    return {__shfl_xor_sync(FULL_WARP, sum, bits)};
  }
  __device__ __forceinline__ float value() const { return sum; }
};

// sum + rest: as if added in twice the precision. Knuth's sum and its error, exact in any order.
struct Compensated {
  float sum = 0.0f, rest = 0.0f;

  __device__ __forceinline__ void add(float x) {
    const float next = __fadd_rn(sum, x);
    const float of_x = __fadd_rn(next, -sum);
    const float error = __fadd_rn(__fadd_rn(sum, -__fadd_rn(next, -of_x)), __fadd_rn(x, -of_x));
    rest = __fadd_rn(rest, error);
    sum = next;
  }
  __device__ __forceinline__ void add(float a, float b) {
    const float product = __fmul_rn(a, b);
    rest = __fadd_rn(rest, __fmaf_rn(a, b, -product));
    add(product);
  }
  __device__ __forceinline__ void add(Compensated other) {
    const float rests = __fadd_rn(rest, other.rest);  // as the other one of two lanes has it
    rest = 0.0f;
    add(other.sum);
    rest = __fadd_rn(rests, rest);
  }
  __device__ __forceinline__ Compensated from(int bits) const {
    return {__shfl_xor_sync(FULL_WARP, sum, bits), __shfl_xor_sync(FULL_WARP, rest, bits)};
  }
  __device__ __forceinline__ float value() const { return __fadd_rn(sum, rest); }
};

template <class Sum>
__device__ __forceinline__ Sum sum_of_warp(Sum x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x.add(x.from(bits));
  return x;
}

}  // namespace
