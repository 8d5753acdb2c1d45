// The gradient of the polar factor of one matrix by a block, or a cluster of blocks: the mathematics
// of lipkernels/kernels/triton/polar_backward.py, with everything m x m in shared memory.
//
//   P Y + Y P = T - T^T,  T = Gamma U^T,    dL/dW = Q Gamma + (Y - Q T) U    (Y U for a square W)
//
// by squared Smith steps for V = q Y / 4, with H = P/q, or q P^-1 where P^-1 was saved:
//
//   N = (I + H)^-1,    V = N C N,  A = I - 2 N,    V <- V + A V A,  A <- A^2,    C = (T - T^T) / 2
//
// Note [Smith, not conjugate gradients]
// Conjugate gradients take one product a step, and 1/2 sqrt(c) ln(2/eps) steps at condition number c
// of P: 13, 28 and 88 to 2^-24 at 2, 10 and 100, each with two sums over the block that wait for one
// another. A Smith step squares what is left of Y: 4, 5 and 7 of three products are enough, and 4, 5
// and 6 of two for N. What is left follows from the bounds of the spectrum that the forward saved,
// so a block knows from the start how many its matrix needs: at most those of the twin in Triton.
//
// A block has room for three m x m matrices. T waits in a workspace, and H is loaded twice.
#pragma once

#include "wide.h"

constexpr int SMITH = 7;
constexpr int INVERSE = 7;
constexpr float ENOUGH = 1e-9f;   // what may be left of Y, and of N
constexpr float R_SCALE = 32.0f;  // Y - Q T of a weight that has lost a rank reaches 850
// P^-1 was polished once more after its norm was bounded, which adds at most a half: I + H stays
// where the start of its inverse has |E|_2 <= 1, and no square of E can grow.
constexpr float ROOM = 0.6f;

struct GradientProblem {
  const void* grad;       // Gamma: contiguous
  const float* result;    // scalars[1] U
  const float* factor;    // P^-1, or P for a square W: m x m
  const float* spectrum;  // -p_max, p_min
  const float* scalars;   // what W was divided by, and U multiplied
  void* out;              // dL/dW
  float* workspace;       // m x m for every block of the cluster
  double scale;
  int rows, cols;
};
constexpr int GRADIENT_PROBLEMS = 56;  // of one launch: 4 KB of parameters
struct GradientGroup {
  GradientProblem problems[GRADIENT_PROBLEMS];
  int format;      // of the gradients
  int out_format;  // of the weights
};
static_assert(sizeof(GradientGroup) <= 4096, "parameters of a kernel");

// q = sqrt(p_min p_max), and sqrt(p_min / p_max).
struct Middle {
  float q, root;

  __device__ __forceinline__ Middle(const float* spectrum, int m) {
    const float largest = -spectrum[0], smallest = m > 1 ? spectrum[1] : largest;
    root = sqrtf(smallest / (largest > 0.0f ? largest : 1.0f));
    q = largest * root;
  }
};

template <int M, int N_WARPS>
struct Gradient : Wide<M, N_WARPS> {
  using Base = Wide<M, N_WARPS>;
  using typename Base::Part;
  using typename Base::Square;
  using Base::chunks, Base::identity, Base::m, Base::n, Base::rank, Base::ranks;
  static constexpr int LOADS = M > 64 ? 2 : 4;  // of a thread at once: what registers are left for
  static constexpr int CHUNKS_BYTES = 2 * Base::CHUNK_BYTES;
  static constexpr int LAST_BYTES =
      Base::SQUARE_BYTES > CHUNKS_BYTES ? Base::SQUARE_BYTES : CHUNKS_BYTES;
  static constexpr int BYTES = Base::SCRATCH_BYTES + 2 * Base::SQUARE_BYTES + LAST_BYTES;

  // What all of it needs is read again, not kept in registers, which products are short of.
  const GradientProblem& problem;
  int format, out_format;
  Planes one, two, three;  // m x m; what a cluster adds up goes by way of `two`
  Planes gamma, u;         // m x 64, where `three` is

