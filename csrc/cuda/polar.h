// The whole polar factor of one matrix by a block, or a cluster of blocks: the mathematics, the
// schedule and what is saved are those of lipkernels/kernels/triton/polar.py and schedule.py.
//
//   X <- z(X X^T) X,  Z <- z Z          up to STEPS times, from X = W / s, Z = I
//   X <- X + (1/2 E + 3/8 E^2 + 5/16 E^3) X,    E = I - X X^T
//
// A step reads the columns of X once: 64 of them are multiplied by z, written back, and their
// products with one another added to the next X X^T while they are there. The last line, the series
// of (X X^T)^(-1/2) around X X^T = I, brings what the steps leave, |E|_F <= 0.01, to rounding at
// once; cut off after an odd power it is below the whole for every E < I, so that no singular
// value ever exceeds one.
//
// X and Z live in a workspace, as chunks of M x 64 float32 numbers, those of Z after those of X.
#pragma once

#include "wide.h"

constexpr int POLAR_STEPS = 6;
constexpr float POLAR_DONE = 1e-2f;

struct PolarProblem {
  const void* weight;  // contiguous
  void* result;        // of the same shape
  float* factor;       // m x m
  float* spectrum;     // m
  float* scalars;      // 2
  float* workspace;
  double scale;
  double worst_case;  // what U is multiplied by in float32, and where nothing else is certain
  int rows, cols;
};
constexpr int POLAR_PROBLEMS = 48;  // of one launch: 4 KB of parameters
struct PolarGroup {
  PolarProblem problems[POLAR_PROBLEMS];
  int format;         // of the weights
  int result_format;
};
static_assert(sizeof(PolarGroup) <= 4096, "parameters of a kernel");

// Rows GROW, NEAR, NEXT of the schedule: coefficients of E^0 .. E^4.
__device__ __forceinline__ float polar_coefficient(int row, int power) {
  constexpr float GROW[5] = {1.01360495f, 1.71072954f, -0.119720537f, -12.1004201f, 15.2026228f};
  constexpr float NEAR[5] = {1.00049779f, 0.483115564f, 0.349360243f, 0.477526377f, 0.450920238f};
  constexpr float NEXT[5] = {0.999991896f, 0.499416231f, 0.375774676f, 0.339740689f, 0.276765989f};
  return row == 0 ? GROW[power] : row == 1 ? NEAR[power] : NEXT[power];
}
// The row for f = |E|_F and t = |E^2|_F^2; below zero: none, it is done.
__device__ __forceinline__ int polar_row(float f, float t, int m) {
  if (f <= POLAR_DONE) return -1;
  if (t <= float(m) * (0.31f * 0.31f * 0.31f * 0.31f)) return 2;
  return t <= 0.6f * 0.6f * 0.6f * 0.6f ? 1 : 0;
}

template <int M, int N_WARPS>
struct Polar : Wide<M, N_WARPS> {
  using Base = Wide<M, N_WARPS>;
  using typename Base::Fours;
  using typename Base::Part;
  using typename Base::Square;
  using Base::chunks, Base::first, Base::identity, Base::m, Base::n, Base::rank, Base::ranks;
  using Base::second, Base::x, Base::y;
  static constexpr int Z_CHUNKS = M > CHUNK ? M / CHUNK : 1;
  static constexpr int CHUNK_SIZE = M * CHUNK;

  const PolarProblem& problem;
  Source weight;
  Unit unit;
  int result_format;
  float inverse;  // 1 / s
  float s;

  __device__ __forceinline__ Polar(char* shared, const PolarProblem& of, int format, int to)
      : Base(shared, of.rows, of.cols), problem(of), result_format(to) {
    weight = wide_source(of.weight, of.rows, of.cols, format);
  }

  __device__ __forceinline__ float* workspace(int chunk) const {
    return problem.workspace + int64_t(chunk) * CHUNK_SIZE;
  }
  // The chunks of Z that this block has: the turns go on after those of X.
  __device__ __forceinline__ bool has(int z_chunk) const {
    return (chunks + z_chunk) % ranks == rank;
  }

