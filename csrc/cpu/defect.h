// How far a matrix U is from orthogonal, E = I - U U^T, m <= n, and the last step of the polar factor:
// E in float64 tells sigma_max(U)^2 <= 1 + |E|_2. A tiny E is paid by a division; a larger one by the
// step U + E U / 2, which maps every sigma < 2 to at most one.
#pragma once

#include <cmath>
#include <cstdint>

#include "workspace.h"

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

// Norm that may be given away by dividing by it instead of taking the step U + E U / 2. It counts four
// times in |I - U U^T|, what roundings ask for anyway (1 - margin) twice: together 1e-5 at most, and a
// third stays for the roundings themselves. Beyond 1,000 rows they take more: there it is the least.
inline double max_shrink(double margin) {
  const double shrink = (0.5e-5 - (1 - margin)) / 3;
  return shrink < 4e-7 ? 4e-7 : shrink < 1e-6 ? shrink : 1e-6;
}

// A defect that says that what U was computed from was wrong.
constexpr double MAX_DEFECT = 0.1;

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
// 16 times two of them and adds that to the result, see TDPBF16PS in Intel's manual: less, also with
// six products instead of one.)
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
  const double enough = 2 * max_shrink(margin);
  if (bound > enough && likely_bound(m, bound) < enough && !takes_step(m, n))
    bound = bound_of(team, m, e, bound, half, rows_of((float*)e2.data + m * ld, ld),
                     rows_of(space.take<float>(m * ld), ld), partial, (float*)packed) +
            defect_rounding(m, n, bound);
  if (bound <= enough) {
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

}  // namespace
}  // namespace lipkernels
