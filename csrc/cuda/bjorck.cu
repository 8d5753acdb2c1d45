// lipkernels::bjorck for small sides up to 64, forward and backward: one block a matrix, one launch
// a group. The mathematics is that of lipkernels/kernels/triton/bjorck.py; sigma_max, never too
// small, with its vectors that of norms.py.
//
//   X_0 = W / sigma_max(W),    X_{k+1} = X_k + beta E_k X_k,    E_k = I - X_k X_k^T
//
// A step reads the columns of X once, and adds their products with one another up for the next E.
// Backward keeps every X_k in the workspace and goes back through them, two readings a step:
//
//   Gamma_k = Gamma_{k+1} + beta (E_k Gamma_{k+1} - S_k X_k),
//   S_k = Gamma_{k+1} X_k^T + X_k Gamma_{k+1}^T
//   dL/dW = (Gamma_0 - <Gamma_0, W> / sigma u v^T) / sigma
#include "wide.h"

namespace {
constexpr int WARPS = 8;
constexpr int LARGEST = 64;
constexpr int PROBLEMS = 40;     // of one launch: 4 KB of parameters
constexpr int SQUARINGS = 25;    // a tied norm is at most m^(1 / 2^26) too large
constexpr double RANK_ONE = 1e-12;

struct Problem {
  const void* weight;  // contiguous, as all of them are
  const void* grad;    // dL/dX_n, backward only
  void* result;        // X_n; backward: dL/dW
  double* sigma;       // and the left and right singular vectors; backward reads them
  double* left;
  double* right;
  float* workspace;    // chunks of as many X as there are, then of Gamma
  double scale;
  double worst_case;   // what X_n is multiplied by in float32, and where nothing else is certain
  double first;        // what W / sigma is multiplied by to have a norm below one in float32
  int rows, cols;
};
struct Group {
  Problem problems[PROBLEMS];
  int format;        // of the weights and their gradients
  int other_format;  // of the results; backward: of the gradients that come in
  int backward;
  int n_iter;
  float beta, tol;
  double own;  // for roundings of this file: in half precision X_n is multiplied by it
};
static_assert(sizeof(Group) <= 4096, "parameters of a kernel");

template <int M>
struct Bjorck : Wide<M, WARPS> {
  using Base = Wide<M, WARPS>;
  using typename Base::Fours;
  using typename Base::Part;
  using typename Base::Square;
  using Base::chunks, Base::first, Base::identity, Base::m, Base::n, Base::second, Base::x, Base::y;
  static constexpr int CHUNK_SIZE = M * CHUNK;

  const Problem& problem;
  const Group& group;
  Source weight;

  __device__ __forceinline__ Bjorck(char* shared, const Problem& of, const Group& with)
      : Base(shared, of.rows, of.cols), problem(of), group(with) {
    weight = wide_source(of.weight, of.rows, of.cols, with.format);
  }

  __device__ __forceinline__ float* chunk_of(int slot, int chunk) const {
    return problem.workspace + (int64_t(slot) * chunks + chunk) * CHUNK_SIZE;
  }
  __device__ __forceinline__ double* of_rows() const {  // of the wide one
    return weight.tall ? problem.right : problem.left;
  }
  __device__ __forceinline__ double* of_columns() const {
    return weight.tall ? problem.left : problem.right;
  }
  __device__ __forceinline__ double sum_double(double value) const {
    return block_sum(value, reinterpret_cast<double*>(this->scratch));
  }

  __device__ __forceinline__ void gather_all(const Source& from, const Unit& unit, int slot) const {
    for (int c = 0; c < chunks; ++c) {
      this->gather(from, unit, c, chunk_of(slot, c), x);
      __syncthreads();
    }
  }
  __device__ __forceinline__ void multiply_all(int slot, double by) const {
    float* all = chunk_of(slot, 0);
    for (int i = int(threadIdx.x); i < chunks * CHUNK_SIZE; i += Base::THREADS) {
      all[i] = float(double(all[i]) * by);
    }
    __syncthreads();
  }

