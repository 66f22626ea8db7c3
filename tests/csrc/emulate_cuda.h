// Enough of CUDA to run kernels on the host: one host thread per CUDA thread, one block after the other. Dynamic shared
// memory is filled with NaNs before each block, and operations of a whole warp exchange their operands at a barrier.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;
inline Index gridDim, blockDim;

struct EmulatedWarp {
  explicit EmulatedWarp(int lanes) : barrier(lanes) {}

  std::barrier<> barrier;
  alignas(16) unsigned char slots[2][32 * 128];
};
struct EmulatedCopy {
  unsigned char* to;
  const void* from;  // null: zeros
};

inline std::barrier<>* emulated_barrier;
inline std::vector<std::unique_ptr<EmulatedWarp>> emulated_warps;
inline unsigned char* emulated_shared;
inline int emulated_largest_shared_memory = 227 << 10;
inline thread_local unsigned emulated_exchanges;
inline thread_local std::vector<EmulatedCopy> emulated_copies;  // not yet made
inline thread_local std::vector<size_t> emulated_groups;        // where each group of them ends

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

constexpr int cudaSuccess = 0;
inline int cudaGetLastError() { return cudaSuccess; }

template <class Kernel>
void emulate(int64_t blocks, int threads, Kernel kernel, int shared_bytes = 0) {
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  for (int64_t block = 0; block < blocks; ++block) {
    std::barrier<> barrier(threads);
    emulated_barrier = &barrier;
    emulated_warps.clear();
    for (int first = 0; first < threads; first += 32)
      emulated_warps.push_back(std::make_unique<EmulatedWarp>(threads - first < 32 ? threads - first : 32));
    const std::unique_ptr<unsigned char[]> shared(new unsigned char[shared_bytes]);
    std::memset(shared.get(), 0xff, shared_bytes);
    emulated_shared = shared.get();
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