  // E = I - alpha G and E^2, G = W W^T / |W|_F^2; s.
  __device__ __forceinline__ void start(float& f, float& t) {
    Square g;
    g.clear();
    float squares = 0.0f;
    Fours next;
    if (rank < chunks) this->load(next, weight, rank);
    for (int c = rank; c < chunks; c += ranks) {
      this->put(x, next, weight.tall, [&](float value) {
        value = unit(value);
        squares += value * value;
        return value * SCALE;
      });
      if (c + ranks < chunks) this->load(next, weight, c + ranks);
      __syncthreads();
      this->add_symmetric(g, x, x, CHUNK);
      __syncthreads();
    }
    this->reduce(g);
    squares = this->sum_of_all(squares);
    const float to_g = UNSCALE / (squares > 0.0f ? squares : 1.0f);
    float own = 0.0f;
    this->lower(g, [&](int row, int col, float& value) {
      value *= to_g;
      first.put_symmetric(row, col, value * SCALE);
      own += this->weight_of(row, col) * value * value;
    });
    const float frobenius = sqrtf(this->sum(own));
    Square g2;
    g2.clear();
    this->add_symmetric(g2, first, first, M);
    const float mu = 1.0f / float(m);
    own = 0.0f;
    this->lower(g2, [&](int row, int col, float& value) {
      value *= UNSCALE;
      const float g_here = first.get(row, col) / SCALE;
      const float d = value - 2.0f * mu * g_here + mu * mu * identity(row, col);
      own += this->weight_of(row, col) * d * d;
    });
    const float quartic = sqrtf(sqrtf(this->sum(own)));
    const float bound = min(frobenius, mu + quartic) * (1.0f + 4e-6f);
    const float alpha = bound > 0.0f ? 1.0f / bound : 1.0f;
    s = sqrtf(squares / alpha);
    inverse = squares > 0.0f ? sqrtf(alpha / squares) : 0.0f;
    float own_e = 0.0f, own_s = 0.0f;
    this->lower(g2, [&](int row, int col, float& value) {
      const float g_here = first.get(row, col) / SCALE, one = identity(row, col);
      const float e = one - alpha * g_here;
      const float e2 = one - 2.0f * alpha * g_here + alpha * alpha * value;
      first.put_symmetric(row, col, e * SCALE);
      second.put_symmetric(row, col, e2 * SCALE);
      own_e += this->weight_of(row, col) * e * e;
      own_s += this->weight_of(row, col) * e2 * e2;
    });
    f = sqrtf(this->sum(own_e));
    t = this->sum(own_s);
  }

  // z in the place of E.
  __device__ __forceinline__ void polynomial(int row) {
    const float c0 = polar_coefficient(row, 0), c1 = polar_coefficient(row, 1);
    const float c2 = polar_coefficient(row, 2), c3 = polar_coefficient(row, 3);
    const float ratio = polar_coefficient(row, 4) / c3;
    Square z;
    z.clear();
    this->add_symmetric(z, second, second, M);
    this->all(z, [&](int, int, float& value) { value *= ratio; });
    this->add_symmetric(z, first, second, M);
    this->lower(z, [&](int r, int c, float& value) {
      value = c3 * UNSCALE * value + (c2 * second.get(r, c) + c1 * first.get(r, c)) / SCALE;
      value += c0 * identity(r, c);
    });
    this->replace_first(z);
  }
  __device__ __forceinline__ void replace_first(Square& by) {
    __syncthreads();
    this->lower(by, [&](int row, int col, float& value) {
      first.put_symmetric(row, col, value * SCALE);
    });
    __syncthreads();
  }

