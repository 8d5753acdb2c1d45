// The gradient of the polar factor W = P U; m <= n throughout.
//
// P Y + Y P = C, C = T - T^T, T = Gamma U^T, by conjugate gradients on skew Y: one product a step,
// since Y P = -(P Y)^T. Wide matrices keep Q = P^(-1) and not P: Q times the equation times Q is
// Q Y + Y Q = Q C Q. After an eigendecomposition the equation is solved entry by entry.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "defect.h"
#include "range.h"

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

constexpr double CG_TOLERANCE = 3e-7;
constexpr int CG_STEPS = 100;

// Solves A Y + Y A = C for skew C, A symmetric positive definite; C is overwritten. All (m, ld).
inline void lyapunov(const Team& team, int64_t m, View<const float> a, View<float> c,
                     View<float> y, View<float> d, View<float> h, double* partial, float* packed,
                     Digits digits) {
  const auto squared = [&](View<float> x) {
    return sum_over_rows(team, m, partial, [&](int64_t i) { return dot(x.row(i), x.row(i), m); });
  };
  team.each(m, m / 8, [&](int64_t i) {
    std::memcpy(d.row(i), c.row(i), m * sizeof(float));
    std::memset(y.row(i), 0, m * sizeof(float));
  });
  double rest = squared(c);
  if (!std::isfinite(rest)) {  // an incoming gradient that is not, or overflows: so is what goes out
    team.each(m, m / 8, [&](int64_t i) {
      for (int64_t j = 0; j < m; ++j) y(i, j) = NAN;
    });
    return;
  }
  const double enough = rest * CG_TOLERANCE * CG_TOLERANCE;
  // What a product may get wrong, relative to the direction, grows as the rest gets smaller (Simoncini
  // and Szyld, 2003): C is wrong by this in the end.
  const double few = enough * (1 << 15), half = enough * std::ldexp(1.0, 32);
  Kept kept;
  Digits allowed = digits;
  // The rest's Rayleigh quotient <C, A C + C A> / |C|^2 before the last two steps, and by how much more
  // than the direction's, the inverse of a step's length, the next one is; how many times as large the
  // last step left the rest (squared), and the worst one.
  double value = 0, value_before = 0, carried = 0, turn = 0, worst = 0;
  for (int step = 0; step < CG_STEPS && rest > enough; ++step) {
    if (step > 1) {
      // The last step needs no product where its length is known, because the quotients hardly change
      // any more. One fast step is no reason to expect another: of a spectrum in clusters each step
      // resolves one, and what is left inside of them takes as many again.
      const double length = 1 / (value - carried), off = length * (value - value_before);
      if (length > 0 && rest * (turn + off * off) <= enough && rest * worst <= 4 * enough) {
        team.each(m, m / 8, [&](int64_t i) {
          float* yi = y.row(i);
          const float* di = d.row(i);
          for (int64_t j = 0; j < m; ++j) yi[j] += float(length) * di[j];
        });
        break;
      }
    }
    if (allowed == Digits::ALL && rest < half) allowed = Digits::HALF;
    if (allowed == Digits::HALF && rest < few) allowed = Digits::FEW;
    gemm<float>(team, m, m, m, a, read_only(d), h, 1.0f, 0.0f, false, packed, allowed, &kept);
    // <D, A D + D A> = 2 <D, H>, since D A = -(A D)^T = -H^T.
    const double along =
        2 * sum_over_rows(team, m, partial, [&](int64_t i) { return dot(d.row(i), h.row(i), m); });
    if (!(along > 0)) break;
    const double length = rest / along;
    const auto advance = [&](int64_t i, int64_t j0, int64_t j1, const float* turned) {
      float *yi = y.row(i), *ci = c.row(i);
      const float *di = d.row(i), *hi = h.row(i);
      for (int64_t j = j0; j < j1; ++j) {
        yi[j] += float(length) * di[j];
        ci[j] -= float(length) * (hi[j] - turned[j - j0]);
      }
    };
    with_transpose<float>(team, m, read_only(h), false, advance);
    const double now = squared(c);
    turn = now / rest;
    worst = turn > worst ? turn : worst;
    rest = now;
    value_before = value;
    value = 1 / length + carried;
    carried = turn / length;
    team.each(m, m / 8, [&](int64_t i) {
      float* di = d.row(i);
      const float* ci = c.row(i);
      for (int64_t j = 0; j < m; ++j) di[j] = ci[j] + float(turn) * di[j];
    });
  }
}

struct Backward {
  const float *grad, *result, *factor, *spectrum, *scalars;
  float* out;
  int64_t rows, cols;
  double scale;
};

// C = X - X^T
inline void skew(const Team& team, int64_t m, View<const float> x, View<float> c) {
  const auto subtract = [&](int64_t i, int64_t j0, int64_t j1, const float* turned) {
    float* ci = c.row(i);
    const float* xi = x.row(i);
    for (int64_t j = j0; j < j1; ++j) ci[j] = xi[j] - turned[j - j0];
  };
  with_transpose<float>(team, m, x, false, subtract);
}