  __device__ __forceinline__ Gradient(char* shared, const GradientProblem& of, int from, int to)
      : Base(shared, of.rows, of.cols), problem(of), format(from), out_format(to) {
    char* at = shared + Base::SCRATCH_BYTES;
    one = planes_at(at, M, M);
    two = planes_at(at + Base::SQUARE_BYTES, M, M);
    at += 2 * Base::SQUARE_BYTES;
    three = planes_at(at, M, M);
    gamma = planes_at(at, M, CHUNK);
    u = planes_at(at + Base::CHUNK_BYTES, M, CHUNK);
  }
  __device__ __forceinline__ Source gradient() const {
    return wide_source(problem.grad, problem.rows, problem.cols, format);
  }
  __device__ __forceinline__ Source result() const {
    return wide_source(problem.result, problem.rows, problem.cols, FLOAT32);
  }
  __device__ __forceinline__ float* t() const {  // T, M x M
    return problem.workspace + int64_t(rank) * M * M;
  }
  __device__ __forceinline__ float q() const {
    return Middle(problem.spectrum, m).q;
  }
  // Shared memory that no sum uses.
  __device__ __forceinline__ float& norm() const {  // |Gamma|_F
    return this->scratch[48];
  }
  __device__ __forceinline__ int& largest_bits() const {  // of Gamma
    return reinterpret_cast<int&>(this->scratch[49]);
  }

