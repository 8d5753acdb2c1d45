// The library's functions for one instruction set. This file is compiled once for each, with
// LK_NAME(x) their names; all that it includes has internal linkage (templates of the standard
// library too, which are used on types from here alone), so that the linker cannot put one set's
// code in another one's place. library.cpp chooses among them.
#include <algorithm>
#include <memory>
#include <new>

#include "polar.h"
#include "polar_backward.h"
#include "retract.h"
#include "scratch.h"
#include "sorting.h"

namespace {

using namespace lipkernels;

// Below this many multiplications, in all and in one matrix, a second thread costs more than it
// gives: it has to wake up, and what one core wrote the other reads slowly.
constexpr double MIN_WORK = 1e6;
constexpr double MIN_ELEMENTS_PER_TEAM = 1e5;
// How well threads work together on one matrix, compared to each on its own.
constexpr double EFFICIENCY = 0.7;
// Scratch space for matrices of which each thread has its own, in bytes.
constexpr int64_t MOST_ALONE = int64_t(128) << 20;

struct Sized {
  int64_t index, bytes;
  double work;
};

// How many of the matrices, which are sorted by their work, the threads shall take together: the
// others are left to one thread each.
int64_t together_of(int64_t n, const Sized* sorted, double work, int threads) {
  if (threads == 1) return 0;
  int64_t best = 0;
  double shared = 0, least = INFINITY;
  for (int64_t t = 0;; ++t) {
    const bool is_last = t == n;
    const bool fits = is_last || sorted[t].bytes * threads <= MOST_ALONE;
    const double largest = is_last ? 0.0 : sorted[t].work, rest = (work - shared) / threads;
    const double time = shared / (EFFICIENCY * threads) + (largest > rest ? largest : rest);
    if (fits && time < least) best = t, least = time;
    if (is_last || largest < MIN_WORK) return best;
    shared += largest;
  }
}

// Runs job(team, i, workspace) for every i: some matrices by all threads together, one after the
// other, then the others one for each thread. False if there is no memory.
template <class Size, class Job>
bool for_each(int64_t n, int threads, Size size_of, Job job) {
  if (n == 0) return true;
  const std::unique_ptr<Sized[]> sorted(new (std::nothrow) Sized[n]);
  if (!sorted) return false;
  double work = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto [m, k] = size_of(i);
    sorted[i] = {i, round_up(workspace_size(m, k), 4096), double(m) * m * k};
    work += sorted[i].work;
  }
  std::stable_sort(sorted.get(), sorted.get() + n,
                   [](const Sized& a, const Sized& b) { return a.work > b.work; });
  if (work < MIN_WORK) threads = 1;
  const int64_t shared = together_of(n, sorted.get(), work, threads);
  if (shared == 0 && threads > n) threads = int(n);
  int64_t alone = 0, together = 0;
  for (int64_t i = 0; i < n; ++i) {
    int64_t& most = i < shared ? together : alone;
    most = sorted[i].bytes > most ? sorted[i].bytes : most;
  }
  Scratch scratch(alone * threads > together ? alone * threads : together);
  if (!scratch.data()) return false;
  Team::start(threads, [&](const Team& team) {
    for (int64_t i = 0; i < shared; ++i) job(team, sorted[i].index, Workspace{scratch.data()});
    team.run(n - shared, [&](int64_t i, int rank) {
      job(Team(), sorted[shared + i].index, Workspace{scratch.data() + alone * rank});
    });
  });
  return true;
}

// The same for the rows of a table, each of which ends with a matrix's rows and columns. Returns 0,
// or 1 if there is no memory.
template <class Job>
int for_each_row(int64_t n, const int64_t* table, int width, int threads, Job job) {
  const auto size_of = [&](int64_t i) {
    const int64_t rows = table[width * (i + 1) - 2], cols = table[width * (i + 1) - 1];
    return rows < cols ? std::pair{rows, cols} : std::pair{cols, rows};
  };
  const auto call = [&](const Team& team, int64_t i, Workspace space) {
    job(team, i, table + width * i, space);
  };
  return for_each(n, threads, size_of, call) ? 0 : 1;
}

}  // namespace

