// CUDA kernels run on the host: a fiber for every thread, one OS thread for all of them. For tests.
//
// A kernel's body is the one that nvcc compiles; for g++ with LK_SIMT defined csrc/cuda/runtime.h
// takes the words that it is written in from simt.h, and they are made of what is here. Blocks run
// one after the other, the blocks of a cluster together, a fiber from one barrier to the next. What
// is checked, each with a test in tests/test_simt.py:
//
// * Barriers: threads that wait where others don't come (or come by another line) end the launch
//   with DEADLOCK or DIVERGENT. Stricter than CUDA: a thread that has returned never arrives.
// * Shared memory starts as NaN, in every format, so that what was not written shows in the result.
// * Shared memory is surrounded by bytes that must not change: OUT_OF_BOUNDS.
// * The order of the threads is drawn anew between any two barriers, by `lk_simt_seed` (0: in
//   order), so that a missing barrier changes results.
// * 16-byte accesses are aligned: MISALIGNED. No access to the memory of a block that has ended.
//
// Not covered: memory ordering inside one barrier interval, bank conflicts, wgmma, TMA, cp.async.
// x86-64, GNU C++17; half precision is fast with -march=native only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#ifndef __x86_64__
#error "csrc/simt/machine.h switches stacks by x86-64 instructions"
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace simt {

// In place of a cudaError_t; above all of those.
enum Error : int {
  BAD_LAUNCH = 10001,
  DEADLOCK,
  DIVERGENT,
  OUT_OF_BOUNDS,
  MISALIGNED,
  BAD_CLUSTER,
  NOT_A_FULL_WARP,
};

constexpr size_t STACK = 64 << 10;
constexpr size_t CANARY = 2048;            // bytes before and after shared memory
constexpr size_t STATIC_SHARED = 48 << 10;
constexpr size_t MAX_SHARED = 227 << 10;   // of sm_90
constexpr int MAX_CLUSTER = 8;             // the portable limit
constexpr uint16_t GUARD = 0xFFFD;         // a NaN in every format; memory starts as another

// The kinds of barriers; threads that meet at one must have come for the same.
enum class Kind { BLOCK, WARP, EXCHANGE, MMA, CLUSTER };

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
  Kind kind = Kind::BLOCK;
  int line = 0;
};

// What lanes exchange; two in turns, since nobody gets two exchanges ahead of anybody.
struct Slot {
  alignas(64) char lanes[32][16];
  alignas(64) float a[16][16];
  alignas(64) float b[8][16];
};

struct Warp {
  Barrier barrier;
  Slot slots[2];
  unsigned turn[32] = {};
};

struct StaticArray {
  const void* key;
  size_t offset, bytes;
};

struct Block {
  dim3 index;
  int live = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> memory, static_memory;
  char* shared = nullptr;  // the dynamic part
  size_t shared_bytes = 0, static_used = 0;
  std::vector<StaticArray> arrays;
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  dim3 index;
  int number = 0;  // in its block
  bool done = false;
  Block* block = nullptr;
  const Barrier* waits_for = nullptr;
  unsigned generation = 0;
};

inline Fiber* fiber = nullptr;
inline void* scheduler = nullptr;
inline dim3 block_size, grid_size;
inline std::vector<Block>* cluster = nullptr;
inline Barrier cluster_barrier;
inline const std::function<void()>* body = nullptr;
inline unsigned seed = 0;
inline int failure = 0;
inline char message[256] = "";
inline std::mutex one_launch;

// Saves the registers that a call preserves, and goes on where `to` was saved.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

inline void yield() {
  switch_stack(&fiber->stack_pointer, scheduler);
}

// Ends the launch. Its other threads are given up where they are.
inline void fail(int code, const char* what) {
  if (!failure) {
    const dim3 b = fiber->block->index;
    failure = code;
    snprintf(message, sizeof(message), "%s: thread %d of block (%u, %u, %u)", what, fiber->number,
             b.x, b.y, b.z);
  }
  yield();
}

inline void wait(Barrier& barrier, Kind kind, int line) {
  if (barrier.arrived == 0) {
    barrier.kind = kind;
    barrier.line = line;
  } else if (barrier.kind != kind || barrier.line != line) {
    fail(DIVERGENT, "a barrier that others have not come to");
  }
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  fiber->waits_for = &barrier;
  fiber->generation = barrier.generation;
  yield();
  fiber->waits_for = nullptr;
}

inline Warp& warp() {
  return fiber->block->warps[fiber->number / 32];
}
inline int lane() {
  return fiber->number % 32;
}
inline Slot& next_slot() {
  return warp().slots[warp().turn[lane()]++ & 1];
}

