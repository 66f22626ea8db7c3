// Enough of CUDA to run kernels on the host: one host thread per CUDA thread, one block after the other. Dynamic shared
// memory is filled with NaNs before each block, and operations of a whole warp exchange their operands at a barrier.
#pragma once

#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;
inline Index gridDim, blockDim;

// std::barrier of libstdc++ waits through atomics that all barriers of the program share; to ThreadSanitizer they order
// threads that no barrier of ours has ordered, and a missing one goes unseen.
class EmulatedBarrier {
 public:
  explicit EmulatedBarrier(int threads) : expected_(threads) {}

  void arrive_and_wait() {
    std::unique_lock lock(mutex_);
    const unsigned phase = phase_;
    if (++arrived_ == expected_) {
      complete();
    } else {
      changed_.wait(lock, [&] { return phase_ != phase; });
    }
  }

  void arrive_and_drop() {
    const std::lock_guard lock(mutex_);
    if (arrived_ == --expected_ && arrived_ > 0) complete();
  }

 private:
  void complete() {
    arrived_ = 0;
    ++phase_;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  int expected_, arrived_ = 0;
  unsigned phase_ = 0;
};

struct EmulatedWarp {
  explicit EmulatedWarp(int lanes) : barrier(lanes) {}

  EmulatedBarrier barrier;
  alignas(16) unsigned char slots[2][32 * 128];
};
struct EmulatedCopy {
  unsigned char* to;
  const void* from;  // null: zeros
};
struct EmulatedProduct {
  float* d;                         // the accumulators
  std::function<void(float*)> add;  // to what they hold
};

inline EmulatedBarrier* emulated_barrier;
inline std::vector<std::unique_ptr<EmulatedWarp>> emulated_warps;
inline unsigned char* emulated_shared;
inline unsigned char* emulated_async_shared;  // the same memory as the async proxy sees it
inline int emulated_largest_shared_memory = 227 << 10;
inline thread_local unsigned emulated_exchanges;
inline thread_local std::vector<EmulatedCopy> emulated_copies;  // not yet made
inline thread_local std::vector<size_t> emulated_groups;        // where each group of them ends
inline thread_local std::vector<unsigned char*> emulated_unfenced;  // 16 bytes each, written to emulated_shared

inline thread_local std::vector<EmulatedProduct> emulated_products;  // not yet computed
inline thread_local std::vector<size_t> emulated_product_groups;     // where each group of them ends
inline thread_local std::map<float*, std::vector<float>> emulated_accumulators;  // what those of products hold
inline thread_local uint64_t emulated_operands;  // a hash of those of all products
inline thread_local bool emulated_fenced;  // wgmma.fence since the last wait

inline void __syncthreads() { emulated_barrier->arrive_and_wait(); }

// What every lane of the warp passed. The two slots take turns: nobody writes to the first again before all lanes have
// come to the exchange in the second, and so have read the first.
template <class T>
const T* emulated_exchange(const T& mine) {
  static_assert(sizeof(T) <= 128);
  EmulatedWarp& warp = *emulated_warps[threadIdx.x / 32];
  T* slots = reinterpret_cast<T*>(warp.slots[emulated_exchanges++ % 2]);
  std::memcpy(slots + threadIdx.x % 32, &mine, sizeof mine);
  warp.barrier.arrive_and_wait();
  return slots;
}

constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline int cudaGetLastError() { return cudaSuccess; }

template <class Kernel>
void emulate(int64_t blocks, int threads, Kernel kernel, int shared_bytes = 0) {
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  for (int64_t block = 0; block < blocks; ++block) {
    EmulatedBarrier barrier(threads);
    emulated_barrier = &barrier;
    emulated_warps.clear();
    for (int first = 0; first < threads; first += 32)
      emulated_warps.push_back(std::make_unique<EmulatedWarp>(threads - first < 32 ? threads - first : 32));
    const std::unique_ptr<unsigned char[]> shared(new unsigned char[shared_bytes]);
    const std::unique_ptr<unsigned char[]> async(new unsigned char[shared_bytes]);
    std::memset(shared.get(), 0xff, shared_bytes);
    std::memset(async.get(), 0xff, shared_bytes);
    emulated_shared = shared.get();
    emulated_async_shared = async.get();
    std::vector<std::jthread> running;
    for (int thread = 0; thread < threads; ++thread) {
      running.emplace_back([&, thread] {
        threadIdx.x = static_cast<unsigned>(thread);
        blockIdx.x = static_cast<unsigned>(block);
        kernel();
        emulated_warps[thread / 32]->barrier.arrive_and_drop();
        barrier.arrive_and_drop();
      });
    }
  }
}

#define MEDDIFF_LAUNCH(kernel, grid, threads, stream, ...) \
  (static_cast<void>(stream), emulate(grid, threads, [&] { kernel(__VA_ARGS__); }))
#define MEDDIFF_MAX_GRID 2  // so that small problems go round the grid-stride loop