  // f(x) SCALE of the entries of a chunk.
  template <class F>
  __device__ __forceinline__ void put_chunk(const Planes& to, const Source& from, int chunk,
                                            F f) const {
    const int col0 = chunk * CHUNK;
    if (from.fours) {
#pragma unroll LOADS
      for (int i = 0; i < Base::FOURS; ++i) {
        const int k = thread_anew() + i * Base::THREADS;
        // Of a tall matrix two threads read 32 bytes, and their neighbours those of the next row:
        // so they write into different banks.
        const int row = from.tall ? k / (2 * CHUNK) * 8 + k % 2 * 4 : k / (CHUNK / 4);
        const int col = from.tall ? k / 2 % CHUNK : k % (CHUNK / 4) * 4;
        float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
        if (row < m && col0 + col < n) {
          four = load_four(from.data, from.at(row, col0 + col), from.format);
        }
        four = {f(four.x) * SCALE, f(four.y) * SCALE, f(four.z) * SCALE, f(four.w) * SCALE};
        if (from.tall) {
          to.put(row, col, four.x);
          to.put(row + 1, col, four.y);
          to.put(row + 2, col, four.z);
          to.put(row + 3, col, four.w);
        } else {
          to.put_four(row, col, four);
        }
      }
    } else {
#pragma unroll LOADS
      for (int k = thread_anew(); k < M * CHUNK; k += Base::THREADS) {
        const int row = from.tall ? k % M : k / CHUNK, col = from.tall ? k / M : k % CHUNK;
        const bool inside = row < m && col0 + col < n;
        const float x =
            inside ? load_as_float(from.data, from.at(row, col0 + col), from.format) : 0.0f;
        to.put(row, col, f(x) * SCALE);
      }
    }
  }
  // f(row, col) of every entry of an m x m matrix.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll 1
    for (int i = thread_anew(); i < M * M; i += Base::THREADS) f(i / M, i % M);
  }
  __device__ __forceinline__ void load_h(const Planes& to) const {
    const float middle = q();
    const float factor = m == n ? 1.0f / (middle > 0.0f ? middle : 1.0f) : middle;
    each([&](int row, int col) {
      const bool inside = row < m && col < m;
      to.put(row, col, inside ? problem.factor[row * m + col] * factor * SCALE : 0.0f);
    });
  }
  template <Right STORED>
  __device__ __forceinline__ void product(Square& acc, const Planes& a, const Planes& b) const {
    acc.clear();
    multiply<STORED>(acc, a, b, this->row0(), this->square_col0(), M, M);
  }

  // T = Gamma U^T / |Gamma|_F
  __device__ __forceinline__ void along() {
    const int bits = this->largest(gradient());
    if (threadIdx.x == 0) largest_bits() = bits;
    const Unit unit = unit_of(bits);
    Square acc;
    acc.clear();
    float squares = 0.0f;
    const float to_u = 1.0f / problem.scalars[1];
#pragma unroll 1
    for (int c = rank; c < chunks; c += ranks) {
      put_chunk(gamma, gradient(), c, [&](float x) {
        x = unit(x);
        squares += x * x;
        return x;
      });
      put_chunk(u, result(), c, [&](float x) { return x * to_u; });
      __syncthreads();
      multiply<BY_COLUMNS>(acc, gamma, u, this->row0(), this->square_col0(), CHUNK, M);
      __syncthreads();
    }
    this->reduce(acc);
    squares = this->sum_of_all(squares);
    if (threadIdx.x == 0) norm() = sqrtf(squares);
    const float factor = UNSCALE / (squares > 0.0f ? sqrtf(squares) : 1.0f);
    float* to = t();
    this->all(acc, [&](int row, int col, float& value) { to[row * M + col] = value * factor; });
    __syncthreads();
  }

  // N = b (I + H) + a I and E = I - N (I + H) in `one` and `two`; what bounds |E|_2.
  // 1 - x (a + b x) = T_2(c - d x) / T_2(c), the Chebyshev polynomial, on the interval of I + H.
  __device__ __forceinline__ float start(float least) {
    load_h(three);
    __syncthreads();
    Square acc;
    product<BY_COLUMNS>(acc, three, three);
    const float low = 1.0f + least, high = 1.0f + 1.0f / least;
    const float middle = (high + low) / (high - low), slope = 2.0f / (high - low);
    const float whole = 2.0f * middle * middle - 1.0f;
    const float a = 4.0f * middle * slope / whole, b = -2.0f * slope * slope / whole;
    this->lower(acc, [&](int row, int col, float& value) {
      const float h = three.get(row, col) / SCALE, eye = identity(row, col);
      const float inverse = (a + b) * eye + b * h;
      const float e = (1.0f - a - b) * eye - (a + 2.0f * b) * h - b * (value * UNSCALE);
      one.put_symmetric(row, col, inverse * SCALE);
      two.put_symmetric(row, col, e * SCALE);
    });
    __syncthreads();
    return 1.0f / whole;
  }
  // N <- N + N E, E <- E^2, until N is (I + H)^-1: `left` is at least what it lacks.
  __device__ __forceinline__ void invert(float left) {
#pragma unroll 1
    for (int k = 0; k < INVERSE && !(left <= ENOUGH); ++k) {
      Square acc;
      product<BY_COLUMNS>(acc, one, two);
      __syncthreads();
      this->lower(acc, [&](int row, int col, float& value) {
        one.put_symmetric(row, col, one.get(row, col) + value * (UNSCALE * SCALE));
      });
      product<BY_COLUMNS>(acc, two, two);
      __syncthreads();
      this->lower(acc, [&](int row, int col, float& value) {
        two.put_symmetric(row, col, value * (UNSCALE * SCALE));
      });
      __syncthreads();
      left *= left;
    }
  }
  __device__ __forceinline__ void put_skew(const Planes& to, int row, int col, float scaled) const {
    to.put(row, col, row == col ? 0.0f : scaled);
    if (col < row) to.put(col, row, -scaled);
  }
  // V = N C N in `three`, A = I - 2 N in `one`; I - N for N where H = q P^-1, which turns A into -A.
  __device__ __forceinline__ void first_term() {
    const float* from = t();
    each([&](int row, int col) {
      if (col <= row) {
        put_skew(three, row, col, 0.5f * SCALE * (from[row * M + col] - from[col * M + row]));
      }
    });
    __syncthreads();
    Square acc;
    product<BY_COLUMNS>(acc, one, three);  // N C^T = -N C
    this->all(acc, [&](int row, int col, float& value) {
      value *= -UNSCALE * SCALE;
      if (m != n) value = three.get(row, col) - value;
      two.put(row, col, value);
    });
    __syncthreads();
    product<BY_COLUMNS>(acc, two, one);
    this->lower(acc, [&](int row, int col, float& value) {
      value *= UNSCALE * SCALE;
      if (m != n) value = two.get(row, col) - value;
      put_skew(three, row, col, value);
    });
    __syncthreads();
    each([&](int row, int col) {
      one.put(row, col, identity(row, col) * SCALE - 2.0f * one.get(row, col));
    });
    __syncthreads();
  }
  // V <- V + A V A, A <- A^2; `norm` is at least |A|_2.
  __device__ __forceinline__ void solve(float norm) {
    float left = norm * norm;  // of Y
#pragma unroll 1
    for (int k = 0; k < SMITH && !(left <= ENOUGH); ++k) {
      Square acc;
      product<BY_COLUMNS>(acc, one, three);  // A V^T = -A V
      this->all(acc, [&](int row, int col, float& value) {
        two.put(row, col, value * (-UNSCALE * SCALE));
      });
      __syncthreads();
      product<BY_COLUMNS>(acc, two, one);
      this->lower(acc, [&](int row, int col, float& value) {
        put_skew(three, row, col, three.get(row, col) + value * (UNSCALE * SCALE));
      });
      product<BY_COLUMNS>(acc, one, one);
      __syncthreads();
      this->lower(acc, [&](int row, int col, float& value) {
        one.put_symmetric(row, col, value * (UNSCALE * SCALE));
      });
      __syncthreads();
      left *= left;
    }
  }
  // R = q (Y - Q T) = 4 V - H T in `two` and H in `one`; R = q Y for a square W.
  __device__ __forceinline__ void combine() {
    Square acc;
    acc.clear();
    if (m != n) {
      load_h(one);
      const float* from = t();
      each([&](int row, int col) { two.put(row, col, from[row * M + col] * SCALE); });
      __syncthreads();
      product<BY_ROWS>(acc, one, two);
      __syncthreads();
    }
    this->all(acc, [&](int row, int col, float& value) {
      value = 4.0f / SCALE * three.get(row, col) - value * UNSCALE;
      two.put(row, col, value * R_SCALE);
    });
    __syncthreads();
  }
  // dL/dW = (H Gamma + R U) / q, times what Gamma was divided by, and over what W was.
  __device__ __forceinline__ void finish() {
    const Unit unit = unit_of(largest_bits());
    const float size = norm(), middle = q();
    const float to_u = 1.0f / problem.scalars[1];
    const float of_gamma = R_SCALE / SCALE / (size > 0.0f ? size : 1.0f);
    const float factor = float(problem.scale) / (middle > 0.0f ? middle : 1.0f) * size *
                         unit.flag / (R_SCALE * SCALE);
    const int exponent = exponent_of(__float_as_int(unit.unit)) -
                         exponent_of(__float_as_int(problem.scalars[0]));
    const Source like = gradient();
    const float limit = out_format == FLOAT16    ? 65504.0f
                        : out_format == BFLOAT16 ? __int_as_float(0x7F7F0000)
                                                 : __int_as_float(0x7F7FFFFF);
#pragma unroll 1
    for (int c = rank; c < chunks; c += ranks) {
      if (m != n) put_chunk(gamma, gradient(), c, [&](float x) { return unit(x); });
      put_chunk(u, result(), c, [&](float x) { return x * to_u; });
      __syncthreads();
      Part acc;
      acc.clear();
      if (m != n) {
        this->add_part(acc, one, gamma);
        this->part(acc, [&](int, int, float& value) { value *= of_gamma; });
      }
      this->add_part(acc, two, u);
      this->part(acc, [&](int row, int col, float& value) {
        col += c * CHUNK;
        if (row < m && col < n) {
          float x = ldexpf(value * factor, exponent);
          x = x > limit ? limit : x < -limit ? -limit : x;
          store_from_float(problem.out, like.at(row, col), out_format, x);
        }
      });
      __syncthreads();
    }
  }

  __device__ __forceinline__ void run() {
    along();
    const float least = min(max(Middle(problem.spectrum, m).root * ROOM, 1e-4f), ROOM);
    invert(start(least));
    first_term();
    solve((1.0f - least) / (1.0f + least));
    combine();
    finish();
  }
};

// A launch for every GRADIENT_PROBLEMS of them, `cluster` blocks each.
inline int launch_gradient(void (*kernel)(GradientGroup), size_t shared, int threads,
                           const GradientProblem* problems, int count, int format, int out_format,
                           int cluster, void* stream) {
  for (int start = 0; start < count; start += GRADIENT_PROBLEMS) {
    GradientGroup group{};
    group.format = format;
    group.out_format = out_format;
    const int n = count - start < GRADIENT_PROBLEMS ? count - start : GRADIENT_PROBLEMS;
    for (int i = 0; i < n; ++i) group.problems[i] = problems[start + i];
    const int error =
        launch(kernel, dim3(n * cluster), dim3(threads), shared, cluster, stream, group);
    if (error) return error;
  }
  return 0;
}
