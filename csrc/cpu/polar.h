// The polar factor W = P U of a well-conditioned float32 matrix, and its gradient, by products
// alone. The mathematics is that of lipkernels/reference/polar.py; m <= n throughout (a tall matrix
// is read by columns).
//
// Forward: G = W W^T; Q = G^(-1/2) as one Chebyshev polynomial on the interval where the eigenvalues
// of G seem to lie; U = Q W. Whatever that estimate was worth, E = I - U U^T in float64 tells how
// far U is from orthogonal, and with it sigma_max(U)^2 <= 1 + |E|_2. A tiny E is paid by a division;
// a larger one by the step U + E U / 2, which maps every sigma < 2 to at most one.
//
// Backward: P Y + Y P = C, C = T - T^T, T = Gamma U^T, by conjugate gradients on skew Y: one product
// a step, since Y P = -(P Y)^T. Wide matrices keep Q and not P: Q times the equation times Q is
// Q Y + Y Q = Q C Q.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "spectrum.h"

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

// What became of a matrix; other than DONE, it is for an eigendecomposition.
enum Status : int32_t {
  DONE = 0,
  ILL_CONDITIONED = 1,       // in float32
  VERY_ILL_CONDITIONED = 2,  // most likely beyond what a float32 Gram matrix can tell
  EXTREME = 3,               // zero, not finite, or its squares are
};

// sigma_max / sigma_min up to which products beat an eigendecomposition.
constexpr double MAX_CONDITION = 4.0;
// The same for an eigendecomposition in float32, with room for an estimate that is too small.
constexpr double MAX_CONDITION_FLOAT32 = 10.0;
// Entries outside this range are for the reference: their squares leave the range of float32.
constexpr float LARGEST = 1e12f, SMALLEST = 1e-12f;
// Error of U's singular values before the last step, with a step to follow and without one.
constexpr double LOOSE_SERIES = 1e-4, TIGHT_SERIES = 5e-8;
// Norm that may be given away by dividing by it instead of taking the step U + E U / 2.
constexpr double MAX_SHRINK = 2.5e-7;
// A defect that says that the interval was wrong.
constexpr double MAX_DEFECT = 0.1;
constexpr double CG_TOLERANCE = 3e-7;
constexpr int CG_STEPS = 100;

struct Workspace {
  char* next;
  template <class T>
  T* take(int64_t n) {
    T* result = (T*)next;
    next += round_up(n * sizeof(T), 64);
    return result;
  }
};

inline int64_t padded(int64_t n) { return round_up(n, 16); }

// An upper bound for what `Workspace` must hold, in bytes, for a matrix of m * n.
inline int64_t workspace_size(int64_t m, int64_t n) {
  const int64_t square = padded(m) * padded(m), whole = padded(m) * (n + 64);
  return 4 * 10 * square + 8 * 3 * square + 8 * 3 * whole + 8 * 16 * (m + 64) + 8 * n + 65536;
}

inline View<float> wide_view(float* data, int64_t rows, int64_t cols) {
  return rows <= cols ? View<float>{data, cols, 1} : View<float>{data, 1, cols};
}
inline View<const float> wide_view(const float* data, int64_t rows, int64_t cols) {
  return rows <= cols ? View<const float>{data, cols, 1} : View<const float>{data, 1, cols};
}

// sum_i f(i) over the rows of a matrix. The rows are added up in order, whoever computed them.
// `partial` holds n doubles.
template <class F>
inline double sum_over_rows(const Team& team, int64_t n, double* partial, F f) {
  team.each(n, n / 8, [&](int64_t i) {
    partial[i] = f(i);
  });
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += partial[i];
  return sum;
}

// |C|_F^2 of a symmetric matrix of which the lower triangle is there.
template <class T>
inline double square_of_lower(const Team& team, int64_t m, View<T> c, double* partial) {
  return sum_over_rows(team, m, partial, [&](int64_t i) {
    const T* row = c.row(i);
    return 2 * dot(row, row, i) + double(row[i]) * double(row[i]);
  });
}

