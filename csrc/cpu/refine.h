// The polar factor of an ill-conditioned matrix from eigenvectors of its Gram matrix in float32, which
// cost half of those in float64. m <= n throughout; V^T W = X, rows in ascending order.
//
// The rows of X would be orthogonal, were V exact; what is left of X X^T beside the diagonal is known to
// float32's relative digits, and first order in it is enough (Ogita and Aishima, Japan J. Indust. Appl.
// Math. 35, 2018, for eigenvectors). The rows of small singular values are differences of larger
// terms: they are in float64, are freed from the others first, and have a decomposition of their own.
//
//   split()      X, float64 for the rows S of singular values below 1/8 of the largest (the others: L);
//                V <- V + V K with the skew K_ij = -<X_i, X_j> / (|X_i|^2 + |X_j|^2), i in S, j in L
//                (the sum where the difference would free them: at the border between S and L that may be
//                zero, and what the sum leaves there is R's); hands out X_S X_S^T
//   refined()    rotates S by the eigenvectors of that; B = X / |X_i|, R = B B^T - I.
//                U = V (I - R_ij p_j / (p_i + p_j)) B, to first order (X X^T)^(-1/2) X;
//                V <- V (I + R_ij p_i p_j / (p_j^2 - p_i^2)), the eigenvectors that backward takes.
//                Both where i or j is below 1/4 of the largest: beyond that R is float32's rounding.
#pragma once

#include <cmath>
#include <cstring>

#include "defect.h"

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

// Smaller ones are left to float64.
constexpr double LEAST_SINGULAR = 1e-6;
// Parts of the largest singular value below which R counts.
constexpr double CORRECTED = 0.25;
// Squared singular values closer than this, relatively, are one: any basis of theirs will do.
constexpr float SAME = 1e-2f;

// Whether this is less work than eigenvectors in float64. Each row of a small singular value costs
// several products with all others, and how many there are the moments of the eigenvalues of `gram`
// (m, m), the whole matrix, let guess: tr(G)^2 / (m |G|_F^2) is 1 where all are equal, 1/2 for a Gaussian
// square and 0.2 where they are spread evenly over decades.
inline bool pays(const Team& team, int64_t m, int64_t n, View<const float> gram, double* partial) {
  if (m < 128 || n > 4 * m) return false;
  double trace = 0;
  for (int64_t i = 0; i < m; ++i) trace += gram(i, i);
  const double square =
      sum_over_rows(team, m, partial, [&](int64_t i) { return dot(gram.row(i), gram.row(i), m); });
  return trace * trace > 0.35 * double(m) * square;
}

// to(i, j) = row(i)(j): what is the same for a row is looked up once, so that loops over it vectorize.
template <class T, class F>
inline void fill(const Team& team, int64_t rows, int64_t cols, View<T> to, const F& row) {
  team.each(rows, cols / 4, [&](int64_t i) {
    T* out = to.row(i);
    const auto f = row(i);
    for (int64_t j = 0; j < cols; ++j) out[j] = T(f(j));
  });
}

template <class T>
inline View<T> from_row(View<T> x, int64_t i) { return rows_of(x.row(i), x.rs); }

struct Split {
  const float* weight;
  const float* vectors;  // V (m, m), any strides
  int64_t vectors_rs, vectors_cs;
  float *x, *vt;           // X (m, n), V^T (m, m): their rows of L, those of S are not set
  double *xs, *vs, *gram;  // X_S (small, n), V_S^T (small, m), X_S X_S^T (small, small)
  int64_t small, rows, cols;
};

