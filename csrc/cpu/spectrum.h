// Where the eigenvalues of a symmetric matrix lie.
#pragma once

#include <cmath>
#include <cstdint>

#include "matrix.h"
#include "team.h"

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

struct Interval {
  double low, high;
};

constexpr int LANCZOS_STEPS = 12;

// How many eigenvalues of the symmetric tridiagonal (alpha, beta) lie below x: Sturm's sequence.
inline int count_below(const double* alpha, const double* beta, int n, double x) {
  int count = 0;
  double pivot = 1.0;
  for (int i = 0; i < n; ++i) {
    pivot = alpha[i] - x - (i ? beta[i - 1] * beta[i - 1] / pivot : 0.0);
    if (pivot == 0.0) pivot = 1e-300;
    count += pivot < 0.0;
  }
  return count;
}

inline double tridiagonal_eigenvalue(const double* alpha, const double* beta, int n, int index) {
  double low = INFINITY, high = -INFINITY;  // Gershgorin's discs
  for (int i = 0; i < n; ++i) {
    const double radius = (i ? std::fabs(beta[i - 1]) : 0.0) + (i < n - 1 ? std::fabs(beta[i]) : 0.0);
    low = std::fmin(low, alpha[i] - radius);
    high = std::fmax(high, alpha[i] + radius);
  }
  for (int step = 0; step < 12; ++step) {  // the discs are a few times as wide as the spectrum
    const double middle = 0.5 * (low + high);
    (count_below(alpha, beta, n, middle) > index ? high : low) = middle;
  }
  return 0.5 * (low + high);
}

// An estimate, from inside, of the smallest and the largest eigenvalue of the symmetric `g` (n, n):
// a few steps of Lanczos' iteration. It is not a bound: who uses it checks the result.
// `work` holds 3 n floats.
inline Interval estimate_spectrum(const Team& team, int64_t n, View<const float> g, float* work) {
  float *v = work, *previous = work + n, *w = work + 2 * n;
  double alpha[LANCZOS_STEPS], beta[LANCZOS_STEPS];
  uint32_t state = 12345;  // a fixed start without any structure of its own
  double square = 0;
  for (int64_t i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    v[i] = float(state >> 8) / float(1 << 24) - 0.4f;
    previous[i] = 0;
    square += double(v[i]) * v[i];
  }
  for (int64_t i = 0; i < n; ++i) v[i] = float(v[i] / std::sqrt(square));
  int steps = 0;
  for (double last = 0; steps < LANCZOS_STEPS && steps < n;) {
    // Columns, which are rows too, times numbers: no sum over the lanes of a vector.
    constexpr int64_t BLOCK = 64;
    team.each((n + BLOCK - 1) / BLOCK, BLOCK * n / 16, [&](int64_t block) {
      const int64_t i0 = block * BLOCK, width = n - i0 < BLOCK ? n - i0 : BLOCK;
      float sum[BLOCK];
      for (int64_t i = 0; i < width; ++i) sum[i] = -float(last) * previous[i0 + i];
      for (int64_t j = 0; j < n; ++j) {
        const float x = v[j], *row = g.data + j * g.rs + i0;
        if (width == BLOCK) {
          for (int i = 0; i < BLOCK; ++i) sum[i] += x * row[i];
        } else {
          for (int64_t i = 0; i < width; ++i) sum[i] += x * row[i];
        }
      }
      for (int64_t i = 0; i < width; ++i) w[i0 + i] = sum[i];
    });
    const double a = dot(v, w, n);
    for (int64_t i = 0; i < n; ++i) w[i] = float(w[i] - a * v[i]);
    const double norm = std::sqrt(dot(w, w, n)), inverse = norm > 0 ? 1 / norm : 0.0;
    for (int64_t i = 0; i < n; ++i) {
      previous[i] = v[i];
      v[i] = float(w[i] * inverse);
    }
    alpha[steps] = a;
    beta[steps++] = last = norm;
    if (norm <= 1e-6 * std::fabs(alpha[0])) break;  // an invariant subspace: all is known
  }
  return {tridiagonal_eigenvalue(alpha, beta, steps, 0),
          tridiagonal_eigenvalue(alpha, beta, steps, steps - 1)};
}

// The interval with what the estimate may have missed at its ends.
inline Interval widened(Interval x) {
  const double slack = 0.04 * (x.high - x.low) + 1e-6 * std::fabs(x.high);
  return {x.low - slack, x.high + slack};
}

}  // namespace
}  // namespace lipkernels