// Tables hold one row for each matrix. polar_forward: weight, result, factor, spectrum, scalars,
// rows, cols; `numbers`: scale, margin. polar_backward: grad, result, factor, spectrum, scalars,
// out, rows, cols; `numbers`: scale.
extern "C" int LK_NAME(polar_forward)(int64_t n, const int64_t* table, const double* numbers,
                                      int32_t* status, int threads) {
  return for_each_row(n, table, 7, threads,
                      [=](const Team& team, int64_t i, const int64_t* t, Workspace space) {
                        polar_forward(team,
                                      {(const float*)t[0], (float*)t[1], (float*)t[2], (float*)t[3],
                                       (float*)t[4], t[5], t[6], numbers[2 * i],
                                       numbers[2 * i + 1], status + i},
                                      space);
                      });
}

extern "C" int LK_NAME(polar_backward)(int64_t n, const int64_t* table, const double* numbers,
                                       int threads) {
  return for_each_row(n, table, 8, threads,
                      [=](const Team& team, int64_t i, const int64_t* t, Workspace space) {
                        polar_backward(team,
                                       {(const float*)t[0], (const float*)t[1], (const float*)t[2],
                                        (const float*)t[3], (const float*)t[4], (float*)t[5], t[6],
                                        t[7], numbers[i]},
                                       space);
                      });
}

// polar_gram: weight, gram, bytes of gram's numbers, rows, cols; gram gets the lower triangle of the
// smaller Gram matrix (m, m), in float32 (4 bytes) or float64 (8).
extern "C" int LK_NAME(polar_gram)(int64_t n, const int64_t* table, int threads) {
  return for_each_row(
      n, table, 5, threads, [](const Team& team, int64_t, const int64_t* t, Workspace space) {
        const int64_t m = t[3] < t[4] ? t[3] : t[4], k = t[3] < t[4] ? t[4] : t[3];
        const View<const float> w = wide_view((const float*)t[0], t[3], t[4]);
        double* packed = space.take<double>(packed_size<double>(k, m));
        if (t[2] == 4)
          gemm<float>(team, m, m, k, w, w.t(), rows_of((float*)t[1], m), 1.0f, 0.0f, true, (float*)packed);
        else
          gemm<double>(team, m, m, k, w, w.t(), rows_of((double*)t[1], m), 1.0, 0.0, true, packed);
      });
}

// polar_from_eigenvectors: weight, vectors, p, row and column stride of vectors, result, factor,
// spectrum, scalars, rows, cols; `numbers`: scale, margin.
extern "C" int LK_NAME(polar_from_eigenvectors)(int64_t n, const int64_t* table,
                                                const double* numbers, int threads) {
  return for_each_row(n, table, 11, threads,
                      [=](const Team& team, int64_t i, const int64_t* t, Workspace space) {
                        polar_from_eigenvectors(
                            team,
                            {(const float*)t[0], (const double*)t[1], (const double*)t[2], t[3],
                             t[4], (float*)t[5], (float*)t[6], (float*)t[7], (float*)t[8], t[9],
                             t[10], numbers[2 * i], numbers[2 * i + 1]},
                            space);
                      });
}

// polar_split: weight, vectors, their row and column stride, x, vt, xs, vs, gram, small, rows, cols: see
// refine.h.
extern "C" int LK_NAME(polar_split)(int64_t n, const int64_t* table, int threads) {
  return for_each_row(n, table, 12, threads,
                      [](const Team& team, int64_t, const int64_t* t, Workspace space) {
                        split(team,
                              {(const float*)t[0], (const float*)t[1], t[2], t[3], (float*)t[4],
                               (float*)t[5], (double*)t[6], (double*)t[7], (double*)t[8], t[9],
                               t[10], t[11]},
                              space);
                      });
}

