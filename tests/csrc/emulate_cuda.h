// Enough of CUDA to run simple kernels on the host: one host thread per CUDA thread, one block after the other.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;
inline Index gridDim;
inline std::barrier<>* emulated_barrier;

inline void __syncthreads() { emulated_barrier->arrive_and_wait(); }

constexpr int cudaSuccess = 0;
inline int cudaGetLastError() { return cudaSuccess; }

template <class Kernel>
void emulate(int64_t blocks, int threads, Kernel kernel) {
  gridDim.x = static_cast<unsigned>(blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    std::barrier<> barrier(threads);
    emulated_barrier = &barrier;
    std::vector<std::jthread> running;
    for (int thread = 0; thread < threads; ++thread) {
      running.emplace_back([&, thread] {
        threadIdx.x = static_cast<unsigned>(thread);
        blockIdx.x = static_cast<unsigned>(block);
        kernel();
        barrier.arrive_and_drop();
      });
    }
  }
}

#define MEDDIFF_LAUNCH(kernel, grid, threads, stream, ...) \
  (static_cast<void>(stream), emulate(grid, threads, [&] { kernel(__VA_ARGS__); }))
#define MEDDIFF_MAX_GRID 2  // so that small problems go round the grid-stride loop
