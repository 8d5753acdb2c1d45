// The library's C interface: takes the kernels of the best instruction set that the processor has.
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <utility>

#if defined(__x86_64__) && defined(LK_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "scratch.h"

namespace lipkernels {

namespace {
std::mutex mutex;
char* spare = nullptr;  // the largest block that was used and is free now
int64_t spare_bytes = 0;
constexpr int64_t LARGEST_SPARE = int64_t(256) << 20;
constexpr int64_t PAGE = 4096;
}  // namespace

Scratch::Scratch(int64_t bytes) {
  // Without waiting: in a forked process the thread that holds the lock may not exist.
  if (std::unique_lock<std::mutex> lock(mutex, std::try_to_lock); lock) {
    std::swap(data_, spare);
    std::swap(bytes_, spare_bytes);
  }
  if (bytes_ < bytes) {
    std::free(data_);
    bytes_ = (bytes + bytes / 4 + PAGE - 1) / PAGE * PAGE;
    data_ = static_cast<char*>(std::aligned_alloc(PAGE, bytes_));
    if (!data_) bytes_ = 0;  // or nothing would be kept as a spare block, and found too small by none
  }
}

Scratch::~Scratch() {
  if (bytes_ <= LARGEST_SPARE) {
    std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (lock && bytes_ > spare_bytes) {
      std::swap(data_, spare);
      std::swap(bytes_, spare_bytes);
    }
  }
  std::free(data_);
}

}  // namespace lipkernels

#if defined(__x86_64__) && defined(LK_HAS_AMX)  // the compiler knows it: see setup.py
#define LK_SETS(declare) declare(amx) declare(avx512) declare(avx2) declare(baseline)
#elif defined(__x86_64__)
#define LK_SETS(declare) declare(avx512) declare(avx2) declare(baseline)
#else
#define LK_SETS(declare) declare(baseline)
#endif

#define LK_DECLARE(set)                                                                            \
  extern "C" int polar_forward_##set(int64_t, const int64_t*, const double*, int32_t*, int);       \
  extern "C" int polar_backward_##set(int64_t, const int64_t*, const double*, int);                \
  extern "C" int polar_gram_##set(int64_t, const int64_t*, int);                                   \
  extern "C" int polar_from_eigenvectors_##set(int64_t, const int64_t*, const double*, int);       \
  extern "C" int polar_split_##set(int64_t, const int64_t*, int);                                  \
  extern "C" int polar_refined_##set(int64_t, const int64_t*, const double*, int32_t*, int);       \
  extern "C" int polar_retract_##set(int64_t, const int64_t*, const double*, int32_t*, int);       \
  extern "C" int polar_project_##set(int64_t, const int64_t*, const double*, int);                 \
  extern "C" void sort_pairs_##set(const void*, void*, uint8_t*, int64_t, int64_t, int, int);      \
  extern "C" void swap_pairs_##set(const void*, void*, const uint8_t*, int64_t, int64_t, int, int); \
  extern "C" uint64_t fingerprint_##set(const void*, int64_t);
LK_SETS(LK_DECLARE)

namespace {

enum Set { BASELINE, AVX2, AVX512, AMX };

#if defined(__x86_64__) && defined(LK_HAS_AMX)
// Whether there are tiles of bfloat16, and Linux lets this process use them: their 8 KiB of state
// have to be asked for, once (as torch's own kernels do too).
bool has_amx() {
  constexpr unsigned TILE_BF16 = 1u << 22, TILES = 1u << 24, AVX512_BF16 = 1u << 5;
  constexpr unsigned STATE_COMPONENTS = 3u << 17;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & TILE_BF16) || !(d & TILES)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & AVX512_BF16)) return false;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & STATE_COMPONENTS) != STATE_COMPONENTS) return false;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

Set best_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(LK_HAS_AMX)
  static const bool amx = has_amx();
  if (amx) return AMX;
#endif
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
  return BASELINE;
}

Set current = best_set();

}  // namespace

#if defined(__x86_64__) && defined(LK_HAS_AMX)
#define LK_CASE_AMX(function, ...) case AMX: return function##_amx(__VA_ARGS__);
#else
#define LK_CASE_AMX(function, ...)
#endif