  // X <- z X and Z <- z Z, the first time from W and I; E = I - X X^T.
  __device__ __forceinline__ void apply(bool from_weight, float& f) {
    Square gram;
    gram.clear();
    Fours next;
    const auto fetch = [&](int c) {
      if (from_weight) {
        this->load(next, weight, c);
      } else {
        this->load(next, workspace(c));
      }
    };
    const float factor = from_weight ? UNSCALE * inverse : UNSCALE;
    if (rank < chunks) fetch(rank);
    for (int c = rank; c < chunks; c += ranks) {
      this->put(x, next, from_weight && weight.tall, [&](float value) {
        return (from_weight ? unit(value) : value) * SCALE;
      });
      if (c + ranks < chunks) fetch(c + ranks);
      __syncthreads();
      Part zx;
      zx.clear();
      this->add_part(zx, first, x);
      float* to = workspace(c);
      this->part(zx, [&](int row, int col, float& value) {
        value *= factor;
        to[row * CHUNK + col] = value;
        y.put(row, col, value * SCALE);
      });
      __syncthreads();
      this->add_symmetric(gram, y, y, CHUNK);
    }
    for (int k = 0; k < Z_CHUNKS; ++k) {
      if (has(k)) apply_to_z(from_weight, k);
    }
    defect(gram, f);
  }
  __device__ __forceinline__ void apply_to_z(bool from_identity, int k) {
    float* z = workspace(chunks + k);
    if (from_identity) {
      for (int i = int(threadIdx.x); i < CHUNK_SIZE; i += Base::THREADS) {
        const int row = i / CHUNK, col = k * CHUNK + i % CHUNK;
        z[i] = col < M ? first.get(row, col) / SCALE : 0.0f;
      }
      return;
    }
    Fours part;
    this->load(part, z);
    this->put(x, part, false, [](float value) { return value; });
    __syncthreads();
    Part zz;
    zz.clear();
    this->add_part(zz, first, x);
    this->part(zz, [&](int row, int col, float& value) { z[row * CHUNK + col] = value / SCALE; });
    __syncthreads();
  }
  // E from X X^T
  __device__ __forceinline__ void defect(Square& gram, float& f) {
    this->reduce(gram);
    float own = 0.0f;
    this->lower(gram, [&](int row, int col, float& value) {
      value = identity(row, col) - value * UNSCALE;
      first.put_symmetric(row, col, value * SCALE);
      own += this->weight_of(row, col) * value * value;
    });
    f = sqrtf(this->sum(own));
  }
  // E^2; its |.|_F^2
  __device__ __forceinline__ float square() {
    Square e2;
    e2.clear();
    this->add_symmetric(e2, first, first, M);
    float own = 0.0f;
    this->lower(e2, [&](int row, int col, float& value) {
      value *= UNSCALE;
      second.put_symmetric(row, col, value * SCALE);
      own += this->weight_of(row, col) * value * value;
    });
    return this->sum(own);
  }

  // 1/2 E + 3/8 E^2 + 5/16 E^3 in the place of E.
  __device__ __forceinline__ void correction() {
    Square c;
    c.clear();
    this->add_symmetric(c, first, second, M);
    this->lower(c, [&](int row, int col, float& value) {
      value *= 0.3125f * UNSCALE;
      value += (0.375f * second.get(row, col) + 0.5f * first.get(row, col)) / SCALE;
    });
    this->replace_first(c);
  }
  // X + C X into the workspace, and as the result if that is float32.
  __device__ __forceinline__ void finish_x(float multiplier) {
    float* result = static_cast<float*>(problem.result);
    for (int c = rank; c < chunks; c += ranks) {
      Fours here;
      float* from = workspace(c);
      this->load(here, from);
      this->put(x, here, false, [](float value) { return value * SCALE; });
      __syncthreads();
      Part cx;
      cx.clear();
      this->add_part(cx, first, x);
      this->part(cx, [&](int row, int col, float& value) {
        value = value * UNSCALE + from[row * CHUNK + col];
        from[row * CHUNK + col] = value;
        const int column = c * CHUNK + col;
        if (result_format == FLOAT32 && row < m && column < n) {
          result[weight.at(row, column)] = value * multiplier;
        }
      });
      __syncthreads();
    }
  }
  // Z + C Z; P^-1 = Z / s, unless W is square; at least the largest singular value of Z.
  __device__ __forceinline__ float finish_z() {
    constexpr float LESS = 0.25f;  // for planes: Z has grown to 75,000 at most
    Square zz;
    zz.clear();
    for (int k = 0; k < Z_CHUNKS; ++k) {
      if (!has(k)) continue;
      Fours part;
      const float* from = workspace(chunks + k);
      this->load(part, from);
      this->put(x, part, false, [](float value) { return value; });
      __syncthreads();
      Part cz;
      cz.clear();
      this->add_part(cz, first, x);
      this->part(cz, [&](int row, int col, float& value) {
        value = value / SCALE + from[row * CHUNK + col];
        y.put(row, col, value * LESS);
        const int column = k * CHUNK + col;
        if (m != n && row < m && column < m) problem.factor[row * m + column] = value * inverse;
      });
      __syncthreads();
      this->add_symmetric(zz, y, y, CHUNK);
      __syncthreads();
    }
    this->reduce(zz);
    float own = 0.0f;
    this->lower(zz, [&](int row, int col, float& value) {
      own += this->weight_of(row, col) * value * value;
    });
    return sqrtf(sqrtf(this->sum(own))) / LESS;
  }
  // P = W U^T, of a square W.
  __device__ __forceinline__ void factor() {
    Square p;
    p.clear();
    for (int c = rank; c < chunks; c += ranks) {
      Fours part;
      this->load(part, weight, c);
      this->put(x, part, weight.tall, [&](float value) { return unit(value) * SCALE; });
      this->load(part, workspace(c));
      this->put(y, part, false, [](float value) { return value * SCALE; });
      __syncthreads();
      this->add_all(p, x, y, CHUNK);
      __syncthreads();
    }
    this->reduce(p);
    constexpr int LD = M + 1;
    float* both = this->exchanged;
    this->all(p, [&](int row, int col, float& value) { both[row * LD + col] = value; });
    __syncthreads();
    if (rank == 0) {
      for (int i = int(threadIdx.x); i < m * m; i += Base::THREADS) {
        const int row = i / m, col = i % m;
        problem.factor[i] = 0.5f * UNSCALE * (both[row * LD + col] + both[col * LD + row]);
      }
    }
    __syncthreads();
  }

