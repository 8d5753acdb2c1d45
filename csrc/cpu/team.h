// The threads that work together in a call: one leads, the others help when they can.
//
// The leader runs the program, and publishes its loops. Every thread takes the next piece of a
// loop until there is none; the leader goes on as soon as the pieces that were taken are done. It
// never waits for a thread that did not come: on a busy machine, where the system runs something
// else on a helper's core, the leader does that share itself. (A barrier would stop everybody for
// as long as the system pleases, at every step.)
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lipkernels {
namespace {  // each instruction set has its own copy: see kernels.cpp

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

class Team {
 public:
  Team() = default;  // of one
  bool is_one() const { return !board_; }

  // Calls f(piece, rank) for every piece in [0, n); rank tells the threads apart.
  template <class F>
  void run(int64_t n, const F& f) const {
    if (!board_ || n <= 1) {
      for (int64_t i = 0; i < n; ++i) f(i, 0);
      return;
    }
    board_->publish(n, &call<F>, &f);
    board_->work(0);
    board_->wait(n);
  }

  // f(i) for every i in [0, n), in pieces; `cost` is about how many operations one i takes.
  template <class F>
  void each(int64_t n, int64_t cost, const F& f) const {
    constexpr int64_t PIECE = 1 << 14;
    const int64_t size = cost >= PIECE ? 1 : PIECE / (cost > 0 ? cost : 1);
    run((n + size - 1) / size, [&](int64_t piece, int) {
      const int64_t end = (piece + 1) * size < n ? (piece + 1) * size : n;
      for (int64_t i = piece * size; i < end; ++i) f(i);
    });
  }

  // Runs program(team) with up to so many threads.
  template <class Program>
  static void start(int threads, const Program& program) {
#ifdef _OPENMP
    if (threads > 1) {
      Board board;
#pragma omp parallel num_threads(threads)
      {
        if (omp_get_thread_num() == 0) {
          program(Team(&board));
          board.stop();
        } else {
          board.help(omp_get_thread_num());
        }
      }
      return;
    }
#endif
    program(Team());
  }

 private:
  typedef void (*Call)(const void* f, int64_t piece, int rank);

  template <class F>
  static void call(const void* f, int64_t piece, int rank) {
    (*static_cast<const F*>(f))(piece, rank);
  }

  // What the leader publishes. `ticket` has the number of the loop in its upper half and the next
  // piece in its lower half. Whoever moves it from one piece to the next has that piece, and the
  // fields that were read before that are those of its loop: the leader changes them only after
  // every piece is done, and only while the ticket is closed under the number of the next loop.
  struct Board {
    std::atomic<uint64_t> ticket{0};
    std::atomic<int64_t> n{0}, done{0};
    std::atomic<Call> call{nullptr};
    std::atomic<const void*> f{nullptr};
    std::atomic<bool> stopped{false};

    void publish(int64_t pieces, Call function, const void* argument) {
      const uint64_t loop = (ticket.load(std::memory_order_relaxed) >> 32) + 1;
      ticket.store(loop << 32 | CLOSED, std::memory_order_seq_cst);  // nobody takes from the old one
      done.store(0, std::memory_order_release);
      n.store(pieces, std::memory_order_release);
      call.store(function, std::memory_order_release);
      f.store(argument, std::memory_order_release);
      ticket.store(loop << 32, std::memory_order_seq_cst);
    }

    // Takes pieces until there are none; whether there was one.
    bool work(int rank) {
      bool worked = false;
      for (;;) {
        uint64_t now = ticket.load(std::memory_order_acquire);
        const int64_t piece = int64_t(now & CLOSED);
        const Call function = call.load(std::memory_order_acquire);
        const void* argument = f.load(std::memory_order_acquire);
        if (piece >= n.load(std::memory_order_acquire)) return worked;
        if (!ticket.compare_exchange_weak(now, now + 1, std::memory_order_seq_cst)) continue;
        function(argument, piece, rank);
        done.fetch_add(1, std::memory_order_release);
        worked = true;
      }
    }

    void wait(int64_t pieces) {
      for (int spin = 0; done.load(std::memory_order_acquire) < pieces; ++spin)
        spin < SPINS ? pause() : std::this_thread::yield();
    }

    void help(int rank) {
      for (int spin = 0; !stopped.load(std::memory_order_acquire); ++spin) {
        if (work(rank)) spin = 0;
        spin < SPINS ? pause() : std::this_thread::yield();
      }
    }

    void stop() { stopped.store(true, std::memory_order_release); }

    static constexpr int SPINS = 5000;
    static constexpr uint64_t CLOSED = 0xffffffffu;  // larger than every piece
  };

  explicit Team(Board* board) : board_(board) {}

  Board* board_ = nullptr;
};

}  // namespace
}  // namespace lipkernels