// The whole symmetric matrix, in float32, whose lower triangle is `lower`.
inline void to_single(const Team& team, int64_t m, View<double> lower, View<float> to) {
  team.each(m, m / 16, [&](int64_t i) {
    float* row = to.row(i);
    const double* from = lower.row(i);
    for (int64_t j = 0; j <= i; ++j) row[j] = float(from[j]);
  });
  mirror(team, m, to);
}

// The lower triangle of E = I - factor U U^T in float64; returns |E|_F, its own rounding included.
inline double defect(const Team& team, int64_t m, int64_t n, View<const float> u, double factor,
                     View<double> e, double* packed, double* partial) {
  gemm<double>(team, m, m, n, u, u.t(), e, -factor, 0.0, true, packed);
  for (int64_t i = 0; i < m; ++i) e(i, i) += 1.0;
  const double square = square_of_lower(team, m, e, partial);
  // |fl(U U^T) - U U^T|_F <= gamma_n |U|_F^2 in float64, and factor |U|_F^2 <= m + m^(1/2) |E|_F.
  const double norm = std::sqrt(square);
  return norm * (1 + 1e-12) + double(n + 4) * (double(m) + std::sqrt(double(m)) * norm) * 2.3e-16;
}

constexpr double UNIT = 5.97e-8;  // a little more than 2^-24

// What float32 rounds in a sum of m products, relative to the sum of their sizes.
inline double sum_rounding(int64_t m) { return double((m < KC ? m : KC) + m / KC + 3) * UNIT; }

// What float32 adds to (I + C) X, relative to |X|, if |C|_F <= correction and |E|_2 <= norm:
// |fl(C X) - C X|_F <= rounding |C|_F |X|_F, and C's own.
inline double correction_rounding(int64_t m, double correction, double norm) {
  return 3 * sum_rounding(m) * correction * std::sqrt(double(m) * (1 + norm));
}

// Multiplies every entry of U by `factor`.
inline void multiply(const Team& team, int64_t m, int64_t n, View<float> u, float factor) {
  float* data = u.data;
  constexpr int64_t PIECE = 256;
  team.each((m * n + PIECE - 1) / PIECE, PIECE / 8, [&](int64_t piece) {
    const int64_t end = (piece + 1) * PIECE < m * n ? (piece + 1) * PIECE : m * n;
    for (int64_t i = piece * PIECE; i < end; ++i) data[i] *= factor;
  });
}

// Whether the step U + E U / 2 costs no more than the bound of |E| that could spare it.
inline bool takes_step(int64_t m, int64_t n) { return n < 2 * m; }

