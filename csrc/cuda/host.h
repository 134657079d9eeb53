// The kernels of this folder on the CPU: what they need of CUDA, so that a C++ compiler takes the same files.
// Blocks run one after the other; the threads of a block are real ones and all there at once, so that
// __syncthreads, shuffles, shared memory and races are what they are on a GPU. The library is for tests:
// FASTGEN_CUDA=host builds it, FASTGEN_BACKEND=cuda-host runs it.
#pragma once
#include <pthread.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "common.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

namespace fastgen {

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {

class Barrier {
 public:
  explicit Barrier(int threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

constexpr int warp = 32;

// The block that runs.
struct Block {
  explicit Block(int threads, int64_t bytes)
      : all(threads), bytes(bytes), shared(static_cast<unsigned char*>(std::malloc(bytes))), at(threads) {
    for (int first = 0; first < threads; first += warp) {
      warps.push_back(std::make_unique<Barrier>(std::min(warp, threads - first)));
    }
    for (auto& kinds : kind) kinds.resize(threads);
  }
  ~Block() { std::free(shared); }

  // All threads must come to the same place: a __syncthreads, or the end. What they say is kept for two
  // turns, since none can be further ahead.
  void meet(int what) {
    const unsigned t = threadIdx.x, turn = turns++ % 2;
    kind[turn][t] = what;
    all.wait();
    if (kind[turn][(t + 1) % blockDim.x] == what) return;
    std::fputs("a __syncthreads that not all threads of the block reach\n", stderr);
    std::abort();
  }

  Barrier all;
  std::vector<std::unique_ptr<Barrier>> warps;
  const int64_t bytes;
  unsigned char* const shared;              // just as long as was asked for, so that a sanitizer sees more
  std::vector<std::array<uint64_t, 2>> at;  // what threads show their warp
  std::vector<int> kind[2];
  static inline thread_local unsigned turns;
};

inline Block* block = nullptr;
inline std::mutex launching;
// A process that is forked while another thread launches would wait for that thread, which it does not have.
inline const int forked = pthread_atfork(nullptr, nullptr, [] { new (&launching) std::mutex; });

enum { syncing, ending, starting };

// As many threads as a block has, which wait for the next launch. A process that forks has them no more.
class Pool {
 public:
  static Pool& of(int threads) {
    static Pool* pool = nullptr;
    if (!pool || pool->threads_ != threads || pool->process_ != getpid()) pool = new Pool(threads);
    return *pool;
  }
  void run(const std::function<void(int)>& job) {
    job_ = &job;
    begin_.wait();
    end_.wait();
  }

 private:
  explicit Pool(int threads) : threads_(threads), process_(getpid()), begin_(threads + 1), end_(threads + 1) {
    for (int t = 0; t < threads; ++t) {
      std::thread([this, t] {
        for (;;) {
          begin_.wait();
          (*job_)(t);
          end_.wait();
        }
      }).detach();
    }
  }

  const int threads_;
  const pid_t process_;
  Barrier begin_, end_;
  const std::function<void(int)>* job_ = nullptr;
};

// Runs body() in `blocks` blocks of `threads` threads that share so many bytes.
template <class Body>
void run(int64_t blocks, int threads, int64_t bytes, const Body& body) {
  std::lock_guard<std::mutex> lock(launching);
  Block now(threads, bytes);
  block = &now;
  Pool::of(threads).run([&](int t) {
    threadIdx = {static_cast<unsigned>(t)};
    blockDim = {static_cast<unsigned>(threads)};
    gridDim = {static_cast<unsigned>(blocks)};
    Block::turns = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      blockIdx = {static_cast<unsigned>(b)};
      if (bytes) {
        if (t == 0) std::memset(now.shared, 0xff, bytes);  // NaN: nothing is there before it is written
        now.meet(starting);
      }
      const unsigned before = Block::turns;
      body();
      // Threads that did not meet share nothing, and need not wait for each other here.
      if (bytes || Block::turns != before) now.meet(ending);
    }
    now.meet(ending);
  });
  block = nullptr;
}

template <class T>
T shown_by(T value, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(block->at[0]));
  const unsigned first = threadIdx.x / warp * warp;
  Barrier& own = *block->warps[first / warp];
  std::memcpy(&block->at[threadIdx.x], &value, sizeof(T));
  own.wait();
  if (first + lane < blockDim.x) std::memcpy(&value, &block->at[first + lane], sizeof(T));
  own.wait();
  return value;
}

}  // namespace host

inline void __syncthreads() {
  host::block->meet(host::syncing);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return host::shown_by(value, threadIdx.x % host::warp ^ static_cast<unsigned>(lanes));
}

// The result lies in memory in between: compilers contract a product and a sum to one operation.
template <class T>
T rounded(T value) {
  volatile T result = value;
  return result;
}
inline float __fmul_rn(float a, float b) {
  return rounded(a * b);
}
inline float __fadd_rn(float a, float b) {
  return rounded(a + b);
}
inline double __dmul_rn(double a, double b) {
  return rounded(a * b);
}
inline double __dadd_rn(double a, double b) {
  return rounded(a + b);
}

// Of float and double.
template <class T>
T atomicAdd(T* to, T value) {
  T before, after;
  __atomic_load(to, &before, __ATOMIC_RELAXED);
  do {
    after = before + value;
  } while (!__atomic_compare_exchange(to, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

}  // namespace fastgen