// polar_refined: x, vt, xs, vs, rotation, its row and column stride, result, factor, spectrum, scalars,
// small, rows, cols; `numbers`: scale, margin.
extern "C" int LK_NAME(polar_refined)(int64_t n, const int64_t* table, const double* numbers,
                                      int32_t* status, int threads) {
  return for_each_row(n, table, 14, threads,
                      [=](const Team& team, int64_t i, const int64_t* t, Workspace space) {
                        refined(team,
                                {(float*)t[0], (float*)t[1], (const double*)t[2],
                                 (const double*)t[3], (const double*)t[4], t[5], t[6],
                                 (float*)t[7], (float*)t[8], (float*)t[9], (float*)t[10], t[11],
                                 t[12], t[13], numbers[2 * i], numbers[2 * i + 1], status + i},
                                space);
                      });
}

// polar_retract: weight (in place), rows, cols; `numbers`: scale, margin.
extern "C" int LK_NAME(polar_retract)(int64_t n, const int64_t* table, const double* numbers,
                                      int32_t* status, int threads) {
  return for_each_row(
      n, table, 3, threads, [=](const Team& team, int64_t i, const int64_t* t, Workspace space) {
        polar_retract(
            team, {(float*)t[0], t[1], t[2], numbers[2 * i], numbers[2 * i + 1], status + i}, space);
      });
}

// polar_project: grad (in place), weight, rows, cols; `numbers`: scale.
extern "C" int LK_NAME(polar_project)(int64_t n, const int64_t* table, const double* numbers,
                                      int threads) {
  return for_each_row(
      n, table, 4, threads, [=](const Team& team, int64_t i, const int64_t* t, Workspace space) {
        polar_project(team, {(float*)t[0], (const float*)t[1], t[2], t[3], numbers[i]}, space);
      });
}

// Pairs of 4- or 8-byte floats; see sorting.h.
extern "C" void LK_NAME(sort_pairs)(const void* x, void* y, uint8_t* index, int64_t rows,
                                    int64_t inner, int bytes, int threads) {
  if (double(rows) * double(inner) < MIN_ELEMENTS_PER_TEAM) threads = 1;
  Team::start(threads, [&](const Team& team) {
    if (bytes == 4)
      sort_pairs(team, (const float*)x, (float*)y, index, rows, inner);
    else
      sort_pairs(team, (const double*)x, (double*)y, index, rows, inner);
  });
}

extern "C" void LK_NAME(swap_pairs)(const void* x, void* y, const uint8_t* index, int64_t rows,
                                    int64_t inner, int bytes, int threads) {
  if (double(rows) * double(inner) < MIN_ELEMENTS_PER_TEAM) threads = 1;
  Team::start(threads, [&](const Team& team) {
    if (bytes == 4)
      swap_pairs(team, (const float*)x, (float*)y, index, rows, inner);
    else
      swap_pairs(team, (const double*)x, (double*)y, index, rows, inner);
  });
}

// A 64-bit fingerprint of the bytes at `data`: which change leaves it alone is a matter of chance,
// 1 in 2^64. Not for adversaries.
extern "C" uint64_t LK_NAME(fingerprint)(const void* data, int64_t bytes) {
  constexpr int LANES = 8;
  constexpr uint64_t FIRST = 0x9e3779b97f4a7c15u, SECOND = 0xd6e8feb86659fd93u;
  uint64_t state[LANES], block[LANES];
  for (int x = 0; x < LANES; ++x) state[x] = FIRST * (x + 1) + uint64_t(bytes);
  const char* at = (const char*)data;
  int64_t left = bytes;
  const auto absorb = [&]() {
    for (int x = 0; x < LANES; ++x) {
      // The high half of a product sees every lower bit; the rotation hands it on.
      state[x] ^= block[x];
      state[x] *= FIRST;
      state[x] ^= state[x] >> 32;
    }
  };
  for (; left >= int64_t(sizeof block); left -= sizeof block, at += sizeof block) {
    std::memcpy(block, at, sizeof block);
    absorb();
  }
  std::memset(block, 0, sizeof block);
  std::memcpy(block, at, left);
  absorb();
  uint64_t result = 0;
  for (int x = 0; x < LANES; ++x) {
    result = (result ^ state[x]) * SECOND;
    result ^= result >> 29;
  }
  return result;
}