// Scales U (in place) to norm at most `scale`; `margin` < 1 is what float32 roundings may add. Takes
// the step U + E U / 2 first where the defect asks for it. Returns the number that the polar factor
// was multiplied by, and the defect.
inline double finish(const Team& team, int64_t m, int64_t n, View<float> u, double scale,
                     double margin, double* defect_out, Workspace space) {
  const int64_t ld = padded(m);
  View<double> e = rows_of(space.take<double>(m * ld), ld);
  View<double> e2 = rows_of(space.take<double>(m * ld), ld);
  double* partial = space.take<double>(m);
  double* packed = space.take<double>(packed_size<double>(n > m ? n : m, m));
  double bound = *defect_out = defect(team, m, n, read_only(u), 1.0, e, packed, partial);
  if (bound > 2 * MAX_SHRINK && bound < 1e-3 && !takes_step(m, n)) {
    // |E|_2^2 <= |E^2|_F: cheaper than the step if the matrix is wide.
    mirror(team, m, e);
    gemm<double>(team, m, m, m, read_only(e), read_only(e).t(), e2, 1.0, 0.0, true, packed);
    const double square = square_of_lower(team, m, e2, partial);
    bound = std::sqrt(std::sqrt(square) * (1 + 1e-12)) + double(n + 2) * double(m) * 2.3e-16;
  }
  if (bound <= 2 * MAX_SHRINK) {
    const double factor = scale * margin / std::sqrt(1 + bound);
    multiply(team, m, n, u, float(factor));
    return factor;
  }
  View<float> half = rows_of((float*)e2.data, ld);
  to_single(team, m, e, half);
  const double factor =
      scale * margin / (1 + correction_rounding(m, 0.5 * *defect_out, *defect_out));
  gemm<float>(team, m, n, m, read_only(half), read_only(u), u, float(0.5 * factor), float(factor),
              false, (float*)packed);
  return factor;
}

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
  // Largest entry of each row, compared as integers: a NaN or an infinity is larger than all others.
  team.each(job.rows, job.cols / 8, [&](int64_t i) {
    const float* row = job.weight + i * job.cols;
    int32_t largest = 0;
    for (int64_t j = 0; j < job.cols; ++j) {
      int32_t bits;
      std::memcpy(&bits, row + j, sizeof bits);
      bits &= 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    float size;
    std::memcpy(&size, &largest, sizeof size);
    partial[i] = std::isnan(size) ? INFINITY : size;
  });
  double largest = 0;
  for (int64_t i = 0; i < job.rows; ++i) largest = partial[i] > largest ? partial[i] : largest;
  if (!(largest <= LARGEST && largest >= SMALLEST)) return give_up(EXTREME);

  const int64_t packed_floats = packed_size<float>(n > m ? n : m, n > m ? m : n);
  float* packed = space.take<float>(packed_floats > packed_size<float>(m, n) ? packed_floats
                                                                              : packed_size<float>(m, n));
  float* vectors = space.take<float>(3 * m);
  Powers y{m, ld, 1, space.take<float>(7 * m * ld), packed};
  View<float> a = y.power(1);
  gemm<float>(team, m, m, n, w, w.t(), a, 1.0f, 0.0f, true, packed);
  mirror(team, m, a);

  const Interval ritz = estimate_spectrum(team, m, read_only(a), vectors);
  if (!(ritz.high < ritz.low * MAX_CONDITION_FLOAT32 * MAX_CONDITION_FLOAT32))
    return give_up(VERY_ILL_CONDITIONED);
  const Interval range = widened(ritz);
  if (!(range.high < range.low * MAX_CONDITION * MAX_CONDITION)) return give_up(ILL_CONDITIONED);
  const double middle = 0.5 * (range.low + range.high);
  const double delta = std::fmax(0.5 * (range.high - range.low) / middle, 1e-6);
  // A polynomial of G commutes with G: its error leaves the direction of U alone, and the step that
  // a square matrix takes anyway squares it. The others keep Q for backward, which no step improves.
  const Series inverse_root = inverse_root_series(delta, m == n ? LOOSE_SERIES : TIGHT_SERIES);
  if (inverse_root.degree < 0) return give_up(ILL_CONDITIONED);
  y.q = best_block(inverse_root.degree);
  if (y.q > 5) y.q = 5;
  // y = (G / middle - I) / delta has its eigenvalues in [-1, 1].
  team.each(m, m / 8, [&](int64_t i) {
    float* row = a.row(i);
    for (int64_t j = 0; j < m; ++j) row[j] *= float(1 / (middle * delta));
    a(i, i) -= float(1 / delta);
  });
  raise(team, y);
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
  const double *vectors, *p;  // V (m, m), any strides, and p (m): P = V diag(p) V^T
  int64_t vectors_rs, vectors_cs;
  float *result, *scalars;
  int64_t rows, cols;
  double scale, margin;
};

// U = V (p^-1 V^T W): the bracket in float64, its rows are orthonormal; then the last step.
inline void polar_from_eigenvectors(const Team& team, const FromEigenvectors& job, Workspace space) {
  const int64_t m = job.rows < job.cols ? job.rows : job.cols;
  const int64_t n = job.rows < job.cols ? job.cols : job.rows, ld = padded(n);
  const View<const float> w = wide_view(job.weight, job.rows, job.cols);
  const View<float> u = wide_view(job.result, job.rows, job.cols);
  const View<const double> v{job.vectors, job.vectors_rs, job.vectors_cs};
  View<float> b = rows_of(space.take<float>(m * ld), ld);
  double* packed = space.take<double>(packed_size<double>(m, n));
  gemm<double>(team, m, n, m, v.t(), w, b, 1.0, 0.0, false, packed);
  team.each(m, n / 8, [&](int64_t i) {
    const float inverse = job.p[i] > 0 ? float(1 / job.p[i]) : 0.0f;
    float* row = b.row(i);
    for (int64_t j = 0; j < n; ++j) row[j] *= inverse;
  });
  gemm<float>(team, m, n, m, v, read_only(b), u, 1.0f, 0.0f, false, (float*)packed);
  double error = 0;
  job.scalars[0] = 1.0f;
  job.scalars[1] = float(finish(team, m, n, u, job.scale, job.margin, &error, space));
}