inline void polar_backward(const Team& team, const Backward& job, Workspace space) {
  const int64_t m = job.rows < job.cols ? job.rows : job.cols;
  const int64_t n = job.rows < job.cols ? job.cols : job.rows, ld = padded(m);
  const View<const float> gamma = wide_view(job.grad, job.rows, job.cols);
  const View<const float> u = wide_view(job.result, job.rows, job.cols);  // times scalars[1]
  const View<float> out = wide_view(job.out, job.rows, job.cols);
  const View<const float> factor{job.factor, m, 1};
  const float to_u = 1.0f / job.scalars[1];
  const float scale = float(job.scale);

  double* partial = space.take<double>(n);
  const int64_t tall = packed_size<float>(n, m), wide = packed_size<float>(m, n);
  float* packed = space.take<float>(tall > wide ? tall : wide);
  View<float> t = rows_of(space.take<float>(m * ld), ld), c = rows_of(space.take<float>(m * ld), ld);
  View<float> y = rows_of(space.take<float>(m * ld), ld), d = rows_of(space.take<float>(m * ld), ld);
  View<float> h = rows_of(space.take<float>(m * ld), ld), q = rows_of(space.take<float>(m * ld), ld);
  const Digits digits =
      digits_by_size(team, job.rows, job.cols, job.grad, job.scalars[1], partial);
  const auto product = [&](View<const float> a, View<const float> b, View<float> to, bool lower) {
    gemm<float>(team, m, m, m, a, b, to, 1.0f, 0.0f, lower, packed, digits);
  };

  gemm<float>(team, m, m, n, gamma, u.t(), t, to_u, 0.0f, false, packed, digits);
  View<const float> inverse_root = factor;
  bool needs_outside = m < n;  // the part of Gamma outside the row space of W
  if (job.spectrum[0] < 0) {
    if (needs_outside) {
      product(factor, read_only(t), h, false);  // Q T, kept in q
      team.each(m, m / 8, [&](int64_t i) {
        std::memcpy(q.row(i), h.row(i), m * sizeof(float));
      });
      product(read_only(q), factor, t, false);
    }
    skew(team, m, read_only(t), c);
    lyapunov(team, m, factor, c, y, d, h, partial, packed, digits);
    if (needs_outside) {
      team.each(m, m / 8, [&](int64_t i) {
        float* yi = y.row(i);
        const float* qi = q.row(i);
        for (int64_t j = 0; j < m; ++j) yi[j] -= qi[j];
      });
    }
  } else {
    // factor = V: (V^T Y V)_ij = (V^T (T - T^T) V)_ij / (p_i + p_j)
    const float* p = job.spectrum;
    const float largest = p[m - 1];
    needs_outside = needs_outside || !(p[0] > 3.1e-7f * largest);
    skew(team, m, read_only(t), c);
    product(factor.t(), read_only(c), h, false);
    product(read_only(h), factor, d, true);
    team.each(m, m / 8, [&](int64_t i) {
      float* row = d.row(i);
      for (int64_t j = 0; j < i; ++j) row[j] = p[i] + p[j] > 0 ? row[j] / (p[i] + p[j]) : 0.0f;
      row[i] = 0.0f;
    });
    mirror(team, m, d, -1.0f);
    product(factor, read_only(d), h, false);
    product(read_only(h), factor.t(), y, true);
    team.each(m, m / 8, [&](int64_t i) {
      y(i, i) = 0.0f;
    });
    mirror(team, m, y, -1.0f);
    if (needs_outside) {
      team.each(m, m / 8, [&](int64_t i) {
        for (int64_t j = 0; j < m; ++j) d(i, j) = p[j] > 0 ? factor(i, j) / p[j] : 0.0f;
      });
      product(read_only(d), factor.t(), q, true);
      mirror(team, m, q);
      gemm<float>(team, m, m, m, read_only(q), read_only(t), y, -1.0f, 1.0f, false, packed, digits);
      inverse_root = read_only(q);
    }
  }
  // dL/dW = Q Gamma + (Y - Q T) U, or Y U alone.
  gemm<float>(team, m, n, m, read_only(y), u, out, scale * to_u, 0.0f, false, packed, digits);
  if (needs_outside)
    gemm<float>(team, m, n, m, inverse_root, gamma, out, scale, 1.0f, false, packed, digits);
  const float unit = job.scalars[0];
  if (unit != 1.0f) {  // an extreme weight: saturate instead of overflowing
    team.each(job.rows, job.cols, [&](int64_t i) {
      for (float* x = job.out + i * job.cols; x < job.out + (i + 1) * job.cols; ++x) {
        *x /= unit;
        *x = *x > FLT_MAX ? FLT_MAX : *x < -FLT_MAX ? -FLT_MAX : *x;
      }
    });
  }
}

}  // namespace
}  // namespace lipkernels