inline void split(const Team& team, const Split& job, Workspace space) {
  const int64_t m = job.rows < job.cols ? job.rows : job.cols, s = job.small, l = m - s;
  const int64_t n = job.rows < job.cols ? job.cols : job.rows, ld = padded(m);
  const View<const float> w = wide_view(job.weight, job.rows, job.cols);
  const View<const float> v = View<const float>{job.vectors, job.vectors_rs, job.vectors_cs}.t();
  const View<float> x = rows_of(job.x, n), vt = rows_of(job.vt, m);
  const View<float> xl = from_row(x, s), vl = from_row(vt, s);
  const View<double> xs = rows_of(job.xs, n), vs = rows_of(job.vs, m);
  double* packed = space.take<double>(packed_for(m, n));
  float* packed_single = (float*)packed;
  double* squares = space.take<double>(m);

  gemm<float>(team, l, n, m, View<const float>{v.data + s * v.rs, v.rs, v.cs}, w, xl, 1.0f, 0.0f, false,
              packed_single);
  team.each(m, m / 8, [&](int64_t i) {
    if (v.cs == 1)
      std::memcpy(vt.row(i), v.row(i), m * sizeof(float));
    else
      for (int64_t j = 0; j < m; ++j) vt(i, j) = v(i, j);
  });
  if (s == 0) return;
  gemm<double>(team, s, n, m, v, w, xs, 1.0, 0.0, false, packed);
  team.each(m, n / 8, [&](int64_t i) {
    squares[i] = i < s ? dot(xs.row(i), xs.row(i), n) : dot(x.row(i), x.row(i), n);
  });
  View<float> single = rows_of(space.take<float>(s * n), n);  // X_S
  View<float> k = rows_of(space.take<float>(s * ld), ld);     // K_SL
  View<float> change = rows_of(space.take<float>(s * n), n);
  fill(team, s, n, single, [&](int64_t i) {
    const double* row = xs.row(i);
    return [=](int64_t j) { return row[j]; };
  });
  gemm<float>(team, s, l, n, read_only(single), read_only(xl).t(), k, 1.0f, 0.0f, false, packed_single);
  fill(team, s, l, k, [&](int64_t i) {
    const float* row = k.row(i);
    const double own = squares[i], *others = squares + s;
    return [=](int64_t j) { return -row[j] / float(own + others[j]); };
  });
  // X_S + K X_L, X_L - K^T X_S; the same for V.
  gemm<float>(team, s, n, l, read_only(k), read_only(xl), change, 1.0f, 0.0f, false, packed_single);
  fill(team, s, n, xs, [&](int64_t i) {
    const double* row = xs.row(i);
    const float* more = change.row(i);
    return [=](int64_t j) { return row[j] + double(more[j]); };
  });
  gemm<float>(team, l, n, s, read_only(k).t(), read_only(single), xl, -1.0f, 1.0f, false, packed_single);
  gemm<float>(team, s, m, l, read_only(k), read_only(vl), rows_of(change.data, m), 1.0f, 0.0f, false,
              packed_single);
  fill(team, s, m, vs, [&](int64_t i) {
    const float *row = vt.row(i), *more = change.data + i * m;
    return [=](int64_t j) { return double(row[j]) + double(more[j]); };
  });
  gemm<float>(team, l, m, s, read_only(k).t(), read_only(vt), vl, -1.0f, 1.0f, false, packed_single);
  gemm<double>(team, s, s, n, read_only(xs), read_only(xs).t(), rows_of(job.gram, s), 1.0, 0.0, true,
               packed);
}

struct Refined {
  float *x, *vt;           // from split(); they become scratch
  const double *xs, *vs;
  const double* rotation;  // the eigenvectors of its Gram matrix (small, small), any strides
  int64_t rotation_rs, rotation_cs;
  float *result, *factor, *spectrum, *scalars;
  int64_t small, rows, cols;
  double scale, margin;
  int32_t* status;
};