// Solves A Y + Y A = C for skew C, A symmetric positive definite; C is overwritten. All (m, ld).
inline void lyapunov(const Team& team, int64_t m, View<const float> a, View<float> c,
                     View<float> y, View<float> d, View<float> h, double* partial, float* packed) {
  const auto squared = [&](View<float> x) {
    return sum_over_rows(team, m, partial, [&](int64_t i) { return dot(x.row(i), x.row(i), m); });
  };
  team.each(m, m / 8, [&](int64_t i) {
    std::memcpy(d.row(i), c.row(i), m * sizeof(float));
    std::memset(y.row(i), 0, m * sizeof(float));
  });
  double rest = squared(c);
  const double enough = rest * CG_TOLERANCE * CG_TOLERANCE;
  for (int step = 0; step < CG_STEPS && rest > enough; ++step) {
    gemm<float>(team, m, m, m, a, read_only(d), h, 1.0f, 0.0f, false, packed);
    // <D, A D + D A> = 2 <D, H>, since D A = -(A D)^T = -H^T.
    const double along =
        2 * sum_over_rows(team, m, partial, [&](int64_t i) { return dot(d.row(i), h.row(i), m); });
    if (!(along > 0)) break;
    const float length = float(rest / along);
    const auto advance = [&](int64_t i, int64_t j0, int64_t j1, const float* turned) {
      float *yi = y.row(i), *ci = c.row(i);
      const float *di = d.row(i), *hi = h.row(i);
      for (int64_t j = j0; j < j1; ++j) {
        yi[j] += length * di[j];
        ci[j] -= length * (hi[j] - turned[j - j0]);
      }
    };
    with_transpose<float>(team, m, read_only(h), false, advance);
    const double now = squared(c);
    const float turn = float(now / rest);
    rest = now;
    team.each(m, m / 8, [&](int64_t i) {
      float* di = d.row(i);
      const float* ci = c.row(i);
      for (int64_t j = 0; j < m; ++j) di[j] = ci[j] + turn * di[j];
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
  const auto product = [&](View<const float> a, View<const float> b, View<float> to, bool lower) {
    gemm<float>(team, m, m, m, a, b, to, 1.0f, 0.0f, lower, packed);
  };

  gemm<float>(team, m, m, n, gamma, u.t(), t, to_u, 0.0f, false, packed);
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
    lyapunov(team, m, factor, c, y, d, h, partial, packed);
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
    product(factor.t(), read_only(t), h, false);
    product(read_only(h), factor, c, false);
    team.each(m, m / 8, [&](int64_t i) {
      for (int64_t j = 0; j < m; ++j) {
        const float sum = p[i] + p[j];
        d(i, j) = sum > 0 ? (c(i, j) - c(j, i)) / sum : 0.0f;
      }
    });
    product(factor, read_only(d), h, false);
    product(read_only(h), factor.t(), y, true);
    mirror(team, m, y, -1.0f);
    team.each(m, m / 8, [&](int64_t i) {
      y(i, i) = 0.0f;
    });
    if (needs_outside) {
      team.each(m, m / 8, [&](int64_t i) {
        for (int64_t j = 0; j < m; ++j) d(i, j) = p[j] > 0 ? factor(i, j) / p[j] : 0.0f;
      });
      product(read_only(d), factor.t(), q, true);
      mirror(team, m, q);
      gemm<float>(team, m, m, m, read_only(q), read_only(t), y, -1.0f, 1.0f, false, packed);
      inverse_root = read_only(q);
    }
  }
  // dL/dW = Q Gamma + (Y - Q T) U, or Y U alone.
  gemm<float>(team, m, n, m, read_only(y), u, out, scale * to_u, 0.0f, false, packed);
  if (needs_outside)
    gemm<float>(team, m, n, m, inverse_root, gamma, out, scale, 1.0f, false, packed);
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
