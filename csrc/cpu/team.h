// The threads that work on one matrix together: every one runs the same code on its share.
#pragma once

#include <atomic>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

// Where a team meets. Waiting spins for some microseconds, about as long as a step of the work is,
// and then gives the processor away at every turn: the one that is waited for may need it.
struct Meeting {
  std::atomic<int> arrived{0};
  std::atomic<int> generation{0};

  void wait(int size) {
    const int before = generation.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived.store(0, std::memory_order_relaxed);
      generation.store(before + 1, std::memory_order_release);
      return;
    }
    for (int spin = 0; generation.load(std::memory_order_acquire) == before; ++spin) {
      if (spin < SPINS) {
#if defined(__x86_64__)
        _mm_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

  static constexpr int SPINS = 20000;
};

struct Team {
  int rank, size;
  Meeting* meeting;
  void barrier() const {
    if (size > 1) meeting->wait(size);
  }
};

}  // namespace
}  // namespace lipkernels