  // ------------------------------------------------------------------------------------------ norm
  // Entries (row, col) of a product that a thread has: rows and columns 16 apart.
  static constexpr int T = M / 16;
  static constexpr int LD = M + 1, LD_X = CHUNK + 1;  // of `power` and `columns`
  static_assert(8 * M * LD <= Base::SQUARE_BYTES + Base::SECOND_BYTES, "room for a power");
  static_assert(4 * M * LD_X <= Base::CHUNK_BYTES, "room for columns");
  template <class F>
  static __device__ __forceinline__ void own_entries(F f) {
    const int row = int(threadIdx.x) / 16, col = int(threadIdx.x) % 16;
#pragma unroll
    for (int i = 0; i < T; ++i) {
#pragma unroll
      for (int j = 0; j < T; ++j) f(row + 16 * i, col + 16 * j, i, j);
    }
  }
  template <class V>
  static __device__ __forceinline__ void add_products(double (&acc)[T][T], const V* of, int ld,
                                                      int depth) {
    const V* left = of + int(threadIdx.x) / 16 * ld;
    const V* right = of + int(threadIdx.x) % 16 * ld;
#pragma unroll 2
    for (int k = 0; k < depth; ++k) {
      double a[T], b[T];
#pragma unroll
      for (int i = 0; i < T; ++i) {
        a[i] = left[16 * i * ld + k];
        b[i] = right[16 * i * ld + k];
      }
#pragma unroll
      for (int i = 0; i < T; ++i) {
#pragma unroll
        for (int j = 0; j < T; ++j) acc[i][j] += a[i] * b[j];
      }
    }
  }
  static __device__ __forceinline__ double squares_of(double (&acc)[T][T]) {
    double sum = 0.0;
    own_entries([&](int, int, int i, int j) { sum += acc[i][j] * acc[i][j]; });
    return sum;
  }

  // sigma_max of what is in slot 0, and its vectors.
  __device__ __forceinline__ double norm(float flag) const {
    double* power = reinterpret_cast<double*>(first.hi);
    float* columns = reinterpret_cast<float*>(x.hi);
    double acc[T][T] = {};
    for (int c = 0; c < chunks; ++c) {
      const float* from = chunk_of(0, c);
      for (int i = int(threadIdx.x); i < CHUNK_SIZE; i += Base::THREADS) {
        columns[i / CHUNK * LD_X + i % CHUNK] = from[i];
      }
      __syncthreads();
      add_products(acc, columns, LD_X, CHUNK);
      __syncthreads();
    }
    const double gram = sqrt(sum_double(squares_of(acc)));
    double by = gram > 0.0 ? 1.0 / gram : 0.0, spread = gram > 0.0 ? 1.0 : 0.0;
    double log_of_others = 0.0, weight_of_next = 0.25;
#pragma unroll 1
    for (int k = 0;; ++k) {
      own_entries([&](int row, int col, int i, int j) {
        power[row * LD + col] = acc[i][j] * by;
        acc[i][j] = 0.0;
      });
      __syncthreads();
      if (k == SQUARINGS || !(spread > RANK_ONE)) break;
      add_products(acc, power, LD, M);
      const double squares = sum_double(squares_of(acc));
      log_of_others += weight_of_next * log(squares);
      weight_of_next *= 0.5;
      by = 1.0 / sqrt(squares);
      spread = 1.0 - squares;
    }
    // What rounding can take away: Note [Rounding] in norms.py.
    const double room = double(m) * (n + 16) + double(m) * (m + 16) + 64;
    const double sigma = sqrt(gram * exp(log_of_others) * (1.0 + 0x1p-52 * room));
    save_vectors(power, sigma, flag);
    return sigma;
  }
  __device__ __forceinline__ void save_vectors(const double* power, double sigma,
                                               float flag) const {
    int top = 0;
    for (int i = 1; i < m; ++i) {
      if (power[i * LD + i] > power[top * LD + top]) top = i;
    }
    double squares = 0.0;
    for (int i = 0; i < m; ++i) squares += power[i * LD + top] * power[i * LD + top];
    const double length = sqrt(squares), spoiled = flag - 1.0;
    double* small = of_rows();
    for (int i = int(threadIdx.x); i < m; i += Base::THREADS) {
      const double entry = length > 0.0 ? power[i * LD + top] / length : i == 0 ? 1.0 : 0.0;
      small[i] = entry + spoiled;
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < n; i += Base::THREADS) {
      const float* column = chunk_of(0, i / CHUNK) + i % CHUNK;
      double sum = 0.0;
      for (int row = 0; row < m; ++row) sum += double(column[row * CHUNK]) * small[row];
      of_columns()[i] = (sigma > 0.0 ? sum / sigma : 0.0) + spoiled;
    }
    __syncthreads();
  }

