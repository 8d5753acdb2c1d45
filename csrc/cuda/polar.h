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

// Rows GROW, NEAR, NEXT of the schedule, and the last line: coefficients of E^0 .. E^4.
constexpr int POLAR_LAST = 3;
__device__ __forceinline__ float polar_coefficient(int row, int power) {
  constexpr float GROW[5] = {1.01360495f, 1.71072954f, -0.119720537f, -12.1004201f, 15.2026228f};
  constexpr float NEAR[5] = {1.00049779f, 0.483115564f, 0.349360243f, 0.477526377f, 0.450920238f};
  constexpr float NEXT[5] = {0.999991896f, 0.499416231f, 0.375774676f, 0.339740689f, 0.276765989f};
  constexpr float LAST[5] = {0.0f, 0.5f, 0.375f, 0.3125f, 0.0f};
  return row == 0 ? GROW[power] : row == 1 ? NEAR[power] : row == 2 ? NEXT[power] : LAST[power];
}
// The row of step k for f = |E|_F and t = |E^2|_F^2.
__device__ __forceinline__ int polar_row(int k, float f, float t, int m) {
  if (k == POLAR_STEPS) return POLAR_LAST;
  int row = t <= 0.6f * 0.6f * 0.6f * 0.6f ? 1 : 0;
  if (t <= float(m) * (0.31f * 0.31f * 0.31f * 0.31f)) row = 2;
  if (f <= POLAR_DONE) row = k == 0 ? 2 : POLAR_LAST;  // at first W is not yet divided by s
  return row == 0 && k == POLAR_STEPS - 1 ? 2 : row;   // what is at one shall end there
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
  static constexpr bool AHEAD = M <= 64;  // whether registers are left to load the next chunk into
  static constexpr float LESS = 0.25f;  // of Z, which may have grown to 75,000, in planes

  const PolarProblem& problem;
  int result_format;
  Source weight;
  // The same for all threads, in shared memory, where they cost no registers.
  struct Numbers {
    Unit unit;
    float s, inverse;  // 1 / s
    float multiplier;  // of U
  };
  Numbers& its;

  __device__ __forceinline__ Polar(char* shared, const PolarProblem& of, int format, int to)
      : Base(shared, of.rows, of.cols),
        problem(of),
        result_format(to),
        its(*reinterpret_cast<Numbers*>(this->scratch + Base::FREE_OF_SCRATCH)) {
    weight = wide_source(of.weight, of.rows, of.cols, format);
  }

  __device__ __forceinline__ float* workspace(int chunk) const {
    return problem.workspace + int64_t(chunk) * CHUNK_SIZE;
  }
  static __device__ __forceinline__ float counted(int row, int col, float value) {
    return Base::weight_of(row, col) * value * value;
  }

  // X = W / unit in the workspace; G = X X^T / |X|_F^2 in the place of E; |X|_F^2 and |G|_F.
  __device__ __forceinline__ void start(float& squares, float& frobenius) {
    Square g;
    g.clear();
    for (int c = rank; c < chunks; c += ranks) {
      this->gather(weight, its.unit, c, workspace(c), x);
      __syncthreads();
      this->add_symmetric(g, x, x, CHUNK);
      __syncthreads();
    }
    this->reduce(g);
    // From the products, so that |X|_F^2 has the same bits however X was loaded.
    float own = 0.0f;
    this->lower(g, [&](int row, int col, float& value) { own += row == col ? value : 0.0f; });
    squares = UNSCALE * this->sum(own);
    const float to_g = UNSCALE / (squares > 0.0f ? squares : 1.0f);
    own = 0.0f;
    this->lower(g, [&](int row, int col, float& value) {
      value *= to_g;
      first.put_symmetric(row, col, value * SCALE);
      own += counted(row, col, value);
    });
    frobenius = sqrtf(this->sum(own));
  }
  // s, and E = I - alpha G, E^2 = I - 2 alpha G + alpha^2 G^2 in the places of G and G^2.
  __device__ __forceinline__ void center(float squares, float frobenius, float& f, float& t) {
    const float mu = 1.0f / float(m);
    float own = 0.0f;
    this->lower([&](int row, int col) {
      const float d = (second.get(row, col) - 2.0f * mu * first.get(row, col)) / SCALE;
      own += counted(row, col, d + mu * mu * identity(row, col));
    });
    const float quartic = sqrtf(sqrtf(this->sum(own)));
    const float bound = min(frobenius, mu + quartic) * (1.0f + 4e-6f);
    const float alpha = bound > 0.0f ? 1.0f / bound : 1.0f;
    if (threadIdx.x == 0) {
      its.s = sqrtf(squares / alpha);
      its.inverse = squares > 0.0f ? sqrtf(alpha / squares) : 0.0f;
    }
    float own_e = 0.0f, own_s = 0.0f;
    this->lower([&](int row, int col) {
      const float g = first.get(row, col) / SCALE, g2 = second.get(row, col) / SCALE;
      const float e = identity(row, col) - alpha * g;
      const float e2 = identity(row, col) - 2.0f * alpha * g + alpha * alpha * g2;
      first.put_symmetric(row, col, e * SCALE);
      second.put_symmetric(row, col, e2 * SCALE);
      own_e += counted(row, col, e);
      own_s += counted(row, col, e2);
    });
    f = sqrtf(this->sum(own_e));
    t = this->sum(own_s);
  }

  // The square of what is in the place of E; its |.|_F^2.
  __device__ __forceinline__ float square() {
    Square e2;
    e2.clear();
    this->add_symmetric(e2, first, first, M);
    float own = 0.0f;
    this->lower(e2, [&](int row, int col, float& value) {
      value *= UNSCALE;
      second.put_symmetric(row, col, value * SCALE);
      own += counted(row, col, value);
    });
    return this->sum(own);
  }
  // z in the place of E.
  __device__ __forceinline__ void polynomial(int row) {
    const float c0 = polar_coefficient(row, 0), c1 = polar_coefficient(row, 1);
    const float c2 = polar_coefficient(row, 2), c3 = polar_coefficient(row, 3);
    const float ratio = polar_coefficient(row, 4) / c3;
    Square z;
    z.clear();
    if (ratio != 0.0f) this->add_symmetric(z, second, second, M);
    this->all(z, [&](int, int, float& value) { value *= ratio; });
    this->add_symmetric(z, first, second, M);
    this->lower(z, [&](int r, int c, float& value) {
      value = c3 * UNSCALE * value + (c2 * second.get(r, c) + c1 * first.get(r, c)) / SCALE;
      value += c0 * identity(r, c);
    });
    __syncthreads();
    this->lower(z, [&](int r, int c, float& value) {
      first.put_symmetric(r, c, value * SCALE);
    });
    __syncthreads();
  }

  // X <- z X, Z <- z Z, from X / s and I at first; X + z X, Z + z Z and their results at last.
  // X X^T, at last Z Z^T of LESS Z.
  __device__ __forceinline__ void apply(bool at_first, bool at_last, Square& gram) {
    gram.clear();
    const int all = chunks + Z_CHUNKS, end = at_first ? chunks : all;
    Fours next;
    for (int c = rank; c < end; c += ranks) {
      const bool is_z = c >= chunks;
      if (!AHEAD || c == rank) this->load(next, workspace(c));
      this->put(x, next, is_z ? 1.0f : SCALE);
      if (AHEAD && c + ranks < end) this->load(next, workspace(c + ranks));
      __syncthreads();
      Part product;
      product.clear();
      this->add_part(product, first, x);
      const float factor = is_z ? 1.0f / SCALE : at_first ? UNSCALE * its.inverse : UNSCALE;
      const float to_planes = is_z ? LESS : SCALE;
      float* chunk = workspace(c);
      this->part(product, [&](int row, int col, float& value) {
        value *= factor;
        if (at_last) value += chunk[row * CHUNK + col];
        chunk[row * CHUNK + col] = value;
        y.put(row, col, value * to_planes);
        if (at_last) store(c, row, col, value);
      });
      __syncthreads();
      if (is_z == at_last) this->add_symmetric(gram, y, y, CHUNK);
    }
    if (at_first) {
      for (int c = chunks; c < all; ++c) {
        if (c % ranks == rank) begin_z(c);
      }
    }
    this->reduce(gram);
  }
  __device__ __forceinline__ void begin_z(int chunk) {
    float* z = workspace(chunk);
    for (int i = int(threadIdx.x); i < CHUNK_SIZE; i += Base::THREADS) {
      const int row = i / CHUNK, col = (chunk - chunks) * CHUNK + i % CHUNK;
      z[i] = col < M ? first.get(row, col) / SCALE : 0.0f;
    }
  }
  // An entry of U, and of Z: P^-1 = Z / s, unless W is square.
  __device__ __forceinline__ void store(int chunk, int row, int col, float value) const {
    if (chunk < chunks) {
      col += chunk * CHUNK;
      if (result_format == FLOAT32 && row < m && col < n) {
        static_cast<float*>(problem.result)[weight.at(row, col)] = value * its.multiplier;
      }
    } else {
      col += (chunk - chunks) * CHUNK;
      if (m != n && row < m && col < m) problem.factor[row * m + col] = value * its.inverse;
    }
  }
  // E = I - X X^T; its |.|_F.
  __device__ __forceinline__ float defect(Square& gram) {
    float own = 0.0f;
    this->lower(gram, [&](int row, int col, float& value) {
      value = identity(row, col) - value * UNSCALE;
      first.put_symmetric(row, col, value * SCALE);
      own += counted(row, col, value);
    });
    return sqrtf(this->sum(own));
  }
  // At least the largest singular value of Z, from the squares of LESS Z.
  __device__ __forceinline__ float largest_of_z(Square& gram) {
    float own = 0.0f;
    this->lower(gram, [&](int row, int col, float& value) { own += counted(row, col, value); });
    return sqrtf(sqrtf(this->sum(own))) / LESS;
  }

  // P = W U^T, of a square W.
  __device__ __forceinline__ void save_factor() {
    Square p;
    p.clear();
    for (int c = rank; c < chunks; c += ranks) {
      Fours u;
      this->load(u, workspace(c));
      this->put(y, u, SCALE);
      for (int k = int(threadIdx.x); k < CHUNK_SIZE; k += Base::THREADS) {
        const int row = k / CHUNK, col = k % CHUNK, column = c * CHUNK + col;
        const bool inside = row < m && column < n;
        x.put(row, col, inside ? SCALE * its.unit(element(row, column)) : 0.0f);
      }
      __syncthreads();
      multiply<BY_COLUMNS>(p, x, y, this->row0(), this->square_col0(), CHUNK, M);
      __syncthreads();
    }
    this->reduce(p);
    constexpr int LD = M + 1;
    static_assert(4 * M * LD <= Base::SECOND_BYTES, "room for P");
    float* both = this->exchanged;
    this->all(p, [&](int row, int col, float& value) { both[row * LD + col] = value; });
    __syncthreads();
    for (int i = int(threadIdx.x); rank == 0 && i < m * m; i += Base::THREADS) {
      const int row = i / m, col = i % m;
      problem.factor[i] = 0.5f * UNSCALE * (both[row * LD + col] + both[col * LD + row]);
    }
    __syncthreads();
  }
  __device__ __forceinline__ float element(int row, int col) const {
    return load_as_float(weight.data, weight.at(row, col), weight.format);
  }
  __device__ __forceinline__ void save_numbers(float z) const {
    if (rank != 0) return;
    for (int i = int(threadIdx.x); i < m; i += Base::THREADS) {
      problem.spectrum[i] = i == 0 ? -its.s : i == 1 ? its.s / z : 0.0f;
    }
    if (threadIdx.x == 0) {
      problem.scalars[0] = its.unit.unit;
      problem.scalars[1] = its.multiplier;
    }
  }

  __device__ __forceinline__ void run() {
    const int largest = this->largest(weight);
    if (threadIdx.x == 0) {
      its.unit = unit_of(largest);
      its.multiplier =
          (result_format == FLOAT32 ? float(problem.worst_case) : 1.0f) * its.unit.flag;
    }
    __syncthreads();
    float squares, frobenius, f = 0.0f;
    start(squares, frobenius);
    for (int k = 0;; ++k) {
      float t = square();
      if (k == 0) center(squares, frobenius, f, t);
      const int row = polar_row(k, f, t, m);
      polynomial(row);
      Square gram;
      apply(k == 0, row == POLAR_LAST, gram);
      if (row == POLAR_LAST) {
        save_numbers(largest_of_z(gram));
        break;
      }
      f = defect(gram);
    }
    if (m == n) save_factor();
    if (result_format != FLOAT32) {
      this->store_within(workspace(0), weight, problem.result, result_format, problem.scale,
                         problem.worst_case, 1.0, its.unit.flag);
    }
  }
};

// A launch for every POLAR_PROBLEMS of them, `cluster` blocks each.
inline int launch_polar(void (*kernel)(PolarGroup), size_t shared, int threads,
                        const PolarProblem* problems, int count, int format, int result_format,
                        int cluster, void* stream) {
  for (int start = 0; start < count; start += POLAR_PROBLEMS) {
    PolarGroup group{};
    group.format = format;
    group.result_format = result_format;
    const int n = count - start < POLAR_PROBLEMS ? count - start : POLAR_PROBLEMS;
    for (int i = 0; i < n; ++i) group.problems[i] = problems[start + i];
    const int error =
        launch(kernel, dim3(n * cluster), dim3(threads), shared, cluster, stream, group);
    if (error) return error;
  }
  return 0;
}