inline void full_warp(unsigned mask) {
  if (mask != ~0u || warp().barrier.expected != 32) {
    fail(NOT_A_FULL_WARP, "lanes are missing in an exchange");
  }
}

// What lane `source` has passed for `value`.
template <class T>
T exchange(T value, int source, unsigned mask, int line) {
  static_assert(sizeof(T) <= 16, "an exchange of at most 16 bytes");
  full_warp(mask);
  Slot& slot = next_slot();
  memcpy(slot.lanes[lane()], &value, sizeof(T));
  wait(warp().barrier, Kind::EXCHANGE, line);
  T result;
  memcpy(&result, slot.lanes[source & 31], sizeof(T));
  return result;
}

inline unsigned ballot(bool value, unsigned mask, int line) {
  full_warp(mask);
  Slot& slot = next_slot();
  slot.lanes[lane()][0] = value;
  wait(warp().barrier, Kind::EXCHANGE, line);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= unsigned(slot.lanes[i][0] & 1) << i;
  return votes;
}

inline void guard(char* from, size_t bytes) {
  for (size_t i = 0; i + 1 < bytes; i += 2) memcpy(from + i, &GUARD, 2);
}
inline bool guarded(const char* from, size_t bytes) {
  for (size_t i = 0; i + 1 < bytes; i += 2) {
    if (memcmp(from + i, &GUARD, 2) != 0) return false;
  }
  return true;
}
inline size_t to_even(size_t n) {
  return (n + 1) & ~size_t(1);
}

// A static shared array: the first thread of the block that gets here makes it.
inline void* static_array(const void* key, size_t bytes) {
  Block& block = *fiber->block;
  for (const StaticArray& array : block.arrays) {
    if (array.key == key) return block.static_memory.get() + array.offset;
  }
  if (!block.static_memory) {
    block.static_memory.reset(new char[STATIC_SHARED + 2 * CANARY + 64]);
    block.static_used = CANARY + (-(uintptr_t)block.static_memory.get() & 63);
    guard(block.static_memory.get(), block.static_used);
  }
  const size_t offset = block.static_used;
  block.static_used = (offset + bytes + 64 + 63) & ~size_t(63);
  if (block.static_used > STATIC_SHARED) fail(BAD_LAUNCH, "too much static shared memory");
  char* start = block.static_memory.get() + offset;
  memset(start, 0xFF, bytes);
  guard(start + to_even(bytes), block.static_used - offset - to_even(bytes));
  block.arrays.push_back({key, offset, bytes});
  return start;
}

inline void prepare(Block& block, dim3 index, int threads, size_t shared) {
  block.index = index;
  block.live = threads;
  block.barrier.expected = threads;
  block.warps.resize((threads + 31) / 32);
  for (int w = 0; w < int(block.warps.size()); ++w) {
    block.warps[w].barrier.expected = std::min(32, threads - 32 * w);
  }
  const size_t all = CANARY + to_even(shared) + CANARY;
  block.memory.reset(new char[all + 1024]);
  block.shared = block.memory.get() + CANARY;
  block.shared += -(uintptr_t)block.shared & 1023;
  block.shared_bytes = shared;
  guard(block.shared - CANARY, all);
  memset(block.shared, 0xFF, shared);
}

inline void check_canaries(const Block& block) {
  const char* end = block.shared + to_even(block.shared_bytes);
  bool kept = guarded(block.shared - CANARY, CANARY) && guarded(end, CANARY);
  for (const StaticArray& array : block.arrays) {
    const char* start = block.static_memory.get() + array.offset;
    const char* after = start + to_even(array.bytes);
    kept = kept && guarded(start - 64, 64) && guarded(after, 64);
  }
  if (!kept && !failure) {
    failure = OUT_OF_BOUNDS;
    snprintf(message, sizeof(message), "a write beside shared memory: block (%u, %u, %u)",
             block.index.x, block.index.y, block.index.z);
  }
}

inline void enter() {
  (*body)();
  fiber->done = true;
  --fiber->block->live;
  yield();
  abort();
}

inline void prepare(Fiber& f, Block& block, int number, char* stack) {
  const unsigned n = unsigned(number);
  f.stack = stack;
  f.index = dim3(n % block_size.x, n / block_size.x % block_size.y,
                 n / (block_size.x * block_size.y));
  f.number = number;
  f.block = &block;
  void** top = (void**)(((uintptr_t)stack + STACK) & ~uintptr_t(15));
  *--top = nullptr;
  *--top = (void*)enter;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.stack_pointer = top;
}