inline void refined(const Team& team, const Refined& job, Workspace space) {
  const int64_t m = job.rows < job.cols ? job.rows : job.cols, s = job.small;
  const int64_t n = job.rows < job.cols ? job.cols : job.rows, ld = padded(m);
  const View<float> u = wide_view(job.result, job.rows, job.cols);
  const View<float> b = rows_of(job.x, n), vt = rows_of(job.vt, m);
  const View<const double> q{job.rotation, job.rotation_rs, job.rotation_cs};
  double* p = space.take<double>(m);
  Workspace again = space;  // what comes before the last step
  double* packed = again.take<double>(packed_for(m, n));
  float* packed_single = (float*)packed;
  if (s > 0) {
    View<double> wide = rows_of(again.take<double>(s * n), n);
    gemm<double>(team, s, m, s, q.t(), View<const double>{job.vs, m, 1}, wide, 1.0, 0.0, false, packed);
    fill(team, s, m, vt, [&](int64_t i) {
      const double* row = wide.row(i);
      return [=](int64_t j) { return row[j]; };
    });
    gemm<double>(team, s, n, s, q.t(), View<const double>{job.xs, n, 1}, wide, 1.0, 0.0, false, packed);
    team.each(s, n / 4, [&](int64_t i) {
      const double *row = wide.row(i), size = std::sqrt(dot(row, row, n)), inverse = 1 / size;
      float* to = b.row(i);
      for (int64_t j = 0; j < n; ++j) to[j] = float(row[j] * inverse);
      p[i] = size;
    });
  }
  team.each(m - s, n / 4, [&](int64_t row) {
    const int64_t i = s + row;
    float* to = b.row(i);
    p[i] = std::sqrt(dot(to, to, n));
    const float inverse = float(1 / p[i]);
    for (int64_t j = 0; j < n; ++j) to[j] *= inverse;
  });
  *job.status = VERY_ILL_CONDITIONED;
  if (!(p[0] > LEAST_SINGULAR * p[m - 1])) return;  // NaN too

  int64_t c = s;  // the rows that R is taken of
  while (c < m && p[c] < CORRECTED * p[m - 1]) ++c;
  View<float> r = rows_of(again.take<float>(c * ld), ld), weighted = rows_of(again.take<float>(c * ld), ld);
  View<float> change = rows_of(again.take<float>(c * n), n);
  const View<float> bl = from_row(b, c), vl = from_row(vt, c);
  const auto product = [&](int64_t rows, int64_t cols, int64_t terms, View<const float> left,
                           View<const float> right, View<float> to, float alpha, float beta) {
    gemm<float>(team, rows, cols, terms, left, right, to, alpha, beta, false, packed_single, Digits::HALF);
  };
  const auto subtract = [&](View<float> from, int64_t cols, View<float> what) {
    fill(team, c, cols, from, [&](int64_t i) {
      const float *row = from.row(i), *less = what.row(i);
      return [=](int64_t j) { return row[j] - less[j]; };
    });
  };
  gemm<float>(team, c, m, n, read_only(b), read_only(b).t(), r, 1.0f, 0.0f, false, packed_single);
  for (int64_t i = 0; i < c; ++i) r(i, i) = 0.0f;
  fill(team, c, m, weighted, [&](int64_t i) {
    const float* row = r.row(i);
    const double own = p[i];
    return [=](int64_t j) { return row[j] * float(p[j] / (own + p[j])); };
  });
  product(c, n, m, read_only(weighted), read_only(b), change, 1.0f, 0.0f);
  fill(team, c, m, weighted, [&](int64_t i) {
    const float *row = r.row(i), *less = weighted.row(i);
    return [=](int64_t j) { return row[j] - less[j]; };
  });
  product(m - c, n, c, View<const float>{weighted.data + c, 1, ld}, read_only(b), bl, -1.0f, 1.0f);
  subtract(b, n, change);
  gemm<float>(team, m, n, m, read_only(vt).t(), read_only(b), u, 1.0f, 0.0f, false, packed_single);

  fill(team, c, m, r, [&](int64_t i) {
    const float *row = r.row(i), own = float(p[i]);
    return [=](int64_t j) {
      const float other = float(p[j]), apart = (other - own) * (other + own);
      const float smaller = own < other ? own : other;
      return std::fabs(apart) > SAME * smaller * smaller ? row[j] * own * other / apart : 0.0f;
    };
  });
  product(c, m, m, read_only(r), read_only(vt), rows_of(change.data, m), 1.0f, 0.0f);
  product(m - c, m, c, View<const float>{r.data + c, 1, ld}, read_only(vt), vl, 1.0f, 1.0f);
  subtract(vt, m, rows_of(change.data, m));
  constexpr int64_t BLOCK = 64;  // of rows and columns, one of which strides
  team.each((m + BLOCK - 1) / BLOCK, BLOCK * m, [&](int64_t block) {
    const int64_t i0 = block * BLOCK, i1 = i0 + BLOCK < m ? i0 + BLOCK : m;
    for (int64_t j = 0; j < m; ++j)
      for (int64_t i = i0; i < i1; ++i) job.factor[i * m + j] = vt(j, i);
    for (int64_t i = i0; i < i1; ++i) job.spectrum[i] = float(p[i]);
  });
  double error = 0;
  job.scalars[0] = 1.0f;
  job.scalars[1] = float(finish(team, m, n, u, job.scale, job.margin, &error, space));
  if (error <= MAX_DEFECT) *job.status = DONE;
}

}  // namespace
}  // namespace lipkernels