  // ------------------------------------------------------------------------------------- iteration
  // E of X X^T, in `first`.
  __device__ __forceinline__ void defect(Square& gram) const {
    this->reduce(gram);
    this->lower(gram, [&](int row, int col, float& value) {
      first.put_symmetric(row, col, (identity(row, col) - value * UNSCALE) * SCALE);
    });
    __syncthreads();
  }
  __device__ __forceinline__ void first_defect() const {
    Square gram;
    gram.clear();
    for (int c = 0; c < chunks; ++c) {
      Fours here;
      this->load(here, chunk_of(0, c));
      this->put(x, here, SCALE);
      __syncthreads();
      this->add_symmetric(gram, x, x, CHUNK);
      __syncthreads();
    }
    defect(gram);
  }
  // X + beta E X into another slot; its X X^T, and |beta E X|_F.
  __device__ __forceinline__ float step(int from, int to, Square& gram) const {
    gram.clear();
    float squares = 0.0f;
    const float by = group.beta * UNSCALE;
    for (int c = 0; c < chunks; ++c) {
      const float* old = chunk_of(from, c);
      float* now = chunk_of(to, c);
      Fours here;
      this->load(here, old);
      this->put(x, here, SCALE);
      __syncthreads();
      Part change;
      change.clear();
      this->add_part(change, first, x);
      this->part(change, [&](int row, int col, float& value) {
        value *= by;
        squares += value * value;
        value += old[row * CHUNK + col];
        now[row * CHUNK + col] = value;
        y.put(row, col, value * SCALE);
      });
      __syncthreads();
      this->add_symmetric(gram, y, y, CHUNK);
    }
    return sqrtf(this->sum(squares));
  }
  // Steps from slot 0 on, in `slots` that take turns; how many were taken.
  __device__ __forceinline__ int iterate(int slots) const {
    int taken = 0;
    if (group.n_iter > 0) first_defect();
    for (int k = 0; k < group.n_iter; ++k) {
      Square gram;
      const float change = step(k % slots, (k + 1) % slots, gram);
      if (group.tol > 0.0f && change <= group.tol) break;
      taken = k + 1;
      defect(gram);
    }
    __syncthreads();
    return taken;
  }

  __device__ __forceinline__ void run() {
    const Unit unit = unit_of(this->largest(weight));
    gather_all(weight, unit, 0);
    const double sigma = group.backward ? *problem.sigma / unit.unit : norm(unit.flag);
    multiply_all(0, sigma > 0.0 ? problem.first / sigma : 0.0);
    const int taken = iterate(group.backward ? group.n_iter + 1 : 2);
    if (group.backward) {
      backward(taken);
      return;
    }
    if (threadIdx.x == 0) *problem.sigma = sigma * unit.unit + (unit.flag - 1.0);
    const float* last = chunk_of(taken % 2, 0);
    if (group.other_format != FLOAT32) {
      this->store_within(last, weight, problem.result, group.other_format, problem.scale,
                         problem.worst_case, group.own, unit.flag);
      return;
    }
    const float multiplier = float(problem.worst_case) * unit.flag;
    each_entry([&](int row, int col, int c) {
      if (row < m && c * CHUNK + col < n) {
        const float value = last[c * CHUNK_SIZE + row * CHUNK + col] * multiplier;
        static_cast<float*>(problem.result)[weight.at(row, c * CHUNK + col)] = value;
      }
    });
  }
  // f(row, column of the chunk, chunk), neighbours in memory side by side
  template <class F>
  __device__ __forceinline__ void each_entry(F f) const {
    for (int i = int(threadIdx.x); i < chunks * CHUNK_SIZE; i += Base::THREADS) {
      const int c = i / CHUNK_SIZE, k = i % CHUNK_SIZE;
      if (weight.tall) {
        f(k % M, k / M, c);
      } else {
        f(k / CHUNK, k % CHUNK, c);
      }
    }
  }