#if defined(__x86_64__)
#define LK_CALL(function, ...)                                \
  switch (current) {                                          \
    LK_CASE_AMX(function, __VA_ARGS__)                        \
    case AVX512: return function##_avx512(__VA_ARGS__);       \
    case AVX2: return function##_avx2(__VA_ARGS__);           \
    default: return function##_baseline(__VA_ARGS__);         \
  }
#else
#define LK_CALL(function, ...) return function##_baseline(__VA_ARGS__);
#endif

// Changes with every change of a function below.
extern "C" int lk_abi_version() { return 5; }

// 0, 1, 2, 3: baseline, AVX2, AVX-512, AVX-512 and AMX. Asking for one that the processor lacks
// changes nothing.
extern "C" int lk_instruction_set() { return current; }
extern "C" void lk_use_instruction_set(int set) {
  if (set >= BASELINE && set <= best_set()) current = static_cast<Set>(set);
}

// Tables hold one row of addresses and sizes for each matrix; see kernels.cpp. The functions return
// 0, or 1 if there was not enough memory.
extern "C" int lk_polar_forward(int64_t n, const int64_t* table, const double* numbers,
                                int32_t* status, int threads) {
  LK_CALL(polar_forward, n, table, numbers, status, threads)
}
extern "C" int lk_polar_backward(int64_t n, const int64_t* table, const double* numbers,
                                 int threads) {
  LK_CALL(polar_backward, n, table, numbers, threads)
}
// One matrix by itself, without a table. `saved`: factor, spectrum and scalars in a row. The first
// one returns the status (see workspace.h), or -1 if there was not enough memory.
extern "C" int lk_polar_forward_one(int64_t weight, int64_t result, int64_t saved, int64_t rows,
                                    int64_t cols, double scale, double margin, int threads) {
  const int64_t m = rows < cols ? rows : cols, spectrum = saved + m * m * int64_t(sizeof(float));
  const int64_t scalars = spectrum + m * int64_t(sizeof(float));
  const int64_t table[] = {weight, result, saved, spectrum, scalars, rows, cols};
  const double numbers[] = {scale, margin};
  int32_t status = -1;
  return lk_polar_forward(1, table, numbers, &status, threads) == 0 ? status : -1;
}
extern "C" int lk_polar_backward_one(int64_t grad, int64_t result, int64_t saved, int64_t out,
                                     int64_t rows, int64_t cols, double scale, int threads) {
  const int64_t m = rows < cols ? rows : cols, spectrum = saved + m * m * int64_t(sizeof(float));
  const int64_t scalars = spectrum + m * int64_t(sizeof(float));
  const int64_t table[] = {grad, result, saved, spectrum, scalars, out, rows, cols};
  return lk_polar_backward(1, table, &scale, threads);
}
extern "C" int lk_polar_gram(int64_t n, const int64_t* table, int threads) {
  LK_CALL(polar_gram, n, table, threads)
}
extern "C" int lk_polar_from_eigenvectors(int64_t n, const int64_t* table, const double* numbers,
                                          int threads) {
  LK_CALL(polar_from_eigenvectors, n, table, numbers, threads)
}
extern "C" int lk_polar_split(int64_t n, const int64_t* table, int threads) {
  LK_CALL(polar_split, n, table, threads)
}
extern "C" int lk_polar_refined(int64_t n, const int64_t* table, const double* numbers,
                                int32_t* status, int threads) {
  LK_CALL(polar_refined, n, table, numbers, status, threads)
}
extern "C" int lk_polar_retract(int64_t n, const int64_t* table, const double* numbers,
                                int32_t* status, int threads) {
  LK_CALL(polar_retract, n, table, numbers, status, threads)
}
extern "C" int lk_polar_project(int64_t n, const int64_t* table, const double* numbers, int threads) {
  LK_CALL(polar_project, n, table, numbers, threads)
}
extern "C" void lk_sort_pairs(const void* x, void* y, uint8_t* index, int64_t rows, int64_t inner,
                              int bytes, int threads) {
  LK_CALL(sort_pairs, x, y, index, rows, inner, bytes, threads)
}
extern "C" void lk_swap_pairs(const void* x, void* y, const uint8_t* index, int64_t rows,
                              int64_t inner, int bytes, int threads) {
  LK_CALL(swap_pairs, x, y, index, rows, inner, bytes, threads)
}
extern "C" uint64_t lk_fingerprint(const void* data, int64_t bytes) {
  LK_CALL(fingerprint, data, bytes)
}
