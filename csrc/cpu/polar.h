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
constexpr double MAX_SHRINK = 4e-7;
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
  const int64_t packed = 2 * 8 * packed_size<double>(n, m);
  return 4 * 10 * square + 8 * 3 * square + 8 * 3 * whole + packed + 8 * 16 * (m + 64) + 8 * n + 65536;
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

// |fl(U U^T) - U U^T|_F <= gamma_n |U|_F^2 in float64, times factor |U|_F^2 <= m + m^(1/2) |E|_F.
inline double defect_rounding(int64_t m, int64_t n, double norm) {
  return double(n + 4) * (double(m) + std::sqrt(double(m)) * norm) * 2.3e-16;
}

// The lower triangle of E = I - factor U U^T in float64; returns |E|_F, its own rounding included.
inline double defect(const Team& team, int64_t m, int64_t n, View<const float> u, double factor,
                     View<double> e, double* packed, double* partial) {
  gemm<double>(team, m, m, n, u, u.t(), e, -factor, 0.0, true, packed);
  for (int64_t i = 0; i < m; ++i) e(i, i) += 1.0;
  const double norm = std::sqrt(square_of_lower(team, m, e, partial));
  return norm * (1 + 1e-12) + defect_rounding(m, n, norm);
}

constexpr double UNIT = 5.97e-8;  // a little more than 2^-24

// What float32 rounds in a sum of m products, relative to the sum of their sizes. (The tile unit sums
// 16 times two of them and adds that to the result: less, also with six products instead of one.)
inline double sum_rounding(int64_t m) { return double((m < KC ? m : KC) + m / KC + 3) * UNIT; }

// What float32 adds to (I + C) X, relative to |X|, if |C|_F <= correction and |E|_2 <= norm:
// |fl(C X) - C X|_F <= rounding |C|_F |X|_F, and C's own.
inline double correction_rounding(int64_t m, double correction, double norm) {
  return 3 * sum_rounding(m) * correction * std::sqrt(double(m) * (1 + norm));
}

// What half the digits leave out, and how much of that may be given away.
constexpr double HALF_ROUNDING = 3.0 / (1 << 18) * (1 + 1e-2), MAX_LEFT_OUT = 1e-7;

// The same for C X with half the digits.
inline double left_out(int64_t m, double correction, double norm) {
  return HALF_ROUNDING * correction * std::sqrt(double(m) * (1 + norm));
}

// The largest |x|, infinite where there is a NaN; `partial` holds a double for each row.
inline double largest_entry(const Team& team, int64_t rows, int64_t cols, const float* data,
                            double* partial) {
  // Compared as integers: a NaN or an infinity is larger than all others.
  team.each(rows, cols / 8, [&](int64_t i) {
    const float* row = data + i * cols;
    int32_t largest = 0;
    for (int64_t j = 0; j < cols; ++j) {
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
  for (int64_t i = 0; i < rows; ++i) largest = partial[i] > largest ? partial[i] : largest;
  return largest;
}

// Whether products of numbers of this size, and what becomes of them, can do without subnormal ones.
inline Digits digits_of(double size) {
  return size >= 1e-15 && size <= 1e30 ? Digits::ALL : Digits::EVERY;
}

// The same for a gradient of this shape and a matrix of this norm.
inline Digits digits_of(const Team& team, int64_t rows, int64_t cols, const float* grad, double norm,
                        double* partial) {
  const int64_t m = rows < cols ? rows : cols;
  if (!uses_tiles(m, m, m, Digits::FEW)) return Digits::ALL;
  if (digits_of(norm) == Digits::EVERY) return Digits::EVERY;
  return digits_of(largest_entry(team, rows, cols, grad, partial));
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

// What |E|_2 is likely to be bounded by, if E is noise with this |E|_F: its eigenvalues fill a
// semicircle, whose eighth moment is 14 times the fourth power of the second one.
inline double likely_bound(int64_t m, double frobenius) {
  return frobenius / std::sqrt(double(m)) * std::pow(14.0 * double(m), 0.125);
}

// A bound of |E|_2 <= |E^4|_F^(1/4), for the symmetric E (its lower triangle is there) with at most
// this |E|_F. `single`, `square`, `fourth`: scratch, all (m, m).
inline double bound_of(const Team& team, int64_t m, View<double> e, double frobenius,
                       View<float> single, View<float> square, View<float> fourth, double* partial,
                       float* packed) {
  // E / |E|_F, that nothing underflows.
  const double unit = 1 / frobenius;
  team.each(m, m / 16, [&](int64_t i) {
    float* row = single.row(i);
    const double* from = e.row(i);
    for (int64_t j = 0; j <= i; ++j) row[j] = float(unit * from[j]);
  });
  mirror(team, m, single);
  const auto squared = [&](View<float> x, View<float> to) {
    gemm<float>(team, m, m, m, read_only(x), read_only(x), to, 1.0f, 0.0f, true, packed,
                Digits::HALF);
    mirror(team, m, to);
    return std::sqrt(square_of_lower(team, m, to, partial)) * (1 + 1e-12);
  };
  // Each product of symmetric A, in float32, is off by at most this times |A|_F^2.
  const double rounding = 1.01 * (sum_rounding(m) + HALF_ROUNDING + 2 * UNIT);
  const double second = squared(single, square), last = squared(square, fourth);
  return frobenius * std::sqrt(std::sqrt(last + rounding * second * second) + rounding);
}

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
  View<float> half = rows_of((float*)e2.data, ld);
  if (bound > 2 * MAX_SHRINK && likely_bound(m, bound) < 2 * MAX_SHRINK && !takes_step(m, n))
    bound = bound_of(team, m, e, bound, half, rows_of((float*)e2.data + m * ld, ld),
                     rows_of(space.take<float>(m * ld), ld), partial, (float*)packed) +
            defect_rounding(m, n, bound);
  if (bound <= 2 * MAX_SHRINK) {
    const double factor = scale * margin / std::sqrt(1 + bound);
    multiply(team, m, n, u, float(factor));
    return factor;
  }
  to_single(team, m, e, half);
  const double left = left_out(m, 0.5 * *defect_out, *defect_out);
  const bool is_small = left < MAX_LEFT_OUT;
  const double lost = correction_rounding(m, 0.5 * *defect_out, *defect_out) + (is_small ? left : 0.0);
  const double factor = scale * margin / (1 + lost);
  gemm<float>(team, m, n, m, read_only(half), read_only(u), u, float(0.5 * factor), float(factor),
              false, (float*)packed, is_small ? Digits::HALF : Digits::ALL);
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
  const double largest = largest_entry(team, job.rows, job.cols, job.weight, partial);
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
  double* packed = space.take<double>(packed_size<double>(n, m));
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
  const double enough = rest * CG_TOLERANCE * CG_TOLERANCE;
  // What a product may get wrong, relative to the direction, grows as the rest gets smaller (Simoncini
  // and Szyld, 2003): C is wrong by this in the end.
  const double few = enough * (1 << 15), half = enough * std::ldexp(1.0, 32);
  Kept kept;
  Digits allowed = digits;
  for (int step = 0; step < CG_STEPS && rest > enough; ++step) {
    if (allowed == Digits::ALL && rest < half) allowed = Digits::HALF;
    if (allowed == Digits::HALF && rest < few) allowed = Digits::FEW;
    gemm<float>(team, m, m, m, a, read_only(d), h, 1.0f, 0.0f, false, packed, allowed, &kept);
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
  const Digits digits =
      digits_of(team, job.rows, job.cols, job.grad, job.scalars[1], partial);
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
