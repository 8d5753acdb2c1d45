// A function of a symmetric matrix as a polynomial of it, in Chebyshev's basis.
//
// What rounding makes of a power or a T_j counts about j |c_j|, and does not commute with y: it turns the
// result. For (1 + delta y)^(-1/2), where the bracket's condition number is 9 or 15, the sum of j |c_j|
// is 206 or 2e5 in powers, 1.8 or 3.2 in this basis.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "gemm.h"

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

constexpr int MAX_DEGREE = 32;

// sum_j c[j] T_j(y)
struct Series {
  int degree;  // -1: there is none
  double c[MAX_DEGREE + 1];
  // sum_{j >= from} |c_j|
  double tail(int from) const {
    double sum = 0;
    for (int j = from; j <= degree; ++j) sum += std::fabs(c[j]);
    return sum;
  }
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
  Series sum{degree > MAX_DEGREE ? -1 : degree, {}};
  for (int j = 0; j <= sum.degree; ++j) sum.c[j] = chebyshev[j];
  return sum;
}

// The same polynomial as sum_b (sum_{i < q} c[b][i] T_i) T_q^b, b <= last: powers of T_q alone.
struct Blocks {
  static constexpr int MOST = 6;
  int q, last;
  double c[MAX_DEGREE + 1][MOST];
};

// How many matrices T_i make a polynomial of this degree cheapest (Paterson and Stockmeyer, 1973).
inline int best_block(int degree) {
  int q = 1;
  while (q * (q + 1) < degree) ++q;
  return q < Blocks::MOST ? q : Blocks::MOST - 1;
}

// Divides by T_q again and again: T_n = 2 T_q T_{n-q} - T_{|n-2q|}.
inline Blocks blocks_of(const Series& series, int q) {
  Blocks blocks{q, 0, {}};
  double rest[MAX_DEGREE + 1];
  std::memcpy(rest, series.c, sizeof rest);
  for (int degree = series.degree;; degree -= q) {
    double quotient[MAX_DEGREE + 1] = {};
    for (int n = degree; n > q; --n) {
      quotient[n - q] += 2 * rest[n];
      rest[n > 2 * q ? n - 2 * q : 2 * q - n] -= rest[n];
    }
    if (degree >= q) quotient[0] += rest[q];
    for (int i = 0; i < q && i <= degree; ++i) blocks.c[blocks.last][i] = rest[i];
    if (degree < q) return blocks;
    ++blocks.last;
    std::memcpy(rest, quotient, sizeof rest);
  }
}

// The matrices T_1(y) .. T_q(y).
struct Basis {
  int64_t n, ld;
  int q;
  float* first;  // q matrices of n * ld, one after the other
  float* packed;
  View<float> t(int i) const { return rows_of(first + (i - 1) * n * ld, ld); }
};

// How exact a product of matrices of norm 1 has to be that the part `tail` of a series is made of. What
// it gets wrong counts a few times that: see above.
inline Digits digits_by_weight(double tail) { return tail < 0.005 ? Digits::HALF : Digits::ALL; }

// T_1 = y is there; computes the others for this series.
inline void raise(const Team& team, const Basis& y, const Series& series) {
  for (int i = 2; i <= y.q; ++i) {  // T_{a+b} = 2 T_a T_b - T_{|a-b|}
    const View<float> to = y.t(i), one = y.t(1);
    gemm<float>(team, y.n, y.n, y.n, read_only(y.t(i / 2)), read_only(y.t(i - i / 2)), to, 2.0f, 0.0f,
                true, y.packed, digits_by_weight(series.tail(i)));
    if (i % 2 == 0) {
      for (int64_t j = 0; j < y.n; ++j) to(j, j) -= 1.0f;
    } else {
      team.each(y.n, y.n / 16, [&](int64_t r) {
        float* row = to.row(r);
        const float* less = one.row(r);
        for (int64_t j = 0; j <= r; ++j) row[j] -= less[j];
      });
    }
    mirror(team, y.n, to);
  }
}

// result = scale * series(y), by Horner's rule in T_q(y). `other` is scratch of the same size.
inline void polynomial(const Team& team, const Basis& y, const Series& series, double scale,
                       View<float> result, View<float> other) {
  const Blocks blocks = blocks_of(series, y.q);
  View<float> now = result, next = other;
  const auto block = [&](int b, View<float> to, View<float> plus, float factor) {
    // to = sum_{i < q} c[b][i] T_i + factor * plus
    team.each(y.n, y.n * y.q / 8, [&](int64_t i) {
      float* row = to.row(i);
      const float* add = plus.data ? plus.row(i) : nullptr;
      for (int64_t j = 0; j < y.n; ++j) row[j] = add ? factor * add[j] : 0.0f;
      for (int p = 1; p < y.q; ++p) {
        const float weight = float(scale * blocks.c[b][p]);
        if (weight == 0.0f) continue;
        const float* t = y.t(p).row(i);
        for (int64_t j = 0; j < y.n; ++j) row[j] += weight * t[j];
      }
      row[i] += float(scale * blocks.c[b][0]);
    });
  };
  int top = blocks.last;
  if (top > 0 && series.degree == top * y.q) {  // the last block is a number: no product yet
    const float number = float(scale * blocks.c[top][0]);
    block(--top, now, y.t(y.q), number);
  } else {
    block(top, now, {nullptr, 0, 0}, 0.0f);
  }
  while (top-- > 0) {
    block(top, next, {nullptr, 0, 0}, 0.0f);
    gemm<float>(team, y.n, y.n, y.n, read_only(now), read_only(y.t(y.q)), next, 1.0f, 1.0f, true,
                y.packed, digits_by_weight(series.tail((top + 1) * y.q)));
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
