// Where the eigenvalues of a symmetric matrix lie, and a polynomial that takes a function of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "gemm.h"

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

constexpr int MAX_DEGREE = 32;

// sum_i c[i] y^i
struct Series {
  int degree;  // -1: there is none
  double c[MAX_DEGREE + 1];
};

// Chebyshev's polynomials T_j at the nodes x_i of his interpolation.
struct Nodes {
  static constexpr int COUNT = 40;
  double x[COUNT], t[COUNT][COUNT];  // t[j][i] = T_j(x_i)
  Nodes() {
    for (int i = 0; i < COUNT; ++i) {
      x[i] = std::cos(M_PI * (i + 0.5) / COUNT);
      for (int j = 0; j < COUNT; ++j)
        t[j][i] = j == 0 ? 1.0 : j == 1 ? x[i] : 2 * x[i] * t[j - 1][i] - t[j - 2][i];
    }
  }
};

// The polynomial of least degree that approximates (1 + delta y)^(-1/2) on [-1, 1] to `tolerance`,
// by Chebyshev interpolation. None where MAX_DEGREE is not enough.
inline Series inverse_root_series(double delta, double tolerance) {
  static const Nodes nodes;
  constexpr int NODES = Nodes::COUNT;
  double value[NODES], chebyshev[NODES];
  for (int i = 0; i < NODES; ++i) value[i] = 1 / std::sqrt(1 + delta * nodes.x[i]);
  for (int j = 0; j < NODES; ++j) chebyshev[j] = (j ? 2.0 : 1.0) / NODES * dot(nodes.t[j], value, NODES);
  double tail = 0;
  int degree = NODES - 1;
  while (degree > 0 && tail + std::fabs(chebyshev[degree]) <= tolerance)
    tail += std::fabs(chebyshev[degree--]);
  Series sum{degree, {}};
  if (degree > MAX_DEGREE) {
    sum.degree = -1;
    return sum;
  }
  // The same in powers: T_0 = 1, T_1 = y, T_{j+1} = 2 y T_j - T_{j-1}.
  double before[MAX_DEGREE + 2] = {1}, now[MAX_DEGREE + 2] = {0, 1};
  sum.c[0] = chebyshev[0];
  for (int j = 1; j <= degree; ++j) {
    for (int i = 0; i <= j; ++i) sum.c[i] += chebyshev[j] * now[i];
    for (int i = j + 1; i >= 0; --i) {
      const double next = (i ? 2 * now[i - 1] : 0.0) - before[i];
      before[i] = next;
    }
    for (int i = 0; i <= j + 1; ++i) {
      const double swapped = before[i];
      before[i] = now[i];
      now[i] = swapped;
    }
  }
  return sum;
}

// The powers y^1 .. y^q of a symmetric matrix, shared by the polynomials that are taken of it.
struct Powers {
  int64_t n, ld;
  int q;
  float* first;  // q matrices of n * ld, one after the other
  float* packed;
  View<float> power(int i) const { return rows_of(first + (i - 1) * n * ld, ld); }
};

// How many powers make a polynomial of this degree cheapest (Paterson and Stockmeyer, 1973).
inline int best_block(int degree) {
  int q = 1;
  while (q * (q + 1) < degree) ++q;
  return q;
}

// How exact a product of matrices of norm 1 has to be that counts by this factor.
inline Digits digits_by_weight(double weight) { return weight < 0.02 ? Digits::HALF : Digits::ALL; }

// sum_{i >= from} |c_i|
inline double weight_from(const Series& series, int from) {
  double sum = 0;
  for (int i = from; i <= series.degree; ++i) sum += std::fabs(series.c[i]);
  return sum;
}

// y^1 is there; computes the others for this series.
inline void raise(const Team& team, const Powers& y, const Series& series) {
  for (int i = 2; i <= y.q; ++i) {
    gemm<float>(team, y.n, y.n, y.n, read_only(y.power(i / 2)), read_only(y.power(i - i / 2)),
                y.power(i), 1.0f, 0.0f, true, y.packed, digits_by_weight(weight_from(series, i)));
    mirror(team, y.n, y.power(i));
  }
}

// result = scale * series(y), by Horner's rule in y^q. `other` is scratch of the same size.
inline void polynomial(const Team& team, const Powers& y, const Series& series, double scale,
                       View<float> result, View<float> other) {
  const double* c = series.c;
  const int degree = series.degree, blocks = degree / y.q;
  View<float> now = result, next = other;
  const auto block = [&](int b, View<float> to, View<float> plus, float factor) {
    // to = sum_{i < q} c[b q + i] y^i + factor * plus
    team.each(y.n, y.n * y.q / 8, [&](int64_t i) {
      float* row = to.row(i);
      const float* add = plus.data ? plus.row(i) : nullptr;
      for (int64_t j = 0; j < y.n; ++j) row[j] = add ? factor * add[j] : 0.0f;
      for (int p = 1; p < y.q && b * y.q + p <= degree; ++p) {
        const float weight = float(scale * c[b * y.q + p]);
        const float* power = y.power(p).row(i);
        for (int64_t j = 0; j < y.n; ++j) row[j] += weight * power[j];
      }
      row[i] += float(scale * c[b * y.q]);
    });
  };
  int top = blocks;
  if (top > 0 && degree == top * y.q) {  // the first block is a number: no product yet
    --top;
    block(top, now, y.power(y.q), float(scale * c[degree]));
  } else {
    block(top, now, {nullptr, 0, 0}, 0.0f);
  }
  while (top-- > 0) {
    block(top, next, {nullptr, 0, 0}, 0.0f);
    gemm<float>(team, y.n, y.n, y.n, read_only(now), read_only(y.power(y.q)), next, 1.0f, 1.0f, true,
                y.packed, digits_by_weight(weight_from(series, (top + 1) * y.q)));
    mirror(team, y.n, next);
    std::swap(now, next);
  }
  if (now.data != result.data) {
    team.each(y.n, y.n / 8, [&](int64_t i) {
      std::memcpy(result.row(i), now.row(i), y.n * sizeof(float));
    });
  }
}

}  // namespace
}  // namespace lipkernels