struct Order {
  unsigned state;
  std::vector<Fiber*> fibers;
  // Half of the warps wait for the next round, so that some fall behind the others.
  bool delays(const Fiber& f) const {
    const unsigned warp = unsigned(f.number / 32) + 64 * f.block->index.x;
    return ((state ^ warp * 2654435761u) * 2246822519u) >> 31;
  }
  void shuffle() {
    for (size_t i = fibers.size() - 1; i > 0; --i) {
      state = state * 1664525u + 1013904223u;
      std::swap(fibers[i], fibers[(uint64_t(state) * (i + 1)) >> 32]);
    }
  }
};

// Runs all fibers until they have returned, or one has failed, or all of them wait.
inline void run(Order& order) {
  for (size_t left = order.fibers.size(); left > 0;) {
    bool moved = false;
    left = 0;
    if (seed) order.shuffle();
    for (Fiber* f : order.fibers) {
      if (f->done) continue;
      if (f->waits_for && f->waits_for->generation == f->generation) {
        ++left;
        continue;
      }
      moved = true;
      if (seed && order.delays(*f)) {
        ++left;
        continue;
      }
      fiber = f;
      switch_stack(&scheduler, f->stack_pointer);
      if (failure) return;
      left += !f->done;
    }
    if (left && !moved) {
      for (Fiber* f : order.fibers) {
        if (!f->done) fiber = f;
      }
      failure = DEADLOCK;
      snprintf(message, sizeof(message), "a barrier that not all threads come to: line %d",
               fiber->waits_for->line);
    }
    if (failure) return;
  }
}

inline void run_cluster(dim3 first, int size, int threads, size_t shared, char* stacks) {
  std::vector<Block> blocks(size);
  std::vector<Fiber> fibers(size_t(size) * threads);
  Order order{seed * 2654435761u + first.x, {}};
  cluster = &blocks;
  cluster_barrier = Barrier{};
  cluster_barrier.expected = size * threads;
  for (int c = 0; c < size; ++c) {
    prepare(blocks[c], dim3(first.x + c, first.y, first.z), threads, shared);
    for (int t = 0; t < threads; ++t) {
      const size_t i = size_t(c) * threads + t;
      prepare(fibers[i], blocks[c], t, stacks + STACK * i);
      order.fibers.push_back(&fibers[i]);
    }
  }
  run(order);
  for (const Block& block : blocks) check_canaries(block);
}

inline int launch(dim3 grid, dim3 block, size_t shared, int size, std::function<void()> kernel) {
  std::lock_guard<std::mutex> guard(one_launch);
  const int threads = int(block.x * block.y * block.z);
  failure = 0;
  message[0] = 0;
  if (threads < 1 || threads > 1024 || shared > MAX_SHARED || size < 1 || size > MAX_CLUSTER ||
      grid.x % size != 0 || grid.x * grid.y * grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    snprintf(message, sizeof(message), "%u x %u x %u blocks of %d threads, %zu bytes, clusters: %d",
             grid.x, grid.y, grid.z, threads, shared, size);
    return failure = BAD_LAUNCH;
  }
  block_size = block;
  grid_size = grid;
  body = &kernel;
  std::unique_ptr<char[]> stacks(new char[STACK * threads * size]);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x && !failure; x += size) {
        run_cluster(dim3(x, y, z), size, threads, shared, stacks.get());
      }
    }
  }
  return failure;
}

inline const char* error_name(int code) {
  switch (code) {
    case BAD_LAUNCH: return "simtErrorBadLaunch";
    case DEADLOCK: return "simtErrorDeadlock";
    case DIVERGENT: return "simtErrorDivergentBarrier";
    case OUT_OF_BOUNDS: return "simtErrorOutOfBounds";
    case MISALIGNED: return "simtErrorMisaligned";
    case BAD_CLUSTER: return "simtErrorBadCluster";
    case NOT_A_FULL_WARP: return "simtErrorNotAFullWarp";
    default: return "simtErrorUnknown";
  }
}

// The nearest float32 that is not larger in magnitude: tensor cores cut their sums off.
inline float toward_zero(double x) {
  float result = float(x);
  if (std::abs(double(result)) > std::abs(x)) result = std::nextafter(result, 0.0f);
  return result;
}

inline double dot16(const float* a, const float* b, double sum) {
  double part[4] = {};
  for (int i = 0; i < 16; i += 4) {
    for (int k = 0; k < 4; ++k) part[k] += double(a[i + k] * b[i + k]);  // exact
  }
  return sum + ((part[0] + part[1]) + (part[2] + part[3]));
}

}  // namespace simt

// Of the library that is built from this: which it is, the threads' order from now on, what failed.
#define LK_SIMT_EXPORT extern "C" __attribute__((used, visibility("default"))) inline
LK_SIMT_EXPORT int lk_is_simt() {
  return 1;
}
LK_SIMT_EXPORT void lk_simt_seed(unsigned seed) {
  simt::seed = seed;
}
LK_SIMT_EXPORT const char* lk_simt_message() {
  return simt::message;
}
