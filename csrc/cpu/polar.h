// The polar factor W = P U of a well-conditioned float32 matrix by products alone, or of another one
// from eigenvectors. The mathematics is that of lipkernels/reference/polar.py; m <= n throughout (a
// tall matrix is read by columns).
//
// G = W W^T; Q = G^(-1/2) as one Chebyshev polynomial on the interval where the eigenvalues of G seem
// to lie; U = Q W. Whatever that estimate was worth, the last step sees to the norm: see defect.h.
#pragma once

#include <cmath>
#include <cstring>

#include "defect.h"
#include "range.h"
#include "refine.h"
#include "series.h"
#include "spectrum.h"

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

// sigma_max / sigma_min up to which products beat an eigendecomposition.
constexpr double MAX_CONDITION = 4.0;
// The same for an eigendecomposition in float32, with room for an estimate that is too small.
constexpr double MAX_CONDITION_FLOAT32 = 10.0;
// Error of U's singular values before the last step, with a step to follow and without one.
constexpr double LOOSE_SERIES = 1e-4, TIGHT_SERIES = 5e-8;

struct Forward {
  const float* weight;
  float *result, *factor, *spectrum, *scalars;
  int64_t rows, cols;
  double scale, margin;
  int32_t* status;
};

inline void polar_forward(const Team& team, const Forward& job, Workspace space) {
  const int64_t m = job.rows < job.cols ? job.rows : job.cols;
  const int64_t n = job.rows < job.cols ? job.cols : job.rows, ld = padded(m);
  const View<const float> w = wide_view(job.weight, job.rows, job.cols);
  const View<float> u = wide_view(job.result, job.rows, job.cols);
  const auto give_up = [&](Status why) { *job.status = why; };

  double* partial = space.take<double>(n);
  const double largest = largest_entry(team, job.rows, job.cols, job.weight, partial);
  if (!(largest <= LARGEST && largest >= SMALLEST)) return give_up(EXTREME);

  const int64_t packed_floats = packed_size<float>(n > m ? n : m, n > m ? m : n);
  float* packed = space.take<float>(packed_floats > packed_size<float>(m, n) ? packed_floats
                                                                              : packed_size<float>(m, n));
  float* vectors = space.take<float>(3 * m);
  Basis y{m, ld, 1, space.take<float>(7 * m * ld), packed};
  View<float> a = y.t(1);
  gemm<float>(team, m, m, n, w, w.t(), a, 1.0f, 0.0f, true, packed);
  mirror(team, m, a);

  const Interval ritz = estimate_spectrum(team, m, read_only(a), vectors);
  const Interval range = widened(ritz);
  if (!(range.high < range.low * MAX_CONDITION * MAX_CONDITION)) {
    if (pays(team, m, n, read_only(a), partial)) return give_up(FEW_SMALL);
    const bool is_very = !(ritz.high < ritz.low * MAX_CONDITION_FLOAT32 * MAX_CONDITION_FLOAT32);
    return give_up(is_very ? VERY_ILL_CONDITIONED : ILL_CONDITIONED);
  }
  const double middle = 0.5 * (range.low + range.high);
  const double delta = std::fmax(0.5 * (range.high - range.low) / middle, 1e-6);
  // A polynomial of G commutes with G: its error leaves the direction of U alone, and the step that
  // a square matrix takes anyway squares it. The others keep Q for backward, which no step improves.
  const Series inverse_root = inverse_root_series(delta, m == n ? LOOSE_SERIES : TIGHT_SERIES);
  if (inverse_root.degree < 0) return give_up(ILL_CONDITIONED);
  y.q = best_block(inverse_root.degree);
  // y = (G / middle - I) / delta has its eigenvalues in [-1, 1].
  team.each(m, m / 8, [&](int64_t i) {
    float* row = a.row(i);
    for (int64_t j = 0; j < m; ++j) row[j] *= float(1 / (middle * delta));
    a(i, i) -= float(1 / delta);
  });
  raise(team, y, inverse_root);
  View<float> q = rows_of(y.first + (int64_t)y.q * m * ld, ld);
  View<float> other = rows_of(y.first + (int64_t)(y.q + 1) * m * ld, ld);
  polynomial(team, y, inverse_root, 1 / std::sqrt(middle), q, other);
  gemm<float>(team, m, n, m, read_only(q), w, u, 1.0f, 0.0f, false, packed);

  double error = 0;
  const double factor = finish(team, m, n, u, job.scale, job.margin, &error, space);
  if (!(error <= MAX_DEFECT)) return give_up(ILL_CONDITIONED);
  if (m == n) {  // backward needs P = W U^T alone
    gemm<float>(team, m, m, n, w, read_only(u).t(), q, float(1 / factor), 0.0f, true, packed);
    mirror(team, m, q);
  }
  team.each(m, m / 8, [&](int64_t i) {
    std::memcpy(job.factor + i * m, q.row(i), m * sizeof(float));
  });
  for (int64_t i = 0; i < m; ++i) job.spectrum[i] = -1.0f;
  job.scalars[0] = 1.0f;
  job.scalars[1] = float(factor);
  *job.status = DONE;
}