  // -------------------------------------------------------------------------------------- backward
  // Gamma_k from Gamma_{k+1} in its slot. `scale` is Gamma's in planes, S has half of it.
  __device__ __forceinline__ void step_back(int k, int slot, float scale) const {
    Square s, e;
    s.clear();
    e.clear();
    for (int c = 0; c < chunks; ++c) {
      Fours here;
      this->load(here, chunk_of(slot, c));
      this->put(x, here, scale);
      this->load(here, chunk_of(k, c));
      this->put(y, here, SCALE);
      __syncthreads();
      this->add_symmetric(s, x, y, CHUNK);
      this->add_symmetric(s, y, x, CHUNK);
      this->add_symmetric(e, y, y, CHUNK);
      __syncthreads();
    }
    this->lower(s, [&](int row, int col, float& value) {
      second.put_symmetric(row, col, value * (0.5f / SCALE));
    });
    defect(e);
    const float of_gamma = group.beta / (SCALE * scale), of_x = group.beta / (SCALE * 0.5f * scale);
    for (int c = 0; c < chunks; ++c) {
      float* gamma = chunk_of(slot, c);
      Fours here;
      Part change, other;
      change.clear();
      other.clear();
      this->load(here, gamma);
      this->put(x, here, scale);
      __syncthreads();
      this->add_part(change, first, x);
      __syncthreads();
      this->load(here, chunk_of(k, c));
      this->put(x, here, SCALE);
      __syncthreads();
      this->add_part(other, second, x);
      this->part(change, [&](int row, int col, float& value) {
        gamma[row * CHUNK + col] += of_gamma * value;
      });
      this->part(other, [&](int row, int col, float& value) {
        gamma[row * CHUNK + col] -= of_x * value;
      });
      __syncthreads();
    }
  }

  __device__ __forceinline__ void backward(int taken) const {
    const double sigma = *problem.sigma;
    const Source grad = wide_source(problem.grad, problem.rows, problem.cols, group.other_format);
    const Unit of_grad = unit_of(this->largest(grad));
    const int slot = group.n_iter + 1;
    const double root = sqrt(double(m) * n);
    gather_all(grad, of_grad, slot);
    multiply_all(slot, 1.0 / root);
    // Gamma, of norm two at most, and S, of twice that, have to fit into planes.
    float scale = 32.0f, bound = 2.0f;
    for (int k = taken - 1; k >= 0; --k) {
      while (bound * scale > 60000.0f) scale *= 0.5f;
      step_back(k, slot, scale);
      bound *= 1.0f + group.beta;
    }

    const double back = root * of_grad.unit * of_grad.flag * problem.scale;
    const double inverse = sigma == 0.0 ? 0.0 : 1.0 / sigma;
    double own = 0.0;
    each_entry([&](int row, int col, int c) {
      if (row < m && c * CHUNK + col < n) own += gamma_at(slot, row, col, c) * element(row, col, c);
    });
    const double along = sum_double(own) * inverse;
    const float limit = group.format == FLOAT16    ? 65504.0f
                        : group.format == BFLOAT16 ? 0x1.fep127f
                                                   : 0x1.fffffep127f;
    each_entry([&](int row, int col, int c) {
      const int column = c * CHUNK + col;
      if (row >= m || column >= n) return;
      double value = gamma_at(slot, row, col, c);
      value -= along * of_rows()[row] * of_columns()[column];
      value *= back * inverse;
      value = value > limit ? limit : value < -limit ? -limit : value;
      store_from_float(problem.result, weight.at(row, column), group.format, float(value));
    });
  }
  __device__ __forceinline__ double gamma_at(int slot, int row, int col, int c) const {
    return chunk_of(slot, c)[row * CHUNK + col];
  }
  __device__ __forceinline__ double element(int row, int col, int c) const {
    return load_as_float(weight.data, weight.at(row, c * CHUNK + col), weight.format);
  }
};

__global__ void __launch_bounds__(32 * WARPS, 1) bjorck(const __grid_constant__ Group group) {
  DYN_SMEM(shared);
  const Problem& problem = group.problems[blockIdx.x];
  if (min(problem.rows, problem.cols) <= 16) {
    Bjorck<16>(shared, problem, group).run();
  } else {
    Bjorck<LARGEST>(shared, problem, group).run();
  }
}
}  // namespace

// `own`: of `Group`. backward: the gradients' format in the place of the results'.
extern "C" int lk_bjorck(const void* problems, int count, int format, int other_format,
                         int backward, int n_iter, double beta, double tol, double own,
                         void* stream) {
  Group group{{}, format, other_format, backward, n_iter, float(beta), float(tol), own};
  const Problem* all = static_cast<const Problem*>(problems);
  for (int start = 0; start < count; start += PROBLEMS) {
    const int n = count - start < PROBLEMS ? count - start : PROBLEMS;
    for (int i = 0; i < n; ++i) group.problems[i] = all[start + i];
    const int error = launch(bjorck, dim3(n), dim3(32 * WARPS), Bjorck<LARGEST>::BYTES, 1, stream,
                             group);
    if (error) return error;
  }
  return 0;
}