  // U times the largest multiplier that rounding to half precision is certain not to carry over the
  // scale: as lipkernels/kernels/triton/half.py, which says why.
  __device__ __forceinline__ void finish_half() {
    const double eps = result_format == FLOAT16 ? 0x1p-10 : 0x1p-7;
    const float to_units = float(1.0 / (eps * problem.scale));
    const float room = float(1.0 / eps) * (2.0f + sqrtf(float(m))) * (1.0f / 4194304.0f);
    float multiplier = float(problem.worst_case);
    for (int attempt = 0; attempt < 4; ++attempt) {
      const float shrink = attempt == 0 ? 0.3f : attempt == 1 ? 0.6f : attempt == 2 ? 1.2f : 2.5f;
      const float tried = float(problem.scale * max(0.0, 1.0 - double(shrink) * eps));
      if (rounding(tried, to_units) * (1.0f + 1e-4f) + room <= shrink) {
        multiplier = tried;
        break;
      }
    }
    for (int c = rank; c < chunks; c += ranks) {
      const float* from = workspace(c);
      for (int i = int(threadIdx.x); i < CHUNK_SIZE; i += Base::THREADS) {
        const int row = weight.tall ? i % M : i / CHUNK;
        const int col = weight.tall ? i / M : i % CHUNK;
        if (row < m && c * CHUNK + col < n) {
          store_from_float(problem.result, weight.at(row, c * CHUNK + col), result_format,
                           from[row * CHUNK + col] * multiplier);
        }
      }
    }
  }
  // At least the norm of what rounding changes, in units.
  __device__ __forceinline__ float rounding(float multiplier, float to_units) {
    Square rr;
    rr.clear();
    float squares = 0.0f;
    for (int c = rank; c < chunks; c += ranks) {
      Fours part;
      this->load(part, workspace(c));
      this->put(x, part, false, [&](float value) {
        value *= multiplier;
        const float r = (rounded_to(value, result_format) - value) * to_units;
        squares += r * r;
        return r * SCALE;
      });
      __syncthreads();
      this->add_symmetric(rr, x, x, CHUNK);
      __syncthreads();
    }
    this->reduce(rr);
    float own = 0.0f;
    this->lower(rr, [&](int row, int col, float& value) {
      value *= UNSCALE;
      own += this->weight_of(row, col) * value * value;
    });
    return min(sqrtf(this->sum_of_all(squares)), sqrtf(sqrtf(this->sum(own))));
  }

  __device__ __forceinline__ void run() {
    unit = unit_of(this->largest(weight));
    float f, t;
    start(f, t);
    for (int k = 0; k < POLAR_STEPS; ++k) {
      int row = polar_row(f, t, m);
      if (k == 0 && row < 0) row = 2;  // W is not yet divided by s
      if (row < 0) break;
      if (row == 0 && k == POLAR_STEPS - 1) row = 2;  // what is at one shall end there
      polynomial(row);
      apply(k == 0, f);
      t = square();
    }
    correction();
    const float multiplier =
        (result_format == FLOAT32 ? float(problem.worst_case) : 1.0f) * unit.flag;
    finish_x(multiplier);
    const float z = finish_z();
    if (m == n) factor();
    if (rank == 0) {
      for (int i = int(threadIdx.x); i < m; i += Base::THREADS) {
        problem.spectrum[i] = i == 0 ? -s : i == 1 ? s / z : 0.0f;
      }
      if (threadIdx.x == 0) {
        problem.scalars[0] = unit.unit;
        problem.scalars[1] = multiplier;
      }
    }
    if (result_format != FLOAT32) finish_half();
  }
};