struct FromEigenvectors {
  const float* weight;
  const double *vectors, *p;  // P = V diag(p) V^T: V (m, m), any strides, and p (m), ascending
  int64_t vectors_rs, vectors_cs;
  float *result, *factor, *spectrum, *scalars;
  int64_t rows, cols;
  double scale, margin;
};

// Singular values below this part of the largest one lose digits in float32.
constexpr double SMALL_SINGULAR = 0.125;

// U = V (p^-1 V^T W). The rows of the bracket are orthonormal: those of the small p, which are small
// differences before the division, come from a product in float64. Then the last step.
inline void polar_from_eigenvectors(const Team& team, const FromEigenvectors& job, Workspace space) {
  const int64_t m = job.rows < job.cols ? job.rows : job.cols;
  const int64_t n = job.rows < job.cols ? job.cols : job.rows, ld = padded(n);
  const View<const float> w = wide_view(job.weight, job.rows, job.cols);
  const View<float> u = wide_view(job.result, job.rows, job.cols);
  const View<const double> v{job.vectors, job.vectors_rs, job.vectors_cs};
  View<float> b = rows_of(space.take<float>(m * ld), ld);
  const View<float> factor{job.factor, m, 1};
  double* packed = space.take<double>(packed_for(m, n));
  constexpr int64_t BLOCK = 64;  // of rows and columns, one of which strides
  team.each((m + BLOCK - 1) / BLOCK, BLOCK * m, [&](int64_t block) {
    const int64_t i0 = block * BLOCK, i1 = i0 + BLOCK < m ? i0 + BLOCK : m;
    for (int64_t j = 0; j < m; ++j)
      for (int64_t i = i0; i < i1; ++i) factor(i, j) = float(v(i, j));
    for (int64_t i = i0; i < i1; ++i) job.spectrum[i] = float(job.p[i]);
  });
  int64_t small = 0;
  while (small < m && !(job.p[small] > SMALL_SINGULAR * job.p[m - 1])) ++small;
  gemm<double>(team, small, n, m, v.t(), w, b, 1.0, 0.0, false, packed);
  gemm<float>(team, m - small, n, m, View<const float>{factor.data + small, 1, m}, w,
              View<float>{b.row(small), ld, 1}, 1.0f, 0.0f, false, (float*)packed);
  team.each(m, n / 8, [&](int64_t i) {
    const float inverse = job.p[i] > 0 ? float(1 / job.p[i]) : 0.0f;
    float* row = b.row(i);
    for (int64_t j = 0; j < n; ++j) row[j] *= inverse;
  });
  gemm<float>(team, m, n, m, read_only(factor), read_only(b), u, 1.0f, 0.0f, false, (float*)packed);
  double error = 0;
  job.scalars[0] = 1.0f;
  job.scalars[1] = float(finish(team, m, n, u, job.scale, job.margin, &error, space));
}

}  // namespace
}  // namespace lipkernels
