// Holding a weight on the constraint instead of reparametrizing it: see reference/retract.py for the
// mathematics. m <= n, X = W / scale, E = I - X X^T.
#pragma once

#include "defect.h"
#include "range.h"

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

// |E|_F up to which a large matrix leaves E^2 to the next call: X + E X / 2 leaves 3/4 |E|_2^2, 1%.
constexpr double MAX_PLAIN_STEP = 0.125;
// Rows that a float32 Gram matrix is summed over before a double takes the sum.
constexpr int COARSE_DEPTH = 16;
// How many times what that may round the defect has to be.
constexpr double ENOUGH = 64;
// Scales whose squares leave float32 its digits.
constexpr double SMALLEST_COARSE = 1.0 / 256, LARGEST_COARSE = 256;

// Multiplications m^2 n from which time is worth more than the last digits of a large step; the next
// call, after a smaller one, finds them.
constexpr int64_t WORTH_HURRYING = 1 << 22;

// The same in the trace of a Gram matrix of an orthogonal X summed in chunks.
inline double coarse_rounding(int64_t m) { return (COARSE_DEPTH + 1) * UNIT * double(m); }

// |E|_F at most, and how much of it is what a float32 Gram matrix may have rounded.
struct Defect {
  double norm, rounding;
};

// As `defect`, with products in float32: a third of the time, and worse than what an orthogonal
// matrix needs, but not than what a step leaves.
inline Defect coarse_defect(const Team& team, int64_t m, int64_t n, View<const float> x,
                            double factor, View<double> e, float* packed, double* partial) {
  gemm<float, COARSE_DEPTH>(team, m, m, n, x, x.t(), e, -factor, 0.0, true, packed);
  double trace = 0;  // of X X^T, positive terms: as exact as each of them
  for (int64_t i = 0; i < m; ++i) {
    trace -= e(i, i);
    e(i, i) += 1.0;
  }
  // |fl(X X^T) - X X^T|_F <= gamma | |X| |X|^T |_F <= gamma |X|_F^2; what subnormal numbers lose,
  // rounded or flushed to zero, is far below 1e-30 each.
  const double rounding = (COARSE_DEPTH + 1) * UNIT * trace + double(n) * double(m) * factor * 1e-30;
  return {std::sqrt(square_of_lower(team, m, e, partial)) * (1 + 1e-12) + rounding, rounding};
}

// sum_i a[i] x(i, k) for every k, where x's rows or columns are contiguous.
inline void combined(const Team& team, int64_t m, int64_t n, View<const float> x, const float* a,
                     float* to) {
  constexpr int64_t BLOCK = 64;
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  team.each(blocks, BLOCK * m / 8, [&](int64_t b) {
    const int64_t k0 = b * BLOCK, width = n - k0 < BLOCK ? n - k0 : BLOCK;
    float sum[BLOCK] = {};
    if (x.cs == 1) {
      for (int64_t i = 0; i < m; ++i) {
        const float* row = x.row(i) + k0;
        for (int64_t k = 0; k < width; ++k) sum[k] += a[i] * row[k];
      }
    } else {
      for (int64_t k = 0; k < width; ++k) {
        const float* column = x.data + (k0 + k) * x.cs;
        float lanes[16] = {};
        int64_t i = 0;
        for (; i + 16 <= m; i += 16)
          for (int l = 0; l < 16; ++l) lanes[l] += a[i + l] * column[i + l];
        for (; i < m; ++i) sum[k] += a[i] * column[i];
        for (int l = 0; l < 16; ++l) sum[k] += lanes[l];
      }
    }
    for (int64_t k = 0; k < width; ++k) to[k0 + k] = sum[k];
  });
}

// |E z| for signs z: its square is |E|_F^2 on average over the signs. To choose by, not to trust.
inline double estimated_defect(const Team& team, int64_t m, int64_t n, View<const float> x,
                               double factor, float* scratch) {
  float *signs = scratch, *y = signs + padded(m), *z = y + padded(n);
  uint32_t state = 1;
  for (int64_t i = 0; i < m; ++i) {
    state = state * 1664525u + 1013904223u;
    signs[i] = state >> 31 ? 1.0f : -1.0f;
  }
  combined(team, m, n, x, signs, y);
  combined(team, n, m, x.t(), y, z);
  double square = 0;
  for (int64_t i = 0; i < m; ++i) {
    const double left = signs[i] - factor * z[i];
    square += left * left;
  }
  return std::sqrt(square);
}

