// Holding a weight on the constraint instead of reparametrizing it: see reference/retract.py for the
// mathematics. m <= n, X = W / scale, E = I - X X^T.
#pragma once

#include "polar.h"

namespace lipkernels {
namespace {

// |E|_F beyond which the polynomial below is not worth its while.
constexpr double MAX_STEP = 0.9;

// The largest c for which sigma (1 + e / 2 + c e^2), e = 1 - sigma^2, is at most one for every e in
// [-b, 1]: with it, e = -b gives one exactly. At b = 0 it is 3/8, the next term of the series.
inline double second_coefficient(double b) {
  if (b < 1e-3) return 0.375 - 0.3125 * b - 1e-5;  // its series from below; no cancellation
  return std::fmax(0.0, ((1 / std::sqrt(1 + b) - 1 + 0.5 * b) / (b * b)) * (1 - 1e-6));
}

struct Retract {
  float* weight;  // in place
  int64_t rows, cols;
  double scale, margin;
  int32_t* status;
};

// X <- (I + E / 2 + c E^2) X, a little less for what rounding adds, with c so small that no singular value passes one.
inline void polar_retract(const Team& team, const Retract& job, Workspace space) {
  const int64_t m = job.rows < job.cols ? job.rows : job.cols;
  const int64_t n = job.rows < job.cols ? job.cols : job.rows, ld = padded(m);
  const View<float> w = wide_view(job.weight, job.rows, job.cols);
  View<double> e = rows_of(space.take<double>(m * ld), ld);
  View<float> single = rows_of(space.take<float>(m * ld), ld);
  View<float> squared = rows_of(space.take<float>(m * ld), ld);
  double* partial = space.take<double>(m);
  double* packed = space.take<double>(packed_size<double>(n > m ? n : m, m));

  const double frobenius =
      defect(team, m, n, read_only(w), 1 / (job.scale * job.scale), e, packed, partial);
  if (!(frobenius <= MAX_STEP)) {  // a NaN fails the comparison too
    *job.status = ILL_CONDITIONED;
    return;
  }
  to_single(team, m, e, single);
  gemm<float>(team, m, m, m, read_only(single), read_only(single), squared, 1.0f, 0.0f, true,
              (float*)packed);
  // |E|_2 <= |E^2|_F^(1/2), the rounding of the product included.
  const double u = 5.97e-8;  // a little more than 2^-24
  const double rounding = double((m < KC ? m : KC) + m / KC + 3) * u;  // of a sum over m, relatively
  const double square = square_of_lower(team, m, squared, partial);
  const double norm = std::fmin(
      frobenius, std::sqrt(std::sqrt(square) + rounding * frobenius * frobenius));
  const double c = second_coefficient(norm);
  team.each(m, m / 16, [&](int64_t i) {
    float* to = squared.row(i);
    const float* from = single.row(i);
    for (int64_t j = 0; j <= i; ++j) to[j] = 0.5f * from[j] + float(c) * to[j];
  });
  mirror(team, m, squared);
  // What float32 does to the correction: |fl(C X) - C X|_F <= rounding |C|_F |X|_F, and C's own.
  const double correction = 0.5 * frobenius + c * frobenius * frobenius;
  const double lost = 3 * rounding * correction * std::sqrt(double(m) * (1 + norm));
  const float factor = float(job.margin / (1 + lost));
  gemm<float>(team, m, n, m, read_only(squared), read_only(w), w, factor, factor, false,
              (float*)packed);
  *job.status = DONE;
}

struct Project {
  float* grad;  // in place
  const float* weight;
  int64_t rows, cols;
  double scale;
};

// G <- G - (G X^T + X G^T) X / 2
inline void polar_project(const Team& team, const Project& job, Workspace space) {
  const int64_t m = job.rows < job.cols ? job.rows : job.cols;
  const int64_t n = job.rows < job.cols ? job.cols : job.rows, ld = padded(m);
  const View<float> g = wide_view(job.grad, job.rows, job.cols);
  const View<const float> w = wide_view(job.weight, job.rows, job.cols);
  View<float> t = rows_of(space.take<float>(m * ld), ld);
  View<float> symmetric = rows_of(space.take<float>(m * ld), ld);
  const int64_t tall = packed_size<float>(n, m), wide = packed_size<float>(m, n);
  float* packed = space.take<float>(tall > wide ? tall : wide);
  const float inverse = float(1 / job.scale);  // once in each product: its square may overflow
  gemm<float>(team, m, m, n, read_only(g), w.t(), t, -0.5f * inverse, 0.0f, false, packed);
  team.each(m, m / 8, [&](int64_t i) {
    float* to = symmetric.row(i);
    const float *from = t.row(i), *column = t.data + i;
    for (int64_t j = 0; j < m; ++j) to[j] = from[j] + column[j * ld];
  });
  gemm<float>(team, m, n, m, read_only(symmetric), w, g, inverse, 1.0f, false, packed);
}

}  // namespace
}  // namespace lipkernels