struct Retract {
  float* weight;  // in place
  int64_t rows, cols;
  double scale, margin;
  int32_t* status;
};

// X <- (I + E / 2 + c E^2) X, a little less for what rounding adds, with c so small that no singular
// value passes one.
inline void polar_retract(const Team& team, const Retract& job, Workspace space) {
  const int64_t m = job.rows < job.cols ? job.rows : job.cols;
  const int64_t n = job.rows < job.cols ? job.cols : job.rows, ld = padded(m);
  const View<float> w = wide_view(job.weight, job.rows, job.cols);
  View<double> e = rows_of(space.take<double>(m * ld), ld);
  View<float> single = rows_of(space.take<float>(m * ld), ld);
  View<float> squared = rows_of(space.take<float>(m * ld), ld);
  double* partial = space.take<double>(m);
  double* packed = space.take<double>(packed_size<double>(n > m ? n : m, m));

  const double inverse = 1 / (job.scale * job.scale);
  Defect found{};
  const bool hurries = m * m * n >= WORTH_HURRYING;
  if (hurries && job.scale >= SMALLEST_COARSE && job.scale <= LARGEST_COARSE &&
      estimated_defect(team, m, n, read_only(w), inverse, (float*)packed) > ENOUGH * coarse_rounding(m))
    found = coarse_defect(team, m, n, read_only(w), inverse, e, (float*)packed, partial);
  if (!(found.norm > 0.5 * ENOUGH * coarse_rounding(m)))  // not asked for, or not worth it
    found = {defect(team, m, n, read_only(w), inverse, e, packed, partial), 0.0};
  const double frobenius = found.norm;
  if (!(frobenius <= MAX_STEP)) {  // a NaN fails the comparison too
    *job.status = ILL_CONDITIONED;
    return;
  }
  to_single(team, m, e, single);
  double norm = frobenius, c = 0;
  if (frobenius > (hurries ? MAX_PLAIN_STEP : 0.0)) {
    gemm<float>(team, m, m, m, read_only(single), read_only(single), squared, 1.0f, 0.0f, true,
                (float*)packed);
    // |E|_2 <= |E^2|_F^(1/2), the rounding of the product included.
    const double square = square_of_lower(team, m, squared, partial);
    norm = std::fmin(norm, std::sqrt(std::sqrt(square) + sum_rounding(m) * frobenius * frobenius) +
                               found.rounding);
    c = second_coefficient(norm);
    team.each(m, m / 16, [&](int64_t i) {
      float* to = squared.row(i);
      const float* from = single.row(i);
      for (int64_t j = 0; j <= i; ++j) to[j] = 0.5f * from[j] + float(c) * to[j];
    });
    mirror(team, m, squared);
  } else {
    std::swap(single, squared);  // C = E / 2: the products below halve it
  }
  const double correction = 0.5 * frobenius + c * frobenius * frobenius;
  // And a Gram matrix that is off by D makes it off by D / 2 + c (E D + D E + D^2).
  const double off = found.rounding * (0.5 + c * (2 * frobenius + found.rounding));
  const double lost =
      correction_rounding(m, correction, norm) + off * std::sqrt(1 + norm);
  const float factor = float(job.margin / (1 + lost));
  gemm<float>(team, m, n, m, read_only(squared), read_only(w), w, c > 0 ? factor : 0.5f * factor,
              factor, false, (float*)packed, digits_by_size(job.scale));
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
  const Digits digits = digits_by_size(team, job.rows, job.cols, job.grad, job.scale,
                                  space.take<double>(job.rows));
  const float inverse = float(1 / job.scale);  // once in each product: its square may overflow
  gemm<float>(team, m, m, n, read_only(g), w.t(), t, -0.5f * inverse, 0.0f, false, packed,
              digits);
  const auto add = [&](int64_t i, int64_t j0, int64_t j1, const float* turned) {
    float* to = symmetric.row(i);
    const float* from = t.row(i);
    for (int64_t j = j0; j < j1; ++j) to[j] = from[j] + turned[j - j0];
  };
  with_transpose<float>(team, m, read_only(t), false, add);
  gemm<float>(team, m, n, m, read_only(symmetric), w, g, inverse, 1.0f, false, packed, digits);
}

}  // namespace
}  // namespace lipkernels
